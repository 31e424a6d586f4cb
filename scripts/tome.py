"""The one file that WebUI executes: it registers the callbacks and defines the script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from modules import script_callbacks, scripts


def _forget_old_package() -> None:
    """Makes the imports below read the files as they are now, where they have changed.

    "Reload UI" executes this file anew but keeps imported packages, so that after an update new code would run on old.
    "Reload custom script bodies" also keeps the running scripts: there the package that they use must stay.
    """
    extension = Path(__file__).resolve().parents[1]
    folder = extension / "tomesd_core"
    stamp = sorted((str(file), file.stat().st_mtime_ns) for file in folder.rglob("*.py"))
    imported = sys.modules.get("tomesd_core")
    if imported is not None and getattr(imported, "files_stamp", stamp) != stamp:
        # WebUI says whose file it executes only while it makes the scripts.
        if Path(scripts.basedir()).resolve() != extension:
            print("ToMe: the extension's files have changed: Reload UI to use them", file=sys.stderr)
            return
        for name in [name for name in sys.modules if name.split(".")[0] == "tomesd_core"]:
            del sys.modules[name]
    import tomesd_core

    tomesd_core.files_stamp = stamp


_forget_old_package()

from tomesd_core.settings import PANEL_FIELDS  # noqa: E402
from tomesd_core.webui import axes, generation, infotext, log, maps, options, panel, routes  # noqa: E402

log.set_up()
options.apply_log_level()


class ToMe(scripts.Script):
    """Token merging, always on the page, under its own switch."""

    def title(self) -> str:
        return "ToMe"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        controls = panel.build("img2img" if is_img2img else "txt2img", self.elem_id)
        self.infotext_fields = infotext.paste_fields(controls)
        self.paste_field_names = [setting.infotext for setting in PANEL_FIELDS.values()]
        return list(controls.values())

    def before_process(self, p: Any, *args: Any) -> None:
        generation.prepare(p, args)

    def process_batch(self, p: Any, *args: Any, batch_number: int = 0, **kwargs: Any) -> None:
        generation.bind(p, first_batch=batch_number == 0)

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        maps.draw_on(p, pp.image)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        maps.append(p, processed)


# "Reload custom script bodies" executes this file again without clearing the callbacks.
script_callbacks.remove_current_script_callbacks()
script_callbacks.on_before_ui(axes.add_axes)
script_callbacks.on_ui_settings(options.add_options)
script_callbacks.on_app_started(routes.add_routes)
script_callbacks.on_cfg_denoiser(generation.on_denoise)
script_callbacks.on_script_unloaded(generation.stop)
