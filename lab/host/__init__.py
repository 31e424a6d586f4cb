"""Stand-in for AUTOMATIC1111 WebUI 1.10.1: the modules that the extension imports.

    with Host({"tiny": TinyModel.load}) as host:
        p = host.make_p([True, 0.5], prompt="red apple", steps=20, width=32, height=32)
        process_images(p).images[0].save("apple.png")

There is one host per process, as there is one WebUI: its package `modules` is imported once, and a
second host resets it. Each module's docstring lists what is missing in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from torch import nn

FOLDER = Path(__file__).resolve().parent
EXTENSION = FOLDER.parents[1]


class Host:
    """A running host, and a context manager that closes it."""

    def __init__(
        self,
        models: Mapping[str, Callable[[], nn.Module]],
        extensions: Sequence[str | os.PathLike] = (EXTENSION,),
    ) -> None:
        """Load the first of `models` (functions by checkpoint name) and the extensions.

        Raises RuntimeError if WebUI's own `modules` are imported.
        """
        present = sys.modules.get("modules")
        if present is not None and Path(present.__file__ or "").parent != FOLDER / "modules":
            raise RuntimeError(
                f"the host stands in for WebUI's package `modules`, but {present} is imported"
            )
        if str(FOLDER) not in sys.path:
            sys.path.insert(0, str(FOLDER))
        from modules import processing, scripts, sd_models, sd_unet, shared

        self.demo: gr.Blocks | None = None
        scripts.folders[:] = [str(Path(folder).resolve()) for folder in extensions]
        shared.opts.reset()
        shared.state.begin()
        self._unload()
        sd_models.checkpoints.update(models)
        sd_unet.hijack()
        model = sd_models.reload_model_weights()
        processing.opt_f, processing.opt_C = 1, model.image_shape[0]
        self._load_ui()

    @property
    def sd_model(self) -> nn.Module:
        """The current model."""
        from modules import sd_models

        return sd_models.model_data.sd_model

    def _load_ui(self) -> None:
        from modules import script_callbacks, scripts

        scripts.load_scripts()
        script_callbacks.before_ui_callback()
        script_callbacks.ui_settings_callback()
        runners = scripts.scripts_txt2img, scripts.scripts_img2img
        with gr.Blocks(analytics_enabled=False) as self.demo:
            for scripts.scripts_current in runners:
                scripts.scripts_current.setup_ui()
        self.default_args = {
            tab: scripts.init_default_script_args(getattr(scripts, f"scripts_{tab}"))
            for tab in ("txt2img", "img2img")
        }

    def load_page(self, build: Callable[[Any], gr.Blocks]) -> None:
        """Replace the bare page: `build` makes one around txt2img's runner and its `setup_ui`."""
        from modules import scripts

        scripts.scripts_current = scripts.scripts_txt2img
        self.demo = build(scripts.scripts_txt2img)

    def start_app(self, app: Any) -> None:
        """Tell the extensions that page and API have started."""
        from modules import script_callbacks

        script_callbacks.app_started_callback(self.demo, app)

    def reload_ui(self) -> None:
        """Do what "Reload UI" does: unload and execute scripts; imported packages stay."""
        from modules import script_callbacks

        script_callbacks.script_unloaded_callback()
        self._load_ui()

    def reload_script_bodies(self) -> None:
        """Do what "Reload custom script bodies" does."""
        from modules import scripts

        scripts.reload_script_body_only()

    def make_p(self, tome: Sequence[Any] | None = None, tab: str = "txt2img", **fields: Any) -> Any:
        """Make `p` as a request to the API does.

        `tome` are the arguments of the first script titled so; missing ones are the defaults.
        """
        from modules import processing, scripts, shared

        kind = processing.StableDiffusionProcessingTxt2Img
        if tab == "img2img":
            kind = processing.StableDiffusionProcessingImg2Img
        p = kind(**fields)
        p.is_api = True
        shared.state.begin()
        return p.set_up(getattr(scripts, f"scripts_{tab}"), self.script_args(tome, tab))

    def script_args(self, tome: Sequence[Any] | None = None, tab: str = "txt2img") -> list[Any]:
        """All scripts' arguments, as for `make_p`."""
        from modules import scripts

        runner = getattr(scripts, f"scripts_{tab}")
        args = list(self.default_args[tab])
        if tome:
            script = runner.script("ToMe")
            values = list(tome)[: len(script.controls)]
            args[script.args_from : script.args_from + len(values)] = values
        return args

    def _unload(self) -> None:
        from modules import script_callbacks, sd_models

        script_callbacks.script_unloaded_callback()
        script_callbacks.clear_callbacks()
        sd_models.checkpoints.clear()
        sd_models.model_data.sd_model, sd_models.model_data.loaded_sd_models = None, []

    def close(self) -> None:
        """Unload scripts and models."""
        from modules import sd_unet

        self._unload()
        sd_unet.undo_hijack()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
