"""The laboratory, which WebUI imports nothing of: a stand-in for WebUI, the demo and the benchmark."""
