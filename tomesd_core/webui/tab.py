"""The tab's values that the panel needs: size, steps, batch size and CFG scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.context import Context

from . import host

DEFAULTS = {"width": 512, "height": 512, "steps": 20, "batch_size": 1, "cfg_scale": 7}
"""The values to assume for components that a host doesn't have."""


class TabValues:
    """Hidden numbers in the panel that follow the tab's components.

    Users can order the page, so the tab's components may be created before the panel or after it.
    """

    def __init__(self) -> None:
        self._tab = ""
        self._page: Any = None
        self._components: dict[str, Any] = {}
        self._numbers: dict[str, Any] = {}

    def add(self, component: Any, tab: str) -> None:
        """A component of `tab` was created."""
        name = str(getattr(component, "elem_id", "")).removeprefix(f"{tab}_")
        if name in DEFAULTS:
            self._forget_other_page()
            self._components[name] = component
            self._follow(name)

    def build(self, tab: str, elem_id: Callable[[str], str]) -> dict[str, Any]:
        """Create the numbers; return them by name, in the order of `DEFAULTS`."""
        self._tab = tab
        self._forget_other_page()
        for name, value in DEFAULTS.items():
            number = gr.Number(value, visible=False, elem_id=elem_id(name))
            number.do_not_save_to_config = True
            self._numbers[name] = number
            self._follow(name)
        return self._numbers

    def _forget_other_page(self) -> None:
        if Context.root_block is not self._page:
            self._page = Context.root_block
            self._components.clear()
            self._numbers = {}

    def _follow(self, name: str) -> None:
        component, number = self._components.get(name), self._numbers.get(name)
        if component is None or number is None:
            return
        number.value = component.value
        js = f"(value) => toMeFollow('{self._tab}', value)"
        # On load too: hosts set the defaults of `ui-config.json` after the page is built.
        for event in (Context.root_block.load, component.change):
            host.listen(event, inputs=[component], outputs=[number], js=js)
