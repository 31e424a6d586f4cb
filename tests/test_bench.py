"""The benchmark: every subcommand on a tiny UNet, and that it compares like with like. No time is asserted."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lab.bench import layer, memory, models, output, speed, timing
from lab.bench.__main__ import SUBCOMMANDS, main
from lab.bench.contenders import CORNER, LIMIT, OURS, RANDOM, UNMERGED, contenders, matchers, merged_layers
from lab.bench.options import merge_ratio, picture_size
from lab.bench.packages import MissingPackage, require
from tomesd_core import hooks
from tomesd_core.settings import MergeSettings

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
CPU = torch.device("cpu")
FORCED = MergeSettings(schedule="constant", reuse_steps=1, skip_unprofitable=False)
EVERYONE = [UNMERGED, OURS, CORNER, RANDOM, LIMIT]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return models.build_unet(models.TINY, CPU, torch.float32)


@pytest.fixture
def bench(tmp_path: Path, capfd: pytest.CaptureFixture) -> Callable[..., tuple[list[dict[str, str]], str]]:
    """Runs a subcommand; gives its CSV's rows and what it printed."""

    def run(*arguments: object) -> tuple[list[dict[str, str]], str]:
        assert main([*map(str, arguments), "--out", str(tmp_path)]) == 0
        printed = capfd.readouterr()
        (written,) = tmp_path.glob(f"{arguments[0]}-*.csv")
        assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "100%" in printed.err
        with written.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            assert row["machine"] and "torch" in row["versions"] and row["date"] and arguments[0] in row["command"]
        assert rows[0]["machine"] in printed.out
        assert rows[0]["command"] in printed.out
        return rows, printed.out

    return run


def test_speed(bench: Callable) -> None:
    pytest.importorskip("tomesd")
    rows, printed = bench("speed", "--tiny", "--rounds", 1, "--ratios", 0, 0.6, "--sizes", "128x64", "--force")
    assert [(row["size"], row["ratio"], row["contender"]) for row in rows] == [
        ("128x64", ratio, name) for ratio in ("0.0", "0.6") for name in EVERYONE
    ]
    assert set(speed.COLUMNS) <= set(rows[0])
    for row in rows:
        assert float(row["seconds"]) > 0
        assert row["rounds"] == "1"
    by_name = {row["contender"]: row for row in rows if row["ratio"] == "0.6"}
    assert float(by_name[UNMERGED]["gain"]) == 1
    ours, random = by_name[OURS], by_name[RANDOM]
    assert float(ours["gain"]) == pytest.approx(float(by_name[UNMERGED]["seconds"]) / float(ours["seconds"]))
    assert float(ours["over_tomesd_random"]) == pytest.approx(float(ours["seconds"]) / float(random["seconds"]))
    assert float(by_name[LIMIT]["over_limit"]) == 1
    assert "128 -> 52 tokens" in ours["merged"] and ours["merged"] in printed
    assert "nothing merged" in next(row for row in rows if row["contender"] == OURS)["merged"]


@pytest.mark.parametrize(("options", "matched_layers"), [((), 3), (("--share-layers",), 1)])
def test_speed_over_several_steps(
    bench: Callable, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], matched_layers: int
) -> None:
    matched = []
    match = hooks.match
    monkeypatch.setattr(hooks, "match", lambda *args, **how: matched.append(args) or match(*args, **how))
    rows, _ = bench(
        *("speed", "--tiny", "--rounds", 2, "--ratios", 0.5, "--sizes", "64x64", "--reuse-steps", 2),
        *("--force", "--attention", "sdp", "--dtype", "bfloat16"),
        *options,
    )
    ours = next(row for row in rows if row["contender"] == OURS)
    assert float(ours["seconds_low"]) <= float(ours["seconds"]) <= float(ours["seconds_high"])
    assert ours["attention"] == "sdp"
    # A warm-up and two rounds of two steps, which share a matching; the tiny UNet has three layers on that grid.
    assert len(matched) == matched_layers * 3
    assert "bfloat16" in ours["versions"]


def test_layer(bench: Callable) -> None:
    pytest.importorskip("tomesd")
    rows, _ = bench("layer", "--tiny", "--rounds", 1, "--ratios", 0.3, 0.6)
    kinds = [f"kept for {layer.REUSE_STEPS} steps", "exact", "whole image"]
    names = [UNMERGED, OURS, *(f"{OURS}, {kind}" for kind in kinds), CORNER, RANDOM]
    assert [(row["tokens"], row["ratio"], row["contender"]) for row in rows] == [
        (tokens, ratio, name) for tokens in ("64", "256") for ratio in ("0.3", "0.6") for name in names
    ]
    assert set(layer.COLUMNS) <= set(rows[0])
    for row in rows:
        assert float(row["attention"]) > 0
        if row["contender"] == UNMERGED:
            unmerged = float(row["attention"])
            assert not row["merging"] and not row["growth"] and not row["gain"]
            continue
        assert float(row["gain"]) == pytest.approx(unmerged / (float(row["merging"]) + float(row["attention"])))
        # Tiny layers: too little to pay.
        assert row["rule"] == ("leave out" if row["contender"].startswith(OURS) else "")
        assert float(row["merging"]) == pytest.approx(sum(float(row[part]) for part in ("match", "merge", "unmerge")))
        # A slope needs two sizes.
        assert bool(row["growth"]) == (row["tokens"] == "256")
    assert [row["over_tomesd_corner"] for row in rows if row["contender"] == CORNER] == ["1.0"] * 4


def test_memory(bench: Callable) -> None:
    pytest.importorskip("tomesd")
    rows, _ = bench("memory", "--tiny", "--rounds", 1, "--force")
    assert set(memory.COLUMNS) <= set(rows[0])
    steps = {row["contender"]: row for row in rows if row["what"] == "unet step"}
    assert list(steps) == EVERYONE
    # The one thing that is the same on every machine: fewer tokens take less, and none less than the limit.
    peaks = {name: int(row["bytes"]) for name, row in steps.items()}
    assert peaks[LIMIT] <= min(peaks.values()) < peaks[OURS] * 1.05 < peaks[UNMERGED]
    assert float(steps[OURS]["gain"]) == pytest.approx(peaks[UNMERGED] / peaks[OURS])
    matching = [row for row in rows if row["what"] == "matching"]
    assert [row["contender"] for row in matching] == [OURS, f"{OURS}, exact", f"{OURS}, whole image", CORNER, RANDOM]
    assert all(int(row["bytes"]) > 0 for row in matching)


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "lab.bench", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in printed for name in SUBCOMMANDS)


def test_checkpoint(tiny: nn.Module, tmp_path: Path, bench: Callable, capfd: pytest.CaptureFixture) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {models.PREFIX + name: tensor for name, tensor in tiny.state_dict().items()}
    path = tmp_path / "sd1.safetensors"
    safetensors.save_file({**weights, "first_stage_model.encoder.conv_in.bias": torch.zeros(2)}, path)

    config, read = models.read_checkpoint(path)
    assert config == {**models.TINY, "num_res_blocks": [1, 1], "attention_resolutions": [2, 1]}
    loaded = models.build_unet(config, CPU, torch.float32, read)
    step, other = (models.one_step(unet, config, (64, 64)) for unet in (loaded, tiny))
    assert torch.equal(step(), other())

    rows, _ = bench("speed", "--checkpoint", path, "--sizes", "64x64", "--ratios", 0.5, "--rounds", 1)
    assert UNMERGED in [row["contender"] for row in rows]

    # A tensor too few is an error, not a random weight.
    weights.popitem()
    safetensors.save_file(weights, path)
    with pytest.raises(RuntimeError, match="Missing key"):
        models.build_unet(config, CPU, torch.float32, models.read_checkpoint(path)[1])
    safetensors.save_file({"lora.up.weight": torch.zeros(2, 2)}, path)
    assert main(["speed", "--checkpoint", str(path), "--out", str(tmp_path)]) == 2
    assert "sd1.safetensors: there is no UNet" in capfd.readouterr().err
    assert main(["speed", "--checkpoint", str(tmp_path / "none.ckpt"), "--out", str(tmp_path)]) == 2
    assert "must be a .safetensors file" in capfd.readouterr().err


def _shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        unet = UNetModel(**config, image_size=32, use_spatial_transformer=True, use_checkpoint=False, legacy=False)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def test_config_is_read_off_the_weights() -> None:
    blocks = {"num_res_blocks": [2] * 4}
    assert models.config_of(_shapes_of(models.SD1)) == {**models.SD1, **blocks}
    second = {**models.SD1, **blocks, "context_dim": 1024, "num_head_channels": 64, "use_linear_in_transformer": True}
    del second["num_heads"]
    assert models.config_of(_shapes_of(second)) == second
    with pytest.raises(ValueError, match="context of 2048 channels"):
        models.config_of(_shapes_of({**models.TINY, "context_dim": 2048}))


def test_limit_touches_the_merged_layers_alone(tiny: nn.Module, watch: Callable, hook_dicts: Callable) -> None:
    step = models.one_step(tiny, models.TINY, (128, 128))
    limit = next(one for one in contenders(256, torch.float32)[0] if one.name == LIMIT)
    names = {one.name for one in merged_layers(tiny)}
    assert len(names) == 3
    before = hook_dicts(tiny)
    with limit.put_on(tiny, 0.6):
        changed = [name for name, registered in hook_dicts(tiny).items() if registered != before[name]]
        # Every changed module is the self-attention of a merged layer.
        assert {name.rpartition(".attn1.")[0] for name in changed} == names
    with limit.put_on(tiny, 0.6), watch(tiny) as seen:
        assert step().shape == (2, 4, 16, 16)
    for name, inputs in seen.items():
        # The hooks of `watch` saw what the queries are made of: 256 tokens at level 1, 64 at level 2.
        assert [tensor.shape[1] for tensor in inputs] == [256 - int(256 * 0.6) if name in names else 64]
        assert all(tensor.is_contiguous() for tensor in inputs)
    assert hook_dicts(tiny) == before


def test_limit_attends_to_as_many_tokens_as_ours(tiny: nn.Module, watch: Callable) -> None:
    step = models.one_step(tiny, models.TINY, (256, 256))
    lengths = {}
    for one in contenders(1024, torch.float32, FORCED)[0]:
        with one.put_on(tiny, 0.6), watch(tiny) as seen:
            step()
        lengths[one.name] = sorted(inputs[0].shape[1] for inputs in seen.values())
    assert lengths[LIMIT] == lengths[OURS] != lengths[UNMERGED]


@pytest.mark.parametrize("name", EVERYONE)
def test_contenders_leave_nothing_behind(tiny: nn.Module, hook_dicts: Callable, name: str) -> None:
    found = {one.name: one for one in contenders(64, torch.float32, FORCED)[0]}
    if name not in found:
        pytest.skip("tomesd is not installed")
    step = models.one_step(tiny, models.TINY, (64, 64))
    registered, kinds, plain = hook_dicts(tiny), [type(module) for module in tiny.modules()], step()
    attributes = [set(vars(module)) for module in tiny.modules()]
    with found[name].put_on(tiny, 0.5):
        assert torch.equal(step(), plain) == (name == UNMERGED)
    assert torch.equal(step(), plain)
    assert hook_dicts(tiny) == registered
    assert [type(module) for module in tiny.modules()] == kinds
    assert [set(vars(module)) for module in tiny.modules()] == attributes


def test_fused_attention_is_the_same_attention(tiny: nn.Module) -> None:
    step = models.one_step(tiny, models.TINY, (64, 64))
    plain = step()
    with models.attention(tiny, "sdp"):
        fused = step()
    assert torch.allclose(plain, fused, atol=1e-4) and not torch.equal(plain, fused)
    assert torch.equal(step(), plain)
    assert not any("forward" in vars(module) for module in tiny.modules())


def test_matchers_match_the_same_number() -> None:
    x = layer.image_tokens(16, 32, CPU, torch.float32)
    assert x.shape == (2, 256, 32)
    for matcher in matchers(16, torch.float32, reuse_steps=4)[0]:
        merge, unmerge = matcher.match(x, (16, 16), 0.5, 0)
        merged = merge(x)
        assert merged.shape == (2, 128, 32)
        assert unmerge(merged).shape == x.shape


def test_what_takes_too_much_is_left_out() -> None:
    # 2048x2048: 6.4 GB of similarities. Nothing is allocated here.
    some, notes = matchers(256, torch.float32)
    assert [one.name for one in some] == [OURS, f"{OURS}, exact"]
    assert any("whole image" in note for note in notes)
    assert any("GB" in note or "not installed" in note for note in notes)
    assert [one.name for one in contenders(256 * 256, torch.float32)[0]] == [UNMERGED, OURS, LIMIT]


def test_without_tomesd(monkeypatch: pytest.MonkeyPatch, bench: Callable) -> None:
    monkeypatch.setitem(sys.modules, "tomesd", None)
    rows, printed = bench("speed", "--tiny", "--rounds", 1, "--ratios", 0.5, "--sizes", "64x64")
    assert [row["contender"] for row in rows] == [UNMERGED, OURS, LIMIT]
    assert rows[0]["over_tomesd_corner"] == ""
    assert "not installed: pip install tomesd==0.1.3" in printed


@pytest.mark.parametrize("package", ["matplotlib", "tqdm", "ldm"])
def test_missing_packages_are_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["speed", "--tiny", "--rounds", "1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert package in said and "pip install" in said
    with pytest.raises(MissingPackage):
        require(package)


def test_wrong_arguments(capsys: pytest.CaptureFixture) -> None:
    assert picture_size("512x768") == (512, 768)
    assert merge_ratio("0.75") == 0.75
    for arguments, why in (
        (["speed", "--sizes", "500x512"], "multiples of 64"),
        (["speed", "--ratios", "0.8"], "0.75"),
        (["layer", "--rounds", "0"], "from 1 up"),
        (["memory", "--tiny", "--checkpoint", "x.safetensors"], "not allowed with"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert why in capsys.readouterr().err
    for arguments, why in (
        (["layer", "--tiny", "--channels", "12"], "multiple of the 8 heads"),
        (["layer", "--tiny", "--ratios", "0"], "above 0"),
        (["layer", "--tiny", "--device", "cuda:99"], "cuda:99"),
    ):
        assert main(arguments) == 2
        assert why in capsys.readouterr().err


def test_spread_and_pairs() -> None:
    assert timing.spread([3.0]) == (3, 3, 3)
    assert timing.spread([5, 1, 4, 2, 3]) == (3, 2, 4)
    # A round that is slow for all alike changes no quotient.
    assert timing.paired([1, 10, 2], [2, 20, 4]) == (0.5, 0.5, 0.5)
    rows = timing.compared({"a": [4.0, 8.0], "b": [2.0, 4.0]}, "seconds", "a", {"over_b": "b", "over_c": "c"})
    assert [(row["contender"], row["seconds"], row["gain"], row["over_b"], row["over_c"]) for row in rows] == [
        ("a", 6, 1, 2, None),
        ("b", 3, 2, 1, None),
    ]


def test_growth() -> None:
    sizes = [4096, 16384, 65536]
    assert timing.growth(sizes, [size**1.15 for size in sizes]) == pytest.approx(1.15)
    assert timing.growth(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
    assert timing.growth(sizes, [7.0] * 3) == pytest.approx(0)
    assert timing.growth(sizes[:1], [1.0]) is None


def test_rounds_are_interleaved_and_turn() -> None:
    told, ran = [], []
    runs = {name: lambda name=name: ran.append(name) or len(ran) for name in "abc"}
    results = timing.interleaved(runs, rounds=3, tick=told.append, warmup=1)
    assert told == ran
    assert "".join(ran) == "cab" + "abc" + "bca" + "cab"
    # The warm-up's results are not among them.
    assert results == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_peak_bytes() -> None:
    kept = torch.zeros(1000)

    def work() -> torch.Tensor:
        first = torch.zeros(2000)
        second = first + 1
        del first
        return torch.cat([second, kept, second])

    # At the end: `second` of 2000 and the result of 5000, without `first` and `kept`.
    assert memory.peak_bytes(work, CPU) == pytest.approx(7000 * 4, abs=64)


def test_table() -> None:
    columns = {"name": ("name", str), "value": ("value", output.number(1))}
    rows = [{"name": "a", "value": 1.0}, {"name": "long", "value": None}, {"name": "b", "value": 123.46}]
    assert output.table(columns, rows).splitlines() == [
        "name  value",
        "-----------",
        "a       1.0",
        "long      -",
        "b     123.5",
    ]


def test_papers_curve() -> None:
    gains = dict(output.paper_line(output.PAPER_SECONDS))
    assert (round(gains[0.5], 2), round(gains[0.6], 2)) == (1.87, 2.03)
    assert round(dict(output.paper_line(output.PAPER_GIGABYTES))[0.6], 2) == 5.68


def test_machine_is_named() -> None:
    machine = output.this_machine(CPU, "float32", "python -m lab.bench speed")
    assert "thread" in machine.machine
    assert torch.__version__ in machine.versions and "tomesd" in machine.versions
