"""Stands in for `modules.shared`: settings, command line, state, and `sd_model`, which loads the model when read."""

from __future__ import annotations

import argparse
import os
import sys

import gradio as gr
from modules import devices, options, paths, shared_state

OptionInfo, OptionHTML, options_section = options.OptionInfo, options.OptionHTML, options.options_section

parser = argparse.ArgumentParser(description="The miniature host.")
parser.add_argument("--port", type=int, default=7860, help="port of the page and of the API")
parser.add_argument("--api-auth", type=str, default=None, help='who may use the API: "user:password,user2:password2"')
parser.add_argument("--data-dir", type=str, default=None, help="where settings and the extension's own files go")
parser.add_argument("--theme", type=str, default=None, help='"light" or "dark"; what the browser prefers by default')
parser.add_argument("--ckpt", type=str, default=None, help=argparse.SUPPRESS)
cmd_opts = parser.parse_args([])

state = shared_state.State()
demo: gr.Blocks | None = None
device = devices.device
config_filename = os.path.join(paths.data_path, "config.json")
ui_config_filename = os.path.join(paths.data_path, "ui-config.json")
tab_names: list[str] = []
settings_components: dict | None = None
sd_upscalers: list = []
hypernetworks: dict = {}
latent_upscale_default_mode = "Latent"
latent_upscale_modes = {
    "Latent": {"mode": "bilinear", "antialias": False},
    "Latent (bicubic)": {"mode": "bicubic", "antialias": False},
    "Latent (nearest)": {"mode": "nearest", "antialias": False},
}

options_templates: dict[str, OptionInfo] = {
    **options_section(
        ("sd", "Stable Diffusion", "sd"),
        {
            "sd_model_checkpoint": OptionInfo(None, "Stable Diffusion checkpoint", infotext="Model hash"),
            "sd_checkpoints_limit": OptionInfo(1, "Maximum number of checkpoints loaded at the same time"),
            "sd_unet": OptionInfo("Automatic", "SD Unet"),
            "refiner_switch_by_sample_steps": OptionInfo(False, "Switch to refiner by sampling steps"),
        },
    ),
    **options_section(
        ("optimizations", "Optimizations", "sd"),
        {
            "s_min_uncond": OptionInfo(0.0, "Negative Guidance minimum sigma", infotext="NGMS"),
            "s_min_uncond_all": OptionInfo(False, "Negative Guidance minimum sigma all steps"),
            "skip_early_cond": OptionInfo(0.0, "Ignore negative prompt during early sampling"),
            "token_merging_ratio": OptionInfo(0.0, "Token merging ratio", infotext="Token merging ratio"),
            "token_merging_ratio_img2img": OptionInfo(0.0, "Token merging ratio for img2img"),
            "token_merging_ratio_hr": OptionInfo(0.0, "Token merging ratio for high-res pass"),
            "pad_cond_uncond": OptionInfo(False, "Pad prompt/negative prompt", infotext="Pad conds"),
            "batch_cond_uncond": OptionInfo(True, "Batch cond/uncond"),
        },
    ),
    **options_section(
        ("img2img", "img2img", "sd"),
        {"img2img_fix_steps": OptionInfo(False, "With img2img, do exactly the amount of steps the slider specifies")},
    ),
    **options_section(
        ("infotext", "Infotext", "ui"),
        {
            "infotext_skip_pasting": OptionInfo(
                [], "Disregard fields from pasted infotext", gr.Dropdown, lambda: {"multiselect": True, "choices": []}
            ),
            "send_size": OptionInfo(True, "Send size when sending prompt or image to another interface"),
            "send_seed": OptionInfo(True, "Send seed when sending prompt or image to other interface"),
        },
    ),
    **options_section(
        ("saving-images", "Saving images/grids", "saving"),
        {"return_grid": OptionInfo(True, "Show grid in results for web")},
    ),
}
opts = options.Options(options_templates, set())


class Shared(sys.modules[__name__].__class__):
    """Makes `shared.sd_model` a property that loads the model on first use, as WebUI does."""

    @property
    def sd_model(self):
        """The loaded model; reading it may load one."""
        from modules import sd_models

        return sd_models.model_data.get_sd_model()

    @sd_model.setter
    def sd_model(self, value) -> None:
        from modules import sd_models

        sd_models.model_data.set_sd_model(value)


sys.modules[__name__].__class__ = Shared
