"""Distance of merged pictures of a tiny trained model to the unmerged ones, by table.

The model is the one of emoji, or by --model the one of photographs, which makes textures and no
compositions. All rows are made from the same seeds and prompts, by ldm's PLMS sampler unless a
table names another. PSNR and SSIM are to the unmerged twin of the same sampler and steps; "pairs"
is the fraction of query-key pairs left in layers that merge. Pictures are kept in --out: an
interrupted run continues, and more --samples make only the new ones. --speed adds a table at equal
time for each size in its files, and the rows' speed-ups from the first of them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
from collections.abc import Mapping
from pathlib import Path

from ..demo.model import MODELS
from . import output
from .ablations import TABLES
from .contenders import KEYS, UNMERGED, reason_skipped
from .equal_time import at_equal_time
from .evaluation import Evaluator
from .options import SHARED, add_options, fill_in, picture_side, whole_number
from .packages import require
from .peers import CA_TOME, CORNER, QUERIES, RANDOM
from .pictures import UNTRAINED, PictureCache, Pipeline
from .quality_output import Section, heading, markdown, panels, speed_panels, write_markdown
from .timing import progress
from .variants import Gains, Table, Variant

USUAL = {"samples": 500, "steps": 50, "scale": 3.0, "attention": "sdp", "threads": 1}
USUAL["tables"] = list(TABLES)
QUICK = {"samples": 8, "steps": 10}
TINY = {"samples": 6, "steps": 2}

NOTES = (
    "± is half of the 95 % interval: 1.96 bootstrap standard errors over the pictures. Differences "
    "are paired, picture by picture; one inside its interval is called none. By chance about one "
    "of twenty true nones is called otherwise.",
    "Seconds per picture are of one process among others; only large differences are meaningful.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench quality`."""
    add_options(parser, *SHARED, "tiny")
    number = {"type": whole_number, "metavar": "N"}
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="its training pictures")
    side_help = "of pictures and the finest token grid (32; photos was trained at 64 too)"
    parser.add_argument("--side", type=picture_side, metavar="PIXELS", help=side_help)
    parser.add_argument("--samples", **number, help="pictures per row, at least 2")
    parser.add_argument("--steps", **number, help="steps, unless a table names its own")
    parser.add_argument("--scale", type=float, metavar="S", help="of classifier-free guidance")
    some = f"some of: {', '.join(TABLES)}"
    parser.add_argument("--tables", choices=TABLES, nargs="+", metavar="TABLE", help=some)
    parser.add_argument("--processes", **number, help="parallel processes, of --threads each")
    files = {"type": Path, "nargs": "+", "metavar": "FILE.csv", "default": []}
    parser.add_argument(
        "--speed", **files, help="of `bench speed` or `layer`: tables at equal time"
    )


def run(args: argparse.Namespace) -> None:
    """Make missing pictures, print the tables, and write `quality.md` and each table's files."""
    fill_in(args, USUAL, QUICK, TINY)
    _check(args)
    machine = output.this_machine(args.device, args.dtype, args.command)
    name = UNTRAINED if args.tiny else args.model
    how = args.steps, args.scale, args.attention, args.dtype, args.device, args.side
    cache = PictureCache(args.out / "quality", Pipeline(name, *how))
    evaluator = Evaluator(cache, args.samples)
    gains = {f"{file.stem} {size}": of for file in args.speed for size, of in _gains(file).items()}
    first = next(iter(gains.values()), {})
    tables, skipped = _available_tables(args, gains, cache.pipeline.image_shape[-1])
    notes = [*NOTES, *skipped]
    batches = _batches_by_table(cache, tables, args.samples)
    every_batch = [batch for some in batches.values() for batch in some]
    files = [args.out / "quality.md"]
    sections: list[Section] = []
    with (
        progress(len(every_batch)) as tick,
        contextlib.closing(cache.make(every_batch, args.processes, args.threads)) as variants,
    ):
        for name, table in tables.items():
            for _ in batches[name]:
                variant = next(variants)
                tick(f"{name}: {variant.contender}, {variant.ratio:g}")
            rows = [{"table": name, **row} for row in evaluator.rows(table, table.gains or first)]
            sections.append((heading(table), rows))
            # Written after every table, to be read while the others are made.
            stem = args.out / f"quality-{name}"
            files += _write(stem, table, rows, machine)
            files.append(Path(f"{stem}-pictures.png"))
            evaluator.sheet(table).save(files[-1])
            write_markdown(files[0], sections, machine, notes)
    text = "\n\n".join(f"{title}\n{markdown(rows)}" for title, rows in sections)
    output.show(f"{text}\n", machine, notes, files)


def _check(args: argparse.Namespace) -> None:
    """Raise `ValueError` or `MissingPackage` for what can't run; choose the number of processes."""
    if args.samples < 2:
        raise ValueError(f"samples must be at least 2, for a spread, got {args.samples}")
    if 1000 % args.steps:
        # ldm takes every (1000 // steps)th step, so another number would add steps.
        raise ValueError(f"steps must divide 1000, got {args.steps}")
    require("skimage.metrics")
    if args.processes is None:
        args.processes = max(1, output.cores() // args.threads) if args.device.type == "cpu" else 1


def _write(stem: Path, table: Table, rows: list[output.Row], machine: output.Machine) -> list[Path]:
    """Write a table's CSV and plots; return their paths."""
    files = [Path(f"{stem}.csv")]
    output.write_csv(files[0], rows, machine)
    for ending, plots in (("", panels(table, rows)), ("-speed", speed_panels(table, rows))):
        if plots:
            files.append(Path(f"{stem}{ending}.png"))
            output.plot(files[-1], plots, machine)
    return files


def _gains(path: Path) -> dict[str, Gains]:
    """Read speed-ups by size from a CSV of `bench speed` or `bench layer`.

    Raises `ValueError` for other files.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    size = next((column for column in ("size", "grid") if rows and column in rows[0]), None)
    if size is None or not {"ratio", "contender", "gain"} <= set(rows[0]):
        raise ValueError(f"{path} is not a CSV of `bench speed` or `bench layer`")
    by_size: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        # Presets in files of version 1.0.0 have no ratio, and matching alone has no gain.
        if row["ratio"] and row["gain"]:
            by_ratio = by_size.setdefault(row[size], {}).setdefault(row["contender"], {})
            by_ratio[float(row["ratio"])] = float(row["gain"])
    if not by_size or any(len(gains.get(KEYS, {})) < 2 for gains in by_size.values()):
        raise ValueError(f"{path} must hold {KEYS} at two ratios or more")
    return by_size


def _available_tables(
    args: argparse.Namespace, gains: Mapping[str, Gains], side: int
) -> tuple[dict[str, Table], list[str]]:
    """The chosen tables and those at equal time, without missing peers; notes on these."""
    tables = {name: TABLES[name] for name in TABLES if name in args.tables}
    for what, of_size in gains.items():
        tables[f"time {what}".replace(" ", "-")] = at_equal_time(what, of_size)
    needed = {row.variant.contender for table in tables.values() for row in table.rows}
    reasons = {
        peer: reason_skipped(peer, 0.0, side * side, args.torch_dtype)
        for peer in (CORNER, RANDOM, QUERIES, CA_TOME)
    }
    missing = {peer for peer, reason in reasons.items() if reason}
    notes = [reason for peer, reason in reasons.items() if reason and peer in needed]
    available = {}
    for name, table in tables.items():
        some = table.without(missing)
        if all(row.variant.contender == UNMERGED for row in some.rows):
            notes.append(f"{name} is skipped: {KEYS} was never measured as fast as tomesd")
        else:
            available[name] = some
    return available, notes


def _batches_by_table(
    cache: PictureCache, tables: Mapping[str, Table], samples: int
) -> dict[str, list[tuple[Variant, int]]]:
    """By table: the batches that are missing once the tables before it are done."""
    batches: dict[str, list[tuple[Variant, int]]] = {}
    earlier: set[Path] = set()
    for name, table in tables.items():
        variants = [one for row in table.rows for one in (row.variant.unmerged, row.variant)]
        missing = cache.missing(variants, samples)
        batches[name] = [batch for path, batch in missing.items() if path not in earlier]
        earlier.update(missing)
    return batches
