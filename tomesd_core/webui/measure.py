"""How many times faster merging makes a step here: unmerged and merged steps in turn, in one sampling of the host's."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import torch
from modules import call_queue, devices, processing, progress, scripts, shared
from modules.sd_samplers_common import InterruptedException
from torch import nn

from ..settings import MergeSettings, Setting, SettingsError
from . import generation, host, presets
from .arguments import read_arguments
from .generation import Generation
from .log import NoResultError, failed
from .sampling import Sampling, merges_in
from .timing import now

SECONDS, FEWEST_ROUNDS, STEPS = 10.0, 3, 150
WARM_UP, MOST_REUSED = 3, 4
OUT_OF_MEMORY = "out of memory", "allocate memory"
"""What the devices' errors have in common."""

FIELDS = {
    "width": Setting(512, "integer", minimum=16, maximum=16384),
    "height": Setting(512, "integer", minimum=16, maximum=16384),
    "batch_size": Setting(1, "integer", minimum=1, maximum=256),
    "cfg_scale": Setting(7.0, "number", minimum=0, maximum=100),
    "hires_width": Setting(0, "integer", minimum=0, maximum=16384),
    "hires_height": Setting(0, "integer", minimum=0, maximum=16384),
}
"""What a measurement is asked for, beside `settings`. A hires size of 0: no hires fix."""

_stopped: set[str] = set()
"""The tasks that are to end."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one size gave."""

    line: str
    """For people."""
    times_faster: float | None = None
    """None where the settings merge nothing there."""
    spread: float | None = None
    """Half of the range in which the middle half of the rounds lies, as a share of `times_faster`."""
    attention_share: float | None = None
    """Of an unmerged step's time, in self-attention."""
    memory_saved: float | None = None
    """Share of the device's peak memory; None where it isn't known."""


def measure(request: Mapping[str, Any], task: str = "") -> list[Result]:
    """Measures the size and, with hires fix, its second pass's, when its turn has come in the host's queue.

    `request` has any of `FIELDS`, and `settings`, an object as for the script's argument. The host shows the progress
    of `task`. Raises `SettingsError` for a wrong value, and `NoResultError` where it was interrupted or failed.
    """
    values, settings = _read(request)
    task = task or f"task({uuid.uuid4().hex})"
    sizes = [(values["width"], values["height"], False)]
    if values["hires_width"] and values["hires_height"]:
        sizes.append((values["hires_width"], values["hires_height"], True))

    def each() -> list[Result]:
        with host.last_parameters_kept():
            return [_of_size(size, number, len(sizes), values, settings, task) for number, size in enumerate(sizes)]

    progress.add_task_to_queue(task)
    with call_queue.queue_lock:
        shared.state.begin(job=task)
        progress.start_task(task)
        try:
            return host.run_as_generation(each)
        finally:
            progress.finish_task(task)
            shared.state.end()
            shared.state.skipped = shared.state.interrupted = shared.state.stopping_generation = False
            _stopped.discard(task)


def stop(task: str) -> None:
    """Ends the measurement of a task before its next step, also where it waits for its turn."""
    _stopped.add(task)


def _read(request: Mapping[str, Any]) -> tuple[dict[str, Any], MergeSettings]:
    unknown = [repr(name) for name in request if name not in (*FIELDS, "settings")]
    if unknown:
        raise SettingsError(f"unknown field {', '.join(unknown)}: the fields are {', '.join(FIELDS)}, settings")
    values = {name: field.check(name, request.get(name, field.default)) for name, field in FIELDS.items()}
    settings = request.get("settings", {})
    if not isinstance(settings, Mapping):
        raise SettingsError(f"settings must be an object of settings, got {settings!r}")
    arguments = read_arguments([{**settings, "enabled": True}], None, presets.get)
    return values, arguments.settings if arguments else MergeSettings()


def _of_size(
    size: tuple[int, int, bool], number: int, sizes: int, values: Mapping[str, Any], settings: MergeSettings, task: str
) -> Result:
    width, height, is_hires = size
    name = f"{width}x{height}"
    if not merges_in(settings, is_hires):
        return Result(f"no faster at {name}: apply to is {settings.apply_to!r}")
    p = processing.StableDiffusionProcessingTxt2Img(
        seed=0, sampler_name="Euler", steps=STEPS, width=width, height=height
    )
    # WebUI knows Euler without a scheduler's name up to 1.8, and later corrects it with a warning.
    p.scheduler = "Automatic"
    # No other extension's script runs; reForge needs to be told by which runner none does.
    p.scripts, p.script_args = scripts.ScriptRunner(), ()
    p.batch_size, p.cfg_scale = values["batch_size"], values["cfg_scale"]
    # The next picture finds what the last one has left: networks, embeddings, encoded prompts.
    p.disable_extra_networks = p.do_not_reload_embeddings = True
    p.cached_c, p.cached_uc = [None, None], [None, None]
    if generation.is_left_to_built_in(p):
        return Result(f"no faster at {name}: {generation.LEFT_TO_BUILT_IN}")
    run = _Run(p, settings, lambda: task in _stopped)
    sample = p.sample

    def sample_and_end(*args: Any, **kwargs: Any) -> None:
        with run:
            sample(*args, **kwargs)
        raise _SampledError

    p.sample = sample_and_end
    shared.state.job_count, shared.state.job_no = sizes, number
    try:
        with contextlib.closing(p), contextlib.suppress(_SampledError):
            processing.process_images(p)
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            raise NoResultError(f"too little memory to measure at {name}") from error
        raise NoResultError(failed(f"measuring at {name}", error)) from error
    if shared.state.interrupted or shared.state.skipped or task in _stopped:
        raise NoResultError("interrupted")
    return run.result(name)


class _SampledError(Exception):
    """Nothing is decoded or saved."""


class _Run(Sampling):
    """One sampling that merges in some of its steps, and its clock.

    Three steps warm up: an unmerged one, a merged one, and an unmerged one in which self-attention is timed too. Then
    come rounds of an unmerged step and the merged ones that share a matching, which walk the settings' schedule.
    """

    def __init__(self, p: Any, settings: MergeSettings, is_stopped: Callable[[], bool]) -> None:
        prepared = Generation(weakref.ref(p), settings)
        super().__init__(p, prepared)
        p.get_token_merging_ratio = prepared.token_merging_ratio
        self._is_stopped = is_stopped
        self._seconds: list[float] = []
        """Of the UNet's passes in each step."""
        self._peaks: list[int] = []
        """Bytes, of each step."""
        self._attention = 0.0
        self._merged_a_round = min(settings.reuse_steps, MOST_REUSED)
        self._rounds = 0
        self._clocks: list[Any] = []

    def __exit__(self, *exc: object) -> None:
        self._stop_clocks()
        super().__exit__(*exc)

    def follow(self, params: Any) -> None:
        """A step is about to run."""
        step, turns = len(self._seconds), self._merged_a_round + 1
        if step == WARM_UP:
            most = (STEPS - WARM_UP) // turns
            self._rounds = max(FEWEST_ROUNDS, min(int(SECONDS / turns / max(self._seconds[-1], 1e-6)), most))
        steps = WARM_UP + self._rounds * turns
        unet, layers = host.loaded_unet(), host.loaded_layers()
        # A failure of ours has taken the settings.
        if self.settings is None or unet is None or not layers or self._is_stopped() or step == steps > WARM_UP:
            raise InterruptedException
        if step >= WARM_UP:
            shared.state.sampling_steps = steps
        number, turn = divmod(step - WARM_UP, turns)
        if step == 1 or (step >= WARM_UP and turn):
            if self._merging is None:
                self._hook(unet, False, params.x.shape)
            if self._merging is not None:
                every = self.settings.reuse_steps
                self._merging.set_step(max(number, 0) * every + max(turn - 1, 0), max(self._rounds, 1) * every)
        else:
            self.unhook()
        self._stop_clocks()
        self._time(unet, self._add_pass)
        if step == WARM_UP - 1:
            for layer in layers:
                self._time(layer.block.attn1, self._add_attention)
        self._seconds.append(0.0)
        self._peaks.append(0)
        if devices.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _time(self, module: nn.Module, add: Callable[[float], None]) -> None:
        began: list[float] = []
        self._clocks += [
            module.register_forward_pre_hook(lambda *_: began.append(now())),
            module.register_forward_hook(lambda *_: add(now() - began.pop())),
        ]

    def _stop_clocks(self) -> None:
        for clock in self._clocks:
            clock.remove()
        self._clocks.clear()

    def _add_pass(self, seconds: float) -> None:
        self._seconds[-1] += seconds
        if devices.device.type == "cuda":
            self._peaks[-1] = torch.cuda.max_memory_allocated()

    def _add_attention(self, seconds: float) -> None:
        self._attention += seconds

    def result(self, size: str) -> Result:
        """What came out, once the sampling has ended."""
        if self.settings is None:
            raise NoResultError(f"measuring at {size} failed: the log says why")
        if not any(report.merged_layers for report in self.reports):
            why = next(iter(self._summaries), "this model has no self-attention layers that can be merged")
            return Result(f"no faster at {size}: {why}")
        turns = self._merged_a_round + 1
        rounds = [self._seconds[first : first + turns] for first in range(WARM_UP, len(self._seconds), turns)]
        times, spread = _times_faster([(unmerged, fmean(merged)) for unmerged, *merged in rounds])
        share = self._attention / self._seconds[WARM_UP - 1]
        peaks = self._peaks[WARM_UP::turns], self._peaks[WARM_UP + 1 :: turns]
        saving = 1 - max(peaks[1]) / max(peaks[0]) if max(peaks[0]) else None
        line = f"no faster at {size}: attention is {share:.0%} of a step here"
        if times > 1 + max(spread, 0.005):
            memory = f", {saving:.0%} less memory" if saving and saving >= 0.005 else ""
            line = f"{times:.2f} times faster at {size} (± {spread:.0%}){memory}, on this machine"
        return Result(line.replace("%", " %"), times, spread, share, saving)


def _times_faster(rounds: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """How many times faster the rounds' merged steps are than the unmerged ones, and the spread (see `Result`).

    Each step counts as the median of itself and its neighbours: so a hiccup counts for nothing, and each part of the
    schedule for what it is of a sampling. The spread is that of normal noise with the same differences from round to
    round, in which the schedule doesn't show.
    """
    unmerged, merged = (
        sum(median(times[first : first + 3]) for first in range(len(times) - 2)) for times in zip(*rounds, strict=True)
    )
    changes = [abs(math.log(one[0] / one[1]) - math.log(other[0] / other[1])) for one, other in pairwise(rounds)]
    return unmerged / merged, median(changes) / math.sqrt(2)
