"""`bench quality`: its tables as files, what runs again, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_bench import TINY_PIPELINE, rows_of
from PIL import Image

from lab.bench import distances, output, pictures
from lab.bench.__main__ import main
from lab.bench.ablations import TABLES
from lab.bench.contenders import KEYS, PAPER, UNMERGED, UNWEIGHTED
from lab.bench.peers import CORNER, RANDOM
from lab.bench.pictures import BATCH, UNTRAINED, Batch, PictureCache, Pipeline
from lab.bench.variants import Variant, base_variant
from lab.demo import model as demo_model


@pytest.fixture
def bench(tmp_path: Path, capfd: pytest.CaptureFixture) -> Callable[..., str]:
    """Run `bench quality` in one process; return its output."""

    def run(*arguments: object, status: int = 0) -> str:
        command = ["quality", "--processes", "1", "--out", str(tmp_path), *map(str, arguments)]
        assert main(command) == status
        printed = capfd.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.fixture
def batches_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Variant, int]]:
    """Batches that are made, in order."""
    batches: list[tuple[Variant, int]] = []
    make = Pipeline.make
    monkeypatch.setattr(
        Pipeline, "make", lambda self, *batch: batches.append(batch) or make(self, *batch)
    )
    return batches


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make noise in place of pictures, and no charts."""

    def make(pipeline: Pipeline, variant: Variant, first: int) -> Batch:
        pixels = torch.randint(0, 256, (BATCH, 8, 8, 3), dtype=torch.uint8)
        return Batch(pixels, 1.0, "", math.nan)

    monkeypatch.setattr(Pipeline, "make", make)
    monkeypatch.setattr(output, "plot", lambda *_: None)


def test_a_table_shows_how_each_row_differs(bench: Callable, tmp_path: Path) -> None:
    printed = bench("--tiny", "--tables", "where")
    rows = rows_of(tmp_path / "quality-where.csv")
    assert [(row["row"], row["ratio"]) for row in rows] == [
        (UNMERGED, "0.0"),
        *((name, "0.5") for name in ("level 1", "levels 1, 2", "levels 1, 2, 4")),
    ]
    unmerged, reference, coarser, coarsest = rows
    assert unmerged["psnr"] == unmerged["ssim"] == ""
    assert reference["psnr"] and reference["psnr_difference"] == reference["psnr_verdict"] == ""
    for row in (coarser, coarsest):
        for metric, digits in (("psnr", 2), ("ssim", 4)):
            difference = float(row[metric]) - float(reference[metric])
            assert float(row[f"{metric}_difference"]) == pytest.approx(difference)
            assert f"{abs(difference):.{digits}f} ± " in printed
        assert row["reference"] == "level 1" and row["contender"] == PAPER
        assert row["samples"] == "6" and row["steps"] == "2"
        assert row["machine"] and "torch" in row["versions"] and "quality" in row["command"]
    merged = [row["merged"].partition(" self")[0] for row in rows]
    assert merged == ["", "3 of 10", "6 of 10", "10 of 10"]
    with Image.open(tmp_path / "quality-where-pictures.png") as sheet:
        assert sheet.width > 6 * 8 * 3 and sheet.height > 4 * 8 * 3
    assert (tmp_path / "quality-where.png").read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert rows[0]["command"] in markdown and rows[0]["command"] in printed
    assert "| levels 1, 2, 4 |  0.50 |  0.25 |" in markdown
    assert f"{float(coarser['psnr']):.2f} ± {float(coarser['psnr_interval']):.2f} |" in markdown


def test_tables_make_common_rows_once(
    noise: None, bench: Callable, batches_made: list, tmp_path: Path
) -> None:
    bench("--tiny", "--steps", 1)
    ways = [row.variant for table in TABLES.values() for row in table.rows]
    assert len(batches_made) == len({*ways, *(way.unmerged for way in ways)})
    assert len(batches_made) == len(set(batches_made))
    csvs = {name: rows_of(tmp_path / f"quality-{name}.csv") for name in TABLES}
    for name, rows in csvs.items():
        assert [row["row"] for row in rows] == [row.name for row in TABLES[name].rows]
        assert {row["table"] for row in rows} == {name}
    half = {row["psnr"] for row in csvs["what"] if (row["row"], row["ratio"]) == (PAPER, "0.5")}
    assert half == {row["psnr"] for row in csvs["where"] if row["row"] == "level 1"}


def test_pictures_are_compared_with_unmerged_ones_of_as_many_steps(
    bench: Callable, batches_made: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = TABLES["steps"]
    monkeypatch.setitem(TABLES, "steps", dataclasses.replace(table, rows=table.rows[:8]))
    printed = bench("--tiny", "--steps", 4, "--tables", "steps", "where")
    rows = rows_of(tmp_path / "quality-steps.csv")
    assert [(row["steps"], row["row"]) for row in rows] == [
        (steps, name)
        for steps in ("4", "8")
        for name in (UNMERGED, "kept for 1", "kept for 2", "kept for 4")
    ]
    assert "4 or 8 steps" in (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "'kept for 1', the last one above" in printed
    # Rows of four steps by the table are those of four steps by the command.
    assert [variant for variant, _ in batches_made if variant.steps is None] == [
        row.variant for row in TABLES["where"].rows[1:]
    ]
    cache = PictureCache(tmp_path / "quality", TINY_PIPELINE)
    for four, row in ((4, rows[1]), (8, rows[5])):
        variant = dataclasses.replace(base_variant(KEYS, ratio=0.84), steps=four)
        merged, twins = (
            cache.read(one, 6).pixels for one in (variant, Variant(UNMERGED, steps=four))
        )
        assert float(row["psnr"]) == pytest.approx(float(distances.psnr(merged, twins).mean()))
        assert f"{four} of {four} steps" in row["merged"]


def test_an_interrupted_run_continues(
    bench: Callable, batches_made: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = pictures.os.replace

    def interrupted(*paths: object) -> None:
        if len(batches_made) == 3:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(pictures.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench("--tiny", "--tables", "where")
    done, half_written = batches_made[:2], batches_made[2]
    batches_made.clear()
    bench("--tiny", "--tables", "where")
    assert batches_made[0] == half_written and len(batches_made) == 2
    assert not set(done) & set(batches_made)


def test_two_processes_make_the_same_larger_pictures(bench: Callable, tmp_path: Path) -> None:
    bench("--tiny", "--tables", "where", "--side", 16, "--processes", 2, "--threads", 1)
    (shown, *_) = rows_of(tmp_path / "quality-where.csv")
    assert (shown["model"], shown["side"]) == (UNTRAINED, "16")
    pipeline = dataclasses.replace(TINY_PIPELINE, steps=2, side=16)
    for row in TABLES["where"].rows:
        series = PictureCache(tmp_path / "quality", pipeline).read(row.variant, BATCH)
        assert series.pixels.shape == (BATCH, 16, 16, 3) and series.seconds > 0
        assert (series.pixels.int() - pipeline.make(row.variant, 0)[0].int()).abs().max() <= 1


def write_gains(path: Path, gains: dict[str, tuple[float, float]], size: str = "size") -> Path:
    """Write a CSV of `bench speed`, with each contender's gains at the ratios 0 and 0.75."""
    lines = [f"{size},ratio,contender,gain", "64x64,,Fast,2"]
    for name, (at_none, at_most) in gains.items():
        lines += [f"64x64,0,{name},{at_none}", f"64x64,0.75,{name},{at_most}"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_keys_is_compared_with_tomesd_at_equal_time(
    noise: None, bench: Callable, tmp_path: Path
) -> None:
    gains = {KEYS: (1.0, 4.0), CORNER: (0.71, 2.21), RANDOM: (0.6, 1.8), UNMERGED: (1.0, 1.0)}
    speed = write_gains(tmp_path / "speed.csv", gains)
    layer = write_gains(tmp_path / "layer.csv", {**gains, KEYS: (1.0, 7.0)}, size="grid")
    printed = bench("--tiny", "--steps", 1, "--tables", "what", "--speed", speed, layer)
    of_layer = rows_of(tmp_path / "quality-time-layer-64x64.csv")
    ratios = [row["ratio"] for row in of_layer if row["row"] == KEYS]
    assert ratios == ["0.03", "0.09", "0.12", "0.16"]
    rows = rows_of(tmp_path / "quality-time-speed-64x64.csv")
    # The corner is 1.21, 1.71, 1.91 and 2.21 times faster; keys at 0.0525, 0.1775, 0.2275, 0.3025.
    assert [(row["row"], row["ratio"]) for row in rows[1:]] == [
        *((KEYS, "0.06"), (CORNER, "0.25")),
        *((KEYS, "0.18"), (CORNER, "0.5")),
        *((KEYS, "0.23"), (CORNER, "0.6")),
        *((KEYS, "0.31"), (CORNER, "0.75")),
    ]
    for mine, theirs in zip(rows[1::2], rows[2::2], strict=True):
        difference = float(theirs["psnr"]) - float(mine["psnr"])
        assert float(theirs["psnr_difference"]) == pytest.approx(difference)
        assert float(theirs["faster"]) <= float(mine["faster"])
    table = rows_of(tmp_path / "quality-what.csv")
    faster = {(row["contender"], row["ratio"]): row["faster"] for row in table}
    assert float(faster[CORNER, "0.5"]) == pytest.approx(1.71)
    assert faster[UNWEIGHTED, "0.75"] == faster[KEYS, "0.84"] == ""
    assert "x faster" in printed


def test_where_keys_is_never_as_fast_there_is_no_table(bench: Callable, tmp_path: Path) -> None:
    path = write_gains(tmp_path / "speed.csv", {KEYS: (0.5, 0.6), CORNER: (1.0, 2.0)})
    printed = bench("--tiny", "--steps", 1, "--tables", "where", "--speed", path)
    assert "time-speed-64x64" in printed
    assert not [*tmp_path.glob("quality-time*")]


def test_wrong_or_missing_files_are_named(
    bench: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n", encoding="utf-8")
    assert "other.csv" in bench("--tiny", "--speed", other, status=2)
    one = write_gains(tmp_path / "one.csv", {CORNER: (1.0, 2.0)})
    assert "keys at two ratios" in bench("--tiny", "--speed", one, status=2)
    monkeypatch.setattr(demo_model, "WEIGHTS", tmp_path)
    TINY_PIPELINE.model()  # The last model is kept: a small one, so that the next is loaded.
    assert "tiny.safetensors is missing" in bench("--samples", 2, status=2)
    assert str(tmp_path / "photos") in bench("--samples", 2, "--model", "photos", status=2)
