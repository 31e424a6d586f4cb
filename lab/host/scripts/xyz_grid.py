"""Stands in for WebUI's X/Y/Z plot: axes that other scripts append to, and a grid whose cells are copies of `p`.

Its arguments are WebUI's, in order. Ranges (`1-5`), legends, margins and varied seeds are left out: those arguments are
taken and have no effect.
"""

import csv
from copy import copy
from io import StringIO

import gradio as gr
from modules import errors, images, infotext_utils, processing, scripts, sd_models, sd_samplers, shared
from modules.processing import Processed, process_images
from PIL import Image


def apply_field(field):
    """An axis that sets an attribute of `p`."""

    def fun(p, x, xs):
        setattr(p, field, x)

    return fun


def apply_override(field, boolean: bool = False):
    """An axis that overrides a setting."""

    def fun(p, x, xs):
        p.override_settings[field] = x.lower() == "true" if boolean else x

    return fun


def apply_checkpoint(p, x, xs):
    """An axis of checkpoints."""
    info = sd_models.get_closet_checkpoint_match(x)
    if info is None:
        raise RuntimeError(f"Unknown checkpoint: {x}")
    p.override_settings["sd_model_checkpoint"] = info.name


def do_nothing(p, x, xs):
    """An axis of one value."""


def format_value_add_label(p, opt, x):
    """`Steps: 20`."""
    return f"{opt.label}: {round(x, 8) if isinstance(x, float) else x}"


def format_value(p, opt, x):
    """`20`."""
    return round(x, 8) if isinstance(x, float) else x


def format_nothing(p, opt, x):
    """Nothing."""
    return ""


def csv_string_to_list_strip(data_str):
    """`a, b` as a list."""
    return [value.strip() for row in csv.reader(StringIO(data_str), skipinitialspace=True) for value in row]


class AxisOption:
    """One thing that an axis can vary, on both tabs."""

    def __init__(self, label, type, apply, format_value=format_value_add_label,
                 confirm=None, cost=0.0, choices=None, prepare=None):  # fmt: skip
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.cost, self.choices, self.prepare = confirm, cost, choices, prepare


class AxisOptionImg2Img(AxisOption):
    """One that img2img alone has."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_img2img = True


class AxisOptionTxt2Img(AxisOption):
    """One that txt2img alone has."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_img2img = False


axis_options = [
    AxisOption("Nothing", str, do_nothing, format_value=format_nothing),
    AxisOption("Seed", int, apply_field("seed")),
    AxisOption("Steps", int, apply_field("steps")),
    AxisOptionTxt2Img("Hires steps", int, apply_field("hr_second_pass_steps")),
    AxisOption("CFG Scale", float, apply_field("cfg_scale")),
    AxisOption("Sampler", str, apply_field("sampler_name"), choices=sd_samplers.visible_sampler_names),
    AxisOption("Checkpoint name", str, apply_checkpoint, cost=1.0, choices=lambda: sorted(sd_models.checkpoints_list)),
    AxisOption("Denoising", float, apply_field("denoising_strength")),
    AxisOption("Token merging ratio", float, apply_override("token_merging_ratio")),
]


class Script(scripts.Script):
    """The script in the list."""

    def title(self):
        """Its name."""
        return "X/Y/Z plot"

    def ui(self, is_img2img):
        """Three axes: what to vary, and its values, as text or as choices. Then seven flags, a margin, and whether
        choices are given as text too."""
        self.current_axis_options = [x for x in axis_options if type(x) is AxisOption or x.is_img2img == is_img2img]
        labels = [option.label for option in self.current_axis_options]

        def select_axis(axis_type):
            choices = self.current_axis_options[axis_type or 0].choices
            shown = choices is not None
            return gr.update(visible=not shown), gr.update(visible=shown, choices=choices() if shown else [])

        controls, self.infotext_fields = [], []
        for axis in "xyz":
            with gr.Row():
                value, name = labels[axis == "x"], axis.upper()
                elem_ids = [self.elem_id(f"{axis}_type"), self.elem_id(f"{axis}_values")]
                kind = gr.Dropdown(labels, value=value, type="index", label=f"{name} type", elem_id=elem_ids[0])
                text = gr.Textbox(label=f"{name} values", lines=1, elem_id=elem_ids[1])
                chosen = gr.Dropdown([], label=f"{name} values", visible=False, multiselect=True, interactive=True)
            kind.change(select_axis, inputs=[kind], outputs=[text, chosen])
            controls += [kind, text, chosen]
            self.infotext_fields += [(kind, f"{name} Type"), (text, f"{name} Values")]
        with gr.Row():
            flags = ["Draw legend", "Include Sub Images", "Include Sub Grids", "Keep -1 for seeds"]
            flags += [f"Vary seeds for {axis}" for axis in "XYZ"]
            controls += [gr.Checkbox(label=label, value=label == "Draw legend") for label in flags]
            controls.append(gr.Slider(label="Grid margins (px)", minimum=0, maximum=500, value=0, step=2))
            controls.append(gr.Checkbox(label="Use text inputs instead of dropdowns", value=False))
        return controls

    def run(self, p, *args):
        """Generates every cell; one that fails stays black."""
        include_lone_images, keep_random_seed, choices_as_text = args[10], args[12], args[17]
        if not keep_random_seed:
            processing.fix_seed(p)

        def process_axis(option, text, chosen):
            if option.label == "Nothing":
                return [0]
            if option.choices is not None and not choices_as_text:
                values = chosen
            else:
                values = option.prepare(text) if option.prepare else csv_string_to_list_strip(text)
            values = [option.type(value) for value in values if value != "" or option.type is str]
            if option.confirm:
                option.confirm(p, values)
            return values

        options = [self.current_axis_options[args[i] or 0] for i in (0, 3, 6)]
        texts = [args[i] for i in (1, 4, 7)]
        xs, ys, zs = axes = [process_axis(o, t, args[i]) for o, t, i in zip(options, texts, (2, 5, 8), strict=True)]
        shared.state.job_count = len(xs) * len(ys) * len(zs) * p.n_iter

        def cell(*at):
            if shared.state.interrupted or shared.state.stopping_generation:
                return Processed(p, [], p.seed, "")
            pc = copy(p)
            pc.styles = pc.styles[:]
            for option, value, values in zip(options, at, axes, strict=True):
                option.apply(pc, value, values)
            try:
                return process_images(pc)
            except Exception as e:
                errors.display(e, "generating image for xyz plot")
                return Processed(p, [], p.seed, "")

        try:
            cells = [cell(x, y, z) for z in zs for y in ys for x in xs]
        finally:
            sd_models.reload_model_weights()
        first = next((made for made in cells if made.images), None)
        if first is None:
            return Processed(p, [])
        blank = Image.new("RGB", first.images[0].size)
        pictures = [made.images[0] if made.images else blank for made in cells]
        named = {"Script": self.title()}
        for axis, option, text, values in zip("XYZ", options, texts, axes, strict=True):
            if option.label != "Nothing":
                named.update({f"{axis} Type": option.label, f"{axis} Values": text or ", ".join(map(str, values))})
        extra = "".join(f", {key}: {infotext_utils.quote(value)}" for key, value in named.items())
        processed = copy(first)
        processed.info = first.infotexts[0] + extra
        grid = images.image_grid(pictures, rows=len(ys) * len(zs))
        grid.info["parameters"] = processed.info
        processed.images = [grid, *(pictures if include_lone_images else [])]
        processed.infotexts = [processed.info, *(made.infotexts[0] if made.images else "" for made in cells)]
        processed.index_of_first_image = 1
        return processed
