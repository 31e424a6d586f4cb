"""Another extension's script of the same title: it is named, and both keep what is theirs."""

from __future__ import annotations

import pytest
from fastapi import FastAPI

OTHER = """
from modules import scripts, shared, script_callbacks


def add_options():
    section = ("tome", "ToMe Settings")
    shared.opts.add_option("tome_other", shared.OptionInfo(1, "Other", section=section))


script_callbacks.on_ui_settings(add_options)


class Script(scripts.Script):
    def title(self):
        return "ToMe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible
"""


@pytest.fixture(params=["before", "after"])
def is_first(request):
    return request.param == "before"


@pytest.fixture
def other(host, tmp_path, is_first):
    """The file of such an extension, with which the host is restarted."""
    from modules import scripts

    before = list(scripts.folders)
    file = tmp_path / "scripts" / "other.py"
    file.parent.mkdir()
    file.write_text(OTHER)
    scripts.folders.insert(0 if is_first else len(before), str(tmp_path))
    host.reload_ui()
    yield str(file)
    scripts.folders[:] = before
    host.reload_ui()


def test_it_is_named_once_at_the_start(host, log_lines, other, is_first):
    host.start_app(FastAPI())
    (line,) = log_lines
    assert "more than one" in line and "'ToMe'" in line
    assert line.count(other) == line.count("tome.py") == 1
    assert (line.index(other) < line.index("tome.py")) == is_first


def test_alone_nothing_is_named(host, log_lines):
    host.reload_ui()
    host.start_app(FastAPI())
    assert log_lines == []


@pytest.mark.usefixtures("other")
def test_each_has_its_own_section_of_the_settings_page():
    from modules import shared

    sections = {
        info.section
        for info in shared.opts.data_labels.values()
        if info.section and "ToMe" in info.section[1]
    }
    assert len({key for key, _ in sections}) == len(sections) == 2
