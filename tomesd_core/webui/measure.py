"""How many times faster merging makes a step here: unmerged and merged steps in turn, in one
sampling of the host's."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import torch
from modules import call_queue, devices, processing, progress, scripts, shared
from modules.sd_samplers_common import InterruptedException
from torch import nn

from ..reasons import is_out_of_memory
from ..settings import MergeSettings, Setting, SettingsError
from . import generation, host, presets
from .arguments import read_arguments
from .clock import now
from .generation import Generation
from .log import NoResultError, failed
from .sampling import Sampling, merges_in

STEPS, WARM_UP, MOST_REUSED = 150, 3, 4
FEWEST_PAIRS = 2
"""Of rounds, in one walk through the schedule."""
SECONDS, MOST_SECONDS = 10.0, 30.0
"""What one walk takes, and after what time no other one begins."""
MOST_SPREAD = 0.1
"""The spread above which another walk begins, or nothing can be told."""

FIELDS = {
    "width": Setting(512, "integer", minimum=16, maximum=16384),
    "height": Setting(512, "integer", minimum=16, maximum=16384),
    "batch_size": Setting(1, "integer", minimum=1, maximum=256),
    "cfg_scale": Setting(7.0, "number", minimum=0, maximum=100),
    "steps": Setting(20, "integer", minimum=1, maximum=1000),
    "hires_width": Setting(0, "integer", minimum=0, maximum=16384),
    "hires_height": Setting(0, "integer", minimum=0, maximum=16384),
}
"""What a measurement is asked for, beside `settings`. A hires size of 0: no hires fix. `steps`: of
the picture."""

_stopped: deque[str] = deque(maxlen=16)
"""The last tasks that were stopped: maybe before their requests came, maybe after they had ended.
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one size gave."""

    line: str
    """For people."""
    times_faster: float | None = None
    """None where the settings merge nothing there."""
    spread: float | None = None
    """Standard error of `times_faster`, as a share of it."""
    attention_share: float | None = None
    """Of an unmerged step's time, in self-attention."""
    memory_saved: float | None = None
    """Share of the device's peak memory; None where it isn't known."""


def measure(request: Mapping[str, Any], task: str = "") -> list[Result]:
    """Measures the size and, with hires fix, its second pass's, when its turn has come in the
    host's queue.

    `request` has any of `FIELDS`, and `settings`, an object as for the script's argument. The host
    shows the progress of `task`. Raises `SettingsError` for a wrong value, and `NoResultError`
    where it was interrupted or failed.
    """
    values, settings = _read(request)
    task = task or f"task({uuid.uuid4().hex})"
    sizes = [(values["width"], values["height"], False)]
    if values["hires_width"] and values["hires_height"]:
        sizes.append((values["hires_width"], values["hires_height"], True))

    def each() -> list[Result]:
        with host.last_parameters_kept():
            return [
                _of_size(size, number, len(sizes), values, settings, task)
                for number, size in enumerate(sizes)
            ]

    progress.add_task_to_queue(task)
    with call_queue.queue_lock:
        shared.state.begin(job=task)
        progress.start_task(task)
        try:
            return host.run_as_generation(each)
        finally:
            progress.finish_task(task)
            shared.state.end()
            shared.state.skipped = shared.state.interrupted = shared.state.stopping_generation = (
                False
            )


def stop(task: str) -> None:
    """Ends the measurement of a task before its next step, also where it waits for its turn."""
    _stopped.append(task)


def _read(request: Mapping[str, Any]) -> tuple[dict[str, Any], MergeSettings]:
    unknown = [repr(name) for name in request if name not in (*FIELDS, "settings")]
    if unknown:
        raise SettingsError(
            f"unknown field {', '.join(unknown)}: the fields are {', '.join(FIELDS)}, settings"
        )
    values = {
        name: field.check(name, request.get(name, field.default)) for name, field in FIELDS.items()
    }
    settings = request.get("settings", {})
    if not isinstance(settings, Mapping):
        raise SettingsError(f"settings must be an object of settings, got {settings!r}")
    asked = read_arguments([{**settings, "enabled": True}], None, presets.get).settings
    # A measurement has a number of steps of its own.
    return values, dataclasses.replace(asked.in_steps(values["steps"]), full_steps=1)


def _of_size(
    size: tuple[int, int, bool],
    number: int,
    sizes: int,
    values: Mapping[str, Any],
    settings: MergeSettings,
    task: str,
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
    if host.needs_a_picture():
        raise NoResultError(
            "this model (InstructPix2Pix) makes no picture without another one to start from"
        )
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
        if is_out_of_memory(error):
            raise NoResultError(f"too little memory to measure at {name}") from error
        raise NoResultError(failed(f"measuring at {name}", error)) from error
    if is_interrupted() or task in _stopped:
        raise NoResultError("interrupted")
    return run.result(name)


def is_interrupted() -> bool:
    """Whether a person has pressed one of the host's own buttons that end what is running."""
    state = shared.state
    return bool(state.interrupted or state.skipped or getattr(state, "stopping_generation", False))


class _SampledError(Exception):
    """Nothing is decoded or saved."""


class _Run(Sampling):
    """One sampling that merges in some of its steps, and its clock.

    Three steps warm up: an unmerged one, a merged one, and an unmerged one in which self-attention
    is timed too. Then come rounds of an unmerged step and the merged ones that share a matching.
    Every second round runs backwards, so that a pair of rounds has each kind of step at odd and at
    even places: some hosts leave out half of the batch in every other step. The pairs walk the
    settings' schedule, once, or as long as the spread is too large.
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
        self._turns = min(settings.reuse_steps, MOST_REUSED) + 1
        """Steps of a round."""
        self._pairs = FEWEST_PAIRS
        """Of rounds, in a walk."""
        self._clocks: list[Any] = []

    def __exit__(self, *exc: Any) -> None:
        self._stop_clocks()
        super().__exit__(*exc)

    def follow(self, params: Any) -> None:
        """A step is about to run."""
        step, unet, layers = len(self._seconds), host.loaded_unet(), host.loaded_layers()
        settings = self.settings
        # A failure of ours has taken the settings.
        if settings is None or unet is None or not layers or self._is_stopped() or is_interrupted():
            raise InterruptedException
        if 0 < step <= WARM_UP:
            at_once = 2 * self._turns * max(self._seconds[-1], 1e-6)
            # Three walks fit into the sampling.
            self._pairs = max(
                FEWEST_PAIRS, min(int(SECONDS / at_once), (STEPS - WARM_UP) // (6 * self._turns))
            )
        a_walk = self._pairs * 2 * self._turns
        walk, place = divmod(max(step - WARM_UP, 0), a_walk)
        if walk and not place and self._is_enough():
            raise InterruptedException
        shared.state.sampling_steps = WARM_UP + (walk + 1) * a_walk
        number, turn = divmod(place, self._turns)
        merged = self._merged_turn(number, turn) if step >= WARM_UP else step % 2 - 1
        if merged >= 0:
            if self._merging is None:
                self._hook(unet, settings, False, params.x.shape, self._p.sampler)
            if self._merging is not None:
                every = settings.reuse_steps
                self._merging.set_step(number // 2 * every + merged, self._pairs * every)
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
            torch.cuda.reset_peak_memory_stats(devices.device)

    def _merged_turn(self, number: int, turn: int) -> int:
        """Which of its round's merged steps this is, from 0; -1 for the unmerged one."""
        backwards = number % 2
        return -1 if turn == (self._turns - 1) * backwards else turn - 1 + backwards

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
            self._peaks[-1] = torch.cuda.max_memory_allocated(devices.device)

    def _add_attention(self, seconds: float) -> None:
        self._attention += seconds

    def _steps(self, of: Sequence[float]) -> Iterator[tuple[list[float], list[float]]]:
        """What `of` holds of a pair's unmerged and merged steps, pair by pair."""
        size = 2 * self._turns
        for first in range(WARM_UP, len(of) - size + 1, size):
            pair: tuple[list[float], list[float]] = [], []
            for place in range(size):
                pair[self._merged_turn(*divmod(place, self._turns)) >= 0].append(of[first + place])
            yield pair

    def _measured(self) -> tuple[float, float]:
        return times_faster(list(self._steps(self._seconds)))

    def _is_enough(self) -> bool:
        return self._measured()[1] < MOST_SPREAD or sum(self._seconds) + SECONDS > MOST_SECONDS

    def result(self, size: str) -> Result:
        """What came out, once the sampling has ended."""
        if self.failure:
            raise NoResultError(f"measuring at {size} failed: {self.failure}")
        if not any(report.merged_layers for report in self.reports):
            why = next(
                iter(self._summaries), "this model has no self-attention layers that can be merged"
            )
            return Result(f"no faster at {size}: {why}")
        times, spread = self._measured()
        share = self._attention / self._seconds[WARM_UP - 1]
        peaks = [max(map(max, kind)) for kind in zip(*self._steps(self._peaks), strict=True)]
        saving = 1 - peaks[1] / peaks[0] if peaks[0] else None
        return Result(line_of(size, times, spread, share, saving), times, spread, share, saving)


def line_of(size: str, times: float, spread: float, share: float, saving: float | None) -> str:
    """A result's line; see `Result` for what the numbers are."""
    if spread >= MOST_SPREAD:
        least, most = times / (1 + spread), times * (1 + spread)
        return f"too noisy to tell at {size}: between {least:.2f} and {most:.2f} times faster"
    line = f"no faster at {size}: attention is {share:.0%} of a step here"
    if times > 1 + max(spread, 0.005):
        memory = f", {saving:.0%} less memory" if saving and saving >= 0.005 else ""
        line = f"{times:.2f} times faster at {size} (± {max(spread, 0.01):.0%}){memory}, on this machine"
    return line.replace("%", " %")


def times_faster(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float]:
    """How many times faster merged steps are, and the standard error of that as a share of it.

    `pairs` holds the seconds of the unmerged and of the merged steps of each pair of rounds, in the
    order of time. Each pair counts as the median of itself and its neighbours, so that a hiccup
    counts for nothing, and each part of the schedule for its share of a sampling. The error comes
    from unmerged steps at the same place of neighbouring pairs, in which the schedule doesn't show,
    and which are as noisy as the merged ones.
    """
    unmerged, merged = (
        _smoothed([fmean(steps) for steps in kind]) for kind in zip(*pairs, strict=True)
    )
    changes = [
        abs(math.log(one / other))
        for (before, _), (after, _) in pairwise(pairs)
        for one, other in zip(before, after, strict=True)
    ]
    # Of differences of normal noise half are below 0.95 of its deviation. Few of them may be small
    # by chance.
    deviation = median(changes) / 0.954 * math.sqrt(1 + 2 / len(changes))
    steps_per_pair = len(pairs[0][0])
    return sum(unmerged) / sum(merged), math.sqrt(2 / (len(pairs) * steps_per_pair)) * deviation


def _smoothed(times: Sequence[float]) -> list[float]:
    if len(times) < 3:
        return list(times)
    return [median(times[first : first + 3]) for first in range(len(times) - 2)]
