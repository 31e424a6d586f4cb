"""Beside another extension's script of the same title: it is named, and neither takes anything from the other."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from in_host import HALVED, pixels

OTHER = """
from modules import scripts, shared, script_callbacks
import gradio as gr


def add_options():
    shared.opts.add_option("tome_other", shared.OptionInfo(1, "Other", section=("tome", "ToMe Settings")))


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


@pytest.fixture(params=["before ours", "after ours"])
def is_first(request):
    return request.param == "before ours"


@pytest.fixture
def other(host, plain, one_step, tmp_path, is_first, log_lines):
    """Starts the host anew beside such an extension, whose switch is off by default or on; gives its file."""
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
    return [line for line in lines if "more than one script is titled 'ToMe'" in line]


def test_it_is_named_once_at_the_start(other, log_lines, is_first):
    file = other(default=False)
    (line,) = log_lines
    assert named([line])
    assert line.count(file) == line.count("tome.py") == 1
    assert (line.index(file) < line.index("tome.py")) == is_first


def test_alone_nothing_is_named(host, log_lines, make):
    host.reload_ui()
    host.start_app(FastAPI())
    assert log_lines == []
    assert named(make(HALVED).comments.splitlines()) == []


@pytest.fixture
def from_the_page(host, make_p):
    """Makes a picture as the page does, with our arguments as given and the others' defaults."""
    from modules import processing, scripts

    def make(tome):
        p, args = make_p([]), host.script_args()
        script = next(s for s in scripts.scripts_txt2img.scripts if s.filename.endswith("tome.py"))
        args[script.args_from : script.args_from + len(tome)] = tome
        p.is_api, p.script_args = False, args
        return processing.process_images(p)

    return make


def test_it_is_named_under_a_picture_that_ours_was_to_merge(from_the_page, other):
    file = other(default=False)
    for tome in (HALVED, [True, 9]):
        (line,) = named(from_the_page(tome).comments.splitlines())
        assert line.startswith("ToMe: ") and file in line


@pytest.mark.parametrize("default", [False, True])
def test_nothing_is_said_where_nobody_asked(from_the_page, other, plain, default):
    other(default)
    processed = from_the_page([False])
    assert named(processed.comments.splitlines()) == []
    assert pixels(processed) == plain


@pytest.mark.parametrize("args", [[True, 0.5], [{"ratio": 0.5}]])
def test_an_api_call_that_reaches_the_other_is_told(host, make, other, is_first, plain, args):
    file = other(default=False)
    processed = make(args)
    (line,) = named(processed.comments.splitlines())
    assert file in line
    assert ("ToMe ratio" in processed.infotexts[0]) == (not is_first)
    assert processed.extra_generation_params["Other"] == (args[0] if is_first else False)
    assert (pixels(processed) == plain) == is_first


def test_each_has_its_own_section_of_the_settings_page(other):
    from modules import shared

    other(default=False)
    sections = {info.section for info in shared.opts.data_labels.values() if info.section and "ToMe" in info.section[1]}
    assert len({key for key, _ in sections}) == len(sections) == 2
