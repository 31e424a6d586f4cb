"""The paper's tables on the tiny trained model: how far merging takes its pictures from what they were.

Every row's pictures are made from the same seeds and prompts, by ldm's own PLMS sampler. PSNR and SSIM are to the
unmerged twin; Fréchet is the distance of all of a row's pictures to the training pictures, on features of a small
classifier of the same pictures (not Inception: it compares with no published FID); "named" is the share of pictures
that this classifier takes for their prompt's. Pictures are kept in --out: an interrupted run goes on where it was, and
more --samples make only the new ones.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from . import distances, output
from .ablations import TABLES, WHOLE, Table, Variant, at_equal_time
from .contenders import CORNER, OURS, RANDOM, UNMERGED, peers_or_why_not
from .distances import Estimate
from .options import add_shared, fill_in, whole_number
from .packages import require
from .pictures import Album, Made, Studio
from .timing import progress

USUAL = {
    "samples": 500,
    "steps": 50,
    "scale": 3.0,
    "tables": list(TABLES),
    "attention": "sdp",
    "threads": 1,
}
QUICK = {"samples": 8, "steps": 10}
TINY = {"samples": 6, "steps": 2}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A measure of quality, and how it is written."""

    title: str
    write: Callable[[object], str]
    higher_is_better: bool = True


METRICS = {
    "psnr": Metric("PSNR, dB", output.number(2)),
    "ssim": Metric("SSIM", output.number(4)),
    "frechet": Metric("Fréchet", output.number(3), higher_is_better=False),
    "named": Metric("named, %", output.scaled(100, 1)),
}

NOTES = (
    "± is half of the 95 % interval: 1.96 bootstrap standard errors over the pictures. Differences are paired, picture "
    "by picture; one inside its interval is called none. Of twenty that are none, chance calls about one otherwise.",
    "Seconds are a process's for one picture, beside whatever else ran; only large differences mean something.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench quality`."""
    add_shared(parser, rounds=False)
    parser.add_argument("--samples", type=whole_number, metavar="N", help="pictures a row, from 2 up")
    parser.add_argument("--steps", type=_plms_steps, metavar="N", help="of PLMS; they divide 1000")
    parser.add_argument("--scale", type=float, metavar="S", help="of classifier-free guidance")
    parser.add_argument("--tables", choices=TABLES, nargs="+", metavar="TABLE", help=f"some of: {', '.join(TABLES)}")
    parser.add_argument(
        "--processes", type=whole_number, metavar="N", help="that make pictures side by side, of --threads each"
    )
    parser.add_argument(
        "--speed",
        type=Path,
        metavar="FILE.csv",
        help="what `bench speed` wrote for one size: adds a table at equal time",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--weights", type=Path, metavar="FILE.safetensors", help="another tiny model than the shipped")
    which.add_argument(
        "--tiny", action="store_true", help="an untrained model: tries the command, and measures nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Makes what pictures are missing, prints the tables, writes `quality-TABLE.csv`, `.png`, and `quality.md`."""
    fill_in(args, USUAL, QUICK, TINY)
    if args.samples < 2:
        raise ValueError(f"samples must be at least 2, got {args.samples}: a spread needs so many")
    require("skimage.metrics")
    if args.processes is None:
        args.processes = max(1, output.cores() // args.threads) if args.device.type == "cpu" else 1
    machine = output.this_machine(args.device, args.dtype, args.command)
    studio = Studio(args.weights, args.tiny, args.steps, args.scale, args.attention, args.dtype, args.device)
    album = Album(args.out / "quality", studio)
    judge = Judge(album, args.samples)
    tables, notes = _that_can_run(args, studio)
    chunks = _chunks_by_table(album, tables, args.samples)
    every_chunk = [chunk for some in chunks.values() for chunk in some]
    written = [args.out / "quality.md"]
    sections: list[tuple[str, list[output.Row]]] = []
    with (
        progress(len(every_chunk)) as tick,
        contextlib.closing(album.make(every_chunk, args.processes, args.threads)) as made,
    ):
        for name, table in tables.items():
            for _ in chunks[name]:
                variant = next(made)
                tick(f"{name}: {variant.contender}, {variant.ratio:g}")
            rows = [{"table": name, **row} for row in judge.rows(table)]
            sections.append((_heading(table), rows))
            csv_path, plot_path = (args.out / f"quality-{name}{ending}" for ending in (".csv", ".png"))
            # After every table: what is done is there to be read while the rest is made.
            output.write_csv(csv_path, rows, machine)
            output.plot(plot_path, _panels(table, rows), machine)
            written += [csv_path, plot_path]
            _write_markdown(written[0], sections, machine, [*NOTES, *notes])
    shown = "\n\n".join(f"{heading}\n{output.table(*_shown(rows))}" for heading, rows in sections)
    output.show(f"{shown}\n", machine, [*NOTES, *notes], written)


class Judge:
    """Measures variants on their first `samples` pictures, each once."""

    def __init__(self, album: Album, samples: int) -> None:
        self._album, self._samples = album, samples
        self._labels = torch.tensor(album.studio.captions(samples))
        self._net = album.studio.classifier()
        self._frechet = distances.Frechet(self._net.reference)
        self._drawn = distances.resamples(samples)
        self._judged: dict[Variant, tuple[Made, dict[str, Estimate]]] = {}

    def rows(self, table: Table) -> list[dict[str, object]]:
        """A table's rows. All of its pictures, and the unmerged ones, must have been made."""
        studio = self._album.studio
        rows = []
        for row in table.rows:
            made, values = self._judge(row.variant)
            reference = table.reference_of(row)
            others = {} if reference is None else self._judge(reference.variant)[1]
            line: dict[str, object] = {"row": row.name, "ratio": row.ratio}
            for name, metric in METRICS.items():
                line |= _compared(name, metric, values.get(name), others.get(name))
            line |= {"seconds": made.seconds, "reference": table.reference, "merged": made.merged}
            line |= {"samples": self._samples, "steps": studio.steps, "scale": studio.scale}
            rows.append(line | {"how": json.dumps(dataclasses.asdict(row.variant))})
        return rows

    def _judge(self, variant: Variant) -> tuple[Made, dict[str, Estimate]]:
        if variant not in self._judged:
            made = self._album.read(variant, self._samples)
            rgb = made.pictures.permute(0, 3, 1, 2).float().div(255)
            features = self._net.features(rgb)
            named = self._net.head(features).argmax(1) == self._labels
            values = {
                "frechet": self._frechet.estimate(features, self._drawn),
                "named": distances.mean(named, self._drawn),
            }
            if variant != WHOLE.variant:
                twins = self._judge(WHOLE.variant)[0].pictures
                values["psnr"] = distances.mean(distances.psnr(made.pictures, twins), self._drawn)
                values["ssim"] = distances.mean(distances.ssim(made.pictures, twins), self._drawn)
            self._judged[variant] = made, values
        return self._judged[variant]


def _plms_steps(text: str) -> int:
    steps = whole_number(text)
    if 1000 % steps:
        # ldm takes every (1000 // steps)th: others give it more steps than were asked for.
        raise argparse.ArgumentTypeError(f"steps must divide 1000, got {steps}")
    return steps


def _seconds_by_ratio(path: Path) -> dict[str, dict[float, float]]:
    """By contender and ratio: the seconds a step that `bench speed` measured. Raises `ValueError` for another file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"size", "ratio", "contender", "seconds"} <= set(rows[0]):
        raise ValueError(f"{path} is not a CSV of `bench speed`")
    if len({row["size"] for row in rows}) > 1 or len({row["ratio"] for row in rows}) < 2:
        raise ValueError(f"{path} must hold one size and at least two ratios")
    seconds: dict[str, dict[float, float]] = {}
    for row in rows:
        seconds.setdefault(row["contender"], {})[float(row["ratio"])] = float(row["seconds"])
    if OURS not in seconds:
        raise ValueError(f"{path} has no rows of {OURS}")
    return seconds


def _that_can_run(args: argparse.Namespace, studio: Studio) -> tuple[dict[str, Table], list[str]]:
    """The chosen tables in their usual order, without the rows of peers that are missing; and notes that say so."""
    tables = {name: table for name, table in TABLES.items() if name in args.tables}
    if args.speed is not None:
        tables["time"] = at_equal_time(_seconds_by_ratio(args.speed))
    side = studio.model().image_shape[-1]
    peers, notes = peers_or_why_not(side * side, args.torch_dtype)
    left_out = {CORNER, RANDOM} - set(peers)
    if any(row.variant.contender in left_out for table in tables.values() for row in table.rows):
        for name, table in tables.items():
            rows = [row for row in table.rows if row.variant.contender not in left_out]
            tables[name] = dataclasses.replace(table, rows=rows)
        return tables, notes
    return tables, []


def _chunks_by_table(album: Album, tables: Mapping[str, Table], samples: int) -> dict[str, list[tuple[Variant, int]]]:
    """By table: what is still to be made for it when the tables before it are done."""
    seen: set[tuple[Variant, int]] = set()
    chunks = {}
    for name, table in tables.items():
        missing = album.missing([WHOLE.variant, *(row.variant for row in table.rows)], samples)
        chunks[name] = [chunk for chunk in missing if chunk not in seen]
        seen.update(missing)
    return chunks


def _compared(name: str, metric: Metric, value: Estimate | None, other: Estimate | None) -> dict[str, object]:
    """A metric's columns: the value, its difference to the reference's, both intervals, the difference in a word."""
    difference = value.minus(other) if value is not None and other is not None else None
    return {
        name: None if value is None else value.value,
        f"{name}_interval": None if value is None else value.interval,
        f"{name}_difference": None if difference is None else difference.value,
        f"{name}_difference_interval": None if difference is None else difference.interval,
        f"{name}_verdict": None if difference is None else distances.verdict(difference, metric.higher_is_better),
    }


def _heading(table: Table) -> str:
    several = len([row for row in table.rows if row.name == table.reference]) > 1
    return f"{table.title}. Differences: to {'its ' if several else ''}{table.reference!r}."


def _shown(rows: Sequence[output.Row]) -> tuple[output.Columns, list[output.Row]]:
    """What of the rows is shown, as `output.table` takes it: each value with its interval in one place."""
    columns: dict[str, tuple[str, Callable[[object], str]]] = {
        "row": ("row", str),
        "ratio": ("ratio", output.number(2)),
    }
    shown = [dict(row) for row in rows]
    for name, metric in METRICS.items():
        columns |= {name: (metric.title, str), f"{name}_difference": ("difference", str)}
        for line in shown:
            if line[name] is not None:
                line[name] = f"{metric.write(line[name])} ± {metric.write(line[f'{name}_interval'])}"
            if line[f"{name}_difference"] is not None:
                value, interval = line[f"{name}_difference"], metric.write(line[f"{name}_difference_interval"])
                sign = "-" if value < 0 else "+"
                line[f"{name}_difference"] = f"{sign}{metric.write(abs(value))} ± {interval} {line[f'{name}_verdict']}"
    return columns | {"seconds": ("s/picture", output.number(2))}, shown


def _panels(table: Table, rows: Sequence[output.Row]) -> list[output.Panel]:
    """A plot of each measure: over the ratio, a line a name, or a point a row; the unmerged pictures are a line."""
    unmerged, *merged = rows
    if table.over_ratio:
        merged.sort(key=lambda row: row["ratio"])
    measured = {name: METRICS[name].title for name in ("psnr", "ssim", "frechet")}
    if table.over_ratio:
        measured["seconds"] = "s/picture"
    panels = []
    for name, title in measured.items():
        panel = output.Panel(table.title.partition(":")[0], "ratio" if table.over_ratio else "", title)
        for row in merged:
            x, line = (row["ratio"], row["row"]) if table.over_ratio else (row["row"], "merged")
            panel.add(line, x, row[name], row.get(f"{name}_interval"))
            panel.add(UNMERGED, x, unmerged[name])
        panel.reference = UNMERGED
        panels.append(panel)
    return panels


def _write_markdown(
    path: Path, sections: Sequence[tuple[str, Sequence[output.Row]]], machine: output.Machine, notes: Sequence[str]
) -> None:
    """The tables so far, to be pasted where they are told of."""
    parts = [f"`{machine.command}` ({machine.machine}; {machine.versions}; {machine.date})"]
    for heading, rows in sections:
        samples, steps, scale = (rows[0][name] for name in ("samples", "steps", "scale"))
        parts.append(f"**{heading}** {samples} pictures a row, {steps} PLMS steps, guidance {scale:g}.")
        parts.append(output.markdown(*_shown(rows)))
    parts.append("\n".join(f"* {note}" for note in notes))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
