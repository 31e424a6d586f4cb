"""Properties of token maps for any grid, stride, ratio and batch."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tomesd_core as tome
from tomesd_core.partition import make_partition
from tomesd_core.plan import tokens_removed
from tomesd_core.settings import PARTITIONS, max_ratio

ROUNDING = 64
"""With windows, the most by which the number of removed tokens is rounded."""

NO_WINDOW, SOME_WINDOW = st.none(), st.integers(1, 40)
WINDOWS = NO_WINDOW | SOME_WINDOW

quick = settings(max_examples=120, deadline=None, derandomize=True)


@st.composite
def matchings(draw, windows=WINDOWS):
    """A token map, its tokens, their partition and the ratio."""
    grid = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    options = {
        "stride": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        "partition": draw(st.sampled_from(PARTITIONS)),
        "step": draw(st.integers(0, 1000)),
        "window": draw(windows),
        "shared_draw": draw(st.booleans()),
    }
    ratio = draw(st.floats(0, max_ratio(options["stride"], options["partition"])))
    batch, channels = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(batch, math.prod(grid), channels, generator=generator)
    items = 1 if options.pop("shared_draw") else batch
    split = make_partition(grid, items=items, **options)
    return tome.match_tokens(x, grid, ratio, shared_draw=items == 1, **options), x, split, ratio


@quick
@given(matchings())
def test_the_slots_are_onto_the_merged_tokens(case):
    token_map, x, *_ = case
    assert token_map.slots.shape == x.shape[:2]
    for slots in token_map.slots:
        assert torch.equal(slots.unique(), torch.arange(token_map.merged_tokens))


@quick
@given(matchings())
def test_each_slots_mean_is_right(case):
    token_map, x, *_ = case
    batch, tokens, _ = x.shape
    share = torch.zeros(batch, token_map.merged_tokens, tokens, dtype=torch.double)
    share.scatter_(1, token_map.slots[:, None], 1)
    assert torch.equal(share.sum(-1).long(), token_map.counts)
    exact = share @ x.double() / share.sum(-1, keepdim=True)
    torch.testing.assert_close(token_map.merge(x).double(), exact, rtol=0, atol=1e-5)


@quick
@given(matchings())
def test_unmerge_of_merge_is_the_identity_where_slots_are_constant(case):
    token_map, x, *_ = case
    # Small integers: their means are exact.
    y = (x[:, : token_map.merged_tokens] * 8).round()
    constant = token_map.unmerge(y)
    assert torch.equal(token_map.merge(constant), y)
    assert torch.equal(token_map.unmerge(token_map.merge(constant)), constant)


@quick
@given(matchings(windows=NO_WINDOW))
def test_over_the_whole_image_the_ratio_is_removed_while_sources_last(case):
    token_map, x, split, ratio = case
    tokens = x.shape[1]
    assert tokens_removed(tokens, ratio) == int(tokens * ratio)
    # Over the whole image every source has a destination, if there is one.
    assert split.most_removed == (split.src.shape[1] if split.dst.numel() else 0)
    assert token_map.merged_tokens == tokens - min(int(tokens * ratio), split.most_removed)


@quick
@given(matchings(windows=SOME_WINDOW))
def test_in_windows_the_ratio_is_removed_up_to_rounding(case):
    token_map, x, split, ratio = case
    removed = x.shape[1] - token_map.merged_tokens
    assert 0 <= removed <= split.most_removed
    assert abs(removed - min(int(x.shape[1] * ratio), split.most_removed)) <= ROUNDING


@quick
@given(matchings())
def test_a_slot_holds_one_destination_with_its_sources_or_one_token(case):
    token_map, x, split, _ = case
    dst = split.dst.expand(x.shape[0], -1)
    is_dst = torch.zeros(x.shape[:2], dtype=torch.long).scatter_(1, dst, 1)
    dst_in_slot = torch.zeros_like(token_map.counts).scatter_add_(1, token_map.slots, is_dst)
    assert (dst_in_slot <= 1).all()
    assert ((dst_in_slot == 1) | (token_map.counts == 1)).all()
