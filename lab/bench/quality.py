"""How far merging takes the pictures of a tiny trained model from what they were: by method, and
the paper's tables.

The model is that of emoji, or by --model that of photographs, which makes textures and no
compositions. Every row's pictures are made from the same seeds and prompts, by ldm's PLMS sampler
where a table doesn't say otherwise. PSNR and SSIM are to the unmerged twin, made by the same
sampler in as many steps; "pairs" is the share of query-key pairs left in layers that merge.
Pictures are kept in --out: an interrupted run goes on where it was, and more --samples make only
the new ones. --speed adds a table at equal time for each size in its files, and what a row's ratio
brings in times faster, by the first of them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..demo.compare import enlarged, sheet
from ..demo.model import MODELS
from . import distances, output
from .ablations import TABLES
from .contenders import KEYS, UNMERGED, why_left_out
from .distances import Estimate
from .equal_time import at_equal_time, times_faster
from .options import add_shared, fill_in, picture_side, whole_number
from .packages import require
from .peers import CA_TOME, CORNER, QUERIES, RANDOM
from .pictures import UNTRAINED, Album, Series, Studio
from .timing import progress
from .variants import Gains, Table, Variant

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
    """A measure of quality, and how it is written. Higher is better."""

    title: str
    write: Callable[[object], str]


METRICS = {"psnr": Metric("PSNR, dB", output.number(2)), "ssim": Metric("SSIM", output.number(4))}

SHOWN_PICTURES, ENLARGED = 10, 3
"""How many pictures of a row are shown, and how many times as large as they are."""

NOTES = (
    "± is half of the 95 % interval: 1.96 bootstrap standard errors over the pictures. Differences are paired, picture "
    "by picture; one inside its interval is called none. Of twenty that are none, chance calls about one otherwise.",
    "Seconds are a process's for one picture, beside whatever else ran; only large differences mean something.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench quality`."""
    add_shared(parser, rounds=False)
    parser.add_argument(
        "--model", choices=MODELS, default=MODELS[0], help="by what it was trained on"
    )
    parser.add_argument(
        "--side",
        type=picture_side,
        metavar="PIXELS",
        help="of a picture, and tokens of the finest layers (32; the model of photographs knows 64 too)",
    )
    parser.add_argument(
        "--samples", type=whole_number, metavar="N", help="pictures a row, from 2 up"
    )
    parser.add_argument("--steps", type=whole_number, metavar="N", help="where a table doesn't say")
    parser.add_argument("--scale", type=float, metavar="S", help="of classifier-free guidance")
    parser.add_argument(
        "--tables", choices=TABLES, nargs="+", metavar="TABLE", help=f"some of: {', '.join(TABLES)}"
    )
    parser.add_argument(
        "--processes", type=whole_number, metavar="N", help="side by side, of --threads each"
    )
    files = {"type": Path, "nargs": "+", "default": [], "metavar": "FILE.csv"}
    parser.add_argument(
        "--speed", **files, help="of `bench speed` and `bench layer`: adds tables at equal time"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="an untrained model: tries it, and measures nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Makes what pictures are missing, prints the tables, writes `quality.md`, and each one's CSV
    and plots."""
    fill_in(args, USUAL, QUICK, TINY)
    if args.samples < 2:
        raise ValueError(f"samples must be at least 2, got {args.samples}: a spread needs so many")
    if 1000 % args.steps:
        # ldm takes every (1000 // steps)th: others give it more steps than were asked for.
        raise ValueError(f"steps must divide 1000, got {args.steps}")
    require("skimage.metrics")
    if args.processes is None:
        args.processes = max(1, output.cores() // args.threads) if args.device.type == "cpu" else 1
    machine = output.this_machine(args.device, args.dtype, args.command)
    studio = Studio(
        UNTRAINED if args.tiny else args.model,
        *(args.steps, args.scale, args.attention, args.dtype, args.device, args.side),
    )
    album = Album(args.out / "quality", studio)
    judge = Judge(album, args.samples)
    gains = {
        f"{file.stem} {size}": of_size
        for file in args.speed
        for size, of_size in _gains(file).items()
    }
    first = next(iter(gains.values()), {})
    tables, notes = _that_can_run(args, gains, studio)
    chunks = _chunks_by_table(album, tables, args.samples)
    every_chunk = [chunk for some in chunks.values() for chunk in some]
    files = [args.out / "quality.md"]
    sections: list[tuple[str, list[output.Row]]] = []
    with (
        progress(len(every_chunk)) as tick,
        contextlib.closing(album.make(every_chunk, args.processes, args.threads)) as variants,
    ):
        for name, table in tables.items():
            for _ in chunks[name]:
                variant = next(variants)
                tick(f"{name}: {variant.contender}, {variant.ratio:g}")
            rows = [{"table": name, **row} for row in judge.rows(table, table.gains or first)]
            sections.append((_heading(table), rows))
            files.append(args.out / f"quality-{name}-pictures.png")
            judge.sheet(table).save(files[-1])
            # After every table: what is done is there to be read while the rest is made.
            files.append(args.out / f"quality-{name}.csv")
            output.write_csv(files[-1], rows, machine)
            for ending, panels in (
                ("", _panels(table, rows)),
                ("-speed", _over_speed(table, rows)),
            ):
                if panels:
                    files.append(args.out / f"quality-{name}{ending}.png")
                    output.plot(files[-1], panels, machine)
            _write_markdown(files[0], sections, machine, [*NOTES, *notes])
    text = "\n\n".join(f"{heading}\n{output.table(*_shown(rows))}" for heading, rows in sections)
    output.show(f"{text}\n", machine, [*NOTES, *notes], files)


class Judge:
    """Measures variants on their first `samples` pictures, each once."""

    def __init__(self, album: Album, samples: int) -> None:
        self._album, self._samples = album, samples
        self._drawn = distances.resamples(samples)
        self._judged: dict[Variant, tuple[Series, dict[str, Estimate]]] = {}

    def rows(self, table: Table, gains: Gains) -> list[dict[str, object]]:
        """A table's rows. All of its pictures, and their unmerged twins, must have been made."""
        studio = self._album.studio
        rows = []
        for row in table.rows:
            variant, reference = row.variant, row.reference
            series, values = self._judge(variant)
            others = {} if reference is None else self._judge(reference.variant)[1]
            line: dict[str, object] = {"row": row.name, "contender": variant.contender}
            pairs = variant.pairs if math.isnan(series.pairs) else series.pairs
            line |= {
                "ratio": variant.mean_ratio,
                "pairs": pairs,
                "faster": times_faster(variant, gains, pairs),
            }
            line["steps"] = studio.steps_of(variant)
            for name in METRICS:
                line |= _compared(name, values.get(name), others.get(name))
            line |= {
                "seconds": series.seconds,
                "reference": reference and reference.name,
                "merged": series.merged,
            }
            line |= {"model": studio.name, "side": studio.image_shape[-1]}
            line |= {"samples": self._samples, "scale": studio.scale}
            rows.append(line | {"how": json.dumps(dataclasses.asdict(variant))})
        return rows

    def sheet(self, table: Table) -> Image.Image:
        """Some pictures of each row, enlarged, under its name and its distance."""
        strips, labels = [], []
        for row in table.rows:
            series, values = self._judge(row.variant)
            strip = np.concatenate(list(series.pictures[:SHOWN_PICTURES].numpy()), axis=1)
            strips.append(
                enlarged(
                    Image.fromarray(strip), (ENLARGED * strip.shape[1], ENLARGED * strip.shape[0])
                )
            )
            psnr = values.get("psnr")
            ratio = f" {row.variant.ratio:g}" if row.variant.contender == row.name and psnr else ""
            labels.append(f"{row.name}{ratio}{f', {psnr.value:.1f} dB' if psnr else ''}")
        return sheet(strips, labels, columns=1)

    def _judge(self, variant: Variant) -> tuple[Series, dict[str, Estimate]]:
        if variant not in self._judged:
            series = self._album.read(variant, self._samples)
            values = {}
            if variant.contender != UNMERGED:
                twins = self._judge(variant.unmerged)[0].pictures
                values["psnr"] = distances.mean(distances.psnr(series.pictures, twins), self._drawn)
                values["ssim"] = distances.mean(distances.ssim(series.pictures, twins), self._drawn)
            self._judged[variant] = series, values
        return self._judged[variant]


def _gains(path: Path) -> dict[str, Gains]:
    """By size, what is in a CSV of `bench speed` or `bench layer`. Raises `ValueError` for another
    file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    size = next((column for column in ("size", "grid") if rows and column in rows[0]), None)
    if size is None or not {"ratio", "contender", "gain"} <= set(rows[0]):
        raise ValueError(f"{path} is not a CSV of `bench speed` or `bench layer`")
    by_size: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        # Presets have no ratio, and what was matched alone no gain.
        if row["ratio"] and row["gain"]:
            by_ratio = by_size.setdefault(row[size], {}).setdefault(row["contender"], {})
            by_ratio[float(row["ratio"])] = float(row["gain"])
    if not by_size or any(len(gains.get(KEYS, {})) < 2 for gains in by_size.values()):
        raise ValueError(f"{path} must hold {KEYS} at two ratios or more")
    return by_size


def _that_can_run(
    args: argparse.Namespace, gains: Mapping[str, Gains], studio: Studio
) -> tuple[dict[str, Table], list[str]]:
    """The chosen tables, and those at equal time, without the rows of peers that are missing; and
    notes that say so."""
    tables = {name: table for name, table in TABLES.items() if name in args.tables}
    tables |= {
        f"time {what}".replace(" ", "-"): at_equal_time(what, of_size)
        for what, of_size in gains.items()
    }
    side = studio.image_shape[-1]
    why_not = {
        peer: why_left_out(peer, 0.0, side * side, args.torch_dtype)
        for peer in (CORNER, RANDOM, QUERIES, CA_TOME)
    }
    needed = {row.variant.contender for table in tables.values() for row in table.rows}
    notes = [note for peer, note in why_not.items() if note and peer in needed]
    some = {
        name: table.without({peer for peer, note in why_not.items() if note})
        for name, table in tables.items()
    }
    empty = [
        name
        for name, table in some.items()
        if all(row.variant.contender == UNMERGED for row in table.rows)
    ]
    notes += [
        f"{name} is left out: {KEYS} was timed nowhere as fast as tomesd at one of its ratios"
        for name in empty
    ]
    return {name: table for name, table in some.items() if name not in empty}, notes


def _chunks_by_table(
    album: Album, tables: Mapping[str, Table], samples: int
) -> dict[str, list[tuple[Variant, int]]]:
    """By table: what is still to be made for it when the tables before it are done."""
    chunks: dict[str, list[tuple[Variant, int]]] = {}
    earlier: set[Path] = set()
    for name, table in tables.items():
        missing = album.missing(
            [one for row in table.rows for one in (row.variant.unmerged, row.variant)], samples
        )
        chunks[name] = [chunk for path, chunk in missing.items() if path not in earlier]
        earlier.update(missing)
    return chunks


def _compared(name: str, value: Estimate | None, other: Estimate | None) -> dict[str, object]:
    """A metric's columns: the value, its difference to the reference's, both intervals, the
    difference in a word."""
    difference = value.minus(other) if value is not None and other is not None else None
    return {
        name: None if value is None else value.value,
        f"{name}_interval": None if value is None else value.interval,
        f"{name}_difference": None if difference is None else difference.value,
        f"{name}_difference_interval": None if difference is None else difference.interval,
        f"{name}_verdict": None if difference is None else distances.verdict(difference),
    }


def _heading(table: Table) -> str:
    references = dict.fromkeys(row.reference for row in table.rows if row.reference is not None)
    names = ", ".join(repr(name) for name in dict.fromkeys(row.name for row in references))
    if not names:
        return f"{table.title}."
    return f"{table.title}. Differences: to {names}{', the last one above' if len(references) > 1 else ''}."


def _shown(rows: Sequence[output.Row]) -> tuple[output.Columns, list[output.Row]]:
    """What of the rows is shown, as `output.table` takes it: each value with its interval in one
    place."""
    columns: dict[str, tuple[str, Callable[[object], str]]] = {
        "row": ("row", str),
        "ratio": ("ratio", output.number(2)),
        "pairs": ("pairs", output.number(2)),
    }
    if len({row["steps"] for row in rows}) > 1:
        columns["steps"] = ("steps", str)
    if any(row["faster"] for row in rows):
        columns["faster"] = ("x faster", output.number(2))
    lines = [dict(row) for row in rows]
    for name, metric in METRICS.items():
        columns |= {name: (metric.title, str), f"{name}_difference": ("difference", str)}
        for line in lines:
            if line[name] is not None:
                line[name] = (
                    f"{metric.write(line[name])} ± {metric.write(line[f'{name}_interval'])}"
                )
            if line[f"{name}_difference"] is not None:
                value, interval = (
                    line[f"{name}_difference"],
                    metric.write(line[f"{name}_difference_interval"]),
                )
                sign = "-" if value < 0 else "+"
                line[f"{name}_difference"] = (
                    f"{sign}{metric.write(abs(value))} ± {interval} {line[f'{name}_verdict']}"
                )
    return columns | {"seconds": ("s/picture", output.number(2))}, lines


def _panels(table: Table, rows: Sequence[output.Row]) -> list[output.Panel]:
    """A plot of each measure: a line a name, or a point a row."""
    merged = [row for row in rows if row["contender"] != UNMERGED]
    merged.sort(key=lambda row: row[table.over] if table.over else 0)
    panels = []
    for name, metric in METRICS.items():
        panel = output.Panel(table.title.partition(":")[0], table.over or "", metric.title)
        for row in merged:
            x, line = (row[table.over], row["row"]) if table.over else (row["row"], "merged")
            panel.add(line, x, row[name], row[f"{name}_interval"])
        panels.append(panel)
    return panels


def _over_speed(table: Table, rows: Sequence[output.Row]) -> list[output.Panel]:
    """A plot of the distance over the speed, a line a name, of a table whose speed is known."""
    panel = output.Panel("Distance over speed", "times faster than unmerged", METRICS["psnr"].title)
    for row in sorted((row for row in rows if row["faster"]), key=lambda row: row["faster"]):
        panel.add(row["row"], row["faster"], row["psnr"], row["psnr_interval"])
    return [panel] if table.over and panel.lines else []


def _write_markdown(
    path: Path,
    sections: Sequence[tuple[str, Sequence[output.Row]]],
    machine: output.Machine,
    notes: Sequence[str],
) -> None:
    """The tables so far, to be pasted where they are told of."""
    parts = [f"`{machine.command}` ({machine.machine}; {machine.versions}; {machine.date})"]
    for heading, rows in sections:
        samples, scale = (rows[0][name] for name in ("samples", "scale"))
        steps = " or ".join(map(str, dict.fromkeys(row["steps"] for row in rows)))
        parts.append(f"**{heading}** {samples} pictures a row, {steps} steps, guidance {scale:g}.")
        parts.append(output.table(*_shown(rows)))
    parts.append("\n".join(f"* {note}" for note in notes))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
