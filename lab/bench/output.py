"""What every subcommand writes: a table on the screen, a CSV, a plot; each says on which machine it
was made."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .contenders import peer_versions
from .packages import require

Row = Mapping[str, object]
"""One line of a table and of a CSV, by column; None is a value that was not measured."""

Columns = Mapping[str, tuple[str, Callable[[object], str]]]
"""Of a table: by the rows' key, the title and how a value is written."""

PAPER = "paper (RTX 4090, fp16, 512x512)"
PAPER_SECONDS = {0.0: 3.09, 0.1: 2.56, 0.2: 2.29, 0.3: 2.06, 0.4: 1.85, 0.5: 1.65, 0.6: 1.52}
PAPER_GIGABYTES = {0.0: 3.41, 0.1: 2.99, 0.2: 2.17, 0.3: 1.71, 0.4: 1.26, 0.5: 0.89, 0.6: 0.60}
"""Seconds and GB an image, by ratio: SD 1.5, 50 PLMS steps, plain attention (arXiv 2303.17604,
table 4)."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and when something was measured."""

    machine: str
    """Processor, cores and threads, and the GPU where one was used, in words."""
    versions: str
    date: str
    command: str

    def __str__(self) -> str:
        return f"{self.machine}; {self.versions}; {self.date}\n$ {self.command}"


def this_machine(device: torch.device, dtype: str, command: str) -> Machine:
    """This machine, as it is now."""
    threads = torch.get_num_threads()
    words = f"{_processor()}, {cores()} cores, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        words = f"{torch.cuda.get_device_name(device)}; {words}"
    elif device.type != "cpu":
        words = f"{device.type}; {words}"
    versions = f"torch {torch.__version__}, {dtype}, {peer_versions()}"
    return Machine(words, versions, datetime.date.today().isoformat(), command)


def cores() -> int:
    """How many cores this process may use, where the system tells; a container's are fewer than the
    machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    with contextlib.suppress(OSError):
        if model := re.search(
            r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        ):
            return model[1]
    return platform.processor() or platform.machine()


def number(digits: int, factor: float = 1) -> Callable[[object], str]:
    """Writes a value times `factor`, such as ms of s or MB of bytes, with so many digits after the
    point."""
    return lambda value: f"{value * factor:.{digits}f}"


def spread(name: str, title: str, digits: int = 3, factor: float = 1) -> Columns:
    """The columns of a median and its quartiles."""
    titles = {name: title, f"{name}_low": "25 %", f"{name}_high": "75 %"}
    return {name: (title, number(digits, factor)) for name, title in titles.items()}


OVER = {"over_tomesd_corner": "/corner", "over_tomesd_random": "/random", "over_limit": "/limit"}
OVER_OTHERS: Columns = {name: (title, number(3)) for name, title in OVER.items()}


class Results:
    """The rows that a subcommand has measured so far, for a table, a CSV and a plot."""

    def __init__(self, args: argparse.Namespace, stem: str) -> None:
        self.rows: list[dict[str, object]] = []
        self.machine = this_machine(args.device, args.dtype, args.command)
        self.files = [args.out / f"{stem}{ending}" for ending in (".csv", ".png")]

    def save(self, new: Iterable[Row] = ()) -> None:
        """Adds rows, and writes the CSV of all: what was measured in an hour is kept when the next
        is broken off."""
        self.rows += [dict(row) for row in new]
        write_csv(self.files[0], self.rows, self.machine)

    def show(self, columns: Columns, panels: Sequence[Panel], notes: Sequence[str]) -> None:
        """Draws the plot, and prints the table."""
        plot(self.files[1], panels, self.machine)
        show(table(columns, self.rows), self.machine, notes, self.files)


def table(columns: Columns, rows: Sequence[Row]) -> str:
    """The rows under their titles in Markdown, every column as wide as it must be, numbers to the
    right."""
    columns_of_cells: list[list[str]] = []
    for key, (title, write) in columns.items():
        values = [row.get(key) for row in rows]
        cells = [title, *("-" if value is None else write(value) for value in values)]
        width = max(3, *map(len, cells))
        is_text = {type(value) for value in values if value is not None} == {str}
        cells.insert(1, "-" * width if is_text else "-" * (width - 1) + ":")
        columns_of_cells.append([f"{cell:{'<' if is_text else '>'}{width}}" for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns_of_cells, strict=True))


def write_csv(path: Path, rows: Sequence[Row], machine: Machine) -> None:
    """The rows as measured, in SI units, with the machine's columns behind them. The folder is made
    if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made_on = dataclasses.asdict(machine)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *made_on])
        writer.writeheader()
        writer.writerows({**row, **made_on} for row in rows)


@dataclasses.dataclass
class Panel:
    """One pair of axes. What is across may be words, whose points are not joined."""

    title: str
    across: str
    up: str
    lines: dict[str, list[tuple[float | str, float]]] = dataclasses.field(default_factory=dict)
    """By name: the points (x, y)."""
    errors: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """By name, where known: how far each point's interval reaches up and down."""
    reference: str | None = None
    """The line that the others are held against: it is drawn dashed, without points."""
    logarithmic: bool = False

    def add(self, name: str, x: float | str, y: float | None, error: float | None = None) -> None:
        """Adds a point, if it was measured, to the line of that name; all of a line's points have
        an error, or none."""
        if y is not None:
            self.lines.setdefault(name, []).append((x, y))
            if error is not None:
                self.errors.setdefault(name, []).append(error)


def paper_line(measured: Mapping[float, float]) -> list[tuple[float, float]]:
    """The paper's values as times better than its unmerged one, by ratio."""
    return [(ratio, measured[0.0] / value) for ratio, value in measured.items()]


def plot(path: Path, panels: Sequence[Panel], machine: Machine) -> None:
    """Draws the panels beside each other into a PNG."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False, layout="constrained"
    )
    for panel, axis in zip(panels, axes[0], strict=True):
        for name, points in panel.lines.items():
            style = (
                {"linestyle": "--", "color": "grey"} if name == panel.reference else {"marker": "o"}
            )
            words = isinstance(points[0][0], str)
            style = {"linestyle": "none"} | style if words else style
            axis.errorbar(
                *zip(*points, strict=True),
                yerr=panel.errors.get(name),
                capsize=3,
                label=name,
                **style,
            )
            if words:
                pyplot.setp(axis.get_xticklabels(), rotation=45, ha="right")
        axis.set(title=panel.title, xlabel=panel.across, ylabel=panel.up)
        if panel.logarithmic:
            axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(
        f"{machine.machine}; {machine.versions}; {machine.date}", fontsize="small", wrap=True
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(tables: str, machine: Machine, notes: Sequence[str], files: Sequence[Path]) -> None:
    """Prints machine, tables, notes (each once) and where the files are."""
    print(f"\n{machine}\n")
    print(tables)
    for note in dict.fromkeys(notes):
        print(f"* {note}")
    print(f"written: {', '.join(map(str, files))}")
