"""Stands in for `modules.shared`: settings, command line, and whether a generation is to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from modules import devices

cmd_opts = SimpleNamespace(api_auth=None, ui_config_file=None)
device = devices.device
data_path = ""
"""Where `params.txt` is written; nowhere by default."""


class State:
    """Where the current generation is, and whether somebody wants it to end."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, job: str = "") -> None:
        """Begins a generation: everything is set back."""
        self.job, self.job_count = job, -1
        self.skipped = self.interrupted = self.stopping_generation = False
        self.job_no = self.sampling_step = self.sampling_steps = 0

    def end(self) -> None:
        """The generation is over."""
        self.job, self.job_count = "", 0

    def skip(self) -> None:
        """Ends this batch; the next one begins."""
        self.skipped = True

    def interrupt(self) -> None:
        """Ends the whole generation at the next call of the denoiser."""
        self.interrupted = True

    def stop_generating(self) -> None:
        """Lets this batch end and begins no other."""
        self.stopping_generation = True

    def nextjob(self) -> None:
        """A pass or a batch is done."""
        self.job_no += 1
        self.sampling_step = 0


@dataclass
class OptionInfo:
    """Describes one setting: its default, its label, and the component that shows it."""

    default: Any = None
    label: str = ""
    component: Any = None
    component_args: Any = None
    section: tuple | None = None
    onchange: Callable[[], None] | None = None


class Options:
    """The settings' values, readable and settable as attributes."""

    def __init__(self, **defaults: Any) -> None:
        self.__dict__.update(
            data_labels={key: OptionInfo(value) for key, value in defaults.items()}, data={}
        )
        self.reset()

    def reset(self) -> None:
        """Gives every setting its default."""
        self.data.update({key: info.default for key, info in self.data_labels.items()})

    def __setattr__(self, key: str, value: Any) -> None:
        self.data[key] = value

    def __getattr__(self, key: str) -> Any:
        if key in self.__dict__.get("data", {}):
            return self.data[key]
        raise AttributeError(key)

    def set(self, key: str, value: Any) -> None:
        """What the Settings page and the API do: sets an option and calls its `onchange`."""
        changed, self.data[key] = self.data.get(key) != value, value
        if changed and self.data_labels[key].onchange is not None:
            self.data_labels[key].onchange()

    def onchange(self, key: str, func: Callable[[], None], call: bool = True) -> None:
        """Calls `func()` whenever the option changes, and once now."""
        self.data_labels[key].onchange = func
        if call:
            func()

    def add_option(self, key: str, info: OptionInfo) -> None:
        """Adds a setting."""
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
