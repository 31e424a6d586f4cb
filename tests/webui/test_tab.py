"""The panel's hidden numbers follow the tab's own components, in whichever order both are built."""

from __future__ import annotations

import gradio as gr
import pytest

VALUES = {"width": 640, "height": 768, "steps": 30, "batch_size": 2, "cfg_scale": 5}


@pytest.fixture
def build_page(host):
    """Build a page with the tab's components before or after the panel; return ids by element."""

    def build(before: list[str], after: list[str]) -> dict[str, int]:
        def create(names: list[str]) -> None:
            for name in names:
                gr.Slider(0, 2048, value=VALUES[name], elem_id=f"txt2img_{name}")

        def page(runner) -> gr.Blocks:
            with gr.Blocks() as blocks:
                create(before)
                runner.setup_ui()
                create(after)
            return blocks

        host.load_page(page)
        return {block.elem_id: number for number, block in host.demo.blocks.items()}

    yield build
    host.reload_ui()


def links_of(page: gr.Blocks) -> dict[int, int]:
    """The number that each followed component writes to, on its change and on page load."""
    events = [d for d in page.dependencies if d["js"] and "toMeFollow('txt2img'" in d["js"]]
    on_change = {d["inputs"][0]: d["outputs"][0] for d in events if d["inputs"] == d["targets"]}
    on_load = {d["inputs"][0]: d["outputs"][0] for d in events if d["trigger"] == "load"}
    assert on_change == on_load, "`ui-config.json` may have other defaults"
    return on_change


@pytest.mark.parametrize("count", range(len(VALUES) + 1))
def test_numbers_follow_components_before_and_after_the_panel(host, build_page, count):
    names = list(VALUES)
    ids = build_page(names[:count], names[count:])
    numbers = {name: ids[f"script_txt2img_tome_{name}"] for name in names}
    assert links_of(host.demo) == {ids[f"txt2img_{name}"]: numbers[name] for name in names}
    assert {name: host.demo.blocks[number].value for name, number in numbers.items()} == VALUES


def test_a_missing_component_leaves_the_default(host, build_page):
    ids = build_page(["width"], [])
    values = [host.demo.blocks[ids[f"script_txt2img_tome_{name}"]].value for name in VALUES]
    assert values == [VALUES["width"], 512, 20, 1, 7]
    assert len(links_of(host.demo)) == 1


def test_a_second_page_of_the_same_scripts_has_its_own_links(host, build_page):
    for _ in range(2):
        build_page(["width", "steps"], ["height"])
        links = links_of(host.demo)
        assert len(links) == 3 and {*links, *links.values()} <= set(host.demo.blocks)
