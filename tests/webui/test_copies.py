"""Two copies of the extension and an installed `tomesd_core`: each uses its own files and state."""

from __future__ import annotations

import json
import shutil

import pytest
from in_host import HALVED, REQUEST, ROOT, run

LEFT_OUT = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Output of a host with two copies, the first of a newer version, in another process.

    The process has imported this project's `tomesd_core` before.
    """
    extensions = tmp_path_factory.mktemp("host") / "extensions"
    for copy in ("first", "second"):
        for name in ("scripts", "tomesd_core"):
            shutil.copytree(ROOT / name, extensions / copy / name, ignore=LEFT_OUT)
    settings = extensions / "first" / "tomesd_core" / "settings.py"
    text = settings.read_text(encoding="utf-8")
    assert text.count('"Ratio",') == 1
    settings.write_text(text.replace('"Ratio",', '"Share",'), encoding="utf-8")
    done = run(CODE, str(extensions), json.dumps(REQUEST), json.dumps(HALVED))
    answers = json.loads(done.stdout.splitlines()[-1])
    answers["log"] = [
        line for line in done.stderr.decode().splitlines() if "more than one script" in line
    ]
    return answers


CODE = """
import importlib, json, sys
from pathlib import Path

folders, request, halved = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
first, second = folders / "first", folders / "second"
import torch

torch.set_num_threads(1)
import tomesd_core
from lab.host import Host
from lab.demo.model import TinyModel

installed = Path(tomesd_core.__file__).parent
def of_core():
    names = [name for name in sys.modules if name.split(".")[0] == "tomesd_core"]
    return {name: id(sys.modules[name]) for name in names}


before = of_core()
models = {"tiny": lambda: TinyModel.random(0, channel_mult=[1], attention_resolutions=[1])}
host = Host(models, [first, second])
from fastapi import FastAPI
from modules import processing, scripts, shared

host.start_app(FastAPI())


def script_of(folder):
    file = str(folder / "scripts" / "tome.py")
    return next(script for script in scripts.scripts_txt2img.scripts if script.filename == file)


def module_of(folder):
    file = str(folder / "scripts" / "tome.py")
    return next(data.module for data in scripts.scripts_data if data.path == file)


def generate(**given):
    p = processing.StableDiffusionProcessingTxt2Img(**request)
    arguments = host.script_args()
    for name, values in given.items():
        script = script_of(folders / name)
        arguments[script.args_from : script.args_from + len(values)] = values
    p.is_api = True
    p.set_up(scripts.scripts_txt2img, arguments)
    shared.state.begin()
    processed = processing.process_images(p)
    return {
        "picture": processed.images[0].tobytes().hex(),
        "lines": [line for line in processed.comments.splitlines() if "more than one" not in line],
        "keys": {k: v for k, v in processed.extra_generation_params.items() if "ToMe" in k},
        "hooked": sum(
            bool(m._forward_hooks or m._forward_pre_hooks) for m in host.sd_model.modules()
        ),
        "wrapped": "sample" in vars(p),
    }


answers = {"installed": str(installed), "folders": [str(first), str(second)]}
answers["labels"] = [script_of(folder).controls[1].label for folder in (first, second)]
package = module_of(second).PACKAGE
presets = importlib.import_module(f"{package}.webui.presets")
settings = importlib.import_module(f"{package}.settings")
presets.save("Mine", settings.MergeSettings())
for folder in (first, second):
    module = module_of(folder)
    names = [name for name in sys.modules if name.split(".")[0] == module.PACKAGE]
    files = [Path(sys.modules[name].__file__) for name in names]
    packages = {next(part for part in file.parents if part.name == "tomesd_core") for file in files}
    roots = {str(package.parent) for package in packages}
    answers.setdefault("files", []).append([len(files), sorted(roots)])
    answers.setdefault("presets", []).append((folder / "presets.json").exists())

import tomesd_core.compat, tomesd_core.merge_map

after = of_core()
answers["kept"] = after.items() >= before.items()
inner = [sys.modules[name] for name in after if name.count(".") == 1]
answers["installed files"] = sorted(
    {str(Path(module.__file__).parent) for module in inner if not hasattr(module, "__path__")}
)

off = [False, *halved[1:]]
answers["plain"] = generate()
picture = processing.process_images(host.make_p(halved, **request)).images[0]
answers["api"] = picture.tobytes().hex()
answers["first"] = generate(first=halved, second=off)
answers["second"] = generate(first=off, second=halved)
answers["both"] = generate(first=halved, second=halved)
host.reload_ui()
answers["after reload"] = generate(first=halved)
print(json.dumps(answers))
"""


def test_each_runs_the_files_of_its_own_folder(answers):
    assert answers["labels"] == ["Share", "Ratio"]
    for (count, folders), folder in zip(answers["files"], answers["folders"], strict=True):
        assert count > 20
        assert folders == [folder]


def test_each_keeps_presets_in_its_own_folder(answers):
    assert answers["presets"] == [False, True]


def test_a_package_that_was_imported_before_stays(answers):
    assert answers["kept"] is True
    assert answers["installed files"] == [answers["installed"]] == [str(ROOT / "tomesd_core")]


def test_the_api_reaches_the_first_and_it_merges(answers):
    assert answers["api"] == answers["first"]["picture"] != answers["plain"]["picture"]


@pytest.mark.parametrize("which", ["first", "second", "after reload"])
def test_the_copy_that_is_on_merges(answers, which):
    one = answers[which]
    assert one["keys"]["ToMe ratio" if which == "second" else "ToMe share"] == 0.5
    assert len(one["lines"]) == 1 and "1024 → " in one["lines"][0]
    assert (one["hooked"], one["wrapped"]) == (0, False)
    assert one["picture"] == answers["first"]["picture"]


def test_both_merge_once(answers):
    assert answers["both"]["picture"] == answers["first"]["picture"]
    assert answers["both"]["keys"] == answers["first"]["keys"], "the second claims nothing"
    _, second = answers["both"]["lines"]
    assert "nothing merged" in second and "512 tokens" in second


def test_the_second_is_named_at_the_start(answers):
    (line,) = set(answers["log"])
    first, second = (line.index(f"{folder}/scripts/tome.py") for folder in answers["folders"])
    assert first < second
