"""Stands in for `modules.gradio_extensons` (its own spelling): what WebUI changes in gradio 3.41.2.

Components take a `tooltip`, get a class `gradio-<kind>`, and announce themselves to scripts. The host's own: the page
asks no other server for fonts and scripts.
"""

from __future__ import annotations

import re

import gradio as gr
from modules import script_callbacks, scripts


def _announced(original_init):
    """A component's `__init__`, with the callbacks around it."""

    def init(self, *args, **kwargs):
        self.webui_tooltip = kwargs.pop("tooltip", None)
        if scripts.scripts_current is not None:
            scripts.scripts_current.before_component(self, **kwargs)
        script_callbacks.before_component_callback(self, **kwargs)
        original_init(self, *args, **kwargs)
        self.elem_classes = [f"gradio-{self.get_block_name()}", *(self.elem_classes or [])]
        script_callbacks.after_component_callback(self, **kwargs)
        if scripts.scripts_current is not None:
            scripts.scripts_current.after_component(self, **kwargs)

    return init


def _with_tooltip(original_get_config):
    def get_config(self):
        config = original_get_config(self)
        config.pop("example_inputs", None)
        if getattr(self, "webui_tooltip", None):
            config["webui_tooltip"] = self.webui_tooltip
        return config

    return get_config


def _without_examples(original_get_config_file):
    def get_config_file(self, *args, **kwargs):
        config = original_get_config_file(self, *args, **kwargs)
        for component in config["components"]:
            if "example_inputs" in component:
                component["example_inputs"] = {"serialized": []}
        return config

    return get_config_file


def _local(body: bytes) -> bytes:
    """The page without its links to other servers."""
    body = re.sub(rb'<link[^>]*href="https?://[^>]*>', b"", body)
    return re.sub(rb'<script[^>]*src="https?://[^>]*></script>', b"", body)


gr.components.IOComponent.__init__ = _announced(gr.components.IOComponent.__init__)
gr.blocks.BlockContext.__init__ = _announced(gr.blocks.BlockContext.__init__)
gr.blocks.Block.get_config = _with_tooltip(gr.blocks.Block.get_config)
gr.blocks.Blocks.get_config_file = _without_examples(gr.blocks.Blocks.get_config_file)

_template_response = gr.routes.templates.TemplateResponse


def reload_javascript(head: str) -> None:
    """Puts `head` (HTML) into the page's head from now on."""

    def template_response(*args, **kwargs):
        response = _template_response(*args, **kwargs)
        response.body = _local(response.body).replace(b"</head>", head.encode() + b"</head>")
        response.init_headers()
        return response

    gr.routes.templates.TemplateResponse = template_response
