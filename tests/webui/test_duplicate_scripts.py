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
def other(host, tmp_path, request):
    """The file of such an extension, with which the host is restarted."""
    from modules import scripts

    before = list(scripts.folders)
    file = tmp_path / "scripts" / "other.py"
    file.parent.mkdir()
    file.write_text(OTHER)
    scripts.folders.insert(0 if request.param == "before" else len(before), str(tmp_path))
    host.reload_ui()
    yield str(file)
    scripts.folders[:] = before
    host.reload_ui()


def test_both_are_named_once_at_the_start_in_the_apis_order(host, log_lines, other):
    from modules import scripts

    host.start_app(FastAPI())
    (line,) = log_lines
    assert "more than one" in line and "'ToMe'" in line
    first, second = (s.filename for s in scripts.scripts_txt2img.scripts if s.title() == "ToMe")
    assert other in (first, second) and line.endswith(f": {first}, {second}")


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
