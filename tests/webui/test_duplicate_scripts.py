"""Another extension's script of the same title: it is named, and both keep what is theirs."""

from __future__ import annotations

import pytest
from fastapi import FastAPI

OTHER = """
from modules import scripts, shared, script_callbacks
import gradio as gr


def add_options():
    section = ("tome", "ToMe Settings")
    shared.opts.add_option("tome_other", shared.OptionInfo(1, "Other", section=section))


script_callbacks.on_ui_settings(add_options)


class Script(scripts.Script):
    def title(self):
        return "ToMe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Checkbox(value=DEFAULT, label="Enable")]

    def process(self, p, *args):
        p.extra_generation_params["Other"] = args[0]
"""


@pytest.fixture(params=["before", "after"])
def is_first(request):
    return request.param == "before"


@pytest.fixture
def other(host, tmp_path, is_first, log_lines):
    """Restart the host with such an extension; return its file."""
    from modules import scripts

    before = list(scripts.folders)

    def start(default):
        file = tmp_path / "scripts" / "other.py"
        file.parent.mkdir()
        file.write_text(OTHER.replace("DEFAULT", str(default)))
        scripts.folders.insert(0 if is_first else len(before), str(tmp_path))
        host.reload_ui()
        host.start_app(FastAPI())
        return str(file)

    yield start
    scripts.folders[:] = before
    host.reload_ui()


def named(lines):
    return [line for line in lines if "more than one" in line and "'ToMe'" in line]


def test_it_is_named_once_at_the_start(other, log_lines, is_first):
    file = other(default=False)
    (line,) = log_lines
    assert named([line])
    assert line.count(file) == line.count("tome.py") == 1
    assert (line.index(file) < line.index("tome.py")) == is_first


def test_alone_nothing_is_named(host, log_lines):
    host.reload_ui()
    host.start_app(FastAPI())
    assert log_lines == []


def test_each_has_its_own_section_of_the_settings_page(other):
    from modules import shared

    other(default=False)
    sections = {
        info.section
        for info in shared.opts.data_labels.values()
        if info.section and "ToMe" in info.section[1]
    }
    assert len({key for key, _ in sections}) == len(sections) == 2
