"""Differences between hosts: where the UNet is, the prompted part of a batch, gradio's events."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from torch import nn

from tomesd_core.token_map import TokenMap


@pytest.fixture
def host(load):
    return load().host


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(4), nn.Linear(4, 4)


def unet(layers=1):
    model = nn.Module()
    model.transformer_blocks = nn.ModuleList([Block() for _ in range(layers)])
    return model


def in_webui(inner):
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=inner))


def in_forge(inner):
    return SimpleNamespace(
        forge_objects=SimpleNamespace(unet=SimpleNamespace(model=in_webui(inner).model))
    )


@pytest.mark.parametrize("place", [in_webui, in_forge], ids=["WebUI", "Forge"])
def test_the_unet_is_found_where_a_host_has_it(host, modules, place):
    inner = unet(2)
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


def test_a_map_is_of_the_prompted_part_whichever_half_comes_first(load):
    sampling = load().sampling
    options = {}
    maps = {}
    for parts in ([1, 0], [0, 1], None):
        options.clear()
        options.update({} if parts is None else {"cond_or_uncond": parts})
        recorder = sampling.PictureRecorder((1, 1), [0, 1], (2, 2), lambda: ((2, 2), options))
        # First slots 0 and 1 are the prompted pictures', 2 and 3 the others.
        owners = [2, 3, 0, 1] if parts == [1, 0] else [0, 1, 2, 3]
        slots = torch.tensor([[owner, 0, 1, 2] for owner in owners])
        recorder("layer", 0, (2, 2), TokenMap(slots, 4))
        maps[str(parts)] = [int(one.slots[0]) for one in recorder.maps(recorder.pictures)]
    assert maps == {"[1, 0]": [0, 1], "[0, 1]": [0, 1], "None": [0, 1]}


def test_halves_in_separate_passes(load):
    options = {}
    recorder = load().sampling.PictureRecorder((1, 1), [0, 1], (2, 2), lambda: ((2, 2), options))
    for parts, owners in (([0], [0, 1]), ([1], [2, 3])):
        options["cond_or_uncond"] = parts
        recorder(
            "layer", 0, (2, 2), TokenMap(torch.tensor([[owner, 0, 1, 2] for owner in owners]), 4)
        )
    assert [int(one.slots[0]) for one in recorder.maps(recorder.pictures)] == [0, 1]


def test_attention_of_another_extension_is_no_replaced_unet(host, modules):
    assert host.reason_layers_did_not_run({}) is None
    assert (
        host.reason_layers_did_not_run(
            {"patches_replace": {"attn2": {("input", 1): 1}, "attn1": {}}}
        )
        is None
    )
    patched = host.reason_layers_did_not_run({"patches_replace": {"attn1": {("input", 1): print}}})
    assert "another extension" in patched
    modules.sd_unet.current_unet = object()
    assert "UNet was replaced" in host.reason_layers_did_not_run({})


def generation_without_a_model(script, p):
    instance = script.ToMe()
    instance.before_process(p, True, 0.5)
    assert p.extra_generation_params["ToMe ratio"] == 0.5
    instance.process_batch(p, True, 0.5)


class Picture:
    """A `p`."""

    scripts, is_api, script_args = None, True, ()

    def __init__(self):
        self.extra_generation_params, self.comments = {"Size": "1x1"}, {}

    def comment(self, line):
        self.comments[line] = 1

    def get_token_merging_ratio(self, for_hr=False):
        return 0.3

    def sample(self):
        return "sampled"


@pytest.mark.parametrize(
    "model", [None, in_forge(nn.Linear(2, 2))], ids=["no model", "no such layers"]
)
def test_an_unmergeable_model_is_reported_once_and_nothing_is_claimed(
    load, modules, log_lines, model
):
    modules.sd_models.model_data.sd_model = model
    script, p = load(), Picture()
    generation_without_a_model(script, p)
    (line,) = log_lines
    assert "nothing merged" in line
    assert ("no model" if model is None else "no self-attention layers") in line
    assert p.extra_generation_params == {"Size": "1x1"}
    assert list(p.comments) == [f"ToMe: {line}"]
    assert "sample" not in vars(p) and p.get_token_merging_ratio() == 0.3
    script.ToMe().process_batch(p, True, 0.5, batch_number=1)
    assert log_lines == [line], "once per generation"


def test_events_are_those_of_this_gradio(load, part_of):
    script = load()
    with gr.Blocks() as page:
        controls = script.panel.build("txt2img", script.ToMe().elem_id)
    assert list(controls) == list(part_of(script, "webui.arguments").CONTROLS)
    scripts = [dependency["js"] for dependency in page.get_config_file()["dependencies"]]
    codes = [code for code in scripts if code]
    assert len([code for code in codes if "toMeChanged('txt2img')" in code]) == 1 + len(controls)
    assert [code for code in codes if "toMeAnswered" in code]
