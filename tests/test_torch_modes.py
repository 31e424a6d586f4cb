"""Merging on other devices, in backward, in threads, compiled, and in other precisions."""

import concurrent.futures
import contextlib

import pytest
import torch
import torch.utils.checkpoint
from ldm.modules.attention import CrossAttention
from single_block import block_around

import tomesd_core as tome
from tomesd_core import token_map


def small_block():
    return block_around(CrossAttention(32, heads=2, dim_head=16))


@pytest.mark.parametrize("has_bags", [True, False], ids=["bags", "scan"])
@pytest.mark.parametrize(
    "options",
    [
        {"window": None},
        {"window": 4},
        {"partition": "corner"},
        {"shared_draw": False},
        {"reuse_steps": 3},
        {"late_ratio": 0.3, "schedule": "step"},
        {"late_ratio": 0.3, "schedule": "linear", "reuse_steps": 3},
    ],
    ids=str,
)
def test_no_step_but_the_first_waits_for_the_device_and_sums_have_a_fixed_order(
    small_settings, operations, crossings, monkeypatch, method, options, has_bags
):
    """On the meta device reading a value raises, and copies from the CPU are counted."""
    if has_bags:
        monkeypatch.setattr(token_map, "BAG_DEVICES", {"meta"})
    block, x, copies = small_block().to("meta"), torch.empty(2, 32, 16, 16, device="meta"), []
    settings = small_settings(method=method, **options)
    with tome.attach(block, settings) as merging, operations() as operations_run:
        for step in range(4):
            merging.set_step(step, 4)
            with crossings() as crossed:
                output = block(x)
            copies.append(len(crossed.names))
    assert output.shape == (2, 16 * 16, 32)
    assert merging.report().merged_steps == 4
    assert copies[0] <= 1, "a new grid costs one copy"
    assert copies[1:] == [0] * 3
    assert any(name.startswith("_embedding_bag") for name in operations_run.names) == has_bags
    # Atomic on a GPU, so the order of their sums varies.
    in_any_order = ("index_add", "scatter_add", "scatter_reduce")
    assert not any(name.lstrip("_").startswith(in_any_order) for name in operations_run.names)


def test_a_copy_in_the_middle_of_a_merged_call_is_counted(small_settings, crossings, monkeypatch):
    block, x = small_block().to("meta"), torch.empty(2, 32, 16, 16, device="meta")
    usual = token_map.TokenMap.mean

    def copying(*args):
        torch.zeros(1).to("meta", non_blocking=True)
        return usual(*args)

    with tome.attach(block, small_settings()):
        block(x)
        monkeypatch.setattr(token_map.TokenMap, "mean", copying)
        with crossings() as crossed:
            block(x)
    assert crossed.names == ["_to_copy.default"]


def test_gradients_flow_through_a_merged_pass(make_unet, small_settings, make_inputs, method):
    unet = make_unet().requires_grad_()
    with tome.attach(unet, small_settings(method=method)) as merging:
        unet(*make_inputs()).square().mean().backward()
    assert len(merging.report().merged_layers) == 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in unet.parameters())


@pytest.mark.filterwarnings("ignore:.*autocast.*")
def test_under_gradient_checkpointing_nothing_merges_and_gradients_are_right(
    make_unet, whole, make_inputs
):
    latent, *others = make_inputs()
    gradients = []
    for use_checkpoint in (False, True):
        unet = make_unet(use_checkpoint=use_checkpoint).requires_grad_()
        x = latent.clone().requires_grad_()
        with tome.attach(unet, whole()) if use_checkpoint else contextlib.nullcontext() as merging:
            unet(x, *others).square().mean().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in unet.parameters())])
    assert "gradient checkpointing" in merging.report().summary
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-3, atol=1e-5)


def test_recomputing_a_merged_layer_in_backward_raises(make_unet, whole, make_inputs):
    unet, inputs = make_unet().requires_grad_(), make_inputs()
    with tome.attach(unet, whole()):
        output = torch.utils.checkpoint.checkpoint(unet, *inputs, use_reentrant=False)
        with pytest.raises(RuntimeError, match="gradient checkpointing"):
            output.mean().backward()


def test_threads_that_run_at_once_have_their_own_steps(unet, small_settings, make_inputs, method):
    inputs = [make_inputs(size, seed=seed) for seed, size in enumerate([(16, 16), (12, 20)])]
    with tome.attach(
        unet, small_settings(method=method, ratio=0.6, late_ratio=0.1, schedule="linear")
    ) as merging:

        def run(number):
            outputs = []
            for step in range(4):
                merging.set_step(step if number else 3 - step, 4)
                outputs.append(unet(*inputs[number]))
            return outputs

        alone = [run(0), run(1)]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, [0, 1]))
    for right, outputs in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(right, outputs, strict=True))


def test_a_device_that_lacks_an_operation_costs_no_picture(
    unet, small_settings, make_inputs, monkeypatch, method
):
    inputs = make_inputs()
    unmerged = unet(*inputs)

    def lacking(*args, **kwargs):
        raise NotImplementedError("The operator 'aten::searchsorted' is not implemented.\nMore")

    with tome.attach(unet, small_settings(method=method)) as merging:
        monkeypatch.setattr(torch, "searchsorted", lacking)
        assert torch.equal(unet(*inputs), unmerged)
        monkeypatch.undo()
        assert torch.equal(unet(*inputs), unmerged)
    summary = merging.report().summary
    assert "nothing merged" in summary and "NotImplementedError: The operator" in summary
    assert "More" not in summary
    with tome.attach(unet, small_settings(method=method)) as merging:
        unet(*inputs)
    assert len(merging.report().merged_layers) == 3


@pytest.mark.parametrize("how", ["torch.compile(unet)", "unet.compile()"])
def test_a_compiled_model_runs_unmerged_with_the_reason(whole, how):
    unet, x = small_block(), torch.randn(2, 32, 8, 8)
    unmerged = unet(x)
    if how == "unet.compile()":
        if not hasattr(unet, "compile"):
            pytest.skip("this torch compiles no module in place")
        unet.compile(backend="eager")
        compiled = unet
    else:
        compiled = torch.compile(unet, backend="eager")
    with tome.attach(compiled, whole()) as merging:
        torch.testing.assert_close(compiled(x), unmerged)
    assert "nothing merged" in merging.report().summary
    assert "torch.compile" in merging.report().summary
    torch.compiler.reset()


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
def test_a_pass_without_gradients_does_not_spoil_the_next_one(make_unet, whole, make_inputs, mode):
    """Cached tensors of a grid must not be inference tensors."""
    unet, size = make_unet().requires_grad_(), (18, 14) if mode is torch.no_grad else (14, 18)
    with tome.attach(unet, whole()) as merging:
        merging.set_step(0)
        with mode():
            output = unet(*make_inputs(size))
        again = unet(*make_inputs(size))
        again.mean().backward()
    assert torch.equal(output, again.detach())


def test_a_pass_in_autocast_is_merged(unet, whole, make_inputs):
    with tome.attach(unet, whole()) as merging, torch.autocast("cpu", dtype=torch.bfloat16):
        output = unet(*make_inputs())
    assert output.isfinite().all()
    assert {layer.merged_tokens for layer in merging.report().merged_layers} == {128}
