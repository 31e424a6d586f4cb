"""The benchmark's subcommands on a tiny UNet. No time is asserted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from on_bench import rows_of

from lab.bench import layer, memory, speed
from lab.bench.__main__ import SUBCOMMANDS, main
from lab.bench.contenders import (
    EXACT,
    KEYS,
    LIMIT,
    LIMIT_KEYS,
    LIMIT_OF,
    MATCHING,
    PAPER,
    TOKENS,
    UNMERGED,
    UNWEIGHTED,
)
from lab.bench.packages import INSTALL
from lab.bench.peers import CORNER, QUERIES, RANDOM, TODO
from tomesd_core import hooks
from tomesd_core.probe import PROBE_TOKENS

OURS_AND_PEERS = [KEYS, PAPER, CORNER, RANDOM]


@pytest.fixture
def bench(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> Callable[..., tuple[list[dict[str, str]], str]]:
    """Run a subcommand; return its CSV's rows and its output."""

    def run(command: str) -> tuple[list[dict[str, str]], str]:
        assert main([*command.split(), "--out", str(tmp_path)]) == 0
        printed = capfd.readouterr()
        (csv_file,) = tmp_path.glob("*.csv")
        assert csv_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert "100%" in printed.err
        rows = rows_of(csv_file)
        for row in rows:
            assert row["machine"] and row["date"] and "torch" in row["versions"]
            assert command in row["command"]
        assert rows[0]["machine"] in printed.out
        assert rows[0]["command"] in printed.out
        return rows, printed.out

    return run


def test_speed(bench: Callable) -> None:
    ratios = ("0.0", "0.6", "0.75", "0.84")
    rows, printed = bench(f"speed --tiny --ratios {' '.join(ratios)} --sizes 128x64 --force")
    at = {
        ratio: {row["contender"]: row for row in rows if row["ratio"] == ratio} for ratio in ratios
    }
    limits = [LIMIT_KEYS, LIMIT]
    assert {row["size"] for row in rows} == {"128x64"} and set(speed.COLUMNS) <= set(rows[0])
    assert all(float(row["seconds"]) > 0 and row["rounds"] == "1" for row in rows)
    # Each at the ratios that it allows.
    assert list(at["0.0"]) == list(at["0.6"]) == [UNMERGED, *OURS_AND_PEERS, *limits]
    assert list(at["0.75"]) == [UNMERGED, *OURS_AND_PEERS, TODO, *limits]
    assert list(at["0.84"]) == [UNMERGED, KEYS, PAPER, *limits]
    assert "tomesd is skipped above its highest ratio" in printed
    assert "ToDo is skipped" in printed
    by_name = at["0.6"]
    # At one ratio keys leaves other pairs than the peers, so it isn't compared with them.
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
        "speed --tiny --rounds 2 --ratios 0.5 --sizes 64x64 --force"
        " --reuse-steps 2 --methods tokens --attention sdp --dtype bfloat16"
    )
    by_name = {row["contender"]: row for row in rows}
    assert KEYS not in by_name and LIMIT_KEYS not in by_name
    ours = by_name[TOKENS]
    assert float(ours["seconds_low"]) <= float(ours["seconds"]) <= float(ours["seconds_high"])
    assert ours["attention"] == "sdp" and "2 of 2 steps" in ours["merged"]
    # A warm-up and two rounds, each with one matching per layer; three layers merge.
    assert len(matchings) == 3 * 3
    assert "bfloat16" in ours["versions"]


def test_layer(bench: Callable) -> None:
    rows, _ = bench("layer --tiny --ratios 0.3 0.75")
    assert set(layer.COLUMNS) <= set(rows[0])
    names = [UNMERGED, KEYS, UNWEIGHTED, TOKENS, PAPER, EXACT, CORNER, RANDOM, QUERIES]
    cases = [(tokens, ratio) for tokens in ("64", "256") for ratio in ("0.3", "0.75")]
    for case in cases:
        some = {row["contender"]: row for row in rows if (row["tokens"], row["ratio"]) == case}
        last = [TODO, LIMIT_KEYS, LIMIT] if case[1] == "0.75" else [LIMIT_KEYS, LIMIT]
        assert list(some) == [*names, *last]
        seconds = {name: float(row["layer"]) for name, row in some.items() if row["layer"]}
        assert set(some) - set(seconds) == {EXACT}, "matched only"
        # Tiny layers don't pay, except by the rule of the method paper.
        rules = {name: row["rule"] for name, row in some.items() if row["rule"]}
        paper = "merge" if case[0] == "256" else "skip"
        assert rules == {KEYS: "skip", TOKENS: "skip", PAPER: paper}
        for column, of, over in (
            ("gain", dict.fromkeys(seconds, UNMERGED), lambda mine, other: other / mine),
            ("over_limit", LIMIT_OF, lambda mine, other: mine / other),
            ("weighting", {KEYS: UNWEIGHTED, TOKENS: PAPER}, lambda mine, other: mine / other),
        ):
            shown = {name: float(row[column]) for name, row in some.items() if row[column]}
            expected = {name: over(seconds[name], seconds[of[name]]) for name in of if name in some}
            assert shown == pytest.approx(expected)
        corner = float(some[CORNER]["merging"])
        for name in (KEYS, TOKENS, PAPER, EXACT, CORNER, RANDOM):
            row = some.pop(name)
            parts = [float(row[part]) for part in ("match", "merge", "unmerge") if row[part]]
            assert len(parts) == (2 if name == KEYS else 3)
            assert float(row["merging"]) == pytest.approx(sum(parts))
            assert float(row["over_tomesd_corner"]) == pytest.approx(sum(parts) / corner)
            assert bool(row["growth"]) == (case[0] == "256"), "a slope needs two sizes"
        assert not any(row["merging"] or row["growth"] for row in some.values())


def test_layers_are_timed_with_their_contender(
    monkeypatch: pytest.MonkeyPatch, bench: Callable
) -> None:
    lengths: dict[str, set[tuple[int, int]]] = {}
    doing = [""]
    interleaved, fused = layer.interleaved, F.scaled_dot_product_attention

    def turn_by_turn(runs: dict, rounds: int, tick: Callable) -> dict:
        return interleaved(runs, rounds, lambda name: doing.__setitem__(0, name) or tick(name))

    def noting_lengths(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.shape[2] > PROBE_TOKENS:
            lengths.setdefault(doing[0], set()).add((q.shape[2], k.shape[2]))
        return fused(q, k, v)

    monkeypatch.setattr(layer, "interleaved", turn_by_turn)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noting_lengths)
    bench("layer --tiny --tokens 16 --ratios 0.75")
    whole, fewer, both = {(256, 256)}, {(256, 64)}, {(64, 64)}
    assert lengths == {
        UNMERGED: whole,
        **dict.fromkeys((KEYS, UNWEIGHTED, TODO, LIMIT_KEYS), fewer),
        **dict.fromkeys((TOKENS, PAPER, CORNER, RANDOM, LIMIT), both),
        QUERIES: {(64, 256)},
    }


def test_memory(bench: Callable) -> None:
    rows, _ = bench("memory --tiny --force")
    assert set(memory.COLUMNS) <= set(rows[0])
    steps = {row["contender"]: row for row in rows if row["what"] == "unet step"}
    assert list(steps) == [UNMERGED, *OURS_AND_PEERS, LIMIT_KEYS, LIMIT]
    # True on every machine: fewer tokens take less, and none takes less than its limit.
    peaks = {name: int(row["bytes"]) for name, row in steps.items()}
    for name in OURS_AND_PEERS:
        limit = peaks[LIMIT_OF[name]]
        assert limit <= peaks[name] < limit * 1.2 < peaks[UNMERGED]
        assert float(steps[name]["over_limit"]) == pytest.approx(peaks[name] / limit)
    assert float(steps[KEYS]["gain"]) == pytest.approx(peaks[UNMERGED] / peaks[KEYS])
    matching = [row for row in rows if row["what"] == "matching"]
    assert [row["contender"] for row in matching] == [MATCHING, EXACT, CORNER, RANDOM]
    assert all(int(row["bytes"]) > 0 for row in matching)


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "lab.bench", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in printed for name in SUBCOMMANDS)


def test_without_tomesd(monkeypatch: pytest.MonkeyPatch, bench: Callable) -> None:
    monkeypatch.setitem(sys.modules, "tomesd", None)
    rows, printed = bench("speed --tiny --ratios 0.5 --sizes 64x64")
    assert [row["contender"] for row in rows] == [UNMERGED, KEYS, PAPER, LIMIT_KEYS, LIMIT]
    assert rows[2]["over_tomesd_corner"] == ""
    assert "pip install tomesd" in printed


@pytest.mark.parametrize(
    "module", ["matplotlib", "tqdm", "ldm.modules.attention", "skimage.metrics"]
)
def test_a_missing_package_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["quality" if module == "skimage.metrics" else "speed", "--tiny"]) == 2
    package = module.partition(".")[0]
    assert f"{package} is needed: {INSTALL[package]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("speed --sizes 500x512", "multiples of 64"),
        ("speed --ratios 0.95", "0.9375"),
        ("layer --rounds 0", "from 1 up"),
        ("memory --tiny --checkpoint x.safetensors", "not allowed with"),
        ("layer --tiny --channels 12", "multiple of the 8 heads"),
        ("layer --tiny --ratios 0", "above 0"),
        ("layer --tiny --device cuda:99", "cuda:99"),
        ("quality --tiny --side 12", "multiple of 8"),
        ("quality --tiny --samples 1", "samples"),
        ("quality --tiny --steps 3", "1000"),
        ("quality --tiny --speed none.csv", "none.csv"),
    ],
)
def test_wrong_arguments_are_refused(command: str, why: str, capsys: pytest.CaptureFixture) -> None:
    try:
        status = main(command.split())
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert why in capsys.readouterr().err
