"""The panel under the prompt, made from the field list."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context
from modules import devices, processing
from modules.ui_components import FormRow, InputAccordion, ToolButton

from ..settings import PANEL_FIELDS, MergeSettings, Setting, SettingsError
from . import generation, presets, preview
from .arguments import ENABLED, MAP_FIELDS, panel_values, read_arguments, shown_fields
from .model import loaded_layers


def build(tab: str, elem_id: Callable[[str], str]) -> dict[str, Any]:
    """Makes the panel; gives the script's controls by field name, in the order of its arguments.

    `tab` is `txt2img` or `img2img`; `elem_id` names an element of the script.
    """
    controls: dict[str, Any] = {}
    shown_at_first = shown_fields(PANEL_FIELDS["schedule"].default)
    with (
        InputAccordion(ENABLED.default, label=ENABLED.label, elem_id=elem_id("enabled")) as enabled,
        gr.Column(elem_classes=["tome-panel"]),
    ):
        controls["enabled"] = enabled
        shown = gr.HTML(elem_id=elem_id("preview"), elem_classes=["tome-preview"])
        choose = _preset_row(elem_id)
        names = list(PANEL_FIELDS)
        for first in range(0, len(names), 2):
            with FormRow():
                for name in names[first : first + 2]:
                    controls[name] = _control(PANEL_FIELDS[name], elem_id(name), visible=name in shown_at_first)
        with FormRow():
            for name, setting in MAP_FIELDS.items():
                controls[name] = _control(setting, elem_id(name))
        # Pressed by the page's script when something has changed and no slider is moving. The first three inputs are
        # read off the page by it: width, height and steps belong to the tab.
        refresh = gr.Button("Refresh", visible=False, elem_id=elem_id("refresh"))
        sizes = [gr.Number(value, visible=False, elem_id=elem_id(name)) for name, value in _TAB.items()]
    controls = {name: controls[name] for name in ("enabled", *PANEL_FIELDS, *MAP_FIELDS)}
    fields = [controls[name] for name in PANEL_FIELDS]
    for component in (*sizes, shown, refresh):
        component.do_not_save_to_config = True
    refresh.click(
        _preview,
        _js=f"(...given) => toMeTabSize('{tab}', given)",
        inputs=[*sizes, *controls.values()],
        outputs=[shown],
        show_progress=False,
        queue=False,
    ).then(None, _js=f"() => toMeAnswered('{tab}')")
    for event in (Context.root_block.load, *(control.change for control in controls.values())):
        event(None, _js=f"() => toMeChanged('{tab}')")
    controls["schedule"].change(
        _visibility, inputs=[controls["schedule"]], outputs=fields, show_progress=False, queue=False
    )
    choose(fields)
    return controls


_TAB = {"width": 512, "height": 512, "steps": 20}


def _control(setting: Setting, elem_id: str, visible: bool = True) -> Any:
    common = {"value": setting.default, "label": setting.label, "elem_id": elem_id, "visible": visible}
    common["tooltip"] = setting.help
    if setting.kind == "choice":
        return gr.Radio(choices=list(setting.choices), **common)
    # WebUI casts what the API sends by the type of a control's value: a float lets every number pass.
    common["value"] = float(setting.default)
    return gr.Slider(minimum=setting.minimum, maximum=setting.maximum, step=setting.step, **common)


def _visibility(schedule: str) -> list[dict[str, Any]]:
    """Hides what has no effect."""
    shown = shown_fields(schedule)
    return [gr.update(visible=name in shown) for name in PANEL_FIELDS]


def _preview(width: Any, height: Any, steps: Any, *args: Any) -> str:
    """The preview's HTML. The page's script takes the panel's title from it."""
    try:
        on, settings = bool(args[0]), read_arguments([True, *args[1:]])
        factor = processing.opt_f
        latent = int(height) // factor, int(width) // factor
        line = preview.describe(settings, loaded_layers(), latent, devices.device.type)
        chart = preview.chart(preview.ratios_over_steps(settings, min(max(int(steps), 1), 150)))
        title = preview.title(settings if on else None)
    except (SettingsError, TypeError, ValueError, OverflowError) as error:
        line, chart, title = str(error), "", "ToMe"
    last = generation.last_summary()
    done = f'<p class="tome-last">Last: {_text(last)}</p>' if last else ""
    return f'<div data-title="{_text(title)}">{chart}<p>{_text(line)}</p>{done}</div>'


def _preset_row(elem_id: Callable[[str], str]) -> Callable[[list[Any]], None]:
    """The row of presets; what it gives connects it to the panel's fields, once those are there."""
    with FormRow(elem_classes=["tome-presets"]):
        preset = gr.Dropdown(
            choices=list(presets.read()[0]),
            label="Preset",
            value=None,
            allow_custom_value=True,
            elem_id=elem_id("preset"),
        )
        save, delete, reload, export = (
            ToolButton(sign, elem_id=elem_id(f"preset_{name}"), tooltip=tip)
            for sign, name, tip in (
                ("💾", "save", "Save the settings under the name in the preset field"),
                ("🗑️", "delete", "Delete the preset"),
                ("🔄", "reload", "Read the presets again"),
                ("📤", "export", "Export your presets to a file"),
            )
        )
        upload = gr.UploadButton(
            "📥",
            elem_id=elem_id("preset_import"),
            elem_classes=["gradio-button", "tool"],
            tooltip="Import presets from a file",
            file_types=[".json"],
            type="bytes",
        )
    message = gr.HTML(elem_id=elem_id("preset_message"), elem_classes=["tome-message"])
    exported = gr.File(label="Your presets", visible=False, interactive=False, elem_id=elem_id("preset_file"))
    for component in (preset, save, delete, reload, export, upload, message, exported):
        component.do_not_save_to_config = True

    def connect(fields: list[Any]) -> None:
        quiet = {"show_progress": False, "queue": False}
        preset.select(_choose, inputs=[preset], outputs=[message, *fields], **quiet)
        save.click(_save, inputs=[preset, *fields], outputs=[message, preset], **quiet)
        delete.click(_delete, inputs=[preset], outputs=[message, preset], **quiet)
        # The page as it was made holds the presets that there were then.
        for event in (reload.click, Context.root_block.load):
            event(_reload, outputs=[message, preset], **quiet)
        export.click(_export, outputs=[message, exported], **quiet)
        upload.upload(_import, inputs=[upload], outputs=[message, preset], **quiet)

    return connect


def _choose(name: str) -> list[Any]:
    try:
        settings = presets.get(name)
    except SettingsError as error:
        return [_text(str(error)), *(gr.update() for _ in PANEL_FIELDS)]
    shown = shown_fields(settings.schedule)
    updates = [gr.update(value=value, visible=field in shown) for field, value in panel_values(settings).items()]
    return [_text(presets.BUILT_IN.get(name, ("", ""))[1]), *updates]


def _save(name: str, *values: Any) -> tuple[str, Any]:
    try:
        stored = presets.save(name, MergeSettings(**dict(zip(PANEL_FIELDS, values, strict=True))))
    except SettingsError as error:
        return _text(str(error)), gr.update()
    return _reload(f"Saved as {stored!r}.", value=stored)


def _delete(name: str) -> tuple[str, Any]:
    try:
        presets.delete(name)
    except SettingsError as error:
        return _text(str(error)), gr.update()
    return _reload(f"Deleted {name!r}.", value=None)


def _reload(line: str = "", **update: Any) -> tuple[str, Any]:
    """A message and what there is to say of the presets' file, as HTML, and the list of presets."""
    usable, messages = presets.read()
    return "<br>".join(_text(part) for part in (line, *messages) if part), gr.update(choices=list(usable), **update)


def _export() -> tuple[str, Any]:
    try:
        text = presets.export()
    except SettingsError as error:
        return _text(str(error)), gr.update()
    path = Path(tempfile.mkdtemp()) / "tome-presets.json"
    path.write_text(text, encoding="utf-8")
    return "Your presets are in the file below.", gr.update(value=str(path), visible=True)


def _import(content: bytes) -> tuple[str, Any]:
    try:
        added, refused = presets.import_(content)
    except SettingsError as error:
        return _text(str(error)), gr.update()
    lines = [f"Imported: {', '.join(added) or 'nothing new'}.", *(f"Left out: {line}" for line in refused)]
    return _reload(" ".join(lines))


def _text(text: str) -> str:
    return html.escape(text)
