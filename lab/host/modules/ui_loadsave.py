"""Stands in for `modules.ui_loadsave`: `ui-config.json`, where controls' defaults are kept by label and win."""

from __future__ import annotations

import json
import os

import gradio as gr
from modules.ui_components import InputAccordion

FIELDS = {
    gr.Slider: ("value", "minimum", "maximum", "step"),
    gr.Radio: ("value",),
    gr.Checkbox: ("value",),
    gr.Textbox: ("value",),
    gr.Number: ("value",),
    gr.Dropdown: ("value",),
    InputAccordion: ("value",),
}


class UiLoadsave:
    """Reads the file, applies it to controls, and writes what is new."""

    def __init__(self, filename):
        self.filename = filename
        self.ui_settings = {}
        if os.path.exists(filename):
            with open(filename, encoding="utf8") as file:
                self.ui_settings = json.load(file)

    def add_component(self, path, x):
        """Applies the kept fields of one control, or keeps its present ones."""
        if getattr(x, "do_not_save_to_config", False):
            return
        source = getattr(x, "custom_script_source", None)
        prefix = f"customscript/{source}/{path}" if source else path
        for field in FIELDS.get(type(x), ()):
            saved = self.ui_settings.setdefault(f"{prefix}/{field}", getattr(x, field))
            choices = [c[0] if isinstance(c, tuple) else c for c in getattr(x, "choices", None) or []]
            if field != "value" or not choices or isinstance(saved, list) or saved in choices:
                setattr(x, field, saved)
            if isinstance(x, InputAccordion):
                x.accordion.open = bool(x.value)

    def add_block(self, x, path=""):
        """Applies the kept fields of everything inside a block."""
        for child in getattr(x, "children", []):
            self.add_block(child, path)
        if getattr(x, "label", None) is not None:
            self.add_component(f"{path}/{x.label}", x)

    def dump_defaults(self):
        """Writes the file."""
        with open(self.filename, "w", encoding="utf8") as file:
            json.dump(self.ui_settings, file, indent=4, ensure_ascii=False)
