"""Copies of the extension: two at once, each with its own files and state, and an update of one."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from in_host import HALVED, REQUEST, ROOT, hooked, imported, keys_of, pixels, running, script_module

import tomesd_core
from lab.host import Host


def update(extension):
    """Make a copy a newer version, which calls the ratio "Share"."""
    settings = extension / "tomesd_core" / "settings.py"
    text = settings.read_text(encoding="utf-8")
    assert text.count('"Ratio",') == 1
    settings.write_text(text.replace('"Ratio",', '"Share",'), encoding="utf-8")


@pytest.fixture
def two(models, tmp_path):
    """A host with two copies, the first of a newer version."""
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        for name in ("scripts", "tomesd_core"):
            without = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=without)
    update(folders[0])
    before = imported("tomesd_core")
    with Host(models, folders) as host:
        yield SimpleNamespace(host=host, folders=folders, imported_before=before)


def panels():
    """The scripts of the copies."""
    from modules import scripts

    return [script for script in scripts.scripts_txt2img.scripts if script.name == "tome"]


def labels():
    return [script.controls[1].label for script in panels()]


@pytest.fixture
def generate(two):
    """Make a small picture from the arguments of each copy."""
    from modules import processing

    def run(*arguments):
        p = two.host.make_p(**REQUEST)
        for script, values in zip(panels(), arguments, strict=False):
            p.script_args[script.args_from : script.args_from + len(values)] = values
        processed = processing.process_images(p)
        assert hooked(two.host.sd_model) == []
        processed.p = p
        return processed

    return run


def test_each_runs_the_files_of_its_own_folder(two):
    assert labels() == ["Share", "Ratio"]
    for folder in two.folders:
        files = [Path(m.__file__) for m in imported(script_module(folder).PACKAGE).values()]
        assert len(files) > 20 and all(file.is_relative_to(folder) for file in files)


def test_each_keeps_presets_in_its_own_folder(two):
    _, second = two.folders
    running("webui.presets", second).save("Mine", running("settings", second).MergeSettings())
    assert [(folder / "presets.json").exists() for folder in two.folders] == [False, True]


def test_a_package_that_was_imported_before_stays(two):
    now = imported("tomesd_core")
    assert now.items() >= two.imported_before.items()
    assert all(Path(module.__file__).is_relative_to(ROOT) for module in now.values())
    assert [*tomesd_core.__path__] == [str(ROOT / "tomesd_core")]


def test_the_api_reaches_the_first(two, generate):
    from modules import processing

    picture = pixels(processing.process_images(two.host.make_p(HALVED, **REQUEST)))
    assert picture == pixels(generate(HALVED)) != pixels(generate())


def test_one_that_is_on_merges(two, generate):
    first, second = generate(HALVED), generate([False], HALVED)
    two.host.reload_ui()
    again = generate(HALVED)
    assert pixels(first) == pixels(second) == pixels(again)
    for processed, key in ((first, "ToMe share"), (second, "ToMe ratio"), (again, "ToMe share")):
        assert keys_of(processed)[key] == 0.5
        (line,) = processed.comments.splitlines()
        assert "1024 → " in line and "sample" not in vars(processed.p)


def test_both_merge_once(generate):
    alone, both = generate(HALVED), generate(HALVED, HALVED)
    assert pixels(both) == pixels(alone)
    assert keys_of(both) == keys_of(alone), "the second claims nothing"
    _, second = both.comments.splitlines()
    assert "nothing merged" in second and "512 tokens" in second


def test_changed_files_are_run_after_reload_ui(two, generate):
    """Files that the extension doesn't use, such as the demo's, make no difference."""
    _, second = two.folders
    old = running("settings", second)
    update(second)
    two.host.reload_ui()
    assert labels() == ["Share", "Share"]
    assert keys_of(generate([False], HALVED))["ToMe share"] == 0.5
    new = running("settings", second)
    assert new is not old
    (second / "lab").mkdir()
    (second / "lab" / "demo.py").touch()
    two.host.reload_ui()
    assert running("settings", second) is new


def test_old_and_new_code_never_mix(two, generate):
    """Even if script bodies are executed again while the running scripts stay."""
    from modules import script_callbacks

    update(two.folders[1])
    two.host.reload_script_bodies()
    processed = generate([False], HALVED)
    assert "1024 → " in processed.comments and keys_of(processed)["ToMe ratio"] == 0.5
    registered = script_callbacks.callback_map["cfg_denoiser"]
    assert sum("tome.py" in each.script for each in registered) == len(two.folders)
