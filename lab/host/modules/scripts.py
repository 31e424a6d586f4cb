"""Stands in for `modules.scripts`: loads scripts as WebUI does and calls them. Postprocessing scripts are left out."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections import namedtuple
from dataclasses import dataclass

import gradio as gr
from modules import errors, extensions, paths, script_callbacks

AlwaysVisible = object()


class MaskBlendArgs:
    """Two latents being blended by the mask."""

    def __init__(self, current_latent, nmask, init_latent, mask, blended_latent, denoiser=None, sigma=None):
        self.current_latent, self.nmask, self.init_latent, self.mask = current_latent, nmask, init_latent, mask
        self.blended_latent, self.denoiser, self.sigma = blended_latent, denoiser, sigma
        self.is_final_blend = denoiser is None


class PostSampleArgs:
    """What sampling returned."""

    def __init__(self, samples):
        self.samples = samples


class PostprocessImageArgs:
    """One finished picture."""

    def __init__(self, image):
        self.image = image


class PostprocessBatchListArgs:
    """One batch of pictures, as a list of tensors."""

    def __init__(self, images):
        self.images = images


@dataclass
class OnComponent:
    """What a component callback is given."""

    component: gr.blocks.Block


class Script:
    """Base of all scripts. WebUI makes one instance a tab and keeps it until Reload UI."""

    name = section = filename = args_from = args_to = tabname = group = controls = None
    infotext_fields = paste_field_names = api_info = None
    on_before_component_elem_id = on_after_component_elem_id = None
    alwayson = is_txt2img = is_img2img = setup_for_ui_only = False
    create_group = True

    def title(self):
        """What the script is called, in the page and in the API."""
        raise NotImplementedError

    def ui(self, is_img2img):
        """Builds the script's controls and returns those whose values are its arguments."""

    def show(self, is_img2img):
        """False: not in this tab; True: in the list of scripts; `AlwaysVisible`: always on."""
        return True

    def run(self, p, *args):
        """Makes the pictures instead of `process_images`, for a script chosen from the list."""

    def setup(self, p, *args):
        """The generation was set up."""

    def before_process(self, p, *args):
        """Before everything else."""

    def process(self, p, *args):
        """Settings are overridden and the model is loaded."""

    def before_process_batch(self, p, *args, **kwargs):
        """Before each batch."""

    def process_before_every_sampling(self, p, *args, **kwargs):
        """Before each pass of each batch."""

    def process_batch(self, p, *args, **kwargs):
        """Before each batch's prompts are encoded."""

    def postprocess_batch(self, p, *args, **kwargs):
        """After each batch, with its pictures as one tensor."""

    def postprocess_batch_list(self, p, pp: PostprocessBatchListArgs, *args, **kwargs):
        """After each batch, with its pictures as a list."""

    def on_mask_blend(self, p, mba: MaskBlendArgs, *args):
        """When the masked and the unmasked part are joined."""

    def post_sample(self, p, ps: PostSampleArgs, *args):
        """After sampling, before decoding."""

    def postprocess_image(self, p, pp: PostprocessImageArgs, *args):
        """After each picture."""

    def postprocess_image_after_composite(self, p, pp: PostprocessImageArgs, *args):
        """After each picture, when it is whole again."""

    def postprocess(self, p, processed, *args):
        """After everything; not called when sampling raises."""

    def before_component(self, component, **kwargs):
        """Before any component of the page is made."""

    def after_component(self, component, **kwargs):
        """After any component of the page is made."""

    def before_hr(self, p, *args):
        """Before the second pass of hires fix."""

    def on_before_component(self, callback, *, elem_id):
        """Calls `callback(OnComponent)` before the component with this id is made."""
        self.on_before_component_elem_id = [*(self.on_before_component_elem_id or []), (elem_id, callback)]

    def on_after_component(self, callback, *, elem_id):
        """Calls `callback(OnComponent)` after the component with this id is made."""
        self.on_after_component_elem_id = [*(self.on_after_component_elem_id or []), (elem_id, callback)]

    def elem_id(self, item_id):
        """An HTML id made of tab, title and `item_id`."""
        tab = f"{'img2img' if self.is_img2img else 'txt2img'}_" if self.show(True) == self.show(False) else ""
        title = re.sub(r"[^a-z_0-9]", "", re.sub(r"\s", "_", self.title().lower()))
        return f"script_{tab}{title}_{item_id}"


class ScriptBuiltinUI(Script):
    """A part of the page that is written as a script; through the API its `setup` is not called."""

    setup_for_ui_only = True

    def elem_id(self, item_id):
        """An HTML id made of tab and `item_id`."""
        tab = f"{'img2img' if self.is_img2img else 'txt2img'}_" if self.show(True) == self.show(False) else ""
        return f"{tab}{item_id}"

    def show(self, is_img2img):
        """Always on."""
        return AlwaysVisible


current_basedir = paths.script_path


def basedir():
    """The extension's folder; right only while its script is being executed."""
    return current_basedir


ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])
scripts_data: list[ScriptClassData] = []


def load_module(path: str):
    """Executes a file as a module of its own, named by its file name and not kept in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_scripts() -> None:
    """Executes all scripts anew, the host's own and then each extension's; a broken one is reported and left out."""
    global current_basedir, scripts_txt2img, scripts_img2img
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    own = extensions.Extension("host", paths.script_path)
    files = [(e.path, path) for e in [own, *extensions.active()] for path in e.list_files("scripts", ".py")]
    files += [(own.path, path) for path in own.list_files(os.path.join("modules", "processing_scripts"), ".py")]
    for folder, path in files:
        syspath = sys.path
        try:
            if folder != paths.script_path:
                sys.path = [folder, *sys.path]
            current_basedir = folder
            module = load_module(path)
            for found in list(module.__dict__.values()):
                if isinstance(found, type) and issubclass(found, Script):
                    scripts_data.append(ScriptClassData(found, path, folder, module))
        except Exception:
            errors.report(f"Error loading script: {os.path.basename(path)}", exc_info=True)
        finally:
            sys.path = syspath
            current_basedir = paths.script_path
    scripts_txt2img, scripts_img2img = ScriptRunner(), ScriptRunner()


def wrap_call(func, filename, funcname, *args, default=None, **kwargs):
    """Calls a script's function; an exception is reported and `default` returned."""
    try:
        return func(*args, **kwargs)
    except Exception:
        errors.report(f"Error calling: {filename}/{funcname}", exc_info=True)
    return default


class ScriptRunner:
    """One tab's scripts."""

    def __init__(self):
        self.scripts: list[Script] = []
        self.selectable_scripts: list[Script] = []
        self.alwayson_scripts: list[Script] = []
        self.titles: list[str] = []
        self.title_map: dict[str, Script] = {}
        self.infotext_fields: list = []
        self.paste_field_names: list[str] = []
        self.inputs: list = [None]

    def initialize_scripts(self, is_img2img):
        """Makes one instance of every script class."""
        for scripts in (self.scripts, self.alwayson_scripts, self.selectable_scripts):
            scripts.clear()
        for found in scripts_data:
            try:
                script = found.script_class()
            except Exception:
                errors.report(f"Error # failed to initialize Script {found.module}: ", exc_info=True)
                continue
            script.filename = found.path
            script.is_txt2img, script.is_img2img = not is_img2img, is_img2img
            script.tabname = "img2img" if is_img2img else "txt2img"
            visibility = script.show(is_img2img)
            if visibility:
                script.alwayson = visibility == AlwaysVisible
                self.scripts.append(script)
                (self.alwayson_scripts if script.alwayson else self.selectable_scripts).append(script)

    def create_script_ui(self, script):
        """Builds a script's controls and notes which arguments are its own."""
        from modules.api import models

        script.args_from = script.args_to = len(self.inputs)
        controls = wrap_call(script.ui, script.filename, "ui", script.is_img2img)
        script.controls = controls
        if controls is None:
            return
        script.name = wrap_call(script.title, script.filename, "title", default=script.filename).lower()
        args = []
        for control in controls:
            control.custom_script_source = os.path.basename(script.filename)
            fields = {field: getattr(control, field, None) for field in ("value", "minimum", "maximum", "step")}
            choices = [c[0] if isinstance(c, tuple) else c for c in getattr(control, "choices", None) or []]
            args.append(models.ScriptArg(label=control.label or "", choices=choices or None, **fields))
        script.api_info = models.ScriptInfo(
            name=script.name, is_img2img=script.is_img2img, is_alwayson=script.alwayson, args=args
        )
        self.infotext_fields += script.infotext_fields or []
        self.paste_field_names += script.paste_field_names or []
        self.inputs += controls
        script.args_to = len(self.inputs)

    def setup_ui_for_section(self, section, scriptlist=None):
        """Builds the controls of the scripts that belong to one section of the page."""
        for script in self.alwayson_scripts if scriptlist is None else scriptlist:
            if script.alwayson and script.section != section:
                continue
            if script.create_group:
                with gr.Group(visible=script.alwayson) as script.group:
                    self.create_script_ui(script)
            else:
                self.create_script_ui(script)

    def prepare_ui(self):
        """Before the first section is built."""
        self.inputs = [None]

    def setup_ui(self):
        """Builds the always-on scripts, the list of the others, and these; returns all inputs."""
        self.title_map = {wrap_call(s.title, s.filename, "title").lower(): s for s in self.scripts}
        self.titles = [wrap_call(s.title, s.filename, "title") for s in self.selectable_scripts]
        self.setup_ui_for_section(None)
        dropdown = gr.Dropdown(
            label="Script", elem_id="script_list", choices=["None", *self.titles], value="None", type="index"
        )
        self.inputs[0] = dropdown
        self.setup_ui_for_section(None, self.selectable_scripts)
        for number, script in enumerate(self.selectable_scripts, start=1):
            dropdown.change(lambda i, n=number: gr.update(visible=i == n), inputs=[dropdown], outputs=[script.group])
        self.infotext_fields.append((dropdown, lambda d: gr.update(value=d.get("Script", "None"))))
        return self.inputs

    def script(self, title):
        """The script with this title."""
        return self.title_map.get(title.lower())

    def run(self, p, *args):
        """Runs the script chosen from the list; None when none is chosen."""
        if not args[0]:
            return None
        script = self.selectable_scripts[args[0] - 1]
        return script.run(p, *args[script.args_from : script.args_to])

    def _call(self, method_name, p, *args, **kwargs):
        """Calls a method of each always-on script that has its own; one that raises does not stop the others."""
        for script in self.alwayson_scripts:
            if getattr(type(script), method_name) is getattr(Script, method_name):
                continue
            try:
                script_args = p.script_args[script.args_from : script.args_to]
                getattr(script, method_name)(p, *args, *script_args, **kwargs)
            except Exception:
                errors.report(f"Error running {method_name}: {script.filename}", exc_info=True)

    def setup_scrips(self, p, *, is_ui=True):
        """Calls `setup`; through the API, not that of the page's own parts."""
        for script in self.alwayson_scripts:
            if type(script).setup is Script.setup or (script.setup_for_ui_only and not is_ui):
                continue
            try:
                script.setup(p, *p.script_args[script.args_from : script.args_to])
            except Exception:
                errors.report(f"Error running setup: {script.filename}", exc_info=True)

    def before_process(self, p):
        """Calls the scripts' method of this name, as the ones below do."""
        self._call("before_process", p)

    def process(self, p):
        self._call("process", p)

    def process_before_every_sampling(self, p, **kwargs):
        self._call("process_before_every_sampling", p, **kwargs)

    def before_process_batch(self, p, **kwargs):
        self._call("before_process_batch", p, **kwargs)

    def process_batch(self, p, **kwargs):
        self._call("process_batch", p, **kwargs)

    def postprocess(self, p, processed):
        self._call("postprocess", p, processed)

    def postprocess_batch(self, p, images, **kwargs):
        self._call("postprocess_batch", p, images=images, **kwargs)

    def postprocess_batch_list(self, p, pp, **kwargs):
        self._call("postprocess_batch_list", p, pp, **kwargs)

    def post_sample(self, p, ps):
        self._call("post_sample", p, ps)

    def on_mask_blend(self, p, mba):
        self._call("on_mask_blend", p, mba)

    def postprocess_image(self, p, pp):
        self._call("postprocess_image", p, pp)

    def postprocess_image_after_composite(self, p, pp):
        self._call("postprocess_image_after_composite", p, pp)

    def before_hr(self, p):
        self._call("before_hr", p)

    def _component_callbacks(self, when, component, elem_id):
        for script in self.scripts:
            for wanted, callback in getattr(script, f"on_{when}_component_elem_id") or []:
                if wanted == elem_id:
                    wrap_call(callback, script.filename, f"on_{when}_component", OnComponent(component=component))

    def before_component(self, component, **kwargs):
        """Tells the scripts that a component is about to be made."""
        self._component_callbacks("before", component, kwargs.get("elem_id"))
        for script in self.scripts:
            wrap_call(script.before_component, script.filename, "before_component", component, **kwargs)

    def after_component(self, component, **kwargs):
        """Tells the scripts that a component was made."""
        self._component_callbacks("after", component, component.elem_id)
        for script in self.scripts:
            wrap_call(script.after_component, script.filename, "after_component", component, **kwargs)

    def reload_sources(self, cache):
        """Executes the scripts anew and puts fresh instances in the old ones' places, without building controls."""
        for i, old in enumerate(self.scripts):
            module = cache.setdefault(old.filename, None) or load_module(old.filename)
            cache[old.filename] = module
            for found in module.__dict__.values():
                if type(found) is type and issubclass(found, Script):
                    self.scripts[i] = found()
                    self.scripts[i].filename = old.filename
                    self.scripts[i].args_from, self.scripts[i].args_to = old.args_from, old.args_to


scripts_txt2img: ScriptRunner | None = None
scripts_img2img: ScriptRunner | None = None
scripts_current: ScriptRunner | None = None


def reload_script_body_only():
    """ "Reload custom script bodies": callbacks are not cleared, and running scripts stay the old instances."""
    cache: dict = {}
    scripts_txt2img.reload_sources(cache)
    scripts_img2img.reload_sources(cache)
