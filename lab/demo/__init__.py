"""The extension without a WebUI: a page, a tiny model, and samplers. Never imported inside WebUI."""
