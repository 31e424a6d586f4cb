"""The script file: its callbacks, reloads after an update, imports, and the console."""

from __future__ import annotations

import ast
import io
import json
import logging
import shutil
import sys
from collections import Counter

import pytest
from in_host import HALVED, REQUEST, ROOT, left, pixels, run, running, script_module


def callbacks():
    """Number of the extension's callbacks, by category and function."""
    from modules import script_callbacks

    return Counter(
        (category, c.callback.__name__)
        for category, registered in script_callbacks.callback_map.items()
        for c in registered
        if c.script.endswith("tome.py")
    )


def handlers():
    """Number of log handlers, without pytest's."""
    return len(
        [
            h
            for h in logging.getLogger("ToMe").handlers
            if not type(h).__module__.startswith("_pytest")
        ]
    )


def test_each_callback_is_registered_once(host):
    registered = callbacks()
    assert registered["cfg_denoiser", "on_denoise"] == registered["script_unloaded", "stop"] == 1
    assert set(registered.values()) == {1}


@pytest.fixture
def reloaded(host):
    """Reload the UI at the end of the test."""
    yield
    host.reload_ui()


@pytest.mark.parametrize("reload", ["reload_ui", "reload_script_bodies"])
def test_after_a_reload_each_callback_is_there_once(
    host, make, merged, attention, reloaded, reload
):
    before = callbacks()
    for _ in range(2):
        getattr(host, reload)()
    assert callbacks() == before
    processed = make(HALVED)
    assert pixels(processed) == merged
    assert processed.comments.count("ToMe") == 1
    assert attention.tokens == [left(0.5)] * 2
    assert handlers() == 1


@pytest.mark.parametrize("reload", ["reload_ui", "reload_script_bodies"])
def test_unchanged_files_stay_imported(host, reloaded, reload):
    def modules():
        package = script_module().PACKAGE
        return {
            name: id(module)
            for name, module in sys.modules.items()
            if name.split(".")[0] == package
        }

    before = modules()
    assert len(before) > 20
    getattr(host, reload)()
    assert modules() == before


@pytest.fixture(scope="module")
def updated(tmp_path_factory):
    """Output of a host whose extension's files change while it runs, in another process."""
    folder = tmp_path_factory.mktemp("update")
    for name in ("scripts", "tomesd_core", "lab"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", "weights", "bench"),
        )
    shutil.copy(ROOT / "metadata.ini", folder)
    return json.loads(
        run(UPDATE, str(folder), json.dumps(REQUEST), cwd=folder).stdout.splitlines()[-1]
    )


def test_changed_files_are_run_after_reload_ui(updated):
    """Files that the extension doesn't use, such as the demo's, make no difference."""
    assert updated["labels"] == ["Ratio", "Share", "Share"]
    assert updated["ratios"] == [0.8, 0.5, 0.5]
    assert updated["new"] == [True, False]


def test_old_and_new_code_never_mix(updated):
    """Even if script bodies are executed again while the running scripts stay."""
    assert updated["callbacks"] == 1
    assert updated["merged"] == [True] * 4
    assert updated["hooked"] == 0


UPDATE = """
import json, sys
from pathlib import Path

folder, request = Path(sys.argv[1]), {**json.loads(sys.argv[2]), "steps": 1}
import torch

torch.set_num_threads(1)
from lab.host import Host
from lab.demo.model import TinyModel

found = {"labels": [], "ratios": [], "new": [], "merged": []}
models = {"tiny": lambda: TinyModel.random(0, channel_mult=[1], attention_resolutions=[1])}
Host(models, []).close()
host = Host(models, [folder])
from modules import processing, script_callbacks, scripts

tome = next(data.module for data in scripts.scripts_data if data.path.endswith("tome.py"))
package = tome.PACKAGE


def generate():
    processed = processing.process_images(host.make_p([{"full_steps": 1}], **request))
    found["merged"].append("1024 →" in processed.comments)
    return processed


def look():
    ratio = scripts.scripts_txt2img.script("ToMe").controls[1]
    found["labels"].append(ratio.label)
    assert ratio.value == generate().extra_generation_params[f"ToMe {ratio.label.lower()}"]
    found["ratios"].append(ratio.value)


def change(*replacements):
    settings = folder / "tomesd_core" / "settings.py"
    text = settings.read_text(encoding="utf-8")
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    if replacements:
        settings.write_text(text, encoding="utf-8")
    else:
        (folder / "lab" / "demo" / "model.py").touch()


look()
default = "    ratio: float = _field(\\n        "
for changes in ([('"Ratio",', '"Share",'), (f"{default}0.8", f"{default}0.5")], []):
    before = sys.modules[f"{package}.settings"]
    change(*changes)
    host.reload_ui()
    found["new"].append(sys.modules[f"{package}.settings"] is not before)
    look()
change(('"Share",', '"Part",'))
host.reload_script_bodies()
generate()
callbacks = script_callbacks.callback_map["cfg_denoiser"]
found["callbacks"] = sum("tome.py" in each.script for each in callbacks)
found["hooked"] = sum(
    bool(module._forward_hooks or module._forward_pre_hooks) for module in host.sd_model.modules()
)
print(json.dumps(found))
"""


def imports_of(file):
    """Absolute names that a file imports anywhere, also for type checking."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            yield from (f"{name}.{alias.name}" for alias in node.names)


def files(folder, without=""):
    paths = [*(ROOT / folder).rglob("*.py")]
    assert len(paths) > 0
    return [file for file in paths if not without or ROOT / without not in file.parents]


def starts(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_imports_point_one_way():
    """From the lab to the product, and in it from `webui` to the core."""
    product = [ROOT / "install.py", *files("scripts"), *files("tomesd_core")]
    core = files("tomesd_core", without="tomesd_core/webui")
    assert len(core) > 8 and len(product) > len(core) + 5
    above = [(file, "lab") for file in product]
    above += [
        (file, name)
        for file in core
        for name in ("tomesd_core.webui", "modules", "gradio", "numpy")
    ]
    upwards = [
        (file.name, name)
        for file, upper in above
        for name in imports_of(file)
        if starts(name, upper)
    ]
    assert upwards == []
    assert any(starts(name, "tomesd_core") for file in files("lab") for name in imports_of(file))


def test_the_core_needs_torch_alone():
    """In a process that can import nothing else."""
    done = run(
        """
import json, sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        blocked = "gradio", "numpy", "modules", "PIL", "einops", "ldm", "safetensors"
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name, name=name)


sys.meta_path.insert(0, Blocked())
import torch
import tomesd_core as tome

token_map = tome.match_tokens(torch.randn(1, 64, 4), (8, 8), 0.5)
merged = token_map.merge(torch.randn(1, 64, 4))
print(json.dumps([list(merged.shape), [*sys.modules]]))
""",
        PYTHONWARNINGS="ignore",
    )
    shape, imported = json.loads(done.stdout)
    assert shape == [1, 32, 4]
    assert {"torch", "tomesd_core", "tomesd_core.hooks"} <= set(imported)
    assert [
        name
        for name in imported
        if starts(name, "tomesd_core.webui", "lab", "gradio", "numpy", "modules")
    ] == []


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
