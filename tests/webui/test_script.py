"""The script file: its callbacks, reloads, imports, and the console."""

from __future__ import annotations

import ast
import io
import logging
import subprocess
import sys
from collections import Counter

import pytest
from in_host import HALF, HALVED, ROOT, imported, pixels, running, script_module


def callbacks():
    """Number of the extension's callbacks, by category and function."""
    from modules import script_callbacks

    return Counter(
        (category, c.callback.__name__)
        for category, registered in script_callbacks.callback_map.items()
        for c in registered
        if c.script.endswith("tome.py")
    )


@pytest.mark.parametrize("reload", ["reload_ui", "reload_script_bodies"])
def test_a_reload_registers_each_callback_once_and_keeps_unchanged_files(
    host, make, merged, attention, reload
):
    before, modules = callbacks(), imported(script_module().PACKAGE)
    assert before["cfg_denoiser", "on_denoise"] == before["script_unloaded", "stop"] == 1
    assert set(before.values()) == {1} and len(modules) > 20
    for _ in range(2):
        getattr(host, reload)()
    assert callbacks() == before
    assert imported(script_module().PACKAGE) == modules
    processed = make(HALVED)
    assert pixels(processed) == merged
    assert processed.comments.count("ToMe") == 1
    assert attention.tokens == [HALF] * 2
    handlers = [type(handler) for handler in logging.getLogger("ToMe").handlers]
    assert handlers.count(logging.StreamHandler) == 1


def imports_of(files):
    """All parts of the names that files import anywhere, also for type checking."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [alias.name for node in imports for alias in node.names]
    names += [getattr(node, "module", None) or "" for node in imports]
    return {part for name in names for part in name.split(".")}


def test_imports_point_one_way():
    """From the lab to the product, and in it from `webui` to the core."""
    webui = {*(ROOT / "tomesd_core" / "webui").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")}
    core = {*(ROOT / "tomesd_core").rglob("*.py")} - webui
    assert len(core) > 8 and len(webui) > 4
    assert imports_of(core) & {"lab", "webui", "modules", "gradio", "numpy"} == set()
    assert "lab" not in imports_of({*webui, ROOT / "install.py"})
    assert "tomesd_core" in imports_of((ROOT / "lab").rglob("*.py"))


def test_the_core_needs_torch_alone():
    """In a process that can import nothing else."""
    code = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        others = "gradio", "numpy", "modules", "PIL", "einops", "ldm", "safetensors", "lab"
        if name.split(".")[0] in others or name == "tomesd_core.webui":
            raise ModuleNotFoundError(name, name=name)


sys.meta_path.insert(0, Blocked())
import torch
import tomesd_core as tome
import tomesd_core.hooks

token_map = tome.match_tokens(torch.randn(1, 64, 4), (8, 8), 0.5)
assert token_map.merge(torch.randn(1, 64, 4)).shape == (1, 32, 4)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


@pytest.fixture
def console(host, monkeypatch):
    """Set the log up on a console of an encoding; return its bytes."""
    log = running("webui.log")

    def open_console(encoding):
        buffer = io.BytesIO()
        stderr = io.TextIOWrapper(buffer, encoding, sys.__stderr__.errors, write_through=True)
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(log.log, "handlers", [])
        log.set_up()
        return buffer

    return open_console


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252"])
def test_any_console_shows_every_line(console, make, encoding):
    buffer = console(encoding)
    logging.getLogger("ToMe").info("2×2 → 1")
    make([True, 0.95], steps=1)
    lines = buffer.getvalue().decode(encoding).splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith("ToMe: 2") and lines[0].endswith(" 1")
    assert all(part in lines[1] for part in ("ratio", "[0, 0.9375]", "0.95"))
