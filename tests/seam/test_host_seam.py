"""Differences between hosts: where the UNet is, the prompted part of a batch, gradio's events."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from single_block import Block, Projected
from torch import nn

from tomesd_core.token_map import TokenMap


@pytest.fixture
def host(script):
    return script.host


def in_webui(inner):
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=inner))


def in_forge(inner):
    return SimpleNamespace(
        forge_objects=SimpleNamespace(unet=SimpleNamespace(model=in_webui(inner).model))
    )


@pytest.mark.parametrize("place", [in_webui, in_forge], ids=["WebUI", "Forge"])
def test_the_unet_is_found_where_a_host_has_it(host, modules, place):
    inner = nn.Sequential(Block(Projected(1, 4)), Block(Projected(1, 4)))
    modules.sd_models.model_data.sd_model = place(inner)
    assert host.loaded_unet() is inner
    assert len(host.loaded_layers()) == 2


@pytest.mark.parametrize(
    "model", [None, SimpleNamespace(cond_stage_model=None), in_forge(None), in_webui("replaced")]
)
def test_before_a_model_is_loaded_there_is_none(host, modules, model):
    modules.sd_models.model_data.sd_model = model
    assert host.loaded_unet() is None and host.loaded_layers() is None


@pytest.mark.parametrize(
    ("parts", "prompted"),
    [
        (None, None),
        ([1, 0], [2, 3]),
        ([0, 1], [0, 1]),
        ([0], [0, 1]),
        ([1], []),
        ([1, 0, 0], [4, 5]),
    ],
    ids=["unknown", "Forge", "reversed", "prompted alone", "unprompted alone", "AND"],
)
def test_the_prompted_part_of_the_batch(host, parts, prompted):
    options = {} if parts is None else {"cond_or_uncond": parts}
    items = host.prompted_items(options, 2 * len(parts or [0, 0]))
    assert (None if items is None else list(items)) == prompted


@pytest.mark.parametrize(
    "passes",
    [
        [([1, 0], [2, 3, 0, 1])],
        [([0, 1], [0, 1, 2, 3])],
        [(None, [0, 1, 2, 3])],
        [([0], [0, 1]), ([1], [2, 3])],
    ],
    ids=["Forge", "reversed", "unknown", "halves in separate passes"],
)
def test_a_map_is_of_the_prompted_part_of_the_batch(script, passes):
    """First slots 0 and 1 are the prompted pictures', 2 and 3 the others."""
    options = {}
    recorder = script.sampling.PictureRecorder((1, 1), [0, 1], (2, 2), lambda: ((2, 2), options))
    for parts, owners in passes:
        if parts is not None:
            options["cond_or_uncond"] = parts
        slots = torch.tensor([[owner, 0, 1, 2] for owner in owners])
        recorder("layer", 0, (2, 2), TokenMap(slots, 4))
    assert [int(one.slots[0]) for one in recorder.maps(recorder.pictures)] == [0, 1]


def test_attention_of_another_extension_is_no_replaced_unet(host, modules):
    for options in ({}, {"patches_replace": {"attn2": {("input", 1): print}, "attn1": {}}}):
        assert host.reason_layers_did_not_run(options) is None
    patched = host.reason_layers_did_not_run({"patches_replace": {"attn1": {("input", 1): print}}})
    assert "another extension" in patched
    modules.sd_unet.current_unet = object()
    assert "UNet was replaced" in host.reason_layers_did_not_run({})


@pytest.mark.parametrize(
    ("model", "reason"),
    [(None, "no model"), (in_forge(nn.Linear(2, 2)), "no self-attention layers")],
    ids=["no model", "no such layers"],
)
def test_an_unmergeable_model_is_reported_once_and_nothing_is_claimed(
    script, modules, log_lines, model, reason
):
    modules.sd_models.model_data.sd_model = model
    modules.shared.opts.token_merging_ratio = 0.3
    p = modules.processing.StableDiffusionProcessing()
    p.extra_generation_params["Size"] = "1x1"
    instance = script.ToMe()
    instance.before_process(p, True, 0.5)
    assert p.extra_generation_params["ToMe ratio"] == 0.5
    for batch in range(2):
        instance.process_batch(p, True, 0.5, batch_number=batch)
    (line,) = log_lines
    assert "nothing merged" in line and reason in line
    assert p.extra_generation_params == {"Size": "1x1"}
    assert list(p.comments) == [f"ToMe: {line}"]
    assert "sample" not in vars(p) and p.get_token_merging_ratio() == 0.3


def test_events_are_those_of_this_gradio(script):
    with gr.Blocks() as page:
        controls = script.panel.build("txt2img", script.ToMe().elem_id)
    assert list(controls) == list(script.panel.CONTROLS)
    events = page.get_config_file()["dependencies"]
    codes = [event["js"] for event in events if event["js"]]
    assert len([code for code in codes if "toMeChanged('txt2img')" in code]) == 1 + len(controls)
    assert [code for code in codes if "toMeAnswered" in code]
