"""The documentation agrees with the code: settings, links, commands, requests, messages, files."""

from __future__ import annotations

import ast
import datetime
import json
import re
import shlex
from pathlib import Path

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


def text_of(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def files(pattern: str) -> list[str]:
    """Files of the repository, by their paths in it."""
    return sorted(file.relative_to(ROOT).as_posix() for file in ROOT.glob(pattern))


PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *files("docs/*.md")]
TEXTS = {page: text_of(page) for page in PAGES}
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
        values = ", ".join(map(str, setting.choices))
    else:
        values = f"{setting.minimum:g} to {setting.maximum:g}"
    name = f"{setting.label} (`{setting.infotext}`)"
    return f"| {name} | {values} | {setting.default} | {setting.help} |"


def test_the_table_of_settings_is_the_field_list():
    table = "\n".join([HEAD, *(row(setting) for setting in FIELDS.values() if setting.infotext)])
    marked = f"<!-- settings -->\n{table}\n<!-- /settings -->"
    assert marked in TEXTS["docs/api.md"], f"the table should be:\n{table}"


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
        found = target.exists() and (not anchor or anchor in anchors(text_of(target)))
        assert found, f"{name} links to {link}"


@pytest.mark.parametrize("name", TEXTS)
def test_lines_of_prose_are_short_and_no_placeholder_shows(name):
    lines = without_blocks(re.sub("<!--.*?-->", "", TEXTS[name], flags=re.DOTALL)).splitlines()
    too_long = [line for line in lines if len(line) > WIDTH and not line.startswith("|")]
    assert not too_long, f"{name} has lines over {WIDTH} characters:\n" + "\n".join(too_long)
    assert not re.search(r"\| *… *\|", "\n".join(lines)), f"{name} has a cell that is not filled"


def test_every_page_begins_with_its_readers():
    for name in files("docs/*.md"):
        opening = " ".join(TEXTS[name].splitlines()[2:5])
        assert re.search(r"\b(for|if you|who)\b", opening, re.IGNORECASE), name


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].split()) <= 1200


def test_every_named_nox_session_exists():
    sessions = re.findall(r"@nox\.session.*\n(?:@.*\n)*def (\w+)", text_of("noxfile.py"))
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


@pytest.mark.parametrize("name", ["docs/speed.md", "docs/quality.md"])
def test_every_named_option_of_the_bench_exists(name, capsys):
    for subcommand in SUBCOMMANDS:
        with pytest.raises(SystemExit, match="0"):
            bench_parser().parse_args([subcommand, "--help"])
    options = re.findall(r"--[a-z]+[a-z-]*", capsys.readouterr().out)
    named = set(re.findall(r"--[a-z]+[a-z-]*", " ".join(spans(TEXTS[name]))))
    assert len(named) > 2 and named <= set(options)


@pytest.mark.parametrize("code", EXAMPLES)
def test_every_example_in_python_compiles(code):
    assert compile(code, "example", "exec").co_names, "an example that does nothing"


def test_every_request_merges():
    bodies = [json.loads(body) for body in REQUESTS]
    some = [body["alwayson_scripts"] for body in bodies if "settings" not in body]
    settings = [body["settings"] for body in bodies if "settings" in body]
    nodes = [node for code in EXAMPLES for node in ast.walk(ast.parse(code))]
    words = [node for node in nodes if isinstance(node, ast.keyword)]
    in_calls = [ast.literal_eval(word.value) for word in words if word.arg == "alwayson_scripts"]
    assert settings and some and in_calls
    arguments = [scripts["ToMe"]["args"] for scripts in (*some, *in_calls)]
    for args in (*arguments, *([values] for values in settings)):
        assert read_arguments(args).enabled


def test_every_named_route_exists():
    code = text_of("tomesd_core/webui/routes.py")
    routes = set(re.findall(r"/tome/\w+", EVERYTHING))
    assert len(routes) > 2 and all(route in code for route in routes)


def test_every_message_in_the_troubleshooting_is_in_the_code():
    code = "\n".join(map(text_of, files("tomesd_core/**/*.py")))
    named = spans(section("README.md", "Troubleshooting"))
    parts = [part.strip() for span in named for part in re.split("[:…]", span)]
    messages = [part for part in parts if part]
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
    modules = [file for file in files("tomesd_core/**/*.py") if not file.endswith("__init__.py")]
    assert set(modules) <= named


def test_the_entry_of_the_extension_index_has_its_format():
    entry = json.loads(text_of("docs/index-entry.json"))
    assert sorted(entry) == ["added", "description", "name", "tags", "url"]
    assert re.fullmatch(r"https://[^ ]+\.git", entry["url"])
    datetime.date.fromisoformat(entry["added"])
    # Those of the index's tags that describe pictures or the page.
    tags = {"script", "tab", "dropdown", "UI related", "manipulations"}
    assert entry["tags"] and set(entry["tags"]) <= tags


def test_a_bug_report_has_the_status_and_the_log():
    form = yaml.safe_load(text_of(".github/ISSUE_TEMPLATE/bug.yml"))
    assert {"name", "description", "body"} <= set(form)
    parts = [part for part in form["body"] if part.get("validations", {}).get("required")]
    required = [part["attributes"]["label"] for part in parts]
    for needed in ("/tome/status", "log's lines"):
        assert any(needed in label for label in required), required
