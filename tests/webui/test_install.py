"""install.py, which WebUI runs at every start."""

from __future__ import annotations

import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[2] / "install.py"


@pytest.fixture
def lines(monkeypatch, capsys):
    """What the file prints where these versions of packages are installed."""

    def run(**versions):
        def version(package):
            if package not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package]

        monkeypatch.setattr(importlib.metadata, "version", version)
        runpy.run_path(str(INSTALL), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_nothing_is_printed_installed_or_written_when_all_is_well():
    code = """
import runpy, sys

FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.remove", "os.mkdir"}
FORBIDDEN.add("socket.connect")


def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event in FORBIDDEN or writes:
        print("not allowed:", event, arguments)


sys.dont_write_bytecode = True
sys.addaudithook(watch)
runpy.run_path(sys.argv[1], run_name="__main__")
assert not {"torch", "gradio"} & set(sys.modules), "importing them delays every start"
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(INSTALL)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize(
    ("torch", "gradio"),
    [("2.0.0", "3.41.0"), ("2.1.0a0+cu121", "4.0"), ("3", "3.50.2"), ("nightly", "")],
)
def test_new_enough_and_unreadable_versions_are_no_problem(lines, torch, gradio):
    assert lines(torch=torch, gradio=gradio) == []


@pytest.mark.parametrize("versions", [{}, {"torch": "1.13.1+cu117", "gradio": "3.9"}], ids=str)
def test_missing_and_old_packages_are_named_in_one_line_each(lines, versions):
    torch, gradio = lines(**versions)
    assert torch.startswith("ToMe: torch 2.0") and versions.get("torch", "none") in torch
    assert gradio.startswith("ToMe: gradio 3.41") and versions.get("gradio", "none") in gradio


def test_an_old_python_is_named(lines, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 9, 1))
        patch.setattr(sys, "version", "3.9.1 (main)")
        (line,) = lines(torch="2.0", gradio="3.41")
    assert "Python 3.10" in line and "3.9.1" in line
