"""The one seam: what differs from host to host (AUTOMATIC1111's WebUI, Forge, reForge, Forge
Classic).

A host is asked for what it has; no version is compared. The rest of `webui/` doesn't know on which
host it runs.
"""

from __future__ import annotations

import contextlib
import html
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from modules import scripts, sd_models, shared
from torch import nn

from ..unet import Layer, find_layers
from .log import EXPECTED, guarded

T = TypeVar("T")

EXTENSION = Path(__file__).resolve().parents[2]

LEFT_BEHIND = ("modules.hypertile", "modules.sd_hijack_optimizations")
"""Whose `forward` on an attention is no reason to leave it: Hypertile leaves one there that does
nothing when off, and who wrapped WebUI's own attention puts it back there."""

UNET_PLACES = ("model.diffusion_model", "forge_objects.unet.model.diffusion_model")
"""Where the loaded model has its UNet; in Forge it is in a patcher, whose clones share it."""


def loaded_unet() -> nn.Module | None:
    """The UNet of the model that is loaded, or None: Forge loads none before the first generation.

    `shared.sd_model` would load one.
    """
    for place in UNET_PLACES:
        try:
            unet = attrgetter(place)(sd_models.model_data.sd_model)
        except AttributeError:
            continue
        if isinstance(unet, nn.Module):
            return unet
    return None


def loaded_layers() -> list[Layer] | None:
    """The self-attention layers of the loaded UNet, or None where no model is loaded."""
    unet = loaded_unet()
    return None if unet is None else find_layers(unet)


def loads_later() -> bool:
    """Whether a checkpoint is chosen that the host loads at the first picture, as Forge does."""
    chosen = getattr(sd_models.model_data, "forge_loading_parameters", None) or {}
    return loaded_unet() is None and bool(chosen.get("checkpoint_info"))


def needs_a_picture() -> bool:
    """Whether the loaded model is InstructPix2Pix: its UNet takes a picture's latent beside the
    noise."""
    return getattr(loaded_unet(), "in_channels", 4) == 8


def makes_api_defaults() -> bool:
    """Whether the host builds a script's controls to learn the values that requests to its API may
    leave out."""
    return any(frame.f_code.co_name == "init_default_script_args" for frame in _callers())


def p_in(function: str, otherwise: Any) -> Any:
    """The `p` of WebUI's innermost running `function`; `otherwise` where none of the name runs.

    `copy(p)` copies instance attributes, so bound methods there can't tell which `p` they serve,
    and other extensions make pictures of their own from such copies; the caller's frame can tell.
    """
    frame = next((frame for frame in _callers() if frame.f_code.co_name == function), None)
    return otherwise if frame is None else frame.f_locals.get("p", otherwise)


def denoiser_of(params: Any) -> Any:
    """The denoiser whose callback `params` are of; None where it can't be found."""
    if hasattr(params, "denoiser"):
        return params.denoiser
    # WebUI before 1.8 doesn't pass it on.
    callers = (
        frame.f_locals.get("self") for frame in _callers() if frame.f_code.co_name == "forward"
    )
    return next((caller for caller in callers if hasattr(caller, "total_steps")), None)


def _callers() -> Iterator[types.FrameType]:
    """The running frames of this thread, the innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def hypertile_of(attention: nn.Module) -> str | None:
    """Why a layer is left to Hypertile, or None. It takes a layer's width and height off the token
    count."""
    tiling = getattr(attention, "__webui_hypertile_params", None)
    return "tiled by Hypertile" if tiling is not None and tiling.enabled else None


def why_layers_did_not_run(options: Mapping[str, Any]) -> str | None:
    """Why the UNet's own attention layers may have been passed over, or None; by
    `transformer_options` of its call."""
    if options.get("patches_replace", {}).get("attn1"):
        return "another extension computes their attention in their place"
    # An `sd_unet` option (TensorRT, say) runs in place of the model's own UNet.
    sd_unet = sys.modules.get("modules.sd_unet")  # ersatzForge has none.
    return "the UNet was replaced" if getattr(sd_unet, "current_unet", None) is not None else None


def prompted_items(options: Mapping[str, Any], items: int) -> Sequence[int] | None:
    """Which of the items that the UNet is given are prompted, a picture each; None where they are
    not told apart.

    Forge says in `transformer_options` which parts of the batch are prompted (0) and which not (1),
    and an `AND` prompt has several that are: its first comes last.
    """
    parts = options.get("cond_or_uncond")
    if not parts:
        return None
    pictures = items // len(parts)
    numbers = [number for number, part in enumerate(parts) if part == 0][-1:]
    return [part * pictures + picture for part in numbers for picture in range(pictures)]


def first_items(conds: Any) -> list[int]:
    """Each picture's first item in the denoiser's batch where `prompted_items` gives None, by the
    encoded prompts.

    The prompted items come first; a picture has one of them, or with `AND` several, side by side.
    """
    return [0, *accumulate(len(parts) for parts in conds.batch)][:-1]


def run_as_generation(function: Callable[[], T]) -> T:
    """The function's result, from the thread in which the page's generations run: in Forge that is
    its main thread."""
    main_thread = getattr(sys.modules.get("modules.txt2img"), "main_thread", None)
    if main_thread is None:
        return function()
    future: Future[T] = Future()

    def run() -> None:
        # Forge would print an exception, and lose it.
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    main_thread.run_and_wait_result(run)
    return future.result()


@contextlib.contextmanager
def last_parameters_kept() -> Iterator[None]:
    """Puts the parameters of the last generation back, which the host writes to a file, and its
    bars on the console."""
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


def leave_languages_to_others() -> None:
    """WebUI before 1.7 takes one file a language: another's, which translates more than ours, is
    that one."""
    languages = getattr(sys.modules.get("modules.localization"), "localizations", {})
    for language, path in languages.items():
        if isinstance(path, str) and Path(path).resolve().is_relative_to(EXTENSION):
            files = scripts.list_scripts("localizations", ".json")
            others = [
                file.path
                for file in files
                if Path(file.filename).stem == language and file.path != path
            ]
            languages[language] = others[-1] if others else path


def listen(
    event: Any,
    function: Any = None,
    inputs: Any = None,
    outputs: Any = (),
    js: str | None = None,
    queue: bool | None = False,
    what: str = "",
) -> Any:
    """Connects an event of a component or of the page to a function, to JavaScript, or to both.

    A function that fails changes nothing on the page, but that with `what`, its name for people,
    the first output says why. What takes long goes through gradio's `queue` (None: where the page
    has one). Gradio 3 calls the JavaScript `_js`, and gradio 4 `js`.
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
        what or "a part of the panel", function, unchanged, EXPECTED if what else ()
    )
    return event(listener, **options)
