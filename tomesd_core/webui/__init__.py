"""What WebUI sees: the only modules of the package that import `modules.*` and gradio."""
