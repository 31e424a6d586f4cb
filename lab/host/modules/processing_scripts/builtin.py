"""Stands in for `modules/processing_scripts`: the parts of WebUI's page that are scripts themselves."""

import gradio as gr
from modules import scripts, sd_models, sd_samplers
from modules.infotext_utils import PasteField
from modules.ui_components import FormRow, InputAccordion, ToolButton


class ScriptSampler(scripts.ScriptBuiltinUI):
    """Sampler and steps. Schedule types are left out."""

    section = "sampler"

    def title(self):
        """Its name."""
        return "Sampler"

    def ui(self, is_img2img):
        """Two controls."""
        names = sd_samplers.visible_sampler_names()
        with FormRow(elem_id=f"sampler_selection_{self.tabname}"):
            self.sampler_name = gr.Dropdown(
                label="Sampling method", elem_id=f"{self.tabname}_sampling", choices=names, value=names[0]
            )
            self.steps = gr.Slider(
                minimum=1, maximum=150, step=1, value=20, elem_id=f"{self.tabname}_steps", label="Sampling steps"
            )
        self.infotext_fields = [
            PasteField(self.steps, "Steps", api="steps"),
            PasteField(self.sampler_name, sd_samplers.get_sampler_from_infotext, api="sampler_name"),
        ]
        return self.steps, self.sampler_name

    def setup(self, p, steps, sampler_name):
        """From the page to the generation."""
        p.steps, p.sampler_name = steps, sampler_name


class ScriptSeed(scripts.ScriptBuiltinUI):
    """The seed. Variation seeds are left out."""

    section = "seed"
    create_group = False

    def title(self):
        """Its name."""
        return "Seed"

    def ui(self, is_img2img):
        """One control and a button that sets it to -1."""
        with gr.Row(elem_id=self.elem_id("seed_row")):
            self.seed = gr.Number(label="Seed", value=-1, elem_id=self.elem_id("seed"), min_width=100, precision=0)
            random_seed = ToolButton("🎲️", elem_id=self.elem_id("random_seed"), tooltip="Use a new seed every time")
        random_seed.click(lambda: -1, outputs=[self.seed], show_progress=False)
        self.infotext_fields = [PasteField(self.seed, "Seed", api="seed")]
        return [self.seed]

    def setup(self, p, seed):
        """From the page to the generation."""
        p.seed = seed


class ScriptRefiner(scripts.ScriptBuiltinUI):
    """The refiner; the switch itself is in `sd_samplers_common.apply_refiner`."""

    section = "accordions"
    create_group = False

    def title(self):
        """Its name."""
        return "Refiner"

    def ui(self, is_img2img):
        """A fold with two controls."""
        with InputAccordion(False, label="Refiner", elem_id=self.elem_id("enable")) as enable_refiner, gr.Row():
            refiner_checkpoint = gr.Dropdown(
                label="Checkpoint", elem_id=self.elem_id("checkpoint"), choices=sd_models.checkpoint_tiles(), value=""
            )
            refiner_switch_at = gr.Slider(
                value=0.8, label="Switch at", minimum=0.01, maximum=1.0, step=0.01, elem_id=self.elem_id("switch_at")
            )

        def lookup_checkpoint(title):
            info = sd_models.get_closet_checkpoint_match(title)
            return None if info is None else info.title

        self.infotext_fields = [
            PasteField(enable_refiner, lambda d: "Refiner" in d),
            PasteField(refiner_checkpoint, lambda d: lookup_checkpoint(d.get("Refiner")), api="refiner_checkpoint"),
            PasteField(refiner_switch_at, "Refiner switch at", api="refiner_switch_at"),
        ]
        return enable_refiner, refiner_checkpoint, refiner_switch_at

    def setup(self, p, enable_refiner, refiner_checkpoint, refiner_switch_at):
        """From the page to the generation."""
        chosen = enable_refiner and refiner_checkpoint not in (None, "", "None")
        p.refiner_checkpoint = refiner_checkpoint if chosen else None
        p.refiner_switch_at = refiner_switch_at if chosen else None
