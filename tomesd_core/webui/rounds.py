"""The sampling of a measurement: unmerged and merged steps in turn, each timed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from modules import devices, shared
from modules.sd_samplers_common import InterruptedException
from torch import nn

from ..reasons import NO_LAYERS
from ..settings import MergeSettings
from ..unet import Layer
from . import host
from .generation import Generation
from .log import NoResultError
from .sampling import Sampling
from .times_faster import MOST_SPREAD, Result, line_of, times_faster

STEPS, WARM_UP, MOST_REUSED = 150, 3, 4
FEWEST_PAIRS = 2
"""Fewest pairs of rounds in one walk through the schedule."""
SECONDS, MOST_SECONDS = 10.0, 30.0
"""Duration of one walk, and the total after which no other one begins."""


class Rounds(Sampling):
    """A sampling that merges and times its steps in rounds.

    Three steps warm up: an unmerged one, a merged one, and an unmerged one that also times
    self-attention. Each round is one unmerged step and the merged steps that share a matching.
    Every second round runs backwards, so that in a pair of rounds each kind of step has odd and
    even places: some hosts skip half of the batch in every other step. The pairs walk through the
    schedule once, and again while the spread is too large.
    """

    def __init__(self, p: Any, settings: MergeSettings, is_stopped: Callable[[], bool]) -> None:
        """`is_stopped` is asked before each step."""
        prepared = Generation(weakref.ref(p), settings)
        super().__init__(p, prepared)
        p.get_token_merging_ratio = prepared.token_merging_ratio
        self._is_stopped = is_stopped
        self._seconds: list[float] = []
        """Time of the UNet's passes in each step."""
        self._peaks: list[int] = []
        """Peak memory of each step, in bytes."""
        self._attention: list[float] = []
        """Time of each self-attention in the step that times them."""
        merged = range(min(settings.reuse_steps, MOST_REUSED))
        self._turns = [-1, *merged, *merged, -1]
        """The steps of a pair of rounds: their numbers among those that share a matching; -1 for
        unmerged ones."""
        self._pairs = FEWEST_PAIRS
        """Pairs of rounds per walk."""
        self._clocks = contextlib.ExitStack()

    def end(self, error: BaseException | None) -> None:
        """The sampling ended."""
        self._clocks.close()
        super().end(error)

    def follow(self, params: Any) -> None:
        """A step is about to run: merge it or not, and time it."""
        unet, layers, settings = host.loaded_unet(), host.loaded_layers(), self.settings
        # An error of merging clears the settings.
        if settings is None or unet is None or not layers or self._is_stopped():
            raise InterruptedException
        step = self._next_step(settings.reuse_steps)
        if step is None:
            self.unhook()
        elif self._merging is None:
            self._hook(unet, settings, False, params.x.shape, self._p.sampler)
        if step is not None and self._merging is not None:
            self._merging.set_step(step, self._pairs * settings.reuse_steps)
        self._start_clocks(unet, layers)

    def _next_step(self, every: int) -> int | None:
        """The step of the schedule to merge next; None for an unmerged step.

        Raises `InterruptedException` once the result is precise enough.
        """
        step = len(self._seconds)
        if 0 < step <= WARM_UP:
            pair_seconds = len(self._turns) * max(self._seconds[-1], 1e-6)
            # Three walks fit into the sampling.
            most_pairs = (STEPS - WARM_UP) // (3 * len(self._turns))
            self._pairs = max(FEWEST_PAIRS, min(int(SECONDS / pair_seconds), most_pairs))
        walk_steps = self._pairs * len(self._turns)
        walk, place = divmod(max(step - WARM_UP, 0), walk_steps)
        if walk and not place and self._is_enough():
            raise InterruptedException
        shared.state.sampling_steps = WARM_UP + (walk + 1) * walk_steps
        pair, turn = divmod(place, len(self._turns))
        merged = self._turns[turn] if step >= WARM_UP else step % 2 - 1
        return None if merged < 0 else pair * every + merged

    def _start_clocks(self, unet: nn.Module, layers: Sequence[Layer]) -> None:
        self._clocks.close()
        self._time(unet, self._add_pass)
        if len(self._seconds) == WARM_UP - 1:
            for layer in layers:
                self._time(layer.block.attn1, self._attention.append)
        self._seconds.append(0.0)
        self._peaks.append(0)
        if devices.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(devices.device)

    def _time(self, module: nn.Module, add: Callable[[float], None]) -> None:
        began: list[float] = []
        keep = self._clocks.enter_context
        keep(module.register_forward_pre_hook(lambda *_: began.append(host.now())))
        keep(module.register_forward_hook(lambda *_: add(host.now() - began.pop())))

    def _add_pass(self, seconds: float) -> None:
        self._seconds[-1] += seconds
        if devices.device.type == "cuda":
            self._peaks[-1] = torch.cuda.max_memory_allocated(devices.device)

    def _by_pair(self, values: Sequence[float]) -> Iterator[tuple[list[float], list[float]]]:
        """The values of the unmerged and of the merged steps, for each pair of rounds."""
        size = len(self._turns)
        for place in range(WARM_UP, len(values) - size + 1, size):
            first, *merged, last = values[place : place + size]
            yield [first, last], merged

    def _measured(self) -> tuple[float, float]:
        return times_faster(list(self._by_pair(self._seconds)))

    def _is_enough(self) -> bool:
        return self._measured()[1] < MOST_SPREAD or sum(self._seconds) + SECONDS > MOST_SECONDS

    def result(self, size: str) -> Result:
        """The result of the finished sampling. Raises `NoResultError` if merging failed."""
        if self.failure:
            raise NoResultError(f"measuring at {size} failed: {self.failure}")
        if not any(report.merged_layers for report in self.reports):
            return Result(f"no faster at {size}: {next(iter(self._summaries), NO_LAYERS)}")
        times, spread = self._measured()
        share = sum(self._attention) / self._seconds[WARM_UP - 1]
        peaks = [max(map(max, kind)) for kind in zip(*self._by_pair(self._peaks), strict=True)]
        saving = 1 - peaks[1] / peaks[0] if peaks[0] else None
        return Result(line_of(size, times, spread, share, saving), times, spread, share, saving)
