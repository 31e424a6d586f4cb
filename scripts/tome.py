"""The file that WebUI executes: it registers the callbacks and defines the script."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from modules import script_callbacks, scripts

EXTENSION = Path(__file__).resolve().parents[1]
PACKAGE = f"tomesd_core_{hashlib.sha256(os.fsencode(EXTENSION)).hexdigest()[:12]}"
"""The import name of the package in this folder, unique to it: other copies of the extension, other
extensions and installed packages may have a `tomesd_core` too.
"""


def _import_package() -> None:
    """Import the package, or import it again if its files have changed.

    "Reload UI" executes this file again but keeps imported packages, so that after an update new
    code would run with old. "Reload custom script bodies" also keeps the running scripts, and these
    need the package that they were made from.
    """
    folder = EXTENSION / "tomesd_core"
    files = [*folder.glob("*.py"), *folder.glob("webui/*.py")]
    stamp = sorted((str(file), file.stat().st_mtime_ns) for file in files)
    imported = sys.modules.get(PACKAGE)
    if imported is not None:
        if getattr(imported, "files_stamp", None) == stamp:
            return
        # `basedir` is this extension's only while WebUI creates the scripts.
        if Path(scripts.basedir()).resolve() != EXTENSION:
            message = "ToMe: the extension's files have changed: Reload UI to use them"
            print(message, file=sys.stderr)
            return
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
    spec = importlib.util.spec_from_file_location(PACKAGE, folder / "__init__.py")
    package = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    package.files_stamp = stamp


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


try:
    _import_package()
    PANEL_FIELDS = _module("settings").PANEL_FIELDS
    axes = _module("webui.axes")
    arguments = _module("webui.arguments")
    defaults = _module("webui.defaults")
    generation = _module("webui.generation")
    host = _module("webui.host")
    log = _module("webui.log")
    maps = _module("webui.maps")
    options = _module("webui.options")
    panel = _module("webui.panel")
    routes = _module("webui.routes")
    sampling = _module("webui.sampling")
    log.set_up()
    options.apply_log_level()
except Exception as error:
    # WebUI prints the traceback and goes on without this script.
    print(
        f"ToMe can't be loaded here ({type(error).__name__}: {error}) and merges nothing; the rest "
        "works as usual. Update WebUI and this extension; if it persists, please report it:",
        file=sys.stderr,
    )
    raise


class ToMe(scripts.Script):
    """Token merging, an always-on script with its own switch."""

    def title(self) -> str:
        """The name on the page and in the API."""
        return host.TITLE

    def show(self, is_img2img: bool) -> Any:
        """Always on."""
        return scripts.AlwaysVisible

    def after_component(self, component: Any, **kwargs: Any) -> None:
        """WebUI created a component: follow it if it is one of the tab's that the panel reads."""
        panel.follow(component, "img2img" if self.is_img2img else "txt2img")

    def ui(self, is_img2img: bool) -> list[Any]:
        """Build the panel; return the controls whose values are the script's arguments."""
        if host.makes_api_defaults():
            # None marks the positions that a request leaves out.
            return [SimpleNamespace(value=None)] * (self.args_to - self.args_from)
        controls = panel.build("img2img" if is_img2img else "txt2img", self.elem_id)
        self.infotext_fields = arguments.paste_fields(controls)
        self.paste_field_names = [setting.infotext for setting in PANEL_FIELDS.values()]
        return list(controls.values())

    def before_process(self, p: Any, *args: Any) -> None:
        """A generation begins."""
        generation.prepare(p, args)

    def process_batch(self, p: Any, *args: Any, batch_number: int = 0, **kwargs: Any) -> None:
        """A batch is about to be sampled."""
        sampling.bind(p, first_batch=batch_number == 0)

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        """A picture is finished."""
        maps.draw_on(p, pp.image)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        """The generation ended."""
        maps.append(p, processed)


# "Reload custom script bodies" executes this file again without clearing the callbacks.
script_callbacks.remove_current_script_callbacks()
script_callbacks.on_before_ui(log.guarded("adding the plot's axes", axes.add_axes))
script_callbacks.on_before_ui(log.guarded("languages", host.leave_languages_to_others))
script_callbacks.on_before_ui(log.guarded("updating ui-config.json", defaults.update_file))
script_callbacks.on_ui_settings(log.guarded("adding the settings", options.add_options))
script_callbacks.on_app_started(log.guarded("adding the routes", routes.add_routes))
script_callbacks.on_app_started(
    log.guarded("looking for scripts of the same title", host.log_same_titles)
)
script_callbacks.on_cfg_denoiser(sampling.on_denoise)
script_callbacks.on_script_unloaded(sampling.stop)
