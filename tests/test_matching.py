import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tomesd_core as tome
from tomesd_core import matching
from tomesd_core.matching import match
from tomesd_core.partition import make_partition
from tomesd_core.plan import tokens_removed
from tomesd_core.settings import PARTITIONS, max_ratio


def tokens(grid, channels=6, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, math.prod(grid), channels, generator=generator)


def groups(token_map):
    """The groups of merged tokens, for each item."""
    numbers = torch.arange(token_map.merged_tokens)
    assert all(torch.equal(slots.unique(), numbers) for slots in token_map.slots)
    return [
        {frozenset((slots == number).nonzero()[:, 0].tolist()) for number in numbers}
        for slots in token_map.slots
    ]


def windows_of(grid, stride, window):
    """The window of each token: whole cells, spread evenly; the rest joins the last cell."""
    along = []
    for side, size in zip(grid, stride, strict=True):
        cells = max(1, side // size)
        count = 1 if window is None else math.ceil(cells / max(1, window // size))
        cell_of = [min(place // size, cells - 1) for place in range(side)]
        along.append(
            [max(i for i in range(count) if i * cells // count <= cell) for cell in cell_of]
        )
    return list(itertools.product(*along))


def similarities(x):
    """The cosine of each pair of tokens of one item, in float64."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return (unit @ unit.T).tolist()


def matched_one_by_one(x, src, dst, removed, home):
    """Groups of one item by bipartite soft matching in plain loops."""
    similarity, pairs = similarities(x), []
    for a in src:
        candidates = [b for b in dst if home[a] == home[b]]
        if candidates:
            best = max(candidates, key=lambda b: similarity[a][b])
            pairs.append((similarity[a][best], a, best))
    pairs.sort(key=lambda pair: -pair[0])
    together = {b: {b} for b in dst}
    for _, a, b in pairs[:removed]:
        together[b].add(a)
    alone = set(src) - {a for _, a, _ in pairs[:removed]}
    return {frozenset(tokens) for tokens in together.values()} | {frozenset([a]) for a in alone}


def assert_matched(token_map, x, split, removed, home):
    """The groups of each item are those of the plain loops."""
    src, dst = (rows.expand(len(x), -1).tolist() for rows in (split.src, split.dst))
    for item, together, *rows in zip(x, groups(token_map), src, dst, strict=True):
        assert together == matched_one_by_one(item, *rows, removed, home)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    partition=st.sampled_from(PARTITIONS),
    window=st.none() | st.integers(1, 12),
    step=st.integers(0, 1000),
    shared_draw=st.booleans(),
    share=st.floats(0, 1),
)
def test_the_most_similar_src_are_merged_into_the_best_dst_of_their_window(
    grid, stride, partition, window, step, shared_draw, share
):
    x, ratio = tokens(grid), share * max_ratio(stride, partition)
    split = make_partition(grid, stride, partition, step, window, 1 if shared_draw else len(x))
    removed = min(tokens_removed(x.shape[1], ratio), split.most_removed)
    if window is None:
        options = {"stride": stride, "partition": partition, "shared_draw": shared_draw}
        token_map = tome.match_tokens(x, grid, ratio, step=step, window=None, **options)
    else:
        # With a window `match_tokens` rounds the number of tokens and the similarities.
        token_map = match(x, split, exact=True).token_map(removed)
    assert token_map.merged_tokens == x.shape[1] - removed
    cell = (1, 2) if partition == "alternating" else stride
    home = windows_of(grid, cell, None if partition == "uniform" else window)
    assert_matched(token_map, x, split, removed, home)


def test_the_default_precision_finds_nearly_as_similar_tokens():
    """In windows a lower, faster precision is allowed."""
    grid, x = (16, 16), tokens((16, 16), channels=32, batch=1)
    split = make_partition(grid, window=8)
    result = match(x, split)
    similarity, home = similarities(x[0]), windows_of(grid, (2, 2), 8)
    src, dst = split.src[0].tolist(), split.dst[0].tolist()
    best = {}
    for a, place in zip(src, split.src_place.tolist(), strict=True):
        inside = [b for b in dst if home[b] == home[a]]
        b = dst[result.best[0, place]]
        assert b in inside
        best[place] = max(similarity[a][b] for b in inside)
        assert similarity[a][b] > best[place] - 0.02
    ordered = [best[place] for place in result.least_similar(len(src))[0].tolist()]
    assert all(later < earlier + 0.02 for earlier, later in itertools.pairwise(ordered))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7])
@pytest.mark.parametrize(
    "bad", [[0], [1], [18, 27], [0, 2, 9]], ids=["dst", "src", "dst and src", "dst, dst and src"]
)
def test_a_token_of_zero_norm_is_similar_to_none(bad, ratio, window):
    """With corners on 8×8 the tokens 0, 2 and 18 are dst, 1, 9 and 27 src."""
    grid, x, removed = (8, 8), tokens((8, 8)) + 1.5, int(64 * ratio)
    x[0, bad] = 0
    split = make_partition(grid, (2, 2), "corner", window=window)
    token_map = match(x, split, exact=True).token_map(removed)
    assert_matched(token_map, x, split, removed, windows_of(grid, (2, 2), window))


@pytest.mark.parametrize("kind", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("ratio", [0.3, 0.75])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("where", [slice(None), slice(10, 11)], ids=["all", "one"])
def test_nan_inf_or_zero_in_an_item_spoils_no_other_item(where, window, ratio, kind):
    x = tokens((7, 9), batch=3)
    healthy = tome.match_tokens(x, (7, 9), ratio, window=window)
    x[1, where] = kind
    token_map = tome.match_tokens(x, (7, 9), ratio, window=window)
    groups(token_map)
    assert torch.equal(token_map.slots[[0, 2]], healthy.slots[[0, 2]])
    assert token_map.unmerge(token_map.merge(x))[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_tiny_token_is_matched_by_its_direction(dtype):
    """The inverse of its norm overflows."""
    x = tokens((8, 8), batch=1).to(dtype)
    x[:, 9] = 6e-8 if dtype == torch.float16 else 1e-40
    split = make_partition((8, 8), (2, 2), "corner")
    result = match(x, split, exact=True)
    place = split.src_place[split.src[0] == 9]
    most_similar = result.least_similar(split.most_removed)[:, 0]
    assert most_similar != place
    token_map = result.token_map(32)
    assert token_map.unmerge(token_map.merge(x)).isfinite().all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("dtype", "powers"),
    [(torch.float16, (-3, 12)), (torch.bfloat16, (-60, 60)), (torch.float32, (-60, 60))],
)
def test_a_tokens_length_does_not_change_what_it_is_similar_to(dtype, powers, exact):
    """Powers of two scale without rounding, so the similarities are equal."""
    x = tokens((8, 8), channels=16, batch=1).to(dtype)
    power = torch.randint(*powers, (64, 1), generator=torch.Generator().manual_seed(0))
    split = make_partition((8, 8), step=1)
    plain, scaled = (match(each, split, exact) for each in (x, torch.ldexp(x, power).to(dtype)))
    assert torch.equal(plain.best, scaled.best)
    assert torch.equal(plain.token_map(20).slots, scaled.token_map(20).slots)


@pytest.mark.parametrize(
    ("device", "dtype", "side", "batch"),
    [
        ("cpu", torch.float32, 104, 1),
        ("meta", torch.float32, 160, 8),
        ("meta", torch.float16, 256, 2),
        ("meta", torch.float64, 256, 2),
    ],
    ids=str,
)
def test_the_similarity_never_takes_more_than_64_mib(operations, device, dtype, side, batch):
    x = torch.randn(batch, side**2, 4, dtype=dtype, device=device)
    whole = (side**2 * 3 / 4) * (side**2 / 4) * x.element_size()
    assert matching.SIMILARITY_BYTES == 64 * 2**20 < whole
    for window in (None, 32):
        with operations() as operations_run:
            tome.match_tokens(x, (side, side), 0.5, window=window)
        assert operations_run.largest <= matching.SIMILARITY_BYTES


@pytest.mark.parametrize("limit", [1, 1000, 2**14, 2**30])
@pytest.mark.parametrize("window", [None, 4])
def test_the_memory_limit_does_not_change_the_result(monkeypatch, window, limit):
    x, split = tokens((10, 14), batch=3), make_partition((10, 14), window=window)
    whole = match(x, split, exact=True)
    monkeypatch.setattr(matching, "CACHED_BYTES", limit)
    parts = match(x, split, exact=True)
    assert torch.equal(parts.best, whole.best)
    assert torch.equal(parts.least_similar(100), whole.least_similar(100))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_picture_alone_has_its_map_of_the_batch(partition, window):
    x = tokens((13, 10), channels=16, batch=4)
    together, *alone = (
        tome.match_tokens(each, (13, 10), 0.4, partition=partition, window=window, step=2)
        for each in (x, *x.split(1))
    )
    assert {each.merged_tokens for each in alone} == {together.merged_tokens}
    assert torch.equal(torch.cat([each.slots for each in alone]), together.slots)


@pytest.mark.parametrize("shape", [(2, 63, 4), (64, 4), (2, 8, 8, 4)])
def test_tokens_that_are_not_on_the_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[B, 64, C\]") as caught:
        tome.match_tokens(torch.zeros(shape), (8, 8), 0.5)
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"ratio": 0.9}, ["ratio", "0.9"]), ({"window": 0}, ["window", "[1, 4096]", "0"])],
    ids=str,
)
def test_an_option_out_of_range_is_refused_as_in_the_settings(options, words):
    with pytest.raises(tome.SettingsError) as caught:
        tome.match_tokens(tokens((8, 8)), (8, 8), **{"ratio": 0.5, **options})
    assert all(word in str(caught.value) for word in words)


def test_autocast_keeps_the_precision_of_an_exact_matching():
    x = tokens((24, 24), channels=16)
    expected = tome.match_tokens(x, (24, 24), 0.5, window=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tome.match_tokens(x, (24, 24), 0.5, window=None).slots, expected.slots)


def test_a_grid_may_be_any_pair():
    x = tokens((7, 9))
    expected = tome.match_tokens(x, (7, 9), 0.5).slots
    for grid in ([7, 9], torch.Size([7, 9])):
        assert torch.equal(tome.match_tokens(x, grid, 0.5).slots, expected)


def test_an_empty_batch_has_a_map_of_no_items():
    x = torch.zeros(0, 64, 4)
    token_map = tome.match_tokens(x, (8, 8), 0.5)
    assert token_map.slots.shape == (0, 64)
    assert token_map.unmerge(token_map.merge(x)).shape == x.shape
