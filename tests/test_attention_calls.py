"""Calls of self-attention as blocks and extensions make them: contexts, masks, other arguments."""

import pytest
import torch
from layer_calls import assert_merged_alone
from ldm.modules.attention import CrossAttention
from single_block import ldm_block

import tomesd_core as tome


@pytest.fixture
def drive(whole):
    """Merge in a block whose attention is called by `body`, and return the report."""

    def driving(body, kind=CrossAttention, batch=2, steps=1, **values):
        model = ldm_block(kind)
        model.attend = body
        with tome.attach(model, whole(**values)) as merging:
            for step in range(steps):
                merging.set_step(step, steps)
                model(torch.randn(batch, 32, 16, 12))
        return merging.report()

    return driving


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("length", [1, 20, 192, 384])
@pytest.mark.parametrize("keyword", [True, False])
def test_a_context_from_elsewhere_is_not_merged_and_keeps_its_mask(
    drive, length, keyword, is_masked
):
    def body(block, x, y):
        other = torch.randn(2, length, 32)
        mask = torch.arange(length).expand(2, -1) < 7 if is_masked else None
        given = {"context": other, "mask": mask}
        output = block.attn1(y, **given) if keyword else block.attn1(y, *given.values())
        assert_merged_alone(output, block.attn1, y, x, **given)

    assert drive(body).layers[0].merged_calls == 1


def test_each_of_several_calls_in_a_block_gives_its_own_output(drive):
    """As with a reference picture: a longer context, a part of the batch, and other tokens."""

    def body(block, x, y):
        usual = block.attn1(y)
        longer = torch.cat([y, 2 * y], dim=1)
        assert_merged_alone(usual, block.attn1, y, x)
        assert_merged_alone(block.attn1(y, context=longer), block.attn1, y, x, context=longer)
        part = y[1:]
        assert_merged_alone(block.attn1(part, context=part), block.attn1, part)
        assert_merged_alone(block.attn1(y[:1]), block.attn1, y[:1])
        # A context that is the same tensor is self-attention.
        for again in (
            block.attn1(y),
            block.attn1(x=y),
            block.attn1(y, y),
            block.attn1(y, context=y),
        ):
            assert torch.equal(again, usual)
        other = x.flip(1)
        y = block.norm1(other)
        assert_merged_alone(block.attn1(y), block.attn1, y, other)

    (layer,) = drive(body, batch=3).layers
    assert (layer.calls, layer.merged_calls) == (9, 9)


def test_a_call_within_a_call_gives_its_own_output(drive):
    """Another extension's hook may run attention again in the middle of a call."""

    def body(block, x, y):
        inner = []

        def once_more(*_):
            handle.remove()
            inner.append(block.attn1(y[1:]))

        right = block.attn1(y)
        handle = block.attn1.to_out.register_forward_pre_hook(once_more)
        assert torch.equal(block.attn1(y), right)
        assert_merged_alone(inner[0], block.attn1, y[1:])

    assert drive(body).layers[0].merged_calls == 3


def test_a_call_with_another_token_count_than_the_grids_is_not_merged(drive):
    """The batch's tokens in one row, and a part of the picture."""

    def body(block, x, y):
        for other in (y.reshape(1, -1, 32), y[:, :100]):
            assert torch.equal(block.attn1(other), block.attn1.forward(other))

    (layer,) = drive(body).layers
    assert (layer.calls, layer.merged_calls) == (2, 0)
    assert "100 tokens" in layer.reason and "16x12" in layer.reason


def test_attention_with_a_mask_per_token_is_not_merged(drive):
    def body(block, x, y):
        mask = torch.rand(x.shape[:2]) < 0.5
        right = block.attn1.forward(y, mask=mask)
        assert torch.equal(block.attn1(y, mask=mask), right)
        for context in (None, y):
            assert torch.equal(block.attn1(y, context, mask), right)

    (layer,) = drive(body).layers
    assert layer.merged_calls == 0
    assert "mask" in layer.reason


def test_unknown_arguments_pass_through(drive, method):
    calls, extra = [], object()

    class Attention(CrossAttention):
        """Takes more arguments, as sgm's does."""

        def forward(self, x, context=None, mask=None, *more, **named):
            calls.append((x, context, more, named))
            return super().forward(x, context)

    def body(block, x, y):
        block.attn1(y, None, None, extra, 5, scale=extra)
        block.attn1(y, context=y, mask=None, shared=y, scale=7)
        block.attn1(y, context=None, additional_tokens=None, n_times_crossframe_attn_in_self=0)

    assert drive(body, Attention, method=method).layers[0].merged_calls == 3
    first, second, third = (call for call in calls if call[2] or call[3])  # A probe has neither.
    assert first[2:] == ((extra, 5), {"scale": extra})
    assert second[3]["scale"] == 7
    assert third[3] == {"additional_tokens": None, "n_times_crossframe_attn_in_self": 0}
    if method == "paper":
        assert first[0].shape == (2, 96, 32) and first[1] is None
        assert second[1] is second[0] and third[1] is None


def test_calls_of_a_merged_layer_that_are_not_merged_are_counted(drive):
    def body(block, x, y):
        block.attn1(y, context=torch.cat([y, y], dim=1))
        block.attn1(y)

    summary = drive(body, steps=2, method="keys", late_ratio=0.0, schedule="linear").summary
    # Calls that aren't merged because of the step's ratio don't count.
    assert "2 of 4 calls not merged" in summary and summary.count("not merged") == 1
