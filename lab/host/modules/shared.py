"""Stands in for `modules.shared`: settings, command line, and the state of a generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from modules import devices

cmd_opts = SimpleNamespace(ui_config_file=None)
device = devices.device
data_path = ""
"""Folder of `params.txt`; empty to write none."""


class State:
    """Progress of the current generation, and requests to end it."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, job: str = "") -> None:
        """Begin a generation: reset everything."""
        self.job, self.job_count = job, -1
        self.skipped = self.interrupted = self.stopping_generation = False
        self.job_no = self.sampling_step = self.sampling_steps = 0

    def end(self) -> None:
        """End the generation."""
        self.job, self.job_count = "", 0

    def skip(self) -> None:
        """End the current batch; the next one begins."""
        self.skipped = True

    def interrupt(self) -> None:
        """End the generation at the next call of the denoiser."""
        self.interrupted = True

    def stop_generating(self) -> None:
        """End the generation after the current batch."""
        self.stopping_generation = True

    def nextjob(self) -> None:
        """Count a finished pass or batch."""
        self.job_no += 1
        self.sampling_step = 0


@dataclass
class OptionInfo:
    """A setting's default, label, and component."""

    default: Any = None
    label: str = ""
    component: Any = None
    component_args: Any = None
    section: tuple | None = None
    onchange: Callable[[], None] | None = None


class Options:
    """The settings' values, as attributes."""

    def __init__(self, **defaults: Any) -> None:
        self.__dict__.update(
            data_labels={key: OptionInfo(value) for key, value in defaults.items()}, data={}
        )
        self.reset()

    def reset(self) -> None:
        """Reset every setting to its default."""
        self.data.update({key: info.default for key, info in self.data_labels.items()})

    def __setattr__(self, key: str, value: Any) -> None:
        self.data[key] = value

    def __getattr__(self, key: str) -> Any:
        if key in self.__dict__.get("data", {}):
            return self.data[key]
        raise AttributeError(key)

    def set(self, key: str, value: Any) -> None:
        """Set an option and call its `onchange`, as the Settings page and the API do."""
        changed, self.data[key] = self.data.get(key) != value, value
        if changed and self.data_labels[key].onchange is not None:
            self.data_labels[key].onchange()

    def onchange(self, key: str, func: Callable[[], None], call: bool = True) -> None:
        """Call `func()` whenever the option changes, and once now."""
        self.data_labels[key].onchange = func
        if call:
            func()

    def add_option(self, key: str, info: OptionInfo) -> None:
        """Add a setting."""
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)


opts = Options(
    sd_model_checkpoint=None,
    sd_checkpoints_limit=1,
    sd_unet="None",
    token_merging_ratio=0.0,
    token_merging_ratio_img2img=0.0,
    token_merging_ratio_hr=0.0,
    batch_cond_uncond=True,
    return_grid=True,
)
state = State()
