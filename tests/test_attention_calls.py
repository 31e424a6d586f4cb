"""Calls of self-attention as blocks and extensions make them: contexts, masks, other arguments."""

import pytest
import torch
import torch.utils.checkpoint
from layer_calls import FIRST, assert_merged_alone, layer_named

import tomesd_core as tome


@pytest.fixture
def drive(unet, whole, make_inputs, blocks_of, monkeypatch):
    """Run the merging UNet with `body` in place of a block's forward, as extensions do."""

    def driving(body, name=FIRST, size=(16, 12), batch=2):
        block = blocks_of(unet)[name]
        monkeypatch.setattr(block, "_forward", lambda x, context=None: body(block, x, context))
        with tome.attach(unet, whole()) as merging:
            output = unet(*make_inputs(size, batch))
        assert output.shape == (batch, 4, *size)
        return layer_named(merging.report(), name)

    return driving


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("length", [1, 20, 192, 384])
@pytest.mark.parametrize("keyword", [True, False])
def test_a_context_from_elsewhere_is_not_merged_and_keeps_its_mask(
    drive, length, keyword, is_masked
):
    def body(block, x, context):
        y, generator = block.norm1(x), torch.Generator().manual_seed(0)
        other = torch.randn(x.shape[0], length, x.shape[2], generator=generator)
        mask = torch.arange(length).expand(x.shape[0], -1) < 7 if is_masked else None
        given = {"context": other, "mask": mask}
        output = block.attn1(y, **given) if keyword else block.attn1(y, *given.values())
        assert_merged_alone(output, block.attn1, y, x, **given)
        return output + x

    assert drive(body).merged_calls == 1


def test_each_of_several_calls_in_a_block_gives_its_own_output(drive):
    """As with a reference picture: a longer context, and calls on a part of the batch."""

    def body(block, x, context):
        y = block.norm1(x)
        usual = block.attn1(y)
        longer = torch.cat([y, 2 * y], dim=1)
        assert_merged_alone(usual, block.attn1, y, x)
        assert_merged_alone(block.attn1(y, context=longer), block.attn1, y, x, context=longer)
        part = y[1:]
        assert_merged_alone(block.attn1(part, context=part), block.attn1, part)
        assert_merged_alone(block.attn1(y[:1]), block.attn1, y[:1])
        # A context that is the same tensor is self-attention.
        for again in (block.attn1(y), block.attn1(y, y), block.attn1(y, context=y)):
            assert torch.equal(again, usual)
        return usual + x

    layer = drive(body, batch=3)
    assert (layer.calls, layer.merged_calls) == (7, 7)


def test_a_block_that_runs_twice_in_a_pass_is_matched_twice(drive):
    def body(block, x, context):
        for each in (x, x.flip(1)):
            y = block.norm1(each)
            output = block.attn1(y)
            assert_merged_alone(output, block.attn1, y, each)
        return output + x

    assert drive(body).merged_calls == 2


def test_a_call_within_a_call_gives_its_own_output(unet, whole, make_inputs, blocks_of):
    """Another extension's hook may run attention again in the middle of a call."""
    block, inner = blocks_of(unet)[FIRST], []
    y = torch.randn(1, 256, 32, generator=torch.Generator().manual_seed(0))

    def once_more(module, args):
        if not inner:
            inner.append(y)
            inner[0] = block.attn1(y)

    with tome.attach(unet, whole()) as merging:
        merging.set_step(0)
        right = unet(*make_inputs())
        block.attn1.to_out.register_forward_pre_hook(once_more)
        assert torch.equal(unet(*make_inputs()), right)
    assert_merged_alone(inner[0], block.attn1, y, grid=(16, 16))


def test_a_call_with_another_token_count_than_the_grids_is_not_merged(drive):
    """The batch's tokens in one row, and a part of the picture."""

    def body(block, x, context):
        y = block.norm1(x)
        row = y.reshape(1, -1, y.shape[2])
        output = block.attn1(row)
        assert torch.equal(output, block.attn1.forward(row))
        assert torch.equal(block.attn1(y[:, :100]), block.attn1.forward(y[:, :100]))
        return output.view(x.shape) + x

    layer = drive(body)
    assert (layer.calls, layer.merged_calls) == (2, 0)
    assert "100 tokens" in layer.reason and "16x12" in layer.reason


def test_attention_with_a_mask_per_token_is_not_merged(drive):
    def body(block, x, context):
        y = block.norm1(x)
        mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5
        for output in (
            block.attn1(y, mask=mask),
            block.attn1(y, None, mask),
            block.attn1(y, y, mask),
        ):
            assert torch.equal(output, block.attn1.forward(y, mask=mask))
        return output + x

    layer = drive(body)
    assert layer.merged_calls == 0
    assert "mask" in layer.reason


def test_unknown_arguments_pass_through(unet, whole, make_inputs, blocks_of, monkeypatch, method):
    block, calls, extra = blocks_of(unet)[FIRST], [], object()
    kind = type(block.attn1)

    class Attention(kind):
        """Takes more arguments, as sgm's does."""

        def forward(self, x, context=None, mask=None, *more, **named):
            calls.append((x, context, more, named))
            return super().forward(x, context=context)

    def body(x, context=None):
        y = block.norm1(x)
        block.attn1(y, None, None, extra, 5, scale=extra)
        block.attn1(y, context=y, mask=None, shared=y, scale=7)
        block.attn1(y, context=None, additional_tokens=None, n_times_crossframe_attn_in_self=0)
        return x

    block.attn1.__class__ = Attention
    monkeypatch.setattr(block, "_forward", body)
    with tome.attach(unet, whole(method=method)) as merging:
        unet(*make_inputs())
    assert layer_named(merging.report()).merged_calls == 3
    first, second, third = (call for call in calls if call[2] or call[3])  # A probe has neither.
    assert first[2:] == ((extra, 5), {"scale": extra})
    assert second[3]["scale"] == 7
    assert third[3] == {"additional_tokens": None, "n_times_crossframe_attn_in_self": 0}
    if method == "paper":
        assert first[0].shape == (2, 128, 32) and first[1] is None
        assert second[1] is second[0] and third[1] is None


def test_the_input_of_attention_may_be_a_keyword(drive):
    def body(block, x, context):
        return block.attn1(x=block.norm1(x)) + x

    assert drive(body).merged_calls == 1
