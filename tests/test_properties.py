"""Properties of token maps for any grid, stride, ratio and batch."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tomesd_core as tome
from tomesd_core.partition import make_partition
from tomesd_core.settings import PARTITIONS, max_ratio

ROUNDING = 8
"""With windows, the most by which the number of removed tokens is rounded."""

quick = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def matchings(draw):
    """A token map, its tokens, their partition, the ratio and whether there are windows."""
    grid = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    options = {
        "stride": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        "partition": draw(st.sampled_from(PARTITIONS)),
        "step": draw(st.integers(0, 1000)),
        "window": draw(st.none() | st.integers(1, 40)),
    }
    ratio = draw(st.floats(0, max_ratio(options["stride"], options["partition"])))
    batch, channels, shared_draw = draw(
        st.tuples(st.integers(1, 4), st.integers(1, 5), st.booleans())
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(batch, math.prod(grid), channels, generator=generator)
    token_map = tome.match_tokens(x, grid, ratio, shared_draw=shared_draw, **options)
    split = make_partition(grid, items=1 if shared_draw else batch, **options)
    return token_map, x, split, ratio, options["window"] is not None


@quick
@given(matchings())
def test_merge_is_each_slots_mean_and_undoes_unmerge(case):
    token_map, x, *_ = case
    members = F.one_hot(token_map.slots, token_map.merged_tokens).transpose(1, 2).double()
    assert torch.equal(members.sum(-1).long(), token_map.counts) and token_map.counts.all()
    exact = members @ x.double() / members.sum(-1, keepdim=True)
    torch.testing.assert_close(token_map.merge(x).double(), exact, rtol=0, atol=1e-5)
    # Small integers: their means are exact.
    y = (x[:, : token_map.merged_tokens] * 8).round()
    assert torch.equal(token_map.merge(token_map.unmerge(y)), y)


@quick
@given(matchings())
def test_the_ratio_is_removed_while_sources_last_and_in_windows_up_to_rounding(case):
    token_map, x, split, ratio, has_windows = case
    # Every source has a destination, if there is one.
    assert split.most_removed == (split.src.shape[1] if split.dst.numel() else 0)
    removed = x.shape[1] - token_map.merged_tokens
    assert 0 <= removed <= split.most_removed
    wanted = min(int(x.shape[1] * ratio), split.most_removed)
    assert abs(removed - wanted) <= (ROUNDING if has_windows else 0)


@quick
@given(matchings())
def test_a_slot_holds_one_destination_with_its_sources_or_one_token(case):
    token_map, x, split, *_ = case
    is_dst = torch.zeros(x.shape[:2], dtype=torch.long)
    is_dst.scatter_(1, split.dst.expand(len(x), -1), 1)
    dst_in_slot = torch.zeros_like(token_map.counts).scatter_add_(1, token_map.slots, is_dst)
    assert (dst_in_slot <= 1).all()
    assert ((dst_in_slot == 1) | (token_map.counts == 1)).all()
