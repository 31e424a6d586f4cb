"""What the documentation says of the code is so: the table of settings, links, commands, requests."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from lab.bench.__main__ import parser
from tomesd_core.settings import FIELDS, MergeSettings, Setting
from tomesd_core.webui.arguments import read_arguments
from tomesd_core.webui.presets import BUILT_IN

ROOT = Path(__file__).parent.parent
HEAD = "| setting | values | default | what it does |\n| --- | --- | --- | --- |"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
EVERYTHING = "\n".join(TEXTS.values())


def row(setting: Setting) -> str:
    if setting.choices:
        values = ", ".join(str(choice) for choice in setting.choices)
    else:
        values = f"{setting.minimum:g} to {setting.maximum:g}"
    return f"| {setting.label} (`{setting.infotext}`) | {values} | {setting.default} | {setting.help} |"


def test_the_table_of_settings_is_the_field_list():
    table = "\n".join([HEAD, *(row(setting) for setting in FIELDS.values() if setting.infotext)])
    written = re.search("<!-- settings -->\n(.*?)\n<!-- /settings -->", TEXTS["README.md"], re.DOTALL)
    assert written, "the README has no table of settings"
    assert written.group(1) == table, f"the table should be:\n{table}"


def anchors(text: str) -> set[str]:
    headings = re.findall("^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_and_picture_is_there(name):
    text = TEXTS[name]
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{name} links to {link}"


def test_every_page_says_in_its_first_sentence_whom_it_is_for():
    for name, text in TEXTS.items():
        if name.startswith("docs/"):
            assert text.splitlines()[2].startswith("This page is for those who "), name


def test_the_readme_is_read_in_a_minute():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_every_nox_session_that_is_named_is_there():
    sessions = re.findall(r"@nox.session.*?\ndef (\w+)", (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    named = set(re.findall(r"nox -s (\w+)", EVERYTHING))
    assert len(named) > 4 and named <= set(sessions)


def commands() -> list[str]:
    written = [" ".join(text.split()) for text in re.findall(r"`(python -m lab\.bench \w[^`]*)`", EVERYTHING)]
    return [
        *written,
        *(f"python -m lab.bench {more}" for more in re.findall(r"nox -s bench -- (\w[^`\n]*)", EVERYTHING)),
    ]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_bench_can_be_given(command):
    parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize("code", re.findall("```python\n(.*?)```", EVERYTHING, re.DOTALL))
def test_every_example_in_python_is_python(code):
    ast.parse(code)


@pytest.mark.parametrize("body", re.findall("-d '(.*?)'", EVERYTHING, re.DOTALL))
def test_every_request_is_one_that_merges(body):
    arguments = json.loads(body)["alwayson_scripts"]["ToMe"]["args"]
    assert read_arguments(arguments, None, lambda name: MergeSettings(**BUILT_IN[name][0])) is not None
