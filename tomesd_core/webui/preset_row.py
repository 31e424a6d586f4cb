"""The panel's row of presets: choose, save, delete, reload."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr
from gradio.context import Context
from modules import ui_components

from ..settings import PANEL_FIELDS, MergeSettings
from . import host, presets
from .arguments import shown

BUTTONS = {
    "save": ("💾", "Save the settings under the name in the preset field"),
    "delete": ("🗑️", "Delete the preset"),
    "reload": ("🔄", "Reload presets"),
}


def build(elem_id: Callable[[str], str], fields: Sequence[Any]) -> Any:
    """Build the row, which sets and saves `fields`, the panel's fields; return its dropdown."""
    with ui_components.FormRow(elem_classes=["tome-presets"]):
        preset = gr.Dropdown(
            choices=list(presets.read()[0]),
            label="Preset",
            value=presets.named(MergeSettings()),
            allow_custom_value=True,
            elem_id=elem_id("preset"),
        )
        buttons = {
            name: ui_components.ToolButton(sign, elem_id=elem_id(f"preset_{name}"), tooltip=tip)
            for name, (sign, tip) in BUTTONS.items()
        }
    message = gr.HTML(elem_id=elem_id("preset_message"), elem_classes=["tome-message"])
    for component in (preset, *buttons.values(), message):
        component.do_not_save_to_config = True
    connect, outputs = partial(host.listen, what="this button"), [message, preset]
    connect(preset.select, _choose, [preset], [message, *fields])
    connect(buttons["save"].click, _save, [preset, *fields], outputs)
    connect(buttons["delete"].click, _delete, [preset], outputs)
    # The page lists the presets of the time it was built.
    connect(buttons["reload"].click, _reload, [], outputs)
    connect(Context.root_block.load, _load, [], outputs)
    return preset


def _choose(name: str) -> list[Any]:
    values = presets.get(name).panel_values.items()
    return ["", *(shown(field, value) for field, value in values)]


def _save(name: str, *values: Any) -> list[Any]:
    kept_as = presets.save(name, MergeSettings(**dict(zip(PANEL_FIELDS, values, strict=True))))
    return _reload(f"Saved as {kept_as!r}.", value=kept_as)


def _delete(name: str) -> list[Any]:
    presets.delete(name)
    return _reload(f"Deleted {name!r}.", value=None)


def _reload(line: str = "", **update: Any) -> list[Any]:
    """A message, including messages about the file, and the updated list of presets."""
    usable, messages = presets.read()
    text = "<br>".join(html.escape(part) for part in (line, *messages) if part)
    return [text, gr.update(choices=list(usable), **update)]


def _load() -> list[Any]:
    # Its answer may come after a button's, so it must not clear that button's message.
    text, presets_there = _reload()
    return [text or gr.update(), presets_there]
