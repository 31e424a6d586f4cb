"""The panel's Measure button and its results."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from modules import ui_components

from . import host, measure
from .arguments import CONTROLS
from .tab import DEFAULTS

TIP = (
    "Time steps with and without merging, with these settings at this tab's size: ten seconds or "
    "more per size, at least eleven steps"
)


class MeasureRow:
    """The row's components; `connect` ties them to the panel's controls."""

    def __init__(self, tab: str, elem_id: Callable[[str], str]) -> None:
        self._tab = tab
        with ui_components.FormRow():
            self._button = gr.Button("Measure", elem_id=elem_id("measure"), tooltip=TIP)
        self._lines = gr.HTML(elem_id=elem_id("measure_lines"), elem_classes=["tome-message"])
        # The page's script presses these and supplies the task and size.
        self._start, self._stop = (
            gr.Button(name, visible=False, elem_id=elem_id(f"measure_{name}"))
            for name in ("start", "stop")
        )
        self._request = gr.Textbox("{}", visible=False, elem_id=elem_id("measure_asked"))
        for component in (self._button, self._lines, self._start, self._stop, self._request):
            component.do_not_save_to_config = True

    def connect(self, numbers: Mapping[str, Any], controls: Sequence[Any]) -> None:
        """Let the button measure the settings of `controls` with the tab's `numbers`."""
        tab = self._tab
        host.listen(self._button.click, js=f"() => toMeMeasure('{tab}')")
        ask = f"(...given) => toMeMeasuring('{tab}', given)"
        inputs, outputs = [self._request, *numbers.values(), *controls], [self._lines]
        end = host.listen(
            self._start.click, _measure, inputs, outputs, ask, queue=None, what="measuring"
        )
        host.listen(end.then, js=f"() => toMeMeasured('{tab}')")
        host.listen(
            self._stop.click, measure.stop, [self._request], js=f"() => toMeMeasuredTask('{tab}')"
        )


def _measure(request_json: str, *values: Any) -> str:
    request = json.loads(request_json)
    task = request.pop("task", "")
    numbers = dict(zip(DEFAULTS, values, strict=False))
    settings = dict(zip(CONTROLS, values[len(DEFAULTS) :], strict=True))
    results = measure.measure({**numbers, **request, "settings": settings}, task)
    return "<br>".join(html.escape(result.line) for result in results)
