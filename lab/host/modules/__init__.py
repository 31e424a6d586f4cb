"""What the extension imports of WebUI 1.10.1, and what runs a generation, under WebUI's names."""
