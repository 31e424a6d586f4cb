"""What WebUI sees: the only part of the package that imports `modules.*` and gradio."""
