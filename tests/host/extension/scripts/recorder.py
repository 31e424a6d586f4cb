"""A script that records every callback, for the host's own tests."""

import gradio as gr
import recorded
from modules import script_callbacks, scripts, shared

BASEDIR = scripts.basedir()
METHODS = [
    "setup",
    "before_process",
    "process",
    "before_process_batch",
    "process_batch",
    "process_before_every_sampling",
    "before_hr",
    "post_sample",
    "postprocess_batch",
    "postprocess_batch_list",
    "on_mask_blend",
    "postprocess_image",
    "postprocess_image_after_composite",
    "postprocess",
]


class Recorder(scripts.Script):
    def title(self):
        return "Recorder"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        recorded.record("ui")
        note = gr.Textbox("nothing", label="Recorder note", elem_id=self.elem_id("note"))
        level = gr.Slider(0.0, 1.0, step=0.1, value=0.5, label="Recorder level", elem_id=self.elem_id("level"))
        with gr.Accordion("More", open=False, elem_id=self.elem_id("more")):
            unsaved = gr.Dropdown(["a", "b"], value="a", label="Recorder preset", elem_id=self.elem_id("preset"))
            unsaved.do_not_save_to_config = True
        self.infotext_fields = [(note, "Recorder note"), (level, lambda d: float(d.get("Recorder level", 0.5)))]
        self.paste_field_names = ["Recorder note", "Recorder level"]
        return [note, level]


def _method(name):
    def method(self, p, *args, **kwargs):
        p.recorded_args = args
        recorded.record(name, p, *args)

    return method


for name in METHODS:
    setattr(Recorder, name, _method(name))


def on_cfg_denoiser(params):
    denoiser = params.denoiser
    recorded.denoiser_calls.append((denoiser.step, denoiser.total_steps, params.sampling_step, tuple(params.x.shape)))
    recorded.record("cfg_denoiser", params)


def on_ui_settings():
    shared.opts.add_option(
        "recorder_flag", shared.OptionInfo(False, "Recorder flag", section=("recorder", "Recorder")).info("for tests")
    )


script_callbacks.on_cfg_denoiser(on_cfg_denoiser)
script_callbacks.on_ui_settings(on_ui_settings)
script_callbacks.on_before_ui(lambda: recorded.record("before_ui"))
script_callbacks.on_before_reload(lambda: recorded.record("before_reload"))
script_callbacks.on_script_unloaded(lambda: recorded.record("script_unloaded"))
script_callbacks.on_model_loaded(lambda model: recorded.record("model_loaded"))
script_callbacks.on_app_started(lambda demo, app: app.add_api_route("/recorder", lambda: {"demo": demo is not None}))
