"""Measure how much faster merging makes a step on this machine, in a sampling of the host's."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any

from modules import call_queue, processing, progress, shared

from ..fields import refuse_unknown
from ..reasons import is_out_of_memory
from ..settings import MergeSettings, Setting, SettingsError
from . import generation, host
from .arguments import read_arguments
from .log import NoResultError, failed
from .rounds import STEPS, Rounds
from .sampling import merges_in
from .times_faster import Result

FIELDS = {
    "width": Setting(512, "integer", minimum=16, maximum=16384),
    "height": Setting(512, "integer", minimum=16, maximum=16384),
    "batch_size": Setting(1, "integer", minimum=1, maximum=256),
    "cfg_scale": Setting(7.0, "number", minimum=0, maximum=100),
    "steps": Setting(20, "integer", minimum=1, maximum=1000),
    "hires_width": Setting(0, "integer", minimum=0, maximum=16384),
    "hires_height": Setting(0, "integer", minimum=0, maximum=16384),
}
"""The fields of a request, besides `settings`. A hires size of 0 means no hires fix. `steps` is the
number of steps that the picture would have.
"""

_stopped: deque[str] = deque(maxlen=16)
"""The last stopped tasks; their requests may come later, or may have ended before."""


def measure(request: Mapping[str, Any], task: str = "") -> list[Result]:
    """Measure the size and, with hires fix, the second pass's, in the host's queue.

    `request` has any of `FIELDS`, and `settings`, an object like the script's argument. The host
    shows the progress of `task`. Raises `SettingsError` for a wrong value, and `NoResultError` if
    the measurement was interrupted or failed.
    """
    values, settings = _read(request)
    task = task or f"task({uuid.uuid4().hex})"
    sizes = [(values["width"], values["height"], False)]
    if values["hires_width"] and values["hires_height"]:
        sizes.append((values["hires_width"], values["hires_height"], True))

    def measure_each() -> list[Result]:
        results = []
        with host.last_parameters_kept():
            for number, size in enumerate(sizes):
                shared.state.job_count, shared.state.job_no = len(sizes), number
                results.append(_of_size(size, values, settings, task))
        return results

    progress.add_task_to_queue(task)
    with call_queue.queue_lock:
        shared.state.begin(job=task)
        progress.start_task(task)
        try:
            return host.run_as_generation(measure_each)
        finally:
            progress.finish_task(task)
            shared.state.end()
            for flag in ("skipped", "interrupted", "stopping_generation"):
                setattr(shared.state, flag, False)


def stop(task: str) -> None:
    """End the measurement of `task` before its next step, or before it starts."""
    _stopped.append(task)


def _read(request: Mapping[str, Any]) -> tuple[dict[str, Any], MergeSettings]:
    refuse_unknown(request, (*FIELDS, "settings"), "field")
    values = {
        name: field.check(name, request.get(name, field.default)) for name, field in FIELDS.items()
    }
    settings = request.get("settings", {})
    if not isinstance(settings, Mapping):
        raise SettingsError(f"settings must be an object of settings, got {settings!r}")
    asked = read_arguments([{**settings, "enabled": True}]).settings
    # The picture's number of steps decides the ratio, not the measurement's.
    return values, dataclasses.replace(asked.in_steps(values["steps"]), full_steps=1)


def _of_size(
    size: tuple[int, int, bool], values: Mapping[str, Any], settings: MergeSettings, task: str
) -> Result:
    width, height, is_hires = size
    name = f"{width}x{height}"
    if not merges_in(settings, is_hires):
        return Result(f"no faster at {name}: apply to is {settings.apply_to!r}")
    p = host.plain_txt2img(width, height, STEPS)
    p.batch_size, p.cfg_scale = values["batch_size"], values["cfg_scale"]
    # Keep the host's networks, embeddings and encoded prompts for the next picture.
    p.disable_extra_networks = p.do_not_reload_embeddings = True
    p.cached_c, p.cached_uc = [None, None], [None, None]
    if generation.is_left_to_built_in(p):
        return Result(f"no faster at {name}: {generation.LEFT_TO_BUILT_IN}")
    if host.needs_a_picture():
        raise NoResultError("this model (InstructPix2Pix) needs a picture to start from")

    def is_stopped() -> bool:
        return task in _stopped or host.is_interrupted()

    rounds = Rounds(p, settings, is_stopped)
    _sample(p, rounds, name)
    if is_stopped():
        raise NoResultError("interrupted")
    return rounds.result(name)


def _sample(p: Any, rounds: Rounds, name: str) -> None:
    """Generate p up to the end of its sampling, in `rounds`. Raises `NoResultError`."""
    sample = p.sample

    def sample_and_end(*args: Any, **kwargs: Any) -> None:
        with rounds:
            sample(*args, **kwargs)
        raise _SampledError

    p.sample = sample_and_end
    try:
        with contextlib.closing(p), contextlib.suppress(_SampledError):
            processing.process_images(p)
    except Exception as error:
        if is_out_of_memory(error):
            raise NoResultError(f"too little memory to measure at {name}") from error
        raise NoResultError(failed(f"measuring at {name}", error)) from error


class _SampledError(Exception):
    """Ends the generation after sampling: nothing is decoded or saved."""
