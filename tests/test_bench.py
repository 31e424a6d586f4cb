"""The benchmark: every subcommand on a tiny UNet, and that it compares like with like. No time is
asserted."""

from __future__ import annotations

import contextlib
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
from lab.bench.contenders import (
    CORNER,
    EXACT,
    KEYS,
    LIMIT,
    LIMIT_KEYS,
    LIMIT_OF,
    OURS,
    PAPER,
    QUERIES,
    RANDOM,
    TODO,
    TODO_FACTORS,
    TOKENS,
    UNMERGED,
    UNWEIGHTED,
    Contender,
    contenders,
    matchers,
    merged_layers,
)
from lab.bench.options import merge_ratio, picture_size
from lab.bench.packages import MissingPackage, require
from lab.bench.peers import TOMA
from tomesd_core import hooks
from tomesd_core.proportional import PROBE_TOKENS
from tomesd_core.settings import MergeSettings

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
CPU = torch.device("cpu")
FORCED = MergeSettings(schedule="constant", skip_unprofitable=False)
OURS_AND_PEERS = [KEYS, PAPER, CORNER, RANDOM]
EVERYONE = [
    UNMERGED,
    KEYS,
    UNWEIGHTED,
    TOKENS,
    PAPER,
    CORNER,
    RANDOM,
    QUERIES,
    TODO,
    TOMA,
    LIMIT_KEYS,
    LIMIT,
]


def one_contender(name: str, ratio: float, tokens: int = 256) -> Contender:
    (contender,), _ = contenders([name], ratio, tokens, torch.float32, FORCED)
    return contender


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return models.build_unet(models.TINY, CPU, torch.float32)


@pytest.fixture
def bench(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> Callable[..., tuple[list[dict[str, str]], str]]:
    """Runs a subcommand; gives its CSV's rows and what it printed."""

    def run(*arguments: object, stem: str | None = None) -> tuple[list[dict[str, str]], str]:
        assert main([*map(str, arguments), "--out", str(tmp_path)]) == 0
        printed = capfd.readouterr()
        (csv_file,) = tmp_path.glob(f"{stem or arguments[0]}-*.csv")
        assert csv_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "100%" in printed.err
        with csv_file.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            assert (
                row["machine"]
                and "torch" in row["versions"]
                and row["date"]
                and arguments[0] in row["command"]
            )
        assert rows[0]["machine"] in printed.out
        assert rows[0]["command"] in printed.out
        return rows, printed.out

    return run


def test_speed(bench: Callable) -> None:
    pytest.importorskip("tomesd")
    ratios = ("0.0", "0.6", "0.75", "0.84")
    rows, printed = bench(
        "speed", "--tiny", "--rounds", 1, "--ratios", *ratios, "--sizes", "128x64", "--force"
    )
    at = {
        ratio: {row["contender"]: row for row in rows if row["ratio"] == ratio} for ratio in ratios
    }
    limits = [LIMIT_KEYS, LIMIT]
    assert {row["size"] for row in rows} == {"128x64"} and set(speed.COLUMNS) <= set(rows[0])
    assert all(float(row["seconds"]) > 0 and row["rounds"] == "1" for row in rows)
    # Each only at the ratios that it has.
    assert list(at["0.0"]) == list(at["0.6"]) == [UNMERGED, *OURS_AND_PEERS, *limits]
    assert list(at["0.75"]) == [UNMERGED, *OURS_AND_PEERS, TODO, *limits]
    assert list(at["0.84"]) == [UNMERGED, KEYS, PAPER, *limits]
    assert (
        "tomesd is left out above its highest ratio" in printed
        and "ToDo is left out but at" in printed
    )
    by_name = at["0.6"]
    # At one ratio keys leaves other pairs than the peers, and has another limit.
    assert by_name[KEYS]["over_tomesd_random"] == "" != by_name[PAPER]["over_tomesd_random"]
    seconds = {name: float(row["seconds"]) for name, row in by_name.items()}
    for name, limit in ((KEYS, LIMIT_KEYS), (PAPER, LIMIT), (CORNER, LIMIT)):
        assert float(by_name[name]["over_limit"]) == pytest.approx(seconds[name] / seconds[limit])
    assert "128 → 52 tokens" in by_name[PAPER]["merged"] and by_name[PAPER]["merged"] in printed
    assert "128 → 52 keys" in by_name[KEYS]["merged"]
    assert "nothing merged" in at["0.0"][KEYS]["merged"]


def test_speed_over_several_steps(bench: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    matchings = []
    match = hooks.match
    monkeypatch.setattr(
        hooks, "match", lambda *args, **how: matchings.append(args) or match(*args, **how)
    )
    rows, _ = bench(
        *(
            "speed",
            "--tiny",
            "--rounds",
            2,
            "--ratios",
            0.5,
            "--sizes",
            "64x64",
            "--reuse-steps",
            2,
        ),
        *("--methods", "tokens", "--force", "--attention", "sdp", "--dtype", "bfloat16"),
    )
    by_name = {row["contender"]: row for row in rows}
    assert KEYS not in by_name and LIMIT_KEYS not in by_name
    ours = by_name[TOKENS]
    assert float(ours["seconds_low"]) <= float(ours["seconds"]) <= float(ours["seconds_high"])
    assert ours["attention"] == "sdp" and "2 of 2 steps" in ours["merged"]
    # A warm-up and two rounds of two steps, which share a matching; the tiny UNet has three layers
    # on that grid.
    assert len(matchings) == 3 * 3
    assert "bfloat16" in ours["versions"]


def test_speed_of_presets(bench: Callable) -> None:
    rows, _ = bench(
        "speed", "--tiny", "--rounds", 1, "--presets", "Quality", "Fast", "--force", stem="presets"
    )
    names = [row["contender"] for row in rows]
    assert names == [UNMERGED, "Quality", "Quality before", "Fast", "Fast before"]
    # 0.75 and 0.5 of 256 tokens, and of 64 at level 2.
    merged = (
        "7 of 7 self-attention layers, 256 → 64 to 128 tokens, 64 → 16 to 32 tokens, 8 of 8 steps"
    )
    assert rows[4]["merged"] == merged


def test_layer(bench: Callable) -> None:
    pytest.importorskip("tomesd")
    rows, _ = bench("layer", "--tiny", "--rounds", 1, "--ratios", 0.3, 0.75)
    matchers_alone = [EXACT]
    names = [UNMERGED, KEYS, UNWEIGHTED, TOKENS, PAPER, *matchers_alone, CORNER, RANDOM, QUERIES]
    limits = [LIMIT_KEYS, LIMIT]
    assert [(row["tokens"], row["ratio"], row["contender"]) for row in rows] == [
        (tokens, ratio, name)
        for tokens in ("64", "256")
        for ratio in ("0.3", "0.75")
        for name in [*names, *([TODO] if ratio == "0.75" else []), *limits]
    ]
    assert set(layer.COLUMNS) <= set(rows[0])
    for case in [(tokens, ratio) for tokens in ("64", "256") for ratio in ("0.3", "0.75")]:
        by_name = {row["contender"]: row for row in rows if (row["tokens"], row["ratio"]) == case}
        seconds = {name: float(row["layer"]) for name, row in by_name.items() if row["layer"]}
        assert set(by_name) - set(seconds) == set(matchers_alone)
        for name, row in by_name.items():
            # Tiny layers: too little to pay, but by the rule of the method paper.
            rule = "merge" if name == PAPER and row["tokens"] == "256" else "leave out"
            assert row["rule"] == (rule if name in (KEYS, TOKENS, PAPER) else "")
            if name in seconds:
                assert float(row["gain"]) == pytest.approx(seconds[UNMERGED] / seconds[name])
            if name in LIMIT_OF:
                assert float(row["over_limit"]) == pytest.approx(
                    seconds[name] / seconds[LIMIT_OF[name]]
                )
            assert bool(row["weighting"]) == (name in (KEYS, TOKENS))
            assert bool(row["merging"]) == (
                name in (KEYS, TOKENS, PAPER, *matchers_alone, CORNER, RANDOM)
            )
            if row["merging"]:
                parts = [float(row[part]) for part in ("match", "merge", "unmerge") if row[part]]
                assert len(parts) == (2 if name == KEYS else 3)
                assert float(row["merging"]) == pytest.approx(sum(parts))
                corner = float(by_name[CORNER]["merging"])
                assert float(row["over_tomesd_corner"]) == pytest.approx(
                    float(row["merging"]) / corner
                )
            # A slope needs two sizes.
            assert bool(row["growth"]) == (bool(row["merging"]) and row["tokens"] == "256")
        assert float(by_name[KEYS]["weighting"]) == pytest.approx(
            seconds[KEYS] / seconds[UNWEIGHTED]
        )
        assert float(by_name[TOKENS]["weighting"]) == pytest.approx(
            seconds[TOKENS] / seconds[PAPER]
        )


def test_layers_run_with_their_contender_on(
    monkeypatch: pytest.MonkeyPatch, bench: Callable
) -> None:
    pytest.importorskip("tomesd")
    lengths: dict[str, set[tuple[int, int]]] = {}
    doing = [""]
    interleaved, fused = layer.interleaved, models._fused_attention

    def turn_by_turn(runs: dict, rounds: int, tick: Callable) -> dict:
        return interleaved(runs, rounds, lambda name: doing.__setitem__(0, name) or tick(name))

    def noting_lengths(
        attention: nn.Module, x: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        keys = x if context is None else context
        if x.shape[1] > PROBE_TOKENS:
            lengths.setdefault(doing[0], set()).add((x.shape[1], keys.shape[1]))
        return fused(attention, x, context)

    monkeypatch.setattr(layer, "interleaved", turn_by_turn)
    monkeypatch.setattr(models, "_fused_attention", noting_lengths)
    bench("layer", "--tiny", "--rounds", 1, "--tokens", 16, "--ratios", 0.75)
    whole, fewer, both = {(256, 256)}, {(256, 64)}, {(64, 64)}
    assert lengths == {
        UNMERGED: whole,
        **dict.fromkeys((KEYS, UNWEIGHTED, TODO, LIMIT_KEYS), fewer),
        **dict.fromkeys((TOKENS, PAPER, CORNER, RANDOM, LIMIT), both),
        QUERIES: {(64, 256)},
    }


def test_memory(bench: Callable) -> None:
    pytest.importorskip("tomesd")
    rows, _ = bench("memory", "--tiny", "--rounds", 1, "--force")
    assert set(memory.COLUMNS) <= set(rows[0])
    steps = {row["contender"]: row for row in rows if row["what"] == "unet step"}
    assert list(steps) == [UNMERGED, *OURS_AND_PEERS, LIMIT_KEYS, LIMIT]
    # The one thing that is the same on every machine: fewer tokens take less, and none less than
    # its limit.
    peaks = {name: int(row["bytes"]) for name, row in steps.items()}
    for name in OURS_AND_PEERS:
        assert peaks[LIMIT_OF[name]] <= peaks[name] < peaks[LIMIT_OF[name]] * 1.2 < peaks[UNMERGED]
        assert float(steps[name]["over_limit"]) == pytest.approx(
            peaks[name] / peaks[LIMIT_OF[name]]
        )
    assert float(steps[KEYS]["gain"]) == pytest.approx(peaks[UNMERGED] / peaks[KEYS])
    matching = [row for row in rows if row["what"] == "matching"]
    assert [row["contender"] for row in matching] == [OURS, EXACT, CORNER, RANDOM]
    assert all(int(row["bytes"]) > 0 for row in matching)


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "lab.bench", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in printed for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_explains_its_options(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert "\noptions:\n" in capsys.readouterr().out


def test_checkpoint(
    tiny: nn.Module,
    tmp_path: Path,
    bench: Callable,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.setitem(models.BY_CONTEXT, 768, models.TINY)
    weights = {models.PREFIX + name: tensor for name, tensor in tiny.state_dict().items()}
    path = tmp_path / "sd1.safetensors"
    safetensors.save_file(
        {**weights, "first_stage_model.encoder.conv_in.bias": torch.zeros(2)}, path
    )

    config, weights_of_file = models.read_checkpoint(path)
    assert config == models.TINY
    loaded = models.build_unet(config, CPU, torch.float32, weights_of_file)
    step, other = (models.one_step(unet, config, (64, 64)) for unet in (loaded, tiny))
    assert torch.equal(step(), other())

    rows, _ = bench(
        "speed", "--checkpoint", path, "--sizes", "64x64", "--ratios", 0.5, "--rounds", 1
    )
    assert UNMERGED in [row["contender"] for row in rows]

    # A tensor too few is an error, not a random weight.
    weights.popitem()
    safetensors.save_file(weights, path)
    with pytest.raises(ValueError, match="Missing key"):
        models.build_unet(config, CPU, torch.float32, models.read_checkpoint(path)[1])
    safetensors.save_file({"lora.up.weight": torch.zeros(2, 2)}, path)
    assert main(["speed", "--checkpoint", str(path), "--out", str(tmp_path)]) == 2
    assert "sd1.safetensors: there is no UNet" in capfd.readouterr().err
    assert main(["speed", "--checkpoint", str(tmp_path / "none.ckpt"), "--out", str(tmp_path)]) == 2
    assert "must be a .safetensors file" in capfd.readouterr().err


def test_the_shape_is_that_of_the_version(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    for context, inputs, others in (
        (768, 4, {"num_heads": 8}),
        (1024, 9, {"num_head_channels": 64}),
    ):
        keys = {
            "input_blocks.0.0.weight": torch.zeros(1, inputs),
            "x.attn2.to_k.weight": torch.zeros(1, context),
        }
        safetensors.save_file({models.PREFIX + name: value for name, value in keys.items()}, path)
        config, _ = models.read_checkpoint(path)
        assert (config["context_dim"], config["in_channels"]) == (
            context,
            inputs,
        ) and others.items() <= config.items()
    safetensors.save_file({f"{models.PREFIX}x.attn2.to_k.weight": torch.zeros(1, 2048)}, path)
    with pytest.raises(ValueError, match="no UNet of Stable Diffusion 1 or 2"):
        models.read_checkpoint(path)


def test_limit_touches_the_merged_layers_alone(tiny: nn.Module, watch: Callable) -> None:
    step, names = (
        models.one_step(tiny, models.TINY, (128, 128)),
        {one.name for one in merged_layers(tiny)},
    )
    assert len(names) == 3
    with one_contender(LIMIT, 0.6).put_on(tiny), watch(tiny) as inputs_of:
        assert step().shape == (2, 4, 16, 16)
    for name, inputs in inputs_of.items():
        # What the queries are made of: 256 tokens at level 1, 64 at level 2.
        assert [tensor.shape[1] for tensor in inputs] == [
            256 - int(256 * 0.6) if name in names else 64
        ]
        assert all(tensor.is_contiguous() for tensor in inputs)


@pytest.fixture
def keys_of(tiny: nn.Module) -> Callable[[Contender], list[tuple[torch.Tensor, torch.Tensor]]]:
    """What queries and keys are made of, in the merged layers, during a step of 256×256 pixels."""
    step = models.one_step(tiny, models.TINY, (256, 256))

    def run(contender: Contender) -> list[tuple[torch.Tensor, torch.Tensor]]:
        inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        with contender.put_on(tiny), contextlib.ExitStack() as handles:
            for one in merged_layers(tiny):
                queries = []
                attn1 = one.block.attn1
                watched = (
                    attn1.to_q.register_forward_pre_hook(
                        lambda _, args, to=queries: to.append(args[0])
                    ),
                    attn1.to_k.register_forward_pre_hook(
                        lambda _, args, of=queries: (
                            inputs.append((of[-1], args[0]))
                            if of[-1].shape[1] > PROBE_TOKENS
                            else None
                        )
                    ),
                )
                for handle in watched:
                    handles.callback(handle.remove)
            step()
        return inputs

    return run


def test_limits_attend_to_as_many_tokens_as_ours(keys_of: Callable) -> None:
    lengths = {
        name: {
            (queries.shape[1], keys.shape[1])
            for queries, keys in keys_of(one_contender(name, 0.6, 1024))
        }
        for name in (UNMERGED, KEYS, UNWEIGHTED, TOKENS, PAPER, LIMIT_KEYS, LIMIT)
    }
    assert lengths == {
        UNMERGED: {(1024, 1024)},
        **{name: {(1024, 416)} for name in (KEYS, UNWEIGHTED, LIMIT_KEYS)},
        **{name: {(416, 416)} for name in (TOKENS, PAPER, LIMIT)},
    }
    # No projection copies its input.
    assert all(keys.is_contiguous() for _, keys in keys_of(one_contender(LIMIT_KEYS, 0.6, 1024)))


@pytest.mark.parametrize(("ratio", "factor"), TODO_FACTORS.items())
def test_todo_attends_to_every_so_manyth_token_in_each_direction(
    keys_of: Callable, ratio: float, factor: int
) -> None:
    inputs = keys_of(one_contender(TODO, ratio, 1024))
    assert len(inputs) == 3
    for queries, keys in inputs:
        image = queries.transpose(1, 2).unflatten(2, (32, 32))
        nearest = nn.functional.interpolate(image, scale_factor=1 / factor, mode="nearest")
        assert torch.equal(keys, nearest.flatten(2).transpose(1, 2))
        assert keys.shape[1] == (1 - ratio) * queries.shape[1]


def test_unweighted_keys_are_those_of_keys(keys_of: Callable) -> None:
    (_, merged), *_ = keys_of(one_contender(UNWEIGHTED, 0.6, 1024))
    (_, weighted), *_ = keys_of(one_contender(KEYS, 0.6, 1024))
    assert torch.equal(merged, weighted)


def test_what_weighting_changes(tiny: nn.Module) -> None:
    step = models.one_step(tiny, models.TINY, (256, 256))

    def output_of(name: str) -> torch.Tensor:
        with one_contender(name, 0.6, 1024).put_on(tiny):
            return step()

    plain = output_of(UNMERGED)
    wrong = {name: float((output_of(name) - plain).square().mean()) for name in (KEYS, UNWEIGHTED)}
    assert 0 < wrong[KEYS] < wrong[UNWEIGHTED]


@pytest.mark.parametrize("name", EVERYONE)
def test_contenders_leave_nothing_behind(tiny: nn.Module, hook_dicts: Callable, name: str) -> None:
    if name in (CORNER, RANDOM, QUERIES):
        pytest.importorskip("tomesd")
    step = models.one_step(tiny, models.TINY, (64, 64))
    registered, kinds, plain = hook_dicts(tiny), [type(module) for module in tiny.modules()], step()
    attributes = [set(vars(module)) for module in tiny.modules()]
    with one_contender(name, 0.75).put_on(tiny):
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
        # On the class, as WebUI has it: merging leaves a layer alone that has a `forward` of its
        # own.
        assert not any("forward" in vars(module) for module in tiny.modules())
        with one_contender(KEYS, 0.6).put_on(tiny) as running:
            assert not torch.equal(step(), fused)
            assert running.describe().startswith("3 of 7")
    assert torch.allclose(plain, fused, atol=1e-4) and not torch.equal(plain, fused)
    assert torch.equal(step(), plain)


def test_what_takes_too_much_is_left_out() -> None:
    # 2048x2048: 6.4 GB of similarities. Nothing is allocated here.
    some, notes = matchers(256, 0.5, torch.float32)
    assert [one.name for one in some] == [OURS, EXACT]
    assert any("GB" in note or "not installed" in note for note in notes)
    able, _ = contenders(EVERYONE, 0.5, 256 * 256, torch.float32)
    assert [one.name for one in able] == [
        name for name in EVERYONE if name not in (CORNER, RANDOM, QUERIES, TODO)
    ]


def test_without_tomesd(monkeypatch: pytest.MonkeyPatch, bench: Callable) -> None:
    monkeypatch.setitem(sys.modules, "tomesd", None)
    rows, printed = bench("speed", "--tiny", "--rounds", 1, "--ratios", 0.5, "--sizes", "64x64")
    assert [row["contender"] for row in rows] == [UNMERGED, KEYS, PAPER, LIMIT_KEYS, LIMIT]
    assert rows[2]["over_tomesd_corner"] == ""
    assert "not installed: pip install tomesd==0.1.3" in printed


@pytest.mark.parametrize("package", ["matplotlib", "tqdm", "ldm"])
def test_missing_packages_are_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["speed", "--tiny", "--rounds", "1", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert package in message and "pip install" in message
    with pytest.raises(MissingPackage):
        require(package)


def test_wrong_arguments(capsys: pytest.CaptureFixture) -> None:
    assert picture_size("512x768") == (512, 768)
    assert merge_ratio("0.75") == 0.75
    for arguments, why in (
        (["speed", "--sizes", "500x512"], "multiples of 64"),
        (["speed", "--ratios", "0.95"], "0.9375"),
        (["layer", "--rounds", "0"], "from 1 up"),
        (["memory", "--tiny", "--checkpoint", "x.safetensors"], "not allowed with"),
        (["layer", "--tiny", "--channels", "12"], "multiple of the 8 heads"),
        (["layer", "--tiny", "--ratios", "0"], "above 0"),
        (["layer", "--tiny", "--device", "cuda:99"], "cuda:99"),
    ):
        with contextlib.suppress(SystemExit):
            assert main(arguments) == 2
        assert why in capsys.readouterr().err


def test_spread_and_pairs() -> None:
    assert timing.spread([3.0]) == (3, 3, 3)
    assert timing.spread([5, 1, 4, 2, 3]) == (3, 2, 4)
    # A round that is slow for all alike changes no quotient.
    assert timing.paired([1, 10, 2], [2, 20, 4]) == (0.5, 0.5, 0.5)
    others = {"over_b": {"a": "b"}, "over_c": {"a": "c"}}
    rows = timing.compared({"a": [4.0, 8.0], "b": [2.0, 4.0]}, "seconds", "a", others)
    assert [
        (row["contender"], row["seconds"], row["gain"], row["over_b"], row["over_c"])
        for row in rows
    ] == [
        ("a", 6, 1, 2, None),
        ("b", 3, 2, None, None),
    ]


def test_rounds_are_interleaved_and_turn() -> None:
    ticks, runs_in_order = [], []
    runs = {
        name: lambda name=name: runs_in_order.append(name) or len(runs_in_order) for name in "abc"
    }
    results = timing.interleaved(runs, rounds=3, tick=ticks.append, warmup=1)
    assert ticks == runs_in_order
    assert "".join(runs_in_order) == "cab" + "abc" + "bca" + "cab"
    # The warm-up's results are not among them.
    assert results == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_peak_bytes() -> None:
    outside = torch.zeros(1000)

    def work() -> torch.Tensor:
        first = torch.zeros(2000)
        second = first + 1
        del first
        return torch.cat([second, outside, second])

    # At the end: `second` of 2000 and the result of 5000, without `first` and `outside`.
    assert memory.peak_bytes(work, CPU) == pytest.approx(7000 * 4, abs=64)


def test_table() -> None:
    columns = {"name": ("name", str), "value": ("value", output.number(1)), "word": ("word", str)}
    rows = [
        {"name": "a", "value": 1.0},
        {"name": "longer", "word": "none"},
        {"name": "b", "value": 123.46},
    ]
    assert output.table(columns, rows).splitlines() == [
        "| name   | value | word |",
        "| ------ | ----: | ---- |",
        "| a      |   1.0 | -    |",
        "| longer |     - | none |",
        "| b      | 123.5 | -    |",
    ]
