"""Stand-in for WebUI, demo and benchmark; the extension imports nothing of it."""
