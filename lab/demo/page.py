"""The demo's page: a prompt, the extension's panel, and pictures with and without merging."""

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
"""Sides of pictures in pixels; the models were trained at 32, that of photographs at 64 too."""

Pictures = list[tuple[Image.Image, str]]


def compare(
    host: Host, args: Sequence[Any], on_step: Callable[[int], None] | None = None, **fields: Any
) -> tuple[Pictures, Any]:
    """Make a picture without merging, and then with `args`, all scripts' arguments.

    Returns both with their times, their difference and the merge map, if any, and the `Processed`
    with merging, which is made last since the panel reports the last generation. `on_step` is
    called with the number of the model's evaluations so far.
    """
    from modules import processing, script_callbacks

    request = {"steps": STEPS, "sampler_name": SAMPLER, "seed": SEED, "cfg_scale": CFG}
    request |= {"width": 32, "height": 32}
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
    size = pictures[0][0].size
    return pictures + [(enlarged(merge_map, size), "merge map") for merge_map in maps], merged


def build(host: Host, theme: str | None = None) -> Callable[[Any], gr.Blocks]:
    """Return a function that builds the page around a runner's scripts, with merging on."""

    def page(runner: Any) -> gr.Blocks:
        from modules import sd_models, sd_samplers

        _serve_head(theme)
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        theme_of_gradio, title = gr.themes.Default(**fonts), "ToMe: the demo"
        with gr.Blocks(theme_of_gradio, analytics_enabled=False, title=title) as blocks:
            with gr.Row():
                with gr.Column(elem_id="settings"):
                    models = sorted(sd_models.checkpoints)
                    current = host.sd_model.sd_checkpoint_info.model_name
                    id_of_model = "setting_sd_model_checkpoint"
                    model = gr.Dropdown(models, value=current, label="Model", elem_id=id_of_model)
                    prompt = gr.Textbox("cat face", label="Prompt", elem_id="txt2img_prompt")
                    words = gr.HTML(_words(host, ""), elem_id="demo_words")
                    with gr.Row():
                        width = _slider("Width", "width", 32, **SIDES)
                        height = _slider("Height", "height", 32, **SIDES)
                    with gr.Row():
                        steps = _slider("Steps", "steps", STEPS, minimum=1, maximum=150, step=1)
                        names = list(sd_samplers.all_samplers_map)
                        sampler = gr.Dropdown(
                            names, value=SAMPLER, label="Sampler", elem_id="txt2img_sampling"
                        )
                    with gr.Row():
                        seed = gr.Number(
                            SEED, label="Seed (-1: any)", precision=0, elem_id="txt2img_seed"
                        )
                        guidance = _slider(
                            "Guidance", "cfg_scale", CFG, minimum=1, maximum=30, step=0.5
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
            map_step.value = STEPS // 2
            tome[0].value = tome[0].accordion.open = True

            fields = {"prompt": prompt, "width": width, "height": height, "steps": steps}
            fields |= {"sampler_name": sampler, "seed": seed, "cfg_scale": guidance}
            inputs = [*fields.values(), *runner.inputs[1:]]
            for event in (button.click, prompt.submit):
                event(_generate(host, list(fields)), inputs, [gallery, summary])
            model.change(_choose(host), [model, prompt], [words], queue=False)
            prompt.change(
                lambda text: _words(host, text), [prompt], [words], show_progress=False, queue=False
            )
        return blocks

    return page


def _slider(label: str, name: str, value: float, **scale: float) -> gr.Slider:
    return gr.Slider(**scale, value=value, label=label, elem_id=f"txt2img_{name}")


def _generate(host: Host, names: list[str]) -> Callable[..., tuple[Pictures, str]]:
    """Handler of Generate, from the values of the fields `names` and of the scripts' controls."""
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
    """Handler of the model's choice: load it, as in WebUI, and check the prompt."""
    from modules import call_queue, sd_models, shared

    def choose(name: str, prompt: str) -> str:
        with call_queue.queue_lock:
            shared.opts.set("sd_model_checkpoint", name)
            sd_models.reload_model_weights()
        return _words(host, prompt)

    return choose


def _words(host: Host, prompt: str) -> str:
    """HTML of a prompt's unknown words, and, folded, of the known ones."""
    model = host.sd_model
    unknown = ", ".join(html.escape(word) for word in model.unknown_words(prompt))
    lines = f"<p>Unknown to the model, and skipped: <b>{unknown}</b></p>" if unknown else ""
    words = html.escape(", ".join(model.captions or model.words))
    return f"{lines}<details><summary>What the model knows</summary><p>{words}</p></details>"


_template_response = gr.routes.templates.TemplateResponse


def _serve_head(theme: str | None) -> None:
    """Add the demo's and the extension's styles and scripts to pages; remove external links."""
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
