"""Stands in for `modules.ui`: txt2img, img2img, PNG Info and Settings with WebUI's ids, and the extensions' tabs."""

from __future__ import annotations

import html
import json
import os
from contextlib import closing

import gradio as gr
from modules import (
    extensions,
    gradio_extensons,
    images,
    infotext_utils,
    paths,
    processing,
    script_callbacks,
    scripts,
    sd_models,
    shared,
    ui_loadsave,
)
from modules.call_queue import wrap_gradio_call, wrap_gradio_gpu_call
from modules.infotext_utils import ParamBinding, PasteField, register_paste_params_button
from modules.shared import opts
from modules.ui_components import FormGroup, FormRow, InputAccordion, ToolButton

theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

INFOTEXT_KEYS = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "cfg_scale": "CFG scale",
    "width": "Size-1",
    "height": "Size-2",
    "batch_size": "Batch size",
    "denoising_strength": "Denoising strength",
    "hr_scale": "Hires upscale",
    "hr_upscaler": "Hires upscaler",
    "hr_second_pass_steps": "Hires steps",
    "hr_resize_x": "Hires resize-1",
    "hr_resize_y": "Hires resize-2",
    "hr_checkpoint_name": "Hires checkpoint",
    "hr_prompt": "Hires prompt",
    "hr_negative_prompt": "Hires negative prompt",
    "enable_hr": lambda d: "Denoising strength" in d and ("Hires upscale" in d or "Hires resize-1" in d),
}
"""How the fields of a generation that the page sets are called in the infotext."""


def plaintext_to_html(text, classname=None):
    """Text as a paragraph."""
    content = "<br>\n".join(html.escape(line) for line in text.split("\n"))
    return f"<p class='{classname}'>{content}</p>" if classname else f"<p>{content}</p>"


def page_head() -> str:
    """The page's scripts and styles: the host's, then each extension's, as files with their time of change."""
    scripts_js = [os.path.join(paths.script_path, "page.js")]
    styles = [os.path.join(paths.script_path, "page.css")]
    for extension in extensions.active():
        scripts_js += extension.list_files("javascript", ".js")
        styles += [path for path in [os.path.join(extension.path, "style.css")] if os.path.isfile(path)]
    dated = {path: html.escape(f"file={path}?{os.path.getmtime(path)}") for path in styles + scripts_js}
    head = "".join(f'<link rel="stylesheet" href="{dated[path]}">' for path in styles)
    head += "".join(f'<script type="text/javascript" src="{dated[path]}"></script>' for path in scripts_js)
    return head + (f"<script>set_theme('{shared.cmd_opts.theme}');</script>" if shared.cmd_opts.theme else "")


def generate_function(tab: str, names: list[str], runner: scripts.ScriptRunner):
    """What Generate does on a tab: from the task's id, the values of the controls `names` and scripts' arguments to
    pictures, JSON, infotext and comments."""
    classes = processing.StableDiffusionProcessingTxt2Img, processing.StableDiffusionProcessingImg2Img
    make = classes[tab == "img2img"]

    def generate(id_task, *values):
        fields, script_args = dict(zip(names, values, strict=False)), values[len(names) :]
        if fields.get("init_images", ()) is None:
            raise ValueError("img2img needs a picture")
        if "init_images" in fields:
            fields["init_images"] = [fields["init_images"]]
        fields["override_settings"] = infotext_utils.create_override_settings_dict(fields["override_settings"])
        with closing(make(**fields)) as p:
            p.scripts, p.script_args = runner, script_args
            processed = runner.run(p, *script_args) or processing.process_images(p)
        comments = plaintext_to_html(processed.comments, classname="comments")
        return processed.images, processed.js(), plaintext_to_html(processed.info), comments

    return wrap_gradio_gpu_call(generate, extra_outputs=[None, "", ""])


def update_generation_info(generation_info, html_info, img_index):
    """The infotext of the picture that was clicked."""
    try:
        return plaintext_to_html(json.loads(generation_info)["infotexts"][max(int(img_index), 0)])
    except (ValueError, KeyError, IndexError, TypeError):
        return html_info


def slider(label, elem_id, minimum, maximum, step, value):
    """A slider."""
    return gr.Slider(minimum, maximum, step=step, value=value, label=label, elem_id=elem_id)


def create_hires_controls() -> dict[str, gr.blocks.Block]:
    """The fold of hires fix: its controls by the names of the fields that they set."""
    made, unit = {}, processing.opt_f
    with InputAccordion(False, label="Hires. fix", elem_id="txt2img_hr") as made["enable_hr"]:
        with FormRow():
            modes, mode = [*shared.latent_upscale_modes], shared.latent_upscale_default_mode
            made["hr_upscaler"] = gr.Dropdown(modes, value=mode, label="Upscaler", elem_id="txt2img_hr_upscaler")
            made["hr_second_pass_steps"] = slider("Hires steps", "txt2img_hires_steps", 0, 150, 1, 0)
            made["denoising_strength"] = slider("Denoising strength", "txt2img_denoising_strength", 0.0, 1.0, 0.01, 0.7)
        with FormRow():
            made["hr_scale"] = slider("Upscale by", "txt2img_hr_scale", 1.0, 4.0, 0.05, 2.0)
            made["hr_resize_x"] = slider("Resize width to", "txt2img_hr_resize_x", 0, 256 * unit, unit, 0)
            made["hr_resize_y"] = slider("Resize height to", "txt2img_hr_resize_y", 0, 256 * unit, unit, 0)
        names = ["Use same checkpoint", *sd_models.checkpoint_tiles(use_short=True)]
        made["hr_checkpoint_name"] = gr.Dropdown(names, value=names[0], label="Checkpoint", elem_id="hr_checkpoint")
        made["hr_prompt"] = gr.Textbox(label="Hires prompt", elem_id="hires_prompt")
        made["hr_negative_prompt"] = gr.Textbox(label="Hires negative prompt", elem_id="hires_neg_prompt")
    return made


def create_generation_tab(tab: str, runner: scripts.ScriptRunner):
    """Everything on the txt2img or img2img tab. The ids are WebUI's."""
    scripts.scripts_current = runner
    runner.initialize_scripts(is_img2img=tab == "img2img")
    made: dict[str, gr.blocks.Block] = {}
    task = gr.Label(visible=False)
    with gr.Row(elem_id=f"{tab}_toprow", variant="compact"):
        with gr.Column(elem_id=f"{tab}_prompt_container", scale=6):
            for name, label, part in [
                ("prompt", "Prompt", "prompt"),
                ("negative_prompt", "Negative prompt", "neg_prompt"),
            ]:
                made[name] = gr.Textbox(
                    label=label, elem_id=f"{tab}_{part}", show_label=False, lines=3, placeholder=label
                )
        with gr.Column(scale=1, elem_id=f"{tab}_actions_column"):
            with gr.Row(elem_id=f"{tab}_generate_box", elem_classes=["generate-box"]):
                interrupt = gr.Button("Interrupt", elem_id=f"{tab}_interrupt", elem_classes="generate-box-interrupt")
                skip = gr.Button("Skip", elem_id=f"{tab}_skip", elem_classes="generate-box-skip")
                submit = gr.Button("Generate", elem_id=f"{tab}_generate", variant="primary")
            with gr.Row(elem_id=f"{tab}_tools"):
                paste = ToolButton("↙️", elem_id="paste", tooltip="Read the parameters in the prompt, or the last ones")
    skip.click(shared.state.skip, queue=False)
    interrupt.click(shared.state.interrupt, queue=False)

    with gr.Row():
        with gr.Column(variant="compact", elem_id=f"{tab}_settings"):
            runner.prepare_ui()
            if tab == "img2img":
                with gr.Tabs(elem_id="mode_img2img"), gr.TabItem("img2img", elem_id="img2img_img2img_tab"):
                    made["init_images"] = gr.Image(
                        elem_id="img2img_image", show_label=False, source="upload", type="pil"
                    )
            runner.setup_ui_for_section("sampler")
            unit, side = processing.opt_f, processing.default_side
            with FormRow():
                made["width"] = slider("Width", f"{tab}_width", 8 * unit, 256 * unit, unit, side)
                made["height"] = slider("Height", f"{tab}_height", 8 * unit, 256 * unit, unit, side)
            with FormRow():
                made["n_iter"] = slider("Batch count", f"{tab}_batch_count", 1, 100, 1, 1)
                made["batch_size"] = slider("Batch size", f"{tab}_batch_size", 1, 8, 1, 1)
            made["cfg_scale"] = slider("CFG Scale", f"{tab}_cfg_scale", 1.0, 30.0, 0.5, 7.0)
            if tab == "img2img":
                made["denoising_strength"] = slider(
                    "Denoising strength", "img2img_denoising_strength", 0.0, 1.0, 0.01, 0.75
                )
            runner.setup_ui_for_section("seed")
            with gr.Row(elem_id=f"{tab}_accordions", elem_classes="accordions"):
                made.update(create_hires_controls() if tab == "txt2img" else {})
                runner.setup_ui_for_section("accordions")
            override = {"label": "Override settings", "elem_id": f"{tab}_override_settings", "multiselect": True}
            made["override_settings"] = gr.Dropdown([], visible=False, **override)
            with FormGroup(elem_id=f"{tab}_script_container"):
                custom_inputs = runner.setup_ui()

        with gr.Column(elem_id=f"{tab}_results"), gr.Column(variant="panel", elem_id=f"{tab}_results_panel"):
            with gr.Group(elem_id=f"{tab}_gallery_container"):
                gallery = gr.Gallery(show_label=False, elem_id=f"{tab}_gallery", columns=4, preview=True)
            with gr.Row(elem_id=f"image_buttons_{tab}"):
                to_img2img = ToolButton("🖼️", elem_id=f"{tab}_send_to_img2img", tooltip="Send to the img2img tab")
            with gr.Group():
                infotext = gr.HTML(elem_id=f"html_info_{tab}", elem_classes="infotext")
                html_log = gr.HTML(elem_id=f"html_log_{tab}", elem_classes="html-log")
                generation_info = gr.Textbox(visible=False, elem_id=f"generation_info_{tab}")
                chosen = gr.Button(visible=False, elem_id=f"{tab}_generation_info_button")
    chosen.click(
        update_generation_info,
        _js="(x, y) => [x, y, selected_gallery_index()]",
        inputs=[generation_info, infotext, infotext],
        outputs=[infotext],
        show_progress=False,
    )
    for event in (submit.click, made["prompt"].submit):
        event(
            generate_function(tab, [*made], runner),
            _js=f"submit_{tab}" if tab == "img2img" else "submit",
            inputs=[task, *made.values(), *custom_inputs],
            outputs=[gallery, generation_info, infotext, html_log],
            show_progress=False,
        ).then(None, _js=f"() => showSubmitButtons('{tab}', true)")
    fields = [PasteField(made[name], key, api=name) for name, key in INFOTEXT_KEYS.items() if name in made]
    fields += runner.infotext_fields
    infotext_utils.add_paste_fields(tab, made.get("init_images"), fields, made["override_settings"])
    register_paste_params_button(ParamBinding(paste, tab, source_text_component=made["prompt"]))
    source = {"source_tabname": "txt2img" if tab == "txt2img" else None, "source_image_component": gallery}
    register_paste_params_button(
        ParamBinding(to_img2img, "img2img", **source, paste_field_names=runner.paste_field_names)
    )
    scripts.scripts_current = None


def run_pnginfo(image):
    """What the PNG Info tab shows of a picture: (nothing, infotext, everything as HTML)."""
    if image is None:
        return "", "", ""
    geninfo, items = images.read_info_from_image(image)
    shown = {"parameters": geninfo, **items} if geninfo else items
    parts = [f"<p><b>{html.escape(key)}</b></p>{plaintext_to_html(str(value))}" for key, value in shown.items()]
    return "", geninfo or "", "".join(parts) or "<p>Nothing found in the image.</p>"


def create_png_info_tab():
    """A picture's parameters, and two buttons that send them on."""
    with gr.Row():
        with gr.Column(variant="panel"):
            image = gr.Image(elem_id="pnginfo_image", label="Source", source="upload", interactive=True, type="pil")
        with gr.Column(variant="panel"):
            top, geninfo, shown = gr.HTML(), gr.Textbox(visible=False, elem_id="pnginfo_generation_info"), gr.HTML()
            with gr.Row():
                for tab in ("txt2img", "img2img"):
                    button = gr.Button(f"Send to {tab}", elem_id=f"{tab}_tab")
                    register_paste_params_button(ParamBinding(button, tab, geninfo, image))
    image.change(wrap_gradio_call(run_pnginfo), inputs=[image], outputs=[top, geninfo, shown])


def create_settings_tab():
    """One control a setting, by section; Apply and Reload UI."""
    kinds = {str: gr.Textbox, int: gr.Number, float: gr.Number, bool: gr.Checkbox}
    components: dict[str, gr.blocks.Block] = {}
    with gr.Row():
        apply = gr.Button("Apply settings", variant="primary", elem_id="settings_submit")
        reload = gr.Button("Reload UI", variant="primary", elem_id="settings_restart_gradio")
    result = gr.HTML(elem_id="settings_result")
    with gr.Tabs(elem_id="settings"):
        sections = dict.fromkeys(info.section for info in opts.data_labels.values())
        for section in [section for section in sections if section and section[0]]:
            with gr.TabItem(section[1], elem_id=f"settings_{section[0]}"), gr.Column(variant="compact"):
                for key, info in opts.data_labels.items():
                    make = info.component or kinds.get(type(info.default))
                    if info.section == section and make is not None:
                        args = info.component_args() if callable(info.component_args) else info.component_args or {}
                        control = make(label=info.label, value=getattr(opts, key), elem_id=f"setting_{key}", **args)
                        if not info.do_not_save:
                            components[key] = control
                        if info.comment_before or info.comment_after:
                            gr.HTML(info.comment_before + info.comment_after, elem_classes="settings-comment")
    shared.settings_components = components

    def run_settings(*values):
        given = dict(zip(components, values, strict=True))
        for key, value in given.items():
            if not opts.same_type(value, opts.data_labels[key].default):
                raise ValueError(f"Bad value for setting {key}: {value}")
        changed = [key for key, value in given.items() if opts.set(key, value)]
        opts.save(shared.config_filename)
        return [f"{len(changed)} settings changed{': ' if changed else ''}{', '.join(changed)}."]

    apply.click(wrap_gradio_call(run_settings, extra_outputs=[]), inputs=[*components.values()], outputs=[result])
    reload.click(shared.state.request_restart, _js="restart_reload", queue=False)


def create_ui():
    """Builds the page."""
    gradio_extensons.reload_javascript(page_head())
    infotext_utils.reset()
    script_callbacks.ui_settings_callback()
    loadsave = ui_loadsave.UiLoadsave(shared.ui_config_filename)
    with gr.Blocks(theme=theme, analytics_enabled=False, title="Stable Diffusion") as demo:
        names, name = sd_models.checkpoint_tiles(), sd_models.select_checkpoint().title
        label, elem_id = "Stable Diffusion checkpoint", "setting_sd_model_checkpoint"
        checkpoint = gr.Dropdown(names, value=name, label=label, elem_id=elem_id)
        checkpoint.change(lambda title: opts.set("sd_model_checkpoint", title) and None, inputs=[checkpoint])
        with gr.Tabs(elem_id="tabs"):
            with gr.TabItem("txt2img", id="txt2img", elem_id="tab_txt2img") as block:
                create_generation_tab("txt2img", scripts.scripts_txt2img)
            loadsave.add_block(block, "txt2img")
            with gr.TabItem("img2img", id="img2img", elem_id="tab_img2img") as block:
                create_generation_tab("img2img", scripts.scripts_img2img)
            loadsave.add_block(block, "img2img")
            with gr.TabItem("PNG Info", id="pnginfo", elem_id="tab_pnginfo"):
                create_png_info_tab()
            for interface, title, ifid in script_callbacks.ui_tabs_callback():
                with gr.TabItem(title, id=ifid, elem_id=f"tab_{ifid}"):
                    interface.render()
            with gr.TabItem("Settings", id="settings", elem_id="tab_settings"):
                create_settings_tab()
        infotext_utils.connect_paste_params_buttons()
        gr.HTML("A miniature host, not Stable Diffusion WebUI.", elem_id="footer")
    loadsave.dump_defaults()
    return demo
