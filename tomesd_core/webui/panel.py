"""The panel under the prompt, made from the field list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion

from ..settings import Setting
from .arguments import ENABLED, PANEL_FIELDS


def build(elem_id: Callable[[str], str]) -> dict[str, Any]:
    """Makes the controls, by field name, in the order of the script's arguments. `elem_id` names an element."""
    controls: dict[str, Any] = {}
    with InputAccordion(ENABLED.default, label=ENABLED.label, elem_id=elem_id("enabled")) as controls["enabled"]:
        rows = [("ratio", "late_ratio"), ("schedule", "switch_at"), ("max_downsample", "min_tokens"), ("apply_to",)]
        rows.append(tuple(name for name in PANEL_FIELDS if not any(name in row for row in rows)))
        for row in rows:
            with gr.Row():
                for name in row:
                    controls[name] = _control(PANEL_FIELDS[name], elem_id(name))
    return {name: controls[name] for name in ("enabled", *PANEL_FIELDS)}


def _control(setting: Setting, elem_id: str) -> Any:
    common = {"value": setting.default, "label": setting.label, "elem_id": elem_id}
    if setting.kind == "choice":
        return gr.Radio(choices=list(setting.choices), **common)
    if setting.kind == "flag":
        return gr.Checkbox(**common)
    # WebUI casts what the API sends by the type of a control's value: a float lets every number pass.
    common["value"] = float(setting.default)
    return gr.Slider(minimum=setting.minimum, maximum=setting.maximum, step=setting.step, **common)
