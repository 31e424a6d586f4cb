"""Other methods as the bench runs them."""

from __future__ import annotations

import pytest
import torch
from on_bench import CPU

from lab.bench import models, peers
from lab.bench.peers import ATTACH_PEER, CA_TOME


def test_each_of_tomas_destinations_covers_more_than_any_other_token_would():
    unit = torch.nn.functional.normalize(
        torch.randn(64, 5, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    similarity = unit @ unit.T
    chosen = peers.facility_locations(similarity, 3).tolist()
    for place, one in enumerate(chosen):
        covered = similarity[:, chosen[:place]].amax(1) if place else torch.full((64,), -1.0)
        totals = torch.maximum(similarity, covered[:, None]).sum(0)
        assert totals[one] == pytest.approx(float(totals.max()))


@pytest.mark.parametrize("grid", [(16, 8), (8, 24), (5, 8)], ids=str)
def test_untiling_restores_the_tokens(grid):
    x = torch.arange(2 * grid[0] * grid[1] * 3.0).view(2, -1, 3)
    assert torch.equal(peers.untiled(peers.in_tiles(x, grid), grid), x)


def test_with_every_token_a_destination_toma_changes_nothing():
    x = 100 * torch.eye(64).repeat(2, 1, 1)
    queries, keys, unmerge = peers.merge_softly(x, (8, 8), 0.0)
    assert keys is queries and torch.allclose(unmerge(queries), x, atol=1)


def test_ca_tome_matches_in_its_own_steps_only(operations):
    tiny = models.build_unet(models.TINY, CPU, torch.float32)
    step, matches = models.one_step(tiny, models.TINY, (128, 128)), []
    with ATTACH_PEER[CA_TOME](tiny, -1.0) as running:
        for number in range(10):
            running.begin_step(number, 10)
            with operations() as ran:
                step()
            matches.append(any(name.startswith("sort") for name in ran.names))
        # Of 50 steps 0, 8, 11, 13, 20, 25, 30, 35 and 45 to 49.
        assert matches == [True, True, True, False, True, True, True, True, False, True]
        assert running.pairs() == pytest.approx(1 / 16)
