"""What WebUI sees. The only modules that import `modules.*` and gradio, besides the demo's."""
