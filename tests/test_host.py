"""The stand-in for WebUI: the order of callbacks, also where one fails, and each step's model."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from copy import copy
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
from PIL import Image, ImageChops

from lab.demo.model import TinyModel
from lab.host import Host

BEFORE = ["setup", "before_process", "process"]
PREPARED = ["before_process_batch", "process_batch", "process_before_every_sampling"]
BATCH = [*PREPARED, "denoiser", "denoiser"]
CUT = [*PREPARED, "denoiser"]
"""A batch that ends at its first step."""
DECODED = ["post_sample", "postprocess_batch", "postprocess_batch_list"]
AFTER = [*DECODED, "postprocess_image", "postprocess"]
HIRES = "before_hr"
REQUEST = {"prompt": "cat", "steps": 2, "width": 16, "height": 16, "seed": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(seed: int = 0, **shape: Any) -> TinyModel:
    """Two levels with attention."""
    return TinyModel.random(seed, model_channels=32, channel_mult=[1, 1], **shape)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """The host without extensions, with two checkpoints of one shape and one of another."""
    checkpoints = {
        "base": small_model,
        "twin": lambda: small_model(1),
        "other": lambda: small_model(num_res_blocks=2),
    }
    with Host(checkpoints, []) as host:
        yield host


@pytest.fixture
def record(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Callbacks of scripts, the denoiser's calls, and actions to run in a callback."""
    from modules import script_callbacks, scripts, sd_models, shared

    shared.opts.reset()
    notes = SimpleNamespace(events=[], steps=[], sizes=[], models=[], actions={})

    def note(name: str, *args: Any, **_: Any) -> None:
        notes.events.append(name)
        if name in notes.actions:
            notes.actions[name](*args)

    def denoiser(params: Any) -> None:
        count = params.denoiser
        notes.steps.append((count.step, count.total_steps, params.sampling_step))
        notes.sizes.append(tuple(params.x.shape[2:]))
        notes.models.append(sd_models.model_data.sd_model)
        note("denoiser", params)

    callbacks = {name: functools.partial(note, name) for name in [*BEFORE, *BATCH, *AFTER, HIRES]}
    script = SimpleNamespace(filename="recorder.py", args_from=0, args_to=0, **callbacks)
    for runner in (scripts.scripts_txt2img, scripts.scripts_img2img):
        monkeypatch.setattr(runner, "alwayson_scripts", [*runner.alwayson_scripts, script])
    script_callbacks.on_cfg_denoiser(denoiser)
    yield notes
    script_callbacks.remove_callbacks_for_function(denoiser)


@pytest.fixture
def generate(host: Host, record: SimpleNamespace) -> Callable[..., Any]:
    """Make a small picture; earlier notes are cleared."""
    from modules import processing

    def run(tab: str = "txt2img", **fields: Any) -> Any:
        for notes in (record.events, record.steps, record.sizes, record.models):
            notes.clear()
        return processing.process_images(host.make_p(None, tab, **{**REQUEST, **fields}))

    return run


def fail(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("on purpose")


def test_one_picture_and_batches(generate, record):
    alone = generate(seed=4)
    assert record.events == BEFORE + BATCH + AFTER
    assert alone.images[0].size == (16, 16)
    assert alone.images[0].info["parameters"] == alone.infotexts[0]
    processed = generate(n_iter=2, batch_size=2)
    batches = 2 * (BATCH + DECODED + 2 * ["postprocess_image"])
    assert record.events == BEFORE + batches + ["postprocess"]
    assert [text.split("Seed: ")[1][0] for text in processed.infotexts[1:]] == list("1234")
    difference = ImageChops.difference(alone.images[0], processed.images[4])
    assert all(largest <= 1 for _, largest in difference.getextrema())


def test_hires_fix(generate, record):
    processed = generate(enable_hr=True, hr_second_pass_steps=3, denoising_strength=0.5)
    second = [HIRES, "process_before_every_sampling", *["denoiser"] * 3]
    assert record.events == BEFORE + BATCH + second + AFTER
    assert [step[:2] for step in record.steps] == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert record.sizes == [(16, 16)] * 2 + [(32, 32)] * 3
    assert processed.images[0].size == (32, 32)
    generate(enable_hr=True, firstpass_image=Image.new("RGB", (16, 16)))
    assert record.sizes == [(32, 32)] * 2, "the Upscale button has no first pass"


def test_img2img_runs_the_end_of_the_schedule(generate, record):
    picture = Image.new("RGB", (16, 16), "red")
    generate("img2img", init_images=[picture], denoising_strength=0.5, steps=6)
    assert record.steps == [(0, 4, 0), (1, 4, 0), (2, 4, 1), (3, 4, 2)]


@pytest.mark.parametrize(
    ("sampler_name", "steps", "expected"),
    [
        ("Euler a", 3, [(0, 3, 0), (1, 3, 0), (2, 3, 1)]),
        ("Heun", 3, [(0, 6, 0), (1, 6, 0), (2, 6, 0), (3, 6, 1), (4, 6, 1)]),
        ("DPM++ 2M", 3, [(0, 3, 0), (1, 3, 0), (2, 3, 1)]),
        ("DDIM", 4, [(0, 4, 0), (1, 4, 0), (2, 4, 1)]),
        ("PLMS", 3, [(0, 3, 0), (1, 3, 0), (2, 3, 0), (3, 3, 1)]),
    ],
)
def test_the_denoiser_counts_evaluations_and_the_state_lags(
    generate, record, sampler_name, steps, expected
):
    generate(sampler_name=sampler_name, steps=steps)
    assert record.steps == expected


def test_a_scripts_exception_is_reported_and_the_picture_made(generate, record, capsys):
    for name in ("process", "process_batch", "denoiser", "postprocess"):
        record.actions[name] = fail
    assert generate().images
    assert record.events == BEFORE + BATCH + AFTER
    assert capsys.readouterr().err.count("ValueError: on purpose") == 5


@pytest.mark.parametrize("sampler_name", ["Euler", "PLMS"])
def test_an_exception_in_sampling_ends_it_without_postprocess(host, generate, record, sampler_name):
    from modules import shared

    unet = host.sd_model.model.diffusion_model
    with unet.register_forward_hook(fail), pytest.raises(ValueError, match="on purpose"):
        generate(sampler_name=sampler_name, override_settings={"batch_cond_uncond": False})
    assert record.events == BEFORE + CUT
    assert shared.opts.batch_cond_uncond is True


def test_nans_end_it(host, generate, record):
    from modules import devices

    unet = host.sd_model.model.diffusion_model
    with (
        unet.register_forward_hook(lambda module, args, output: output * float("nan")),
        pytest.raises(devices.NansException),
    ):
        generate()
    assert record.events == BEFORE + BATCH + ["post_sample"]


def test_interrupted_and_skipped(generate, record):
    from modules import shared

    record.actions["denoiser"] = lambda _: shared.state.interrupt()
    assert len(generate(n_iter=2, enable_hr=True).images) == 1
    assert record.events == BEFORE + CUT + AFTER
    record.actions["denoiser"] = lambda _: shared.state.skip()
    assert len(generate(n_iter=2).images) == 3
    assert record.events == BEFORE + 2 * (CUT + AFTER[:-1]) + ["postprocess"]
    generate(enable_hr=True)
    second = [HIRES, "process_before_every_sampling"]
    assert record.events == BEFORE + CUT + second + AFTER, "the second pass ends at once"


def test_copies_of_p_share_its_dicts_and_have_no_setup(host, record):
    from modules import processing

    parameters = []
    record.actions["before_process"] = lambda p: parameters.append(dict(p.extra_generation_params))
    record.actions["process"] = lambda p: p.extra_generation_params.update({"Left over": 1})
    p = host.make_p(**REQUEST)
    for _ in range(2):
        processing.process_images(copy(p))
    assert parameters == [{}, {"Left over": 1}]
    assert record.events.count("setup") == 1


def test_refiner_swaps_the_model_between_two_steps(host, generate, record):
    from modules import shared

    for refiner, runs in [("twin", [8]), ("other", [2, 2, 2, 2])]:
        processed = generate(refiner_checkpoint=refiner, refiner_switch_at=0.5, steps=4, n_iter=2)
        first = record.models[0]
        assert [len(list(run)) for _, run in itertools.groupby(record.models, id)] == runs
        assert f"Refiner: {refiner}" in processed.infotexts[0]
        assert host.sd_model.sd_checkpoint_info.model_name == refiner
    assert next(first.parameters()).device.type == "meta", "a replaced model is freed"
    shared.opts.sd_checkpoints_limit = 2
    generate(refiner_checkpoint="twin", refiner_switch_at=0.5, steps=4)
    base = record.models[0]
    assert record.models[1] is not record.models[2]
    generate()
    assert record.models == [base] * 2, "the first one stayed in memory"


@pytest.mark.parametrize("path", [None, "/webui/modules/__init__.py"])
def test_it_refuses_to_start_where_webui_is(monkeypatch, path):
    webui = ModuleType("modules")
    webui.__file__ = path
    monkeypatch.setitem(sys.modules, "modules", webui)
    with pytest.raises(RuntimeError, match="`modules`"):
        Host({})
