"""The panel under the prompt, built from the field list."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.context import Context
from modules import ui_components

from ..settings import PANEL_FIELDS, Setting, SettingsError
from . import generation, host, presets, preview
from .arguments import CONTROLS, ENABLED, MAP_FIELDS, read_arguments, useful_fields
from .log import failed
from .measure_row import MeasureRow
from .preset_row import PresetRow
from .tab import TabValues

MAIN_ROWS = (("ratio", "late_ratio"), ("schedule", "switch_at"), ("max_downsample", "min_tokens"))
MORE_ROWS = (("method",), ("reuse_steps", "full_steps"), ("apply_to",))
"""The panel's fields by row; the second list is folded away."""


def build(
    tab: str, elem_id: Callable[[str], str], tab_values: TabValues | None = None
) -> dict[str, Any]:
    """Build the panel; return the script's controls by field name, in the order of its arguments.

    `tab` is `txt2img` or `img2img`; `elem_id` names an element of the script, and `tab_values`
    follow the tab's components. Raises nothing: if the panel fails, its controls are built bare,
    and if these fail, none are.
    """
    children = Context.block.children if Context.block is not None else []
    before = len(children)
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "the panel": lambda: _whole_panel(tab, elem_id, tab_values or TabValues()),
        "a panel without preview and presets": lambda: _bare_controls(elem_id),
    }
    for what, make in ways.items():
        try:
            return make()
        except Exception as error:
            failed(f"making {what}", error)
            del children[before:]
    return {}


def _whole_panel(tab: str, elem_id: Callable[[str], str], tab_values: TabValues) -> dict[str, Any]:
    useful = useful_fields(PANEL_FIELDS["schedule"].default)
    fields: dict[str, Any] = {}

    def rows(*names: tuple[str, ...]) -> None:
        for row in names:
            with ui_components.FormRow():
                for name in row:
                    fields[name] = _control(CONTROLS[name], elem_id(name), visible=name in useful)

    with (
        ui_components.InputAccordion(
            ENABLED.default, label=ENABLED.label, elem_id=elem_id("enabled")
        ) as enabled,
        gr.Column(elem_classes=["tome-panel"]),
    ):
        chart = gr.HTML(elem_id=elem_id("preview"), elem_classes=["tome-preview"])
        preset_row = PresetRow(elem_id)
        rows(*MAIN_ROWS)
        measure_row = MeasureRow(tab, elem_id)
        with gr.Accordion("More", open=False, elem_id=elem_id("more")) as more:
            rows(*MORE_ROWS, tuple(MAP_FIELDS))
        # The page's script presses it after a change, once no slider is moving.
        refresh = gr.Button("Refresh", visible=False, elem_id=elem_id("refresh"))
        numbers = tab_values.build(tab, elem_id)
    for component in (chart, refresh, more):
        component.do_not_save_to_config = True
    fields["enabled"] = enabled
    controls = {name: fields[name] for name in CONTROLS}
    settings = [fields[name] for name in PANEL_FIELDS]
    sizes = [numbers[name] for name in ("width", "height", "steps")]

    def preview_of_tab(*values: Any) -> str:
        return _preview(tab, *values)

    preview_made = host.listen(refresh.click, preview_of_tab, [*sizes, *controls.values()], [chart])
    host.listen(preview_made.then, outputs=[preset_row.preset], js=f"() => toMeAnswered('{tab}')")
    for event in (Context.root_block.load, *(control.change for control in controls.values())):
        host.listen(event, js=f"() => toMeChanged('{tab}')")
    # On load too: `ui-config.json` may have another default schedule.
    for event in (Context.root_block.load, controls["schedule"].change):
        host.listen(event, _visibility, [controls["schedule"]], settings)
    preset_row.connect(settings)
    measure_row.connect(numbers, list(controls.values()))
    return controls


def _bare_controls(elem_id: Callable[[str], str]) -> dict[str, Any]:
    return {name: _control(setting, elem_id(name)) for name, setting in CONTROLS.items()}


def _control(setting: Setting, elem_id: str, visible: bool = True) -> Any:
    common = {
        "label": setting.label,
        "elem_id": elem_id,
        "visible": visible,
        "tooltip": setting.help,
    }
    if setting.kind == "choice":
        return gr.Radio(choices=[*map(str, setting.choices)], value=str(setting.default), **common)
    if setting.kind == "flag":
        return gr.Checkbox(value=setting.default, **common)
    # WebUI casts API values by the type of the control's value: a float lets every number pass.
    value, limits = float(setting.default), {"minimum": setting.minimum, "maximum": setting.maximum}
    return gr.Slider(value=value, step=setting.step, **limits, **common)


def _visibility(schedule: str) -> list[dict[str, Any]]:
    """Hide controls without effect."""
    useful = useful_fields(schedule)
    return [gr.update(visible=name in useful) for name in PANEL_FIELDS]


def _preview(tab: str, width: Any, height: Any, steps: Any, *args: Any) -> str:
    """The preview's HTML, with the panel's title and the matching preset for the page's script."""
    name = None
    try:
        settings = read_arguments([True, *args[1:]]).settings
        name, steps = presets.named(settings), min(max(int(steps), 1), 150)
        settings = settings.in_steps(steps)
        line = preview.of_loaded_model(settings, width, height, has_hires_pass=tab == "txt2img")
        chart = preview.chart(settings, steps)
        title = preview.title(settings if args[0] else None)
    except (SettingsError, TypeError, ValueError, OverflowError) as error:
        line, chart, title = str(error), "", preview.title(None)
    what_for = presets.BUILT_IN.get(str(name), ("", ""))[1]
    lines = [f"<p>{html.escape(text)}</p>" for text in (line, what_for) if text]
    if summary := generation.last.summary:
        lines.append(f'<p class="tome-last">Last: {html.escape(summary)}</p>')
    data = {"title": title, "preset": name or "", "presets": json.dumps([*presets.read()[0]])}
    attributes = "".join(f' data-{key}="{html.escape(value)}"' for key, value in data.items())
    return f"<div{attributes}>{chart}{''.join(lines)}</div>"
