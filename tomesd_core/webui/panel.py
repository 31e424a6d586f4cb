"""The panel under the prompt, built from the field list."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from gradio.context import Context
from modules import ui_components

from ..settings import PANEL_FIELDS, Setting, SettingsError
from . import generation, host, measure, preset_row, presets, preview
from .arguments import CONTROLS, ENABLED, MAP_FIELDS, read_arguments, useful_fields
from .log import failed

MAIN_ROWS = (("ratio", "late_ratio"), ("schedule", "switch_at"), ("max_downsample", "min_tokens"))
MORE_ROWS = (("method",), ("reuse_steps", "full_steps"), ("apply_to",))
"""The panel's fields by row; the second list is folded away."""
MEASURE_TIP = (
    "Time steps with and without merging, with these settings at this tab's size: ten seconds or "
    "more per size, at least eleven steps"
)
FOLLOWED = ("width", "height", "steps", "batch_size", "cfg_scale")
"""The tab's components whose values a request has."""


def follow(component: Any, tab: str) -> None:
    """Tell the page's script the value of a component that was created, if it is in a request.

    Users can order the page, so it may be created before the panel or after it.
    """
    name = str(getattr(component, "elem_id", "")).removeprefix(f"{tab}_")
    if name in FOLLOWED:
        js = f"(value) => toMeFollow('{tab}', '{name}', value)"
        # On load too: hosts set the defaults of `ui-config.json` after the page is built.
        for event in (Context.root_block.load, component.change):
            host.listen(event, inputs=[component], js=js)


def build(tab: str, elem_id: Callable[[str], str]) -> dict[str, Any]:
    """Build the panel; return the script's controls by field name, in the order of its arguments.

    `tab` is `txt2img` or `img2img`; `elem_id` names an element of the script. Raises nothing: if
    the panel fails, its controls are built bare, and if these fail, none are.
    """
    children = Context.block.children if Context.block is not None else []
    before = len(children)
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "the panel": lambda: _whole_panel(tab, elem_id),
        "a panel without preview and presets": lambda: _bare_controls(elem_id),
    }
    for what, make in ways.items():
        try:
            return make()
        except Exception as error:
            failed(f"making {what}", error)
            del children[before:]
    return {}


def _whole_panel(tab: str, elem_id: Callable[[str], str]) -> dict[str, Any]:
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
        # Filled below, since they need every field.
        preset_place = gr.Column()
        rows(*MAIN_ROWS)
        measure_place = gr.Column()
        with gr.Accordion("More", open=False, elem_id=elem_id("more")) as more:
            rows(*MORE_ROWS, tuple(MAP_FIELDS))
        # The page's script presses it after a change, once no slider is moving.
        refresh = gr.Button("Refresh", visible=False, elem_id=elem_id("refresh"))
        request = gr.Textbox("{}", visible=False, elem_id=elem_id("request"))
        fields["enabled"] = enabled
        controls = {name: fields[name] for name in CONTROLS}
        settings = [fields[name] for name in PANEL_FIELDS]
        with preset_place:
            preset = preset_row.build(elem_id, settings)
        with measure_place:
            measure_row(tab, elem_id, request, list(controls.values()))
    for component in (chart, refresh, request, more):
        component.do_not_save_to_config = True

    def preview_of_tab(*values: Any) -> str:
        return _preview(tab, *values)

    inputs, ask = [request, *controls.values()], f"(...given) => toMeAsking('{tab}', given)"
    preview_made = host.listen(refresh.click, preview_of_tab, inputs, [chart], ask)
    host.listen(preview_made.then, outputs=[preset], js=f"() => toMeAnswered('{tab}')")
    for event in (Context.root_block.load, *(control.change for control in controls.values())):
        host.listen(event, js=f"() => toMeChanged('{tab}')")
    # On load too: `ui-config.json` may have another default schedule.
    for event in (Context.root_block.load, controls["schedule"].change):
        host.listen(event, _visibility, [controls["schedule"]], settings)
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


def measure_row(
    tab: str, elem_id: Callable[[str], str], request: Any, controls: Sequence[Any]
) -> None:
    """Build the row; it measures the settings of `controls`, with the tab's values in `request`."""
    with ui_components.FormRow():
        button = gr.Button("Measure", elem_id=elem_id("measure"), tooltip=MEASURE_TIP)
    lines = gr.HTML(elem_id=elem_id("measure_lines"), elem_classes=["tome-message"])
    # The page's script presses these and supplies the task and size.
    start, stop = (
        gr.Button(name, visible=False, elem_id=elem_id(f"measure_{name}"))
        for name in ("start", "stop")
    )
    for component in (button, lines, start, stop):
        component.do_not_save_to_config = True
    host.listen(button.click, js=f"() => toMeMeasure('{tab}')")
    inputs, ask = [request, *controls], f"(...given) => toMeMeasuring('{tab}', given)"
    end = host.listen(start.click, _measure, inputs, [lines], ask, queue=None, what="measuring")
    host.listen(end.then, js=f"() => toMeMeasured('{tab}')")
    host.listen(stop.click, measure.stop, [request], js=f"() => toMeMeasuredTask('{tab}')")


def _measure(request_json: str, *values: Any) -> str:
    request = json.loads(request_json)
    task = request.pop("task", "")
    settings = dict(zip(CONTROLS, values, strict=True))
    results = measure.measure({**request, "settings": settings}, task)
    return "<br>".join(html.escape(result.line) for result in results)


def _visibility(schedule: str) -> list[dict[str, Any]]:
    """Hide controls without effect."""
    useful = useful_fields(schedule)
    return [gr.update(visible=name in useful) for name in PANEL_FIELDS]


def _preview(tab: str, request_json: str, *args: Any) -> str:
    """The preview's HTML, with the panel's title and the matching preset for the page's script."""
    request, name = json.loads(request_json), None
    width, height, steps = (
        request.get(field, measure.FIELDS[field].default) for field in ("width", "height", "steps")
    )
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
