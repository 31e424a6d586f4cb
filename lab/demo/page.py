"""The demo's page: a prompt and the extension's very panel, and what merging makes of a picture and
of the time."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..host import EXTENSION, Host
from .compare import AMPLIFIED, difference, enlarged

FOLDER = Path(__file__).resolve().parent
STEPS, SAMPLER, CFG, SEED = 20, "Euler", 3.0, 1
SIDES = {"minimum": 16, "maximum": 96, "step": 8}
"""What a model can make, in pixels; both were trained at 32, and that of photographs at 64 too."""

Pictures = list[tuple[Image.Image, str]]
"""Each with what it is."""


def compare(
    host: Host, args: Sequence[Any], on_step: Callable[[int], None] | None = None, **fields: Any
) -> tuple[Pictures, Any]:
    """Makes a picture without merging and then as `args`, all scripts' arguments, say; each with
    its time.

    Gives both, their difference and the merge map, as far as there are any, and what was merged, as
    `Processed`. In this order: what the panel tells of the last generation is of the merged one.
    `on_step` gets the number of the model's runs so far.
    """
    from modules import processing, script_callbacks

    request = {
        "steps": STEPS,
        "seed": SEED,
        "width": 32,
        "height": 32,
        "cfg_scale": CFG,
        "sampler_name": SAMPLER,
    }
    runs = 0

    def count(_: Any) -> None:
        nonlocal runs
        runs += 1
        if on_step is not None:
            on_step(runs)

    def timed(tome: Sequence[Any]) -> tuple[Any, float]:
        p = host.make_p(**request | fields)
        p.script_args = tome
        began = time.perf_counter()
        return processing.process_images(p), time.perf_counter() - began

    script_callbacks.on_cfg_denoised(count)
    try:
        plain, without_merging = timed(host.script_args([False]))
        merged, with_merging = timed(args)
    finally:
        script_callbacks.remove_callbacks_for_function(count)
    if not merged.comments or "ToMe error" in merged.extra_generation_params:
        return [(enlarged(merged.images[0]), "")], merged
    before, after, *maps = plain.images + merged.images
    pictures = [
        (enlarged(before), f"without merging: {without_merging:.2f} s"),
        (enlarged(after), f"with merging: {with_merging:.2f} s"),
        (enlarged(difference(before, after)), f"difference, {AMPLIFIED} times"),
    ]
    return pictures + [
        (enlarged(merge_map, pictures[0][0].size), "merge map") for merge_map in maps
    ], merged


def build(host: Host, theme: str | None = None) -> Callable[[Any], gr.Blocks]:
    """What builds the page around a runner's scripts, which it has on from the start."""

    def page(runner: Any) -> gr.Blocks:
        from modules import sd_models, sd_samplers

        _serve_head(theme)
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        with gr.Blocks(
            gr.themes.Default(**fonts), analytics_enabled=False, title="ToMe: the demo"
        ) as blocks:
            with gr.Row():
                with gr.Column(elem_id="settings"):
                    models = sorted(sd_models.checkpoints)
                    model = gr.Dropdown(
                        models,
                        value=host.sd_model.sd_checkpoint_info.model_name,
                        label="Model",
                        elem_id="setting_sd_model_checkpoint",
                    )
                    prompt = gr.Textbox("cat face", label="Prompt", elem_id="txt2img_prompt")
                    words = gr.HTML(_words(host, ""), elem_id="demo_words")
                    with gr.Row():
                        width, height = (
                            gr.Slider(
                                **SIDES, value=32, label=name, elem_id=f"txt2img_{name.lower()}"
                            )
                            for name in ("Width", "Height")
                        )
                    with gr.Row():
                        steps = gr.Slider(
                            1, 150, step=1, value=STEPS, label="Steps", elem_id="txt2img_steps"
                        )
                        names = list(sd_samplers.all_samplers_map)
                        sampler = gr.Dropdown(
                            names, value=SAMPLER, label="Sampler", elem_id="txt2img_sampling"
                        )
                    with gr.Row():
                        seed = gr.Number(
                            SEED, label="Seed (-1: any)", precision=0, elem_id="txt2img_seed"
                        )
                        guidance = gr.Slider(
                            1,
                            30,
                            step=0.5,
                            value=CFG,
                            label="Guidance",
                            elem_id="txt2img_cfg_scale",
                        )
                    runner.setup_ui()
                with gr.Column(elem_id="results"):
                    button = gr.Button("Generate", variant="primary", elem_id="txt2img_generate")
                    gallery = gr.Gallery(
                        show_label=False, columns=2, height="auto", elem_id="txt2img_gallery"
                    )
                    summary = gr.HTML(elem_id="html_info_txt2img")
            tome = runner.script("ToMe").controls
            map_step = next(control for control in tome if control.elem_id.endswith("_map_step"))
            for control, value in ((tome[0], True), (map_step, STEPS // 2)):
                control.value = value
            tome[0].accordion.open = True

            fields = {
                "prompt": prompt,
                "width": width,
                "height": height,
                "steps": steps,
                "sampler_name": sampler,
            }
            fields |= {"seed": seed, "cfg_scale": guidance}
            for event in (button.click, prompt.submit):
                event(
                    _generate(host, list(fields)),
                    inputs=[*fields.values(), *runner.inputs[1:]],
                    outputs=[gallery, summary],
                )
            model.change(_choose(host), [model, prompt], [words], queue=False)
            prompt.change(
                lambda text: _words(host, text), [prompt], [words], show_progress=False, queue=False
            )
        return blocks

    return page


def _generate(host: Host, names: list[str]) -> Callable[..., tuple[Pictures, str]]:
    """What Generate does, from the values of the fields `names` and of the scripts' controls."""

    from modules import call_queue

    def generate(progress: Any = gr.Progress(), *values: Any) -> tuple[Pictures, str]:  # noqa: B008 - gradio's way
        fields, args = dict(zip(names, values, strict=False)), [0, *values[len(names) :]]
        fields |= {name: int(fields[name]) for name in ("width", "height", "steps")}
        second_order = fields["sampler_name"] == "Heun"
        runs = 2 * fields["steps"] * (1 + second_order)
        with call_queue.queue_lock:
            pictures, merged = compare(
                host, args, lambda run: progress((min(run, runs), runs), unit="steps"), **fields
            )
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in merged.comments.splitlines())
        return pictures, f"{lines}<p>{html.escape(merged.infotexts[0].splitlines()[-1])}</p>"

    return generate


def _choose(host: Host) -> Callable[[str, str], str]:
    """What choosing a model does: it is loaded, as in WebUI, and the prompt is read by it."""
    from modules import call_queue, sd_models, shared

    def choose(name: str, prompt: str) -> str:
        with call_queue.queue_lock:
            shared.opts.set("sd_model_checkpoint", name)
            sd_models.reload_model_weights()
        return _words(host, prompt)

    return choose


def _words(host: Host, prompt: str) -> str:
    """What the model doesn't know of a prompt, and, folded, what it does know."""
    model = host.sd_model
    unknown = ", ".join(html.escape(word) for word in model.unknown_words(prompt))
    lines = (
        f"<p>The model does not know: <b>{unknown}</b>. It leaves that out.</p>" if unknown else ""
    )
    words = html.escape(", ".join(model.captions or model.words))
    return f"{lines}<details><summary>What the model knows</summary><p>{words}</p></details>"


_template_response = gr.routes.templates.TemplateResponse


def _serve_head(theme: str | None) -> None:
    """Gives pages the demo's and the extension's styles and scripts, and takes what they ask of
    other servers."""
    styles, scripts = [EXTENSION / "style.css", FOLDER / "page.css"], [FOLDER / "page.js"]
    scripts += sorted((EXTENSION / "javascript").glob("*.js"))
    head = "".join(f"<style>{file.read_text(encoding='utf-8')}</style>" for file in styles)
    head += "".join(f"<script>{file.read_text(encoding='utf-8')}</script>" for file in scripts)
    head += f"<script>setTheme('{theme}')</script>" if theme else ""

    def template_response(*args: Any, **kwargs: Any) -> Any:
        response = _template_response(*args, **kwargs)
        page = re.sub(r'<link[^>]*href="https?://[^>]*>', "", response.body.decode())
        page = re.sub(r'<script[^>]*src="https?://[^>]*></script>', "", page)
        response.body = page.replace("</head>", f"{head}</head>").encode()
        response.init_headers()
        return response

    gr.routes.templates.TemplateResponse = template_response
