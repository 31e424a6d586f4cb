"""The page's script follows the tab's components, built before the panel or after it."""

from __future__ import annotations

import re

import gradio as gr
import pytest
from in_host import arguments

NAMES = ["width", "height", "steps", "batch_size", "cfg_scale"]


@pytest.fixture
def build_page(host):
    """Build a page with components of the tab before and after the panel."""

    def build(before: list[str], after: list[str]) -> None:
        def create(names: list[str]) -> None:
            for name in names:
                gr.Slider(0, 2048, value=1, elem_id=f"txt2img_{name}")

        def page(runner) -> gr.Blocks:
            with gr.Blocks() as blocks:
                create([*before, "denoising_strength"])
                runner.setup_ui()
                create(after)
            return blocks

        host.load_page(page)

    yield build
    host.reload_ui()


def followed(page: gr.Blocks) -> list[str]:
    """The tab's components whose values the page's script takes on load and after a change."""
    on_change, on_load = [], []
    for event in page.dependencies:
        if call := re.search(r"toMeFollow\('txt2img', '(\w+)', value\)", event["js"] or ""):
            (component,) = event["inputs"]
            assert page.blocks[component].elem_id == f"txt2img_{call[1]}"
            on = on_load if event["trigger"] == "load" else on_change
            assert on is on_load or event["targets"] == [component]
            on.append(call[1])
    assert on_change == on_load, "`ui-config.json` may have other defaults"
    return on_load


@pytest.mark.parametrize("count", range(len(NAMES) + 1))
def test_components_before_and_after_the_panel_are_followed(host, build_page, count):
    for _ in range(2):
        build_page(NAMES[:count], NAMES[count:])
        assert followed(host.demo) == NAMES


def test_a_missing_component_has_a_default(host, build_page):
    build_page(["width"], [])
    assert followed(host.demo) == ["width"]
    (preview,) = [
        function.fn
        for event, function in zip(host.demo.dependencies, host.demo.fns, strict=True)
        if "toMeAsking('txt2img'" in (event["js"] or "")
    ]
    chart = preview('{"width": 1024}', *arguments())
    assert "over 20 steps" in chart and "524288 → " in chart
