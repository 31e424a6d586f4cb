"""A miniature WebUI: enough of AUTOMATIC1111's `modules` (1.10.1) to run this extension, page and API, without one.

    with start(model) as host:
        processed = host.txt2img(prompt="red apple", steps=20, alwayson_scripts={"ToMe": {"args": [True, 0.5]}})
        processed.images[0].save("apple.png")

What each module stands in for, and what of it is left out, is said at its top. There is one host a process, as there is
one WebUI: its `modules` are imported once, and a second `start` sets them back rather than importing them anew, so that
references which the extension holds (`from modules import shared`) stay right.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import gradio
    from fastapi import FastAPI

FOLDER = Path(__file__).resolve().parent
Model = nn.Module | Callable[[], nn.Module]


class Host:
    """A running host; make one with `start`. Also a context manager that closes itself."""

    def __init__(self, models: Mapping[str, Model], extension_dirs: list[Path], data_path: Path):
        from modules import call_queue, devices, extensions, infotext_utils, paths, processing, sd_models, shared

        self.modules = sys.modules["modules"]
        self.demo: gradio.Blocks | None = None
        self.api = None
        self._app: FastAPI | None = None
        self._port: int | None = None
        self.temporary: tempfile.TemporaryDirectory | None = None
        data_path.mkdir(parents=True, exist_ok=True)
        paths.data_path = str(data_path)
        paths.models_path, paths.extensions_dir = str(data_path / "models"), str(data_path / "extensions")
        shared.config_filename = str(data_path / "config.json")
        shared.ui_config_filename = str(data_path / "ui-config.json")
        shared.opts.__dict__.clear()
        shared.opts.__init__(dict(shared.options_templates), set())
        if os.path.exists(shared.config_filename):
            shared.opts.load(shared.config_filename)
        reload_model = call_queue.wrap_queued_call(sd_models.reload_model_weights)
        shared.opts.onchange("sd_model_checkpoint", reload_model, call=False)
        shared.state.begin()
        shared.state.end()
        infotext_utils.reset()
        extensions.extensions[:] = [extensions.Extension(folder.name, str(folder)) for folder in extension_dirs]

        sd_models.checkpoints_list.clear()
        sd_models.checkpoint_aliases.clear()
        sd_models.model_data.__init__()
        for name, model in models.items():
            self.add_checkpoint(name, model)
        first = next(iter(models.values()))
        example = first if isinstance(first, nn.Module) else first()
        processing.opt_C = example.model.diffusion_model.in_channels
        processing.opt_f = getattr(example, "downsampling", 1)
        processing.default_side = getattr(example, "image_shape", (3, 64, 64))[1] * processing.opt_f
        shared.device = devices.device = example.alphas_cumprod.device
        self._load_ui()

    def add_checkpoint(self, name: str, model: Model) -> None:
        """Puts a checkpoint on the list. A given module is copied for each load; a function is called for each."""
        from modules import sd_models

        info = sd_models.CheckpointInfo(f"{name}.safetensors")
        info.load = (lambda: copy.deepcopy(model)) if isinstance(model, nn.Module) else model
        info.register()

    def _load_ui(self) -> None:
        from modules import script_callbacks, scripts, sd_unet, shared, ui

        scripts.load_scripts()
        sd_unet.list_unets()
        script_callbacks.before_ui_callback()
        self.demo = shared.demo = ui.create_ui()

    def _start_app(self, app: FastAPI) -> None:
        from modules import call_queue, progress, script_callbacks
        from modules.api.api import Api

        self._app = app
        progress.setup_progress_api(app)
        self.api = Api(app, call_queue.queue_lock)
        script_callbacks.app_started_callback(self.demo, app)
        # A launched app has answered gradio's own question: its stack was built without what was added here.
        app.middleware_stack = app.build_middleware_stack()

    @property
    def app(self) -> FastAPI:
        """The page's and the API's application, for a test client; made on first use, or by `serve`."""
        if self._app is None:
            import gradio as gr

            self._start_app(gr.routes.App.create_app(self.demo))
        return self._app

    def _api(self):
        return self.api if self.app else None

    @property
    def sd_model(self) -> nn.Module | None:
        """The model in use now, None before one was loaded. Reading it loads none."""
        from modules import sd_models

        return sd_models.model_data.sd_model

    def txt2img(self, **request: Any):
        """Generates as the API's `txt2img` does, with the same fields; returns `modules.processing.Processed`."""
        from modules.api import models

        return self._api().generate(models.StableDiffusionTxt2ImgProcessingAPI(**request), "txt2img")

    def img2img(self, **request: Any):
        """Generates as the API's `img2img` does; `init_images` and `mask` may be pictures instead of base64."""
        from modules.api import models

        return self._api().generate(models.StableDiffusionImg2ImgProcessingAPI(**request), "img2img")

    def build_page(self) -> gradio.Blocks:
        """The page."""
        return self.demo

    def serve(self, port: int | None = None) -> str:
        """Serves page and API in a thread, on the first free port from 7860 if none is given; returns the address."""
        os.environ.setdefault("NO_PROXY", "127.0.0.1,localhost")  # gradio asks itself whether it is up
        allowed = [str(FOLDER), *(extension.path for extension in self.modules.extensions.extensions)]
        app, address, _ = self.demo.queue(64).launch(
            server_name="127.0.0.1",
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            show_api=False,
            allowed_paths=allowed,
            app_kwargs={"docs_url": "/docs"},
        )
        # As WebUI does: gradio lets any other page call this one.
        app.user_middleware = [m for m in app.user_middleware if m.cls.__name__ != "CORSMiddleware"]
        self._port = self.demo.server_port
        self._start_app(app)
        return address

    def wait(self) -> None:
        """Waits, and does what the page asks for (Reload UI), until Ctrl-C or "stop"."""
        from modules import shared

        while True:
            command = shared.state.wait_for_server_command(timeout=0.5)
            if command == "restart":
                self.reload_ui()
            elif command == "stop":
                return

    def reload_ui(self) -> None:
        """Does what "Reload UI" does: callbacks are told, scripts are executed anew, and imported packages stay."""
        from modules import script_callbacks

        port = self._port
        self._stop_serving()
        script_callbacks.app_reload_callback()
        script_callbacks.script_unloaded_callback()
        self._load_ui()
        if port is not None:
            self.serve(port)

    def reload_script_bodies(self) -> None:
        """Does what "Reload custom script bodies" does: executes scripts beside what they registered before."""
        from modules import scripts

        scripts.reload_script_body_only()

    def _stop_serving(self) -> None:
        if self._port is not None:
            self.demo.close(verbose=False)
        self._app = self.api = self._port = None

    def close(self) -> None:
        """Stops serving and unloads scripts and model."""
        from modules import script_callbacks, sd_hijack, sd_models

        self._stop_serving()
        script_callbacks.script_unloaded_callback()
        script_callbacks.clear_callbacks()
        sd_models.model_data.__init__()
        sd_hijack.undo_hijack()
        if self.temporary is not None:
            self.temporary.cleanup()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(
    model: Model | Mapping[str, Model],
    extension_dir: str | os.PathLike | list | None = None,
    data_path: str | os.PathLike | None = None,
    load_model: bool = True,
    api_auth: str | None = None,
    theme: str | None = None,
) -> Host:
    """Starts the host.

    `model` is a module, a function that makes one (called for each load, and once more to see its shape), or a dict of
    names and these: the checkpoints. A module needs `.model.diffusion_model`, `.alphas_cumprod`, `.apply_model` and
    `.encode_prompts`; it may have `.downsampling` (a latent's side in pixels) and WebUI's `decode_first_stage` and
    `encode_first_stage`. `extension_dir` is one extension's folder or several, this project's by default; `data_path`
    is where settings go, by default a folder that `close` removes. With `load_model=False` the model is loaded when
    first needed. `api_auth` is "user:password".
    Raises RuntimeError where a real WebUI's `modules` are imported already.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    present = sys.modules.get("modules")
    if present is not None and Path(present.__file__ or "").parent != FOLDER / "modules":
        raise RuntimeError(
            f"the miniature host stands in for WebUI's package `modules`, but another one is imported already: "
            f"{present.__file__ or present!r}"
        )
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    from modules import shared

    shared.cmd_opts.api_auth, shared.cmd_opts.theme = api_auth, theme
    temporary = tempfile.TemporaryDirectory(prefix="tome-host-") if data_path is None else None
    folders = [FOLDER.parents[1]] if extension_dir is None else extension_dir
    folders = folders if isinstance(folders, list) else [folders]
    host = Host(
        dict(model) if isinstance(model, Mapping) else {"model": model},
        [Path(folder).resolve() for folder in folders],
        Path(data_path or temporary.name).resolve(),
    )
    host.temporary = temporary
    if load_model and shared.sd_model is None:
        raise RuntimeError("the model could not be loaded; the reason is in the log above")
    return host
