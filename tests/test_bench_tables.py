"""The tables of quality: their rows and what each is compared with."""

from __future__ import annotations

import pytest
import torch
from on_bench import TINY_PIPELINE

from lab.bench import contenders, equal_time
from lab.bench.ablations import TABLES
from lab.bench.contenders import KEYS, UNMERGED, UNWEIGHTED
from lab.bench.peers import CORNER, QUERIES, TODO
from lab.bench.variants import Row
from tomesd_core.settings import FIELDS

EVERY_ROW = [
    pytest.param(row, id=f"{name} {number}: {row.name}")
    for name, table in TABLES.items()
    for number, row in enumerate(table.rows)
]


def test_tables_depend_on_no_default() -> None:
    assert set(contenders.BASE) == set(FIELDS) - {"apply_to"}


@pytest.mark.parametrize("row", EVERY_ROW)
def test_a_rows_ratio_and_pairs_are_the_means_over_its_steps(row: Row) -> None:
    variant = row.variant
    ratios = [variant.ratio] * 50
    if variant.settings is not None:
        ratios = [variant.settings.ratio_at(step / 49) for step in range(50)]
    assert variant.mean_ratio == pytest.approx(sum(ratios) / 50, abs=1e-3)
    power = 1 if variant.contender in (KEYS, UNWEIGHTED, TODO, QUERIES) else 2
    pairs = sum((1 - ratio) ** power for ratio in ratios) / 50
    assert variant.pairs == pytest.approx(pairs, abs=2e-3)


@pytest.mark.parametrize("row", EVERY_ROW)
def test_every_row_runs(row: Row) -> None:
    model = TINY_PIPELINE.model()
    x, prompts = torch.ones(2, *model.image_shape), model.encode_prompts(["cat", "apple"])
    with row.variant.attach(model.model.diffusion_model) as running:
        running.begin_step(0, 1)
        assert model.apply_model(x, torch.tensor([500, 500]), prompts).isfinite().all()


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_compared_with_rows_above(name: str) -> None:
    rows = TABLES[name].rows
    assert len({row.variant for row in rows}) == len(rows)
    for number, row in enumerate(rows):
        reference = row.reference
        assert reference is None or reference in rows[:number] or name == "partition"
        assert reference is None or reference.reference is None
        if name != "samplers" and reference is not None and reference.variant.contender != UNMERGED:
            assert reference.variant.steps == row.variant.steps
    assert any(row.reference for row in rows) or name in ("peers", "pictures")


def test_at_equal_time_keys_has_the_lowest_ratio_that_is_as_fast() -> None:
    curve = {0.0: 1.0, 0.1: 0.9, 0.5: 1.7, 0.9375: 4.0}
    table = equal_time.at_equal_time("", {KEYS: curve, CORNER: {0.0: 0.92, 0.5: 1.5, 0.6: 5.0}})
    ratios = [(row.name, row.variant.ratio) for row in table.rows]
    assert ratios == [
        (UNMERGED, 0),
        # 1.21 times: at 0.1 + 0.4 * 0.31 / 0.8 = 0.255.
        *((KEYS, 0.26), (CORNER, 0.25)),
        # 1.5 times: at 0.1 + 0.4 * 0.6 / 0.8 = 0.4.
        *((KEYS, 0.4), (CORNER, 0.5)),
        # Keys never runs 5 times as fast, and nothing was timed at 0.75.
    ]
    assert [row.reference for row in table.rows[1:]] == [None, table.rows[1], None, table.rows[3]]
    # Something is always merged.
    slow = equal_time.at_equal_time("", {KEYS: curve, CORNER: {0.5: 0.5, 0.55: 0.6}})
    assert [(row.name, row.variant.ratio) for row in slow.rows[1:]] == [(KEYS, 0.01), (CORNER, 0.5)]
