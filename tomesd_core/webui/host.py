"""The one seam: the differences between hosts (AUTOMATIC1111's WebUI, Forge, reForge and their
kin).

It asks a host for its abilities and compares no version. The rest of `webui/` runs the same on
every host.
"""

from __future__ import annotations

import contextlib
import html
import inspect
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import torch
from modules import devices, processing, scripts, sd_models, shared
from torch import nn

from ..unet import Layer, find_layers
from .log import EXPECTED, guarded, log

T = TypeVar("T")

TITLE = "ToMe"
"""The script's title; WebUI's names of scripts are titles in lower case."""

EXTENSION = Path(__file__).resolve().parents[2]

LEFT_BEHIND = ("hypertile", "modules.sd_hijack_optimizations")
"""Modules whose replaced `forward` is harmless: an inactive Hypertile, and WebUI's own attention.
"""

PLOT = "xyz_grid.py"


def loaded_unet() -> nn.Module | None:
    """The loaded model's UNet, or None: Forge loads none before the first generation.

    `shared.sd_model` would load one.
    """
    model = sd_models.model_data.sd_model
    # Forge keeps it in a patcher, shared by its clones.
    patcher = getattr(getattr(model, "forge_objects", None), "unet", None)
    for owner in (model, patcher):
        unet = getattr(getattr(owner, "model", None), "diffusion_model", None)
        if isinstance(unet, nn.Module):
            return unet
    return None


def loaded_layers() -> list[Layer] | None:
    """The self-attention layers of the loaded UNet; None if no model is loaded."""
    unet = loaded_unet()
    return None if unet is None else find_layers(unet)


def loads_later() -> bool:
    """Whether the chosen checkpoint is loaded at the first picture, as in Forge."""
    chosen = getattr(sd_models.model_data, "forge_loading_parameters", None) or {}
    return loaded_unet() is None and bool(chosen.get("checkpoint_info"))


def needs_a_picture() -> bool:
    """Whether the loaded model is InstructPix2Pix, whose UNet needs a picture's latent too."""
    return getattr(loaded_unet(), "in_channels", 4) == 8


def now() -> float:
    """Wait until the model's device has finished its queued work, and read the clock."""
    device = devices.device
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    if synchronize is None:
        # DirectML, for example: a read comes after everything queued before it.
        torch.zeros(1, device=device).cpu()
    elif inspect.signature(synchronize).parameters:
        # Without a device, CUDA and XPU use the current one, which --device-id doesn't change.
        synchronize(device)
    else:
        synchronize()
    return time.perf_counter()


def makes_api_defaults() -> bool:
    """Whether the host is building a script's controls to learn the API's default arguments."""
    return any(True for _ in _calls_of("init_default_script_args"))


def p_in(function: str, otherwise: Any) -> Any:
    """The `p` of WebUI's innermost running `function`, or `otherwise` if it isn't running.

    `copy(p)` copies instance attributes, so a bound method on `p` can't tell which copy it serves,
    and other extensions generate pictures from such copies; the caller's frame can tell.
    """
    return next(_calls_of(function), {}).get("p", otherwise)


def denoiser_of(params: Any) -> Any:
    """The denoiser that called back with `params`, or None."""
    if hasattr(params, "denoiser"):
        return params.denoiser
    # WebUI before 1.8 doesn't pass it.
    callers = (variables.get("self") for variables in _calls_of("forward"))
    return next((caller for caller in callers if hasattr(caller, "total_steps")), None)


def _calls_of(function: str) -> Iterator[dict[str, Any]]:
    """The variables of this thread's running calls of a function, innermost first."""
    for frame, _ in traceback.walk_stack(sys._getframe()):
        if frame.f_code.co_name == function:
            yield frame.f_locals


def hypertile_of(attention: nn.Module) -> str | None:
    """Reason not to merge a layer tiled by Hypertile, which relies on the token count."""
    tiling = getattr(attention, "__webui_hypertile_params", None)
    return "tiled by Hypertile" if tiling is not None and tiling.enabled else None


def reason_layers_did_not_run(options: Mapping[str, Any]) -> str | None:
    """Reason why the UNet's own attention layers were bypassed, by its call's
    `transformer_options`."""
    if options.get("patches_replace", {}).get("attn1"):
        return "another extension computes their attention in their place"
    # An `sd_unet` option (TensorRT) replaces the model's own UNet.
    sd_unet = sys.modules.get("modules.sd_unet")  # ersatzForge has none.
    return "the UNet was replaced" if getattr(sd_unet, "current_unet", None) is not None else None


def prompted_items(options: Mapping[str, Any], items: int) -> Sequence[int] | None:
    """The prompted item of each picture in the UNet's batch; None if the host doesn't mark them.

    Forge marks the parts of the batch in `transformer_options` as prompted (0) or not (1). An `AND`
    prompt has several prompted parts, the first of them last.
    """
    parts = options.get("cond_or_uncond")
    if not parts:
        return None
    pictures = items // len(parts)
    numbers = [number for number, part in enumerate(parts) if part == 0][-1:]
    return [part * pictures + picture for part in numbers for picture in range(pictures)]


def first_items(sampler: Any) -> list[int]:
    """Each picture's first item in the denoiser's batch, for hosts without `prompted_items`.

    Prompted items come first; a picture has one, or with `AND` several in a row.
    """
    parts = sampler.sampler_extra_args["cond"].batch
    return [0, *accumulate(map(len, parts))][:-1]


def steps_of(denoiser: Any) -> int:
    """The number of the sampler's steps.

    Samplers that run the model twice per step run it once in the last, and WebUI's total counts
    that one twice too.
    """
    config = getattr(denoiser.sampler, "config", None)
    options = getattr(config, "options", None) or {}
    return int(denoiser.total_steps) - bool(options.get("second_order"))


def is_interrupted() -> bool:
    """Whether the user pressed a button that ends the running generation."""
    state = shared.state
    return bool(state.interrupted or state.skipped or getattr(state, "stopping_generation", False))


def plain_txt2img(width: int, height: int, steps: int) -> Any:
    """The `p` of a picture by Euler without any script."""
    p = processing.StableDiffusionProcessingTxt2Img(
        seed=0, sampler_name="Euler", steps=steps, width=width, height=height
    )
    # WebUI 1.9 and later correct a missing scheduler with a warning.
    p.scheduler = "Automatic"
    # reForge needs a runner even if it runs no script.
    p.scripts, p.script_args = scripts.ScriptRunner(), ()
    return p


def plot_modules() -> list[Any]:
    """The modules of the X/Y/Z plot, found by file: the module's name differs between versions."""
    files = [data.module for data in scripts.scripts_data if Path(data.path).name == PLOT]
    return [file for file in files if hasattr(file, "AxisOption") and hasattr(file, "axis_options")]


def run_as_generation(function: Callable[[], T]) -> T:
    """Call `function` in the thread that runs the page's generations: Forge's main thread."""
    main_thread = getattr(sys.modules.get("modules.txt2img"), "main_thread", None)
    if main_thread is None:
        return function()
    future: Future[T] = Future()

    def run() -> None:
        # Forge prints an exception and drops it.
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    main_thread.run_and_wait_result(run)
    return future.result()


@contextlib.contextmanager
def last_parameters_kept() -> Iterator[None]:
    """Restore the last generation's parameters, which the host writes to a file, and its progress
    bars."""
    file = Path(shared.data_path, "params.txt")
    before = file.read_bytes() if file.exists() else None
    try:
        yield
    finally:
        if before is not None:
            file.write_bytes(before)
        else:
            file.unlink(missing_ok=True)
        if hasattr(shared, "total_tqdm"):
            shared.total_tqdm.clear()


def log_same_titles(demo: Any, app: Any) -> None:
    """Log other scripts of the same title; WebUI's API silently reaches only the first."""
    for files in {
        tuple(script.filename for script in tab.scripts if script.name == TITLE.lower())
        for tab in (scripts.scripts_txt2img, scripts.scripts_img2img)
    }:
        if len(files) > 1:
            log.warning(
                f"more than one script is titled {TITLE!r}, and the API reaches only the first: "
                f"{', '.join(files)}"
            )


def leave_languages_to_others() -> None:
    """Prefer other extensions' localizations in WebUI before 1.7, which loads one file per
    language."""
    languages = getattr(sys.modules.get("modules.localization"), "localizations", {})
    for file in scripts.list_scripts("localizations", ".json") if languages else ():
        language, path = Path(file.filename).stem, Path(file.path).resolve()
        if isinstance(languages.get(language), str) and not path.is_relative_to(EXTENSION):
            languages[language] = file.path


def listen(
    event: Any,
    function: Any = None,
    inputs: Any = None,
    outputs: Any = (),
    js: str | None = None,
    queue: bool | None = False,
    what: str = "",
) -> Any:
    """Connect an event of a component or of the page to a function, to JavaScript, or to both.

    If the function fails, the page stays unchanged; with `what` (a display name) the first output
    shows the error. Slow functions use gradio's `queue` (None: the page's default). Gradio 3 names
    the JavaScript `_js`, gradio 4 `js`.
    """

    def unchanged(line: str) -> Any:
        updates = [html.escape(line) if what else gr.update(), *(gr.update() for _ in outputs[1:])]
        return updates if len(outputs) > 1 else updates[0]

    name = "js" if "js" in inspect.signature(event).parameters else "_js"
    options = {
        "inputs": inputs,
        "outputs": list(outputs),
        "show_progress": "hidden",
        "queue": queue,
        name: js,
    }
    listener = function and guarded(
        what or "part of the panel", function, unchanged, EXPECTED if what else ()
    )
    return event(listener, **options)
