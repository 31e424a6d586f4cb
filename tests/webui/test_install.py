"""install.py, which WebUI runs at every start."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

INSTALL = Path(__file__).parents[2] / "install.py"


@pytest.fixture
def install():
    spec = importlib.util.spec_from_file_location("install_of_this_extension", INSTALL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_versions(install, monkeypatch, **versions):
    def version(package):
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(install, "version", version)
    return install.problems()


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
    [("2.0.0", "3.41.2"), ("2.1.2+cu121", "4.0"), ("3", "3.50.2"), ("2.1.0a0+git123", "3.41.0")],
)
def test_new_enough_versions_are_no_problem(install, monkeypatch, torch, gradio):
    assert with_versions(install, monkeypatch, torch=torch, gradio=gradio) == []


def test_missing_packages_are_named(install, monkeypatch):
    torch, gradio = with_versions(install, monkeypatch)
    assert "torch 2.0" in torch and "gradio 3.41" in gradio


def test_old_packages_are_named(install, monkeypatch):
    torch, gradio = with_versions(install, monkeypatch, torch="1.13.1+cu117", gradio="3.9")
    assert "torch 2.0" in torch and "1.13.1+cu117" in torch
    assert "gradio 3.41" in gradio and "3.9" in gradio


def test_unreadable_versions_are_no_problem(install, monkeypatch):
    assert with_versions(install, monkeypatch, torch="nightly", gradio="") == []


def test_an_old_python_is_named(install, monkeypatch):
    monkeypatch.setattr(
        install, "sys", SimpleNamespace(version_info=(3, 9, 1), version="3.9.1 (main)")
    )
    (problem,) = with_versions(install, monkeypatch, torch="2.0", gradio="3.41")
    assert "Python 3.10" in problem and "3.9.1" in problem


def test_each_problem_is_one_line_of_output(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.1")
    runpy.run_path(str(INSTALL), run_name="__main__")
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["ToMe:", "torch"],
        ["ToMe:", "gradio"],
    ]
