"""WebUI 1.10.1's modules that the extension imports, and those that run a generation."""
