"""Output of every subcommand: a printed table, a CSV and a plot, each naming the machine."""

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
"""One line of a table and of a CSV, by column; None for a value that wasn't measured."""

Columns = Mapping[str, tuple[str, Callable[[object], str]]]
"""Columns of a table: by the rows' key, the title and the function that formats a value."""

PAPER = "paper (RTX 4090, fp16, 512x512)"
PAPER_SECONDS = {0.0: 3.09, 0.1: 2.56, 0.2: 2.29, 0.3: 2.06, 0.4: 1.85, 0.5: 1.65, 0.6: 1.52}
PAPER_GIGABYTES = {0.0: 3.41, 0.1: 2.99, 0.2: 2.17, 0.3: 1.71, 0.4: 1.26, 0.5: 0.89, 0.6: 0.60}
"""Seconds and GB per image: SD 1.5, 50 PLMS steps, plain attention (arXiv 2303.17604, table 4)."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and when something was measured."""

    machine: str
    """Processor, cores and threads, and the GPU if one was used."""
    versions: str
    date: str
    command: str

    def __str__(self) -> str:
        return f"{self.machine}; {self.versions}; {self.date}\n$ {self.command}"


def this_machine(device: torch.device, dtype: str, command: str) -> Machine:
    """Describe this machine."""
    threads = torch.get_num_threads()
    words = f"{_processor()}, {cores()} cores, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        words = f"{torch.cuda.get_device_name(device)}; {words}"
    elif device.type != "cpu":
        words = f"{device.type}; {words}"
    versions = f"torch {torch.__version__}, {dtype}, {peer_versions()}"
    return Machine(words, versions, datetime.date.today().isoformat(), command)


def cores() -> int:
    """Number of cores that this process may use; in a container fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    with contextlib.suppress(OSError):
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if model := re.search(r"^model name\s*: (.+)", cpus, re.MULTILINE):
            return model[1]
    return platform.processor() or platform.machine()


def number(digits: int, factor: float = 1) -> Callable[[object], str]:
    """Format a value times `factor`, such as ms from s, with `digits` decimals."""
    return lambda value: f"{value * factor:.{digits}f}"


def spread(name: str, title: str, digits: int = 3, factor: float = 1) -> Columns:
    """Columns of a median and its quartiles."""
    titles = {name: title, f"{name}_low": "25 %", f"{name}_high": "75 %"}
    return {name: (title, number(digits, factor)) for name, title in titles.items()}


OVER = {"over_tomesd_corner": "/corner", "over_tomesd_random": "/random", "over_limit": "/limit"}
OVER_OTHERS: Columns = {name: (title, number(3)) for name, title in OVER.items()}


class Results:
    """Rows that a subcommand has measured so far, for a table, a CSV and a plot."""

    def __init__(self, args: argparse.Namespace, stem: str) -> None:
        self.rows: list[dict[str, object]] = []
        self.machine = this_machine(args.device, args.dtype, args.command)
        self.files = [args.out / f"{stem}{ending}" for ending in (".csv", ".png")]

    def save(self, new: Iterable[Row] = ()) -> None:
        """Add rows, and write the CSV of all, so that an interrupted run keeps its results."""
        self.rows += [dict(row) for row in new]
        write_csv(self.files[0], self.rows, self.machine)

    def show(self, columns: Columns, panels: Sequence[Panel], notes: Sequence[str]) -> None:
        """Draw the plot, and print the table."""
        plot(self.files[1], panels, self.machine)
        show(table(columns, self.rows), self.machine, notes, self.files)


def table(columns: Columns, rows: Sequence[Row]) -> str:
    """Format rows as a Markdown table with padded columns, numbers to the right."""
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
    """Write rows in SI units and the machine's columns after them; create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made_on = dataclasses.asdict(machine)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *made_on])
        writer.writeheader()
        writer.writerows({**row, **made_on} for row in rows)


@dataclasses.dataclass
class Panel:
    """One pair of axes. x may be words, whose points are not joined."""

    title: str
    across: str
    up: str
    lines: dict[str, list[tuple[float | str, float]]] = dataclasses.field(default_factory=dict)
    errors: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """By name, if known: half of each point's interval."""
    reference: str = ""
    """Name of the line to compare with, drawn dashed and without points."""
    logarithmic: bool = False

    def add(self, name: str, x: float | str, y: float | None, error: float | None = None) -> None:
        """Add a point to a line, if it was measured; a line has errors at all points or at none."""
        if y is not None:
            self.lines.setdefault(name, []).append((x, y))
            if error is not None:
                self.errors.setdefault(name, []).append(error)


def plot(path: Path, panels: Sequence[Panel], machine: Machine) -> None:
    """Draw the panels side by side into a PNG."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False, layout="constrained"
    )
    for panel, axis in zip(panels, axes[0], strict=True):
        for name, points in panel.lines.items():
            words = isinstance(points[0][0], str)
            style = {"marker": "o"} | ({"linestyle": "none"} if words else {})
            if name == panel.reference:
                style = {"linestyle": "--", "color": "grey"}
            errors = panel.errors.get(name)
            axis.errorbar(*zip(*points, strict=True), yerr=errors, capsize=3, label=name, **style)
            if words:
                pyplot.setp(axis.get_xticklabels(), rotation=45, ha="right")
        axis.set(title=panel.title, xlabel=panel.across, ylabel=panel.up)
        if panel.logarithmic:
            axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    about = f"{machine.machine}; {machine.versions}; {machine.date}"
    figure.suptitle(about, fontsize="small", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(tables: str, machine: Machine, notes: Sequence[str], files: Sequence[Path]) -> None:
    """Print the machine, the tables, the notes without repeats, and the files' paths."""
    print(f"\n{machine}\n")
    print(tables)
    for note in dict.fromkeys(notes):
        print(f"* {note}")
    print(f"written: {', '.join(map(str, files))}")
