import math

import pytest
import torch
import torch.nn.functional as F

import tomesd_core as tome
from tomesd_core import token_map as module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["bags", "scan"], autouse=True)
def way(request, monkeypatch):
    """Both ways to take the mean: `embedding_bag`, and the fallback for devices without it."""
    if request.param == "scan":
        monkeypatch.setattr(module, "BAG_DEVICES", frozenset())
    return request.param


def random_map(tokens=63, merged=20, items=2):
    """A map in which every slot has at least one token."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(merged, (items, tokens), generator=generator)
    slots[:, :merged] = torch.arange(merged)
    return tome.TokenMap(slots[:, torch.randperm(tokens, generator=generator)], merged)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def exact_means(token_map, x):
    """The mean over each slot in float64."""
    members = F.one_hot(token_map.slots, token_map.merged_tokens).transpose(1, 2).double()
    return members @ x.double() / members.sum(-1, keepdim=True)


@pytest.mark.parametrize("channels", [1, 3, 320])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_is_the_mean_over_each_slot_rounded_once(dtype, channels):
    token_map, x = random_map(), noise(2, 63, channels).to(dtype)
    merged, exact = token_map.merge(x), exact_means(random_map(), x)
    assert merged.dtype == dtype
    assert merged.shape == (2, 20, channels)
    half_a_place = torch.finfo(dtype).eps / 2 * torch.exp2(torch.frexp(exact).exponent - 1.0)
    # Sums are made in fp32 at least, which rounds too.
    slack = 4 * torch.finfo(torch.float32).eps * x.double().abs().amax()
    assert ((merged.double() - exact).abs() <= half_a_place + slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_slot_loses_no_precision(dtype):
    """In fp16 a sum of these would overflow, in bf16 it would stop at 256 times the value."""
    token_map = tome.TokenMap(torch.zeros(1, 4096, dtype=torch.long), 1)
    assert token_map.merge(torch.full((1, 4096, 3), 100.0, dtype=dtype)).tolist() == [[[100.0] * 3]]
    x = (1 + noise(1, 4096, 8) / 4).to(dtype)
    exact = x.double().mean(1, keepdim=True)
    torch.testing.assert_close(
        token_map.merge(x).double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=0
    )


@pytest.mark.parametrize("channels", [1, 3, 320])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_unmerge_gives_every_token_its_slots_value(dtype, channels):
    token_map, y = random_map(), noise(2, 20, channels).to(dtype)
    back = token_map.unmerge(y)
    assert back.dtype == dtype
    assert back.shape == (2, 63, channels)
    for item, slots in enumerate(token_map.slots):
        assert torch.equal(back[item], y[item, slots])


def test_a_token_alone_in_its_slot_keeps_its_bits():
    token_map, x = random_map(), noise(2, 63, 5)
    alone = token_map.counts.gather(1, token_map.slots) == 1
    assert alone.any()
    assert torch.equal(token_map.unmerge(token_map.merge(x))[alone], x[alone])


@pytest.mark.parametrize("kind", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_slot(kind):
    token_map, x = random_map(), noise(2, 63, 4)
    healthy = token_map.merge(x)
    x[0, 7] = kind
    merged, spoilt = token_map.merge(x), token_map.slots[0, 7]
    assert not merged[0, spoilt].isfinite().any()
    healthy[0, spoilt] = merged[0, spoilt] = 0
    assert torch.equal(merged, healthy)


def test_merging_gives_the_same_bits_with_any_number_of_threads():
    token_map, x = random_map(tokens=1000, merged=30), noise(2, 1000, 64)
    merged, threads = token_map.merge(x), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = random_map(tokens=1000, merged=30)
            assert torch.equal(again.merge(x), merged)
            assert torch.equal(again.unmerge(merged), token_map.unmerge(merged))
    finally:
        torch.set_num_threads(threads)


def test_the_gradients_are_right():
    token_map = random_map(tokens=12, merged=5)
    x = noise(2, 12, 3).double().requires_grad_()
    y = noise(2, 5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(token_map.merge, (x,))
    assert torch.autograd.gradcheck(token_map.unmerge, (y,))
    assert torch.autograd.gradcheck(lambda x: token_map.unmerge(token_map.merge(x).sin()), (x,))
    assert torch.autograd.gradgradcheck(lambda x: token_map.unmerge(token_map.merge(x).sin()), (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_comes_in_the_dtype_of_the_tokens(dtype):
    token_map, x = random_map(), noise(2, 63, 4).to(dtype).requires_grad_()
    token_map.unmerge(token_map.merge(x)).sum().backward()
    # A slot's mean is counted once for each of its tokens.
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=0.02, atol=0)


def test_tokens_may_be_laid_out_in_memory_in_any_way():
    token_map = random_map()
    for x in (noise(2, 6, 63).transpose(1, 2), noise(2, 63, 8)[..., ::2]):
        means = exact_means(token_map, x).float()
        torch.testing.assert_close(token_map.merge(x), means, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("change", "tokens"), [("merge", 63), ("unmerge", 20)])
def test_another_shape_is_refused(change, tokens):
    for shape in ((2, tokens - 1, 4), (3, tokens, 4), (tokens, 4), (2, tokens, 4, 1)):
        with pytest.raises(ValueError, match=rf"\[2, {tokens}, C\]") as caught:
            getattr(random_map(), change)(torch.zeros(shape))
        assert str(list(shape)) in str(caught.value)


def test_a_map_of_one_token_and_one_that_merges_nothing():
    one = tome.TokenMap(torch.zeros(1, 1, dtype=torch.long), 1)
    assert torch.equal(one.merge(noise(1, 1, 3)), noise(1, 1, 3))
    none = tome.TokenMap(torch.arange(9).expand(2, -1), 9)
    assert torch.equal(none.merge(noise(2, 9, 3)), noise(2, 9, 3))
