"""Stands in for `modules.ui_components`, and for WebUI's changes to gradio 3.41.2.

Its components take a `tooltip` and get a class `gradio-<kind>`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from modules import scripts


def _with_tooltip(original_init: Callable) -> Callable:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        self.webui_tooltip = kwargs.pop("tooltip", None)
        original_init(self, *args, **kwargs)
        self.elem_classes = [f"gradio-{self.get_block_name()}", *(self.elem_classes or [])]
        if scripts.scripts_current is not None:
            scripts.scripts_current.after_component(self)

    return init


def _showing_tooltip(original_get_config: Callable) -> Callable:
    return lambda self: {
        **original_get_config(self),
        "webui_tooltip": getattr(self, "webui_tooltip", None),
    }


gr.components.IOComponent.__init__ = _with_tooltip(gr.components.IOComponent.__init__)
gr.blocks.Block.get_config = _showing_tooltip(gr.blocks.Block.get_config)


def _form(self: Any) -> type:
    """Parent of a component outside of a form: gradio's rounded form."""
    return gr.components.Form


gr.Dropdown.get_expected_parent = _form


class ToolButton(gr.Button):
    """A small button, one symbol wide."""

    is_template = True  # gradio then treats it as its base class.
    get_expected_parent = _form

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, elem_classes=["tool", *kwargs.pop("elem_classes", [])], **kwargs)


class FormRow(gr.Row):
    """A row inside a form."""

    is_template = True
    get_expected_parent = _form


class InputAccordion(gr.Checkbox):
    """An accordion that is a toggle: a hidden checkbox with the value, and the accordion."""

    is_template = True

    def __init__(self, value: bool, elem_id: str, **kwargs: Any) -> None:
        super().__init__(value, **{**kwargs, "elem_id": f"{elem_id}-checkbox", "visible": False})
        self.change(
            None, _js=f"(checked) => inputAccordionChecked('{elem_id}', checked)", inputs=[self]
        )
        self.accordion = gr.Accordion(
            elem_id=elem_id, elem_classes=["input-accordion"], open=value, **kwargs
        )

    def __enter__(self) -> InputAccordion:
        self.accordion.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.accordion.__exit__(*exc)
