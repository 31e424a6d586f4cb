"""The contenders that the benchmark compares, and how it times them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from on_bench import CPU, one_contender
from torch import Tensor, nn

from lab.bench import memory, models, output, timing
from lab.bench.contenders import (
    EXACT,
    KEYS,
    LIMIT,
    LIMIT_KEYS,
    MATCHING,
    PAPER,
    TOKENS,
    UNMERGED,
    UNWEIGHTED,
    available,
    matchers,
)
from lab.bench.peers import CORNER, QUERIES, RANDOM, TODO, TODO_FACTORS, TOMA, merged_layers
from tomesd_core.probe import PROBE_TOKENS

EVERYONE = [UNMERGED, KEYS, UNWEIGHTED, TOKENS, PAPER, CORNER, RANDOM, QUERIES, TODO, TOMA]
EVERYONE += [LIMIT_KEYS, LIMIT]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return models.build_unet(models.TINY, CPU, torch.float32)


def test_limit_touches_the_merged_layers_alone(tiny: nn.Module, watch: Callable) -> None:
    step = models.one_step(tiny, models.TINY, (128, 128))
    merged = {one.name for one in merged_layers(tiny)}
    assert len(merged) == 3
    with one_contender(LIMIT, 0.6).attach(tiny), watch(tiny) as inputs_of:
        step()
    # 256 tokens at level 1, 64 at level 2.
    lengths = {name: inputs[0].shape[1] for name, inputs in inputs_of.items()}
    assert lengths == {name: 256 - int(256 * 0.6) if name in merged else 64 for name in inputs_of}


def attention_inputs(tiny: nn.Module, name: str, ratio: float) -> list[tuple[Tensor, Tensor]]:
    """Inputs of `to_q` and `to_k` in the merged layers, in a step of 256×256 pixels."""
    step = models.one_step(tiny, models.TINY, (256, 256))
    inputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    with one_contender(name, ratio).attach(tiny), contextlib.ExitStack() as handles:
        for one in merged_layers(tiny):
            attn1 = one.block.attn1
            for projection, seen in zip((attn1.to_q, attn1.to_k), inputs, strict=True):
                handle = projection.register_forward_pre_hook(
                    lambda _, args, to=seen: to.append(args[0])
                )
                handles.callback(handle.remove)
        step()
    pairs = zip(*inputs, strict=True)
    return [(queries, keys) for queries, keys in pairs if queries.shape[1] > PROBE_TOKENS]


@pytest.mark.parametrize(
    ("name", "queries", "keys"),
    [
        (UNMERGED, 1024, 1024),
        *((name, 1024, 416) for name in (KEYS, UNWEIGHTED, LIMIT_KEYS)),
        *((name, 416, 416) for name in (TOKENS, PAPER, TOMA, LIMIT)),
        (QUERIES, 410, 1024),
    ],
)
def test_limits_attend_to_as_many_tokens_as_the_methods(
    tiny: nn.Module, name: str, queries: int, keys: int
) -> None:
    inputs = attention_inputs(tiny, name, 0.6)
    assert {(of.shape[1], to.shape[1]) for of, to in inputs} == {(queries, keys)}
    if name in (LIMIT_KEYS, LIMIT):
        assert all(one.is_contiguous() for both in inputs for one in both), "a projection copies it"


@pytest.mark.parametrize(("ratio", "factor"), TODO_FACTORS.items())
def test_todo_attends_to_every_nth_token_in_each_direction(
    tiny: nn.Module, ratio: float, factor: int
) -> None:
    inputs = attention_inputs(tiny, TODO, ratio)
    assert len(inputs) == 3
    for queries, keys in inputs:
        image = queries.transpose(1, 2).unflatten(2, (32, 32))
        nearest = nn.functional.interpolate(image, scale_factor=1 / factor, mode="nearest")
        assert torch.equal(keys, nearest.flatten(2).transpose(1, 2))
        assert keys.shape[1] == (1 - ratio) * queries.shape[1]


def test_weighting_changes_no_key_and_comes_nearer_to_the_unmerged(tiny: nn.Module) -> None:
    (_, merged), *_ = attention_inputs(tiny, UNWEIGHTED, 0.6)
    (_, weighted), *_ = attention_inputs(tiny, KEYS, 0.6)
    assert torch.equal(merged, weighted)
    step = models.one_step(tiny, models.TINY, (256, 256))

    def output_of(name: str) -> Tensor:
        with one_contender(name, 0.6).attach(tiny):
            return step()

    plain = output_of(UNMERGED)
    wrong = {name: float((output_of(name) - plain).square().mean()) for name in (KEYS, UNWEIGHTED)}
    assert 0 < wrong[KEYS] < wrong[UNWEIGHTED]


@pytest.mark.parametrize("name", EVERYONE)
def test_contenders_leave_nothing_behind(tiny: nn.Module, hook_dicts: Callable, name: str) -> None:
    def state() -> object:
        return hook_dicts(tiny), [(type(module), set(vars(module))) for module in tiny.modules()]

    step = models.one_step(tiny, models.TINY, (64, 64))
    before, plain = state(), step()
    with one_contender(name, 0.75).attach(tiny):
        assert torch.equal(step(), plain) == (name == UNMERGED)
    assert torch.equal(step(), plain)
    assert state() == before


def test_fused_attention_is_the_same_attention(tiny: nn.Module) -> None:
    step = models.one_step(tiny, models.TINY, (64, 64))
    plain = step()
    with models.attention(tiny, "sdp"):
        fused = step()
        # On the class, as in WebUI: a layer with a `forward` of its own isn't merged.
        assert not any("forward" in vars(module) for module in tiny.modules())
        with one_contender(KEYS, 0.6).attach(tiny) as running:
            assert not torch.equal(step(), fused)
            assert running.describe().startswith("3 of 7")
    assert torch.allclose(plain, fused, atol=1e-4) and not torch.equal(plain, fused)
    assert torch.equal(step(), plain)


def test_contenders_that_need_too_much_memory_are_skipped() -> None:
    # At 2048x2048 a peer's similarities take 6.4 GB. Nothing is allocated here.
    some, notes = matchers(256, 0.5, torch.float32)
    assert [one.name for one in some] == [MATCHING, EXACT]
    assert any("GB" in note for note in notes)
    able, _ = available(EVERYONE, 0.5, 256 * 256, torch.float32)
    assert [one.name for one in able] == [
        name for name in EVERYONE if name not in (CORNER, RANDOM, QUERIES, TODO)
    ]


def test_spread_and_pairs() -> None:
    assert timing.spread([3.0]) == (3, 3, 3)
    assert timing.spread([5, 1, 4, 2, 3]) == (3, 2, 4)
    # A round that is slow for all changes no quotient.
    assert timing.paired([1, 10, 2], [2, 20, 4]) == (0.5, 0.5, 0.5)
    others = {"over_b": {"a": "b"}, "over_c": {"a": "c"}}
    rows = timing.compared({"a": [4.0, 8.0], "b": [2.0, 4.0]}, "seconds", "a", others)
    columns = ("contender", "seconds", "gain", "over_b", "over_c")
    values = [tuple(row[column] for column in columns) for row in rows]
    assert values == [("a", 6, 1, 2, None), ("b", 3, 2, None, None)]


def test_rounds_are_interleaved_and_rotate() -> None:
    ticks, runs_in_order = [], []
    runs = {
        name: lambda name=name: runs_in_order.append(name) or len(runs_in_order) for name in "abc"
    }
    results = timing.interleaved(runs, rounds=3, tick=ticks.append, warmup=1)
    assert ticks == runs_in_order
    assert "".join(runs_in_order) == "cab" + "abc" + "bca" + "cab"
    # Without the warm-up's results.
    assert results == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_peak_bytes() -> None:
    outside = torch.zeros(1000)

    def work() -> Tensor:
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
