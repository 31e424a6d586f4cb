"""The extension without a WebUI: a miniature host, a tiny model, and samplers. Never imported inside WebUI."""
