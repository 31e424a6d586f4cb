"""The documentation agrees with the code: settings, links, commands, requests, messages, files."""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.bench.__main__ import SUBCOMMANDS
from lab.bench.__main__ import make_parser as bench_parser
from lab.demo.__main__ import make_parser as demo_parser
from lab.figure import make_parser as figure_parser
from tomesd_core.settings import FIELDS, Setting
from tomesd_core.webui.arguments import read_arguments

ROOT = Path(__file__).parent.parent
HEAD = "| setting | values | default | what it does |\n| --- | --- | --- | --- |"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
EVERYTHING = "\n\n".join(TEXTS.values())
WIDTH = 128


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced code blocks of a text in this language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for mark, code in fenced if mark == language]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """Inline code of a page, each in one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(text))]


def section(name: str, heading: str) -> str:
    match = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXTS[name], re.DOTALL | re.MULTILINE)
    assert match, f"{name} has no section {heading}"
    return match[1]


def row(setting: Setting) -> str:
    if setting.choices:
        values = ", ".join(str(choice) for choice in setting.choices)
    else:
        values = f"{setting.minimum:g} to {setting.maximum:g}"
    name = f"{setting.label} (`{setting.infotext}`)"
    return f"| {name} | {values} | {setting.default} | {setting.help} |"


def test_the_table_of_settings_is_the_field_list():
    table = "\n".join([HEAD, *(row(setting) for setting in FIELDS.values() if setting.infotext)])
    in_docs = re.search(
        "<!-- settings -->\n(.*?)\n<!-- /settings -->", TEXTS["docs/api.md"], re.DOTALL
    )
    assert in_docs, "docs/api.md has no table of settings"
    assert in_docs.group(1) == table, f"the table should be:\n{table}"


def test_the_expert_fields_are_those_that_the_panel_lacks():
    named = re.search(
        r"^Expert fields.*?: (.*?);", TEXTS["docs/library.md"], re.DOTALL | re.MULTILINE
    )
    assert named
    assert spans(named[1]) == [name for name, setting in FIELDS.items() if not setting.infotext]


def anchors(text: str) -> set[str]:
    headings = re.findall("^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_and_picture_is_there(name):
    text = without_blocks(TEXTS[name])
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), (
            f"{name} links to {link}"
        )


@pytest.mark.parametrize("name", TEXTS)
def test_lines_of_prose_are_short_and_no_placeholder_shows(name):
    lines = without_blocks(re.sub("<!--.*?-->", "", TEXTS[name], flags=re.DOTALL)).splitlines()
    too_long = [line for line in lines if len(line) > WIDTH and not line.startswith("|")]
    assert not too_long, f"{name} has lines over {WIDTH} characters:\n" + "\n".join(too_long)
    assert not [line for line in lines if re.search(r"\| *… *(?=\|)", line)], (
        f"{name} has a cell that is not filled"
    )


def test_every_page_begins_with_its_readers():
    for name, text in TEXTS.items():
        if name.startswith("docs/"):
            opening = " ".join(text.splitlines()[2:5])
            assert re.search(r"\b(for|if you|who)\b", opening, re.IGNORECASE), name


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].split()) <= 1200


def test_every_named_nox_session_exists():
    sessions = re.findall(
        r"@nox\.session.*\n(?:@.*\n)*def (\w+)", (ROOT / "noxfile.py").read_text(encoding="utf-8")
    )
    named = set(re.findall(r"nox -s (\w+)", EVERYTHING))
    assert len(named) > 4 and named <= set(sessions)


PARSERS = {"bench": bench_parser, "demo": demo_parser, "figure": figure_parser}
PREFIXES = {f"python -m lab.{name}": name for name in PARSERS} | {
    f"nox -s {name} --": name for name in PARSERS
}
LINES = [*spans(EVERYTHING), *(line for block in blocks(EVERYTHING) for line in block.splitlines())]
COMMANDS = [line for line in LINES if any(line.startswith(f"{prefix} ") for prefix in PREFIXES)]
EXAMPLES = blocks(EVERYTHING, "python")
REQUESTS = [
    body for block in blocks(EVERYTHING) for body in re.findall("-d '(.*?)'", block, re.DOTALL)
]


def test_there_are_commands_examples_and_requests_to_test():
    assert len(COMMANDS) > 10 and len(EXAMPLES) > 2 and len(REQUESTS) > 1
    assert any(command.startswith("nox -s demo") and "--out" in command for command in COMMANDS)
    modules = {name for line in LINES for name in re.findall(r"python -m (lab[\w.]*)", line)}
    assert modules <= {f"lab.{name}" for name in PARSERS}, "a command with untested arguments"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    prefix = next(prefix for prefix in PREFIXES if command.startswith(f"{prefix} "))
    arguments = shlex.split(command.removeprefix(prefix), comments=True)
    assert PARSERS[PREFIXES[prefix]]().parse_args(arguments)  # It exits where it can't.


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Options of the bench and its subcommands, by their help."""
    text = parser.format_help()
    for name in SUBCOMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            parser.parse_args([name, "--help"])
        text += out.getvalue()
    return set(re.findall(r"--[a-z]+[a-z-]*", text))


@pytest.mark.parametrize("name", ["docs/speed.md", "docs/quality.md"])
def test_every_named_option_of_the_bench_exists(name):
    named = {
        option for span in spans(TEXTS[name]) for option in re.findall(r"--[a-z]+[a-z-]*", span)
    }
    assert len(named) > 2 and named <= options_of(bench_parser())


@pytest.mark.parametrize("code", EXAMPLES)
def test_every_example_in_python_compiles(code):
    assert compile(code, "example", "exec").co_names, "an example that does nothing"


def requests_in_examples() -> list[Any]:
    """The `alwayson_scripts` of the calls in the Python examples."""
    nodes = [node for code in EXAMPLES for node in ast.walk(ast.parse(code))]
    words = [word for node in nodes if isinstance(node, ast.Call) for word in node.keywords]
    return [ast.literal_eval(word.value) for word in words if word.arg == "alwayson_scripts"]


def test_every_request_merges():
    bodies = [json.loads(body) for body in REQUESTS]
    some = [body["alwayson_scripts"] for body in bodies if "settings" not in body]
    settings = [body["settings"] for body in bodies if "settings" in body]
    assert settings and some and requests_in_examples()
    arguments = [scripts["ToMe"]["args"] for scripts in (*some, *requests_in_examples())]
    for args in (*arguments, *([values] for values in settings)):
        assert read_arguments(args).enabled


def test_every_named_route_exists():
    code = (ROOT / "tomesd_core" / "webui" / "routes.py").read_text(encoding="utf-8")
    routes = set(re.findall(r"/tome/\w+", EVERYTHING))
    assert len(routes) > 2 and all(route in code for route in routes)


def test_every_message_in_the_troubleshooting_is_in_the_code():
    code = "\n".join(
        file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("tomesd_core/**/*.py"))
    )
    parts = [
        part
        for span in spans(section("README.md", "Troubleshooting"))
        for part in re.split("[:…]", span)
    ]
    messages = [part.strip() for part in parts if part.strip()]
    assert len(messages) > 8
    assert not [message for message in messages if message not in code]


def test_the_tree_of_the_architecture_is_the_product():
    tree = blocks(section("docs/architecture.md", "The tree"))[0].splitlines()
    folders, named = [""], set()
    for line in tree:
        depth, path = (len(line) - len(line.lstrip())) // 4, line.split()[0]
        path = "".join(folders[: depth + 1]) + path
        named.add(path)
        assert (ROOT / path).exists(), path
        if path.endswith("/"):
            folders[depth + 1 :] = [line.split()[0]]
    modules = {file.relative_to(ROOT).as_posix() for file in ROOT.glob("tomesd_core/**/*.py")}
    assert {module for module in modules if not module.endswith("__init__.py")} <= named


def test_the_entry_of_the_extension_index_has_its_format():
    entry = json.loads((ROOT / "docs" / "index-entry.json").read_text(encoding="utf-8"))
    assert sorted(entry) == ["added", "description", "name", "tags", "url"]
    assert re.fullmatch(r"https://[^ ]+\.git", entry["url"])
    datetime.date.fromisoformat(entry["added"])
    # Those of the index's tags that describe pictures or the page.
    assert entry["tags"]
    assert set(entry["tags"]) <= {
        "script",
        "tab",
        "dropdown",
        "UI related",
        "manipulations",
    }


def test_a_bug_report_has_the_status_and_the_log():
    form = yaml.safe_load(
        (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    )
    assert {"name", "description", "body"} <= set(form)
    required = [
        part["attributes"]["label"]
        for part in form["body"]
        if part.get("validations", {}).get("required")
    ]
    for needed in ("/tome/status", "log's lines"):
        assert any(needed in label for label in required), required
