"""The extension without WebUI: a page, a tiny model, and samplers. WebUI never imports it."""
