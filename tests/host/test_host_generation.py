"""The order of a generation's callbacks, also where it fails, and which steps and models they are told of."""

from __future__ import annotations

import subprocess
import sys
from copy import copy

import pytest
import torch
from PIL import Image, ImageChops

BEFORE = ["setup", "before_process", "process"]
BATCH = ["before_process_batch", "process_batch", "process_before_every_sampling", "cfg_denoiser", "cfg_denoiser"]
DECODED = ["post_sample", "postprocess_batch", "postprocess_batch_list"]
PICTURE = ["postprocess_image", "postprocess_image_after_composite"]


def interrupt(*_):
    from modules import shared

    shared.state.interrupt()


def skip(*_):
    from modules import shared

    shared.state.skip()


def fail(*_, **__):
    raise ValueError("on purpose")


def largest_difference(one, other):
    """Over all pixels and channels, from 0 to 255."""
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def test_one_picture(generate, recorded):
    processed = generate()
    assert recorded.events == BEFORE + BATCH + DECODED + PICTURE + ["postprocess"]
    assert processed.images[0].size == (16, 16)
    assert processed.images[0].info["parameters"] == processed.infotexts[0]


def test_batches(generate, recorded):
    processed = generate(n_iter=2, batch_size=2)
    assert recorded.events == BEFORE + 2 * (BATCH + DECODED + 2 * PICTURE) + ["postprocess"]
    assert processed.index_of_first_image == 1
    assert [text.split("Seed: ")[1][0] for text in processed.infotexts[1:]] == list("1234")
    alone = generate(seed=4)
    assert largest_difference(alone.images[0], processed.images[4]) <= 1, "a picture is the same in any batch"


def test_hires_fix(generate, recorded):
    processed = generate(
        enable_hr=True, hr_second_pass_steps=3, hr_prompt="dog", prompt="cat, dog", denoising_strength=0.5
    )
    passes = [*BATCH, "before_hr", "process_before_every_sampling", *["cfg_denoiser"] * 3]
    assert recorded.events == BEFORE + passes + DECODED + PICTURE + ["postprocess"]
    assert [call[:2] for call in recorded.denoiser_calls] == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [call[3][2:] for call in recorded.denoiser_calls] == [(16, 16)] * 2 + [(32, 32)] * 3
    assert processed.images[0].size == (32, 32)
    for part in ["Hires upscale: 2.0", "Hires steps: 3", "Hires prompt: dog", "Denoising strength: 0.5", "Size: 16x16"]:
        assert part in processed.info
    assert "Hires negative prompt" not in processed.info


def test_hires_fix_from_a_given_picture_has_no_first_pass(generate, recorded, host):
    from modules import processing, scripts, shared

    picture = generate().images[0]
    recorded.clear()
    p = processing.StableDiffusionProcessingTxt2Img(
        prompt="cat", steps=2, width=16, height=16, seed=1, enable_hr=True, firstpass_image=picture
    )
    p.is_api = True
    p.scripts, p.script_args = scripts.scripts_txt2img, tuple(host.api.default_script_arg_txt2img)
    shared.state.begin()
    processed = processing.process_images(p)
    assert recorded.events.count("cfg_denoiser") == 2
    assert processed.images[0].size == (32, 32)


def test_img2img_walks_the_schedules_end(generate, recorded):
    picture = generate().images[0]
    recorded.clear()
    processed = generate("img2img", init_images=[picture], denoising_strength=0.5, steps=6)
    assert [call[:3] for call in recorded.denoiser_calls] == [(0, 4, 0), (1, 4, 0), (2, 4, 1), (3, 4, 2)]
    assert "Denoising strength: 0.5" in processed.info
    recorded.clear()
    generate("img2img", init_images=[picture], denoising_strength=0.5, override_settings={"img2img_fix_steps": True})
    assert [call[:2] for call in recorded.denoiser_calls] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("sampler_name", ["Euler", "DDIM"])
def test_what_is_not_masked_stays(generate, recorded, sampler_name):
    picture = generate().images[0]
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    recorded.clear()
    options = {"mask": mask, "mask_blur": 0, "sampler_name": sampler_name, "denoising_strength": 1.0, "steps": 4}
    processed = generate("img2img", init_images=[picture], seed=5, **options)
    assert "on_mask_blend" in recorded.events
    kept, changed = ((0, 0, 8, 16), (8, 0, 16, 16))
    assert largest_difference(picture.crop(kept), processed.images[0].crop(kept)) <= 1
    assert picture.crop(changed).tobytes() != processed.images[0].crop(changed).tobytes()


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
def test_the_denoiser_counts_evaluations_and_the_state_lags(generate, recorded, sampler_name, steps, expected):
    generate(sampler_name=sampler_name, steps=steps)
    assert [call[:3] for call in recorded.denoiser_calls] == expected


def test_a_scripts_exception_is_reported_and_the_picture_made(generate, recorded, capsys):
    recorded.actions.update({name: fail for name in ("process", "process_batch", "cfg_denoiser", "postprocess")})
    assert generate().images
    assert recorded.events == BEFORE + BATCH + DECODED + PICTURE + ["postprocess"]
    assert capsys.readouterr().err.count("ValueError: on purpose") == 5


@pytest.mark.parametrize("sampler_name", ["Euler", "PLMS"])
def test_an_exception_in_sampling_ends_it_without_postprocess(host, generate, recorded, sampler_name):
    from modules import shared

    handle = host.sd_model.model.diffusion_model.register_forward_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        generate(sampler_name=sampler_name, override_settings={"s_min_uncond": 0.5})
    handle.remove()
    assert recorded.events == BEFORE + BATCH[:4]
    assert shared.opts.s_min_uncond == 0
    assert shared.state.job_count == 0
    assert generate().images


def test_nans_end_it(host, generate, recorded):
    from modules import devices

    handle = host.sd_model.model.diffusion_model.register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(devices.NansException):
        generate()
    handle.remove()
    assert "post_sample" in recorded.events
    assert "postprocess" not in recorded.events


def test_interrupted(generate, recorded):
    recorded.actions["cfg_denoiser"] = interrupt
    processed = generate(n_iter=2, enable_hr=True)
    assert recorded.events == BEFORE + BATCH[:4] + DECODED + PICTURE + ["postprocess"]
    assert len(processed.images) == 1


def test_skipped(generate, recorded):
    recorded.actions["cfg_denoiser"] = skip
    processed = generate(n_iter=2)
    assert recorded.events == BEFORE + 2 * (BATCH[:4] + DECODED + PICTURE) + ["postprocess"]
    assert len(processed.images) == 3


def test_a_script_may_wrap_sample_on_the_instance(generate, recorded):
    def wrap(p, *_):
        before = p.sample

        def sample(*args, **kwargs):
            recorded.record("sample begins")
            try:
                return before(*args, **kwargs)
            finally:
                del p.sample
                recorded.record("sample ends")

        p.sample = sample

    recorded.actions["process_batch"] = wrap
    generate(n_iter=2)
    between = [*BATCH[:2], "sample begins", *BATCH[2:], "sample ends"]
    assert recorded.events == BEFORE + 2 * (between + DECODED + PICTURE) + ["postprocess"]


def test_refiner_swaps_the_model_between_two_steps(host, generate, recorded):
    from modules import sd_models, shared

    seen = []
    recorded.actions["cfg_denoiser"] = lambda params: seen.append(sd_models.model_data.sd_model)
    for refiner, same_module in [("twin", True), ("other", False)]:
        seen.clear()
        processed = generate(refiner_checkpoint=refiner, refiner_switch_at=0.5, steps=4, n_iter=2)
        assert (seen[1] is seen[2]) == same_module
        assert f"Refiner: {refiner}" in processed.info
        assert host.sd_model.sd_checkpoint_info.model_name == refiner
        assert "base" in shared.opts.sd_model_checkpoint
    if seen[0] is not seen[-1]:
        assert next(seen[0].parameters()).device.type == "meta", "a replaced model of another shape is thrown away"
    recorded.clear()
    shared.opts.sd_checkpoints_limit = 2
    recorded.actions["cfg_denoiser"] = lambda params: seen.append(sd_models.model_data.sd_model)
    generate()
    del seen[:]
    generate(refiner_checkpoint="twin", refiner_switch_at=0.5, steps=4)
    assert seen[1] is not seen[2]
    recorded.events.clear()
    generate(steps=4)
    assert "model_loaded" not in recorded.events, "a model kept in memory is not announced"
    assert seen[-1] is seen[0]


def test_hires_fix_with_a_checkpoint_of_its_own(host, generate, recorded):
    names = []
    recorded.actions["cfg_denoiser"] = lambda _: names.append(host.sd_model.sd_checkpoint_info.model_name)
    processed = generate(enable_hr=True, hr_checkpoint_name="twin")
    assert names == ["base", "base", "twin", "twin"]
    assert "Hires checkpoint: twin" in processed.info
    generate()
    assert names[-1] == "base"


def test_override_settings_are_put_back(generate, recorded):
    from modules import shared

    seen = []
    recorded.actions["before_process"] = lambda p, *_: seen.append(shared.opts.sd_unet)
    recorded.actions["process"] = lambda p, *_: seen.append(shared.opts.sd_unet)
    generate(override_settings={"sd_unet": "None"})
    assert seen == ["Automatic", "None"]
    assert shared.opts.sd_unet == "Automatic"
    generate(override_settings={"sd_unet": "None"}, override_settings_restore_afterwards=False)
    assert shared.opts.sd_unet == "None"


def unet_batches(host, generate, **request):
    """The batch size of each UNet call."""
    sizes = []
    unet = host.sd_model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        generate(**{"steps": 2, "batch_size": 2, **request})
    finally:
        handle.remove()
    return sizes


def test_both_halves_of_guidance_in_one_call_or_in_two(host, generate):
    assert unet_batches(host, generate) == [4, 4]
    assert unet_batches(host, generate, override_settings={"batch_cond_uncond": False}) == [2, 2, 2, 2]
    assert unet_batches(host, generate, prompt="a long cat") == [2, 2, 2, 2]
    assert unet_batches(host, generate, negative_prompt="a long cat") == [2, 2, 2, 2]
    assert unet_batches(host, generate, prompt="a long cat", override_settings={"pad_cond_uncond": True}) == [4, 4]
    assert unet_batches(host, generate, prompt="cat AND dog :0.5") == [6, 6]
    assert unet_batches(host, generate, s_min_uncond=1000.0) == [4, 2]
    assert unet_batches(host, generate, override_settings={"skip_early_cond": 0.1}) == [2, 4]


def test_guidance_is_the_same_however_the_calls_are_split(host, generate):
    together = generate(negative_prompt="dog", steps=3)
    apart = generate(negative_prompt="dog", steps=3, override_settings={"batch_cond_uncond": False})
    assert largest_difference(together.images[0], apart.images[0]) <= 1


@pytest.mark.parametrize("size", [(17, 33), (8, 8), (31, 9)])
def test_odd_sizes(generate, size):
    assert generate(width=size[0], height=size[1]).images[0].size == size


def test_infotext(generate, recorded):
    from modules import infotext_utils

    def write(p, *_):
        p.extra_generation_params.update(
            {"A list": ["first", "second"], "A size": "8x8", "A text": 'with, comma: and "quotes"', "None": None}
        )
        p.extra_generation_params["A function"] = lambda p, index, **kwargs: f"picture {index}"
        p.extra_generation_params["Broken"] = fail
        p.comment("said under the picture")

    recorded.actions["process"] = write
    processed = generate(batch_size=2, negative_prompt="dog,\ndog")
    assert processed.comments == "said under the picture\n"
    parsed = infotext_utils.parse_generation_parameters(processed.infotexts[2])
    assert parsed["Prompt"] == "cat"
    assert parsed["Negative prompt"] == "dog,\ndog"
    assert (parsed["A list"], parsed["A function"]) == ("second", "picture 1")
    assert (parsed["A size-1"], parsed["A size-2"]) == ("8", "8")
    assert parsed["A text"] == 'with, comma: and "quotes"'
    assert not {"None", "Broken"} & set(parsed)
    assert parsed["Seed"] == "2"


def test_unknown_words_are_said(generate):
    assert generate(prompt="a purple cat").comments == (
        "The model does not know the word 'a'.\nThe model does not know the word 'purple'.\n"
    )


def test_cells_share_dicts(generate, recorded):
    """X/Y/Z and others generate from copies of `p`: what one cell writes, the next one finds."""
    from modules import processing, scripts, shared

    seen = []
    recorded.actions["before_process"] = lambda p, *_: seen.append(dict(p.extra_generation_params))
    recorded.actions["process"] = lambda p, *_: p.extra_generation_params.update({"Left over": 1})
    p = processing.StableDiffusionProcessingTxt2Img(prompt="cat", steps=1, width=16, height=16, seed=1)
    p.scripts, p.script_args = scripts.scripts_txt2img, (0,) * 40
    shared.state.begin()
    for _ in range(2):
        processing.process_images(copy(p))
    assert seen == [{}, {"Left over": 1}]
    assert recorded.events.count("setup") == 1


def test_xyz_grid(host, generate, recorded):
    from modules import scripts

    module = next(s.module for s in scripts.scripts_data if s.script_class.__module__ == "xyz_grid.py")
    module.axis_options.append(module.AxisOption("[Test] level", float, module.apply_field("test_level"), confirm=None))
    host.reload_ui()
    module = next(s.module for s in scripts.scripts_data if s.script_class.__module__ == "xyz_grid.py")
    assert "[Test] level" not in [option.label for option in module.axis_options], "Reload UI executes it anew"
    module.axis_options.append(module.AxisOption("[Test] level", float, module.apply_field("test_level"), confirm=None))
    levels = []
    runner = scripts.scripts_txt2img
    runner.script("X/Y/Z plot").current_axis_options = module.axis_options
    labels = [option.label for option in module.axis_options]

    def note(p, *_):
        levels.append((p.test_level, p.steps))
        if p.steps == 3:
            host.sd_model.model.diffusion_model.register_forward_hook(fail)

    recorded.actions["before_process"] = note
    nothing = [0, "", []]
    axes = [labels.index("[Test] level"), "0.25, 0.5", [], labels.index("Steps"), "1, 2, 3", [], *nothing]
    processed = generate(script_name="x/y/z plot", script_args=[*axes, *[False] * 7, 0, True], prompt="cat")
    host.sd_model.model.diffusion_model._forward_hooks.clear()
    assert levels == [(0.25, 1), (0.5, 1), (0.25, 2), (0.5, 2), (0.25, 3), (0.5, 3)]
    assert processed.images[0].size == (32, 48)
    assert 'X Type: [Test] level, X Values: "0.25, 0.5"' in processed.info
    assert recorded.events.count("postprocess") == 4, "failing cells are left black, and the plot goes on"


def test_another_unet_in_its_place(generate, recorded):
    from modules import script_callbacks, sd_unet, shared

    class Option(sd_unet.SdUnetOption):
        label, model_name = "Flat", "another"

        def create_unet(self):
            class Flat(sd_unet.SdUnet):
                def forward(self, x, timesteps, context, *args, **kwargs):
                    return torch.zeros_like(x)

            return Flat()

    before = generate().images[0].tobytes()
    callback = script_callbacks.on_list_unets
    callback(lambda found: found.append(Option()))
    sd_unet.list_unets()
    shared.opts.sd_unet = "Flat"
    assert generate().images[0].tobytes() != before
    assert sd_unet.current_unet is not None
    shared.opts.sd_unet = "None"
    assert generate().images[0].tobytes() == before
    assert sd_unet.current_unet is None


def test_webuis_own_token_merging(host, generate, recorded):
    pytest.importorskip("tomesd")
    classes = []
    recorded.actions["cfg_denoiser"] = lambda _: classes.append(
        {type(m).__name__ for m in host.sd_model.modules() if hasattr(m, "attn1")}
    )
    plain = generate()
    merged = generate(override_settings={"token_merging_ratio": 0.5}, enable_hr=True)
    assert "Token merging ratio: 0.5, Token merging ratio hr: 0.5" in merged.info
    assert generate().images[0].tobytes() == plain.images[0].tobytes()
    assert classes == [{"BasicTransformerBlock"}] * 2 + [{"ToMeBlock"}] * 4 + [{"BasicTransformerBlock"}] * 2


def test_refuses_where_webui_is(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport modules\nfrom lab.host import start\nstart(None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: the miniature host stands in for WebUI's package `modules`" in done.stderr
