"""The benchmark of quality: its tables, how its pictures are made and kept, and what is measured on
them."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("ldm")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("tqdm")

from lab.bench import contenders, distances, equal_time, pictures
from lab.bench.__main__ import main
from lab.bench.ablations import TABLES
from lab.bench.contenders import FORMER, KEYS, PAPER, TOKENS, UNMERGED, UNWEIGHTED
from lab.bench.peers import CORNER, QUERIES, RANDOM, TODO
from lab.bench.pictures import CHUNK, UNTRAINED, Album, Studio
from lab.bench.variants import WHOLE, Row, Variant, ours, shipped
from lab.demo import model as demo_model
from tomesd_core.settings import FIELDS

STUDIO = Studio(
    UNTRAINED, steps=4, scale=3.0, attention="sdp", dtype="float32", device=torch.device("cpu")
)
EVERY_ROW = [
    pytest.param(row, id=f"{name} {number}: {row.name}")
    for name, table in TABLES.items()
    for number, row in enumerate(table.rows)
]


@pytest.fixture
def bench(tmp_path: Path, capfd: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs `bench quality --tiny` in one process; gives what it printed."""

    def run(*arguments: object, status: int = 0) -> str:
        command = ["quality", *map(str, arguments), "--out", str(tmp_path)]
        assert (
            main([*command, *([] if "--processes" in command else ["--processes", "1"])]) == status
        )
        printed = capfd.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.fixture
def chunks_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Variant, int]]:
    """The chunks that are made."""
    chunks: list[tuple[Variant, int]] = []
    make = Studio.make
    monkeypatch.setattr(
        Studio, "make", lambda self, *chunk: chunks.append(chunk) or make(self, *chunk)
    )
    return chunks


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of few steps without its longest runs."""
    table = TABLES["steps"]
    monkeypatch.setitem(TABLES, "steps", dataclasses.replace(table, rows=table.rows[:12]))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The command


def test_a_table_says_how_each_row_differs(bench: Callable, tmp_path: Path) -> None:
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
        assert row["machine"] and "torch" in row["versions"] and "quality --tiny" in row["command"]
    assert [row["merged"].partition(" self")[0] for row in rows] == [
        "",
        "3 of 10",
        "6 of 10",
        "10 of 10",
    ]
    with Image.open(tmp_path / "quality-where-pictures.png") as sheet:
        assert sheet.width > 6 * 8 * 3 and sheet.height > 4 * 8 * 3
    assert (tmp_path / "quality-where.png").read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert rows[0]["command"] in markdown and rows[0]["command"] in printed
    assert "| levels 1, 2, 4 |  0.50 |  0.25 |" in markdown
    assert f"{float(coarser['psnr']):.2f} ± {float(coarser['psnr_interval']):.2f} |" in markdown


@pytest.mark.usefixtures("few_steps")
def test_all_tables_share_what_they_have_in_common(
    bench: Callable, chunks_made: list, tmp_path: Path
) -> None:
    pytest.importorskip("tomesd")
    bench("--tiny", "--steps", 1)
    ways = [row.variant for table in TABLES.values() for row in table.rows]
    variants = {*ways, *(variant.unmerged for variant in ways)}
    assert len(chunks_made) == len(set(chunks_made)) == len(variants)
    for name, table in TABLES.items():
        rows = rows_of(tmp_path / f"quality-{name}.csv")
        assert [row["row"] for row in rows] == [row.name for row in table.rows]
        assert {row["table"] for row in rows} == {name}
    half = {
        row["psnr"]
        for row in rows_of(tmp_path / "quality-what.csv")
        if row["row"] == PAPER and row["ratio"] == "0.5"
    }
    assert half == {
        row["psnr"] for row in rows_of(tmp_path / "quality-where.csv") if row["row"] == "level 1"
    }


@pytest.mark.usefixtures("few_steps")
def test_pictures_of_few_steps_are_held_against_twins_of_as_many(
    bench: Callable, chunks_made: list, tmp_path: Path
) -> None:
    printed = bench("--tiny", "--steps", 4, "--tables", "steps", "defaults")
    rows = rows_of(tmp_path / "quality-steps.csv")
    assert [(row["steps"], row["row"]) for row in rows] == [
        (steps, name)
        for steps in ("4", "8", "20")
        for name in (UNMERGED, "kept for 1", "kept for 2", "kept for 4")
    ]
    assert "4 or 8 or 20 steps" in (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "'kept for 1', the last one above" in printed
    # What is made in four steps because the table says so is what is made in four because the
    # command does.
    assert [variant for variant, _ in chunks_made if variant.steps is None] == [
        row.variant for row in TABLES["defaults"].rows[1:]
    ]
    album = Album(tmp_path / "quality", STUDIO)
    for four, row in ((4, rows[1]), (8, rows[5])):
        variant = dataclasses.replace(ours(KEYS, ratio=0.84), steps=four)
        merged, twins = (
            album.read(one, 6).pictures for one in (variant, Variant(UNMERGED, steps=four))
        )
        assert float(row["psnr"]) == pytest.approx(float(distances.psnr(merged, twins).mean()))
        assert f"{four} of {four} steps" in row["merged"]


def test_more_samples_make_only_the_new_ones(
    bench: Callable, chunks_made: list, tmp_path: Path
) -> None:
    bench("--tiny", "--tables", "where", "--samples", CHUNK)
    assert [first for _, first in chunks_made] == [0] * 4
    before = rows_of(tmp_path / "quality-where.csv")
    chunks_made.clear()
    bench("--tiny", "--tables", "where", "--samples", CHUNK + 1)
    assert [first for _, first in chunks_made] == [CHUNK] * 4
    chunks_made.clear()
    bench("--tiny", "--tables", "where", "--samples", CHUNK)
    assert not chunks_made
    again = rows_of(tmp_path / "quality-where.csv")
    assert [row["psnr"] for row in again] == [row["psnr"] for row in before]


def test_an_interrupted_run_goes_on_where_it_was(
    bench: Callable, chunks_made: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = pictures.os.replace

    def interrupted(*paths: object) -> None:
        if len(chunks_made) == 3:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(pictures.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench("--tiny", "--tables", "where")
    done, half_written = chunks_made[:2], chunks_made[2]
    chunks_made.clear()
    bench("--tiny", "--tables", "where")
    assert chunks_made[0] == half_written and len(chunks_made) == 2
    assert not set(done) & set(chunks_made)


def test_two_processes_make_the_same_pictures(bench: Callable, tmp_path: Path) -> None:
    pytest.importorskip("tomesd")
    bench("--tiny", "--tables", "peers", "--processes", 2, "--threads", 1)
    studio = dataclasses.replace(STUDIO, steps=2)
    for row in TABLES["peers"].rows:
        series = Album(tmp_path / "quality", studio).read(row.variant, CHUNK)
        assert (series.pictures.int() - studio.make(row.variant, 0)[0].int()).abs().max() <= 1
        assert series.seconds > 0


def write_gains(path: Path, gains: dict[str, tuple[float, float]]) -> Path:
    """A CSV as `bench speed` writes it: of each contender its gains at the ratios 0 and 0.75;
    presets have no ratio."""
    lines = [
        f"64x64,{at},{name},{both[n]}"
        for name, both in gains.items()
        for n, at in enumerate((0, 0.75))
    ]
    path.write_text(
        "\n".join(["size,ratio,contender,gain", *lines, "64x64,,Fast,2"]), encoding="utf-8"
    )
    return path


def test_keys_is_compared_with_tomesd_at_equal_time(bench: Callable, tmp_path: Path) -> None:
    pytest.importorskip("tomesd")
    gains = {KEYS: (1.0, 4.0), CORNER: (0.71, 2.21), RANDOM: (0.6, 1.8), UNMERGED: (1.0, 1.0)}
    path = write_gains(tmp_path / "speed.csv", gains)
    layer = tmp_path / "layer.csv"
    layer.write_text(
        path.read_text()
        .replace("size", "grid")
        .replace("64x64", "8x8")
        .replace("0.75,keys,4", "0.75,keys,7")
    )
    printed = bench("--tiny", "--steps", 1, "--tables", "what", "--speed", path, layer)
    of_layer = rows_of(tmp_path / "quality-time-layer-8x8.csv")
    assert [row["ratio"] for row in of_layer if row["row"] == KEYS] == [
        "0.03",
        "0.09",
        "0.12",
        "0.16",
    ]
    rows = rows_of(tmp_path / "quality-time-speed-64x64.csv")
    # The corner is 1.21, 1.71, 1.91 and 2.21 times faster; keys is so at 0.0525, 0.1775, 0.2275 and
    # 0.3025.
    assert [(row["row"], row["ratio"]) for row in rows[1:]] == [
        *((KEYS, "0.06"), (CORNER, "0.25")),
        *((KEYS, "0.18"), (CORNER, "0.5")),
        *((KEYS, "0.23"), (CORNER, "0.6")),
        *((KEYS, "0.31"), (CORNER, "0.75")),
    ]
    for mine, theirs in zip(rows[1::2], rows[2::2], strict=True):
        assert float(theirs["psnr_difference"]) == pytest.approx(
            float(theirs["psnr"]) - float(mine["psnr"])
        )
        assert float(theirs["faster"]) <= float(mine["faster"])
    faster = {
        (row["contender"], row["ratio"]): row["faster"]
        for row in rows_of(tmp_path / "quality-what.csv")
    }
    assert float(faster[CORNER, "0.5"]) == pytest.approx(1.71)
    assert faster[UNWEIGHTED, "0.75"] == faster[KEYS, "0.84"] == ""
    assert "x faster" in printed


def test_where_keys_is_never_as_fast_there_is_no_table(bench: Callable, tmp_path: Path) -> None:
    path = write_gains(tmp_path / "speed.csv", {KEYS: (0.5, 0.6), CORNER: (1.0, 2.0)})
    assert "time-speed-64x64 is left out" in bench(
        "--tiny", "--steps", 1, "--tables", "defaults", "--speed", path
    )
    assert not [*tmp_path.glob("quality-time*")]


def test_what_is_wrong_is_said(
    bench: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n", encoding="utf-8")
    one = write_gains(tmp_path / "one.csv", {CORNER: (1.0, 2.0)})
    for arguments, why in (
        (["--tiny", "--samples", 1], "samples must be at least 2"),
        (["--tiny", "--steps", 3], "steps must divide 1000"),
        (["--tiny", "--speed", tmp_path / "none.csv"], "there is no file"),
        (["--tiny", "--speed", other], "not a CSV of `bench speed` or `bench layer`"),
        (["--tiny", "--speed", one], "must hold keys at two ratios"),
    ):
        assert why in bench(*arguments, status=2)
    monkeypatch.setattr(demo_model, "WEIGHTS", tmp_path)
    pictures._model.cache_clear()
    assert "tiny.safetensors is missing" in bench("--samples", 2, status=2)
    assert str(tmp_path / "photos") in bench("--samples", 2, "--model", "photos", status=2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "skimage"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert "pip install scikit-image" in bench("--tiny", status=2)


# Its tables


def test_tables_depend_on_no_default() -> None:
    assert set(contenders.BASE) == set(FIELDS) - {"apply_to"}


@pytest.mark.parametrize("row", EVERY_ROW)
def test_a_rows_ratio_and_pairs_are_the_means_over_its_steps(row: Row) -> None:
    variant = row.variant
    ratios = [variant.ratio] * 50
    if variant.settings is not None:
        ratios = [variant.settings.ratio_at(step / 49) for step in range(50)]
    assert variant.mean_ratio == pytest.approx(sum(ratios) / 50, abs=1e-3)
    power = 1 if variant.contender in (KEYS, UNWEIGHTED, TODO, QUERIES) else 2
    assert variant.pairs == pytest.approx(
        sum((1 - ratio) ** power for ratio in ratios) / 50, abs=2e-3
    )


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_held_against_rows_above(name: str) -> None:
    rows = TABLES[name].rows
    assert len({row.variant for row in rows}) == len(rows)
    for number, row in enumerate(rows):
        reference = row.reference
        assert reference is None or reference in rows[:number] or name == "partition"
        assert reference is None or reference.reference is None
        if name != "samplers" and reference is not None and reference.variant.contender != UNMERGED:
            assert reference.variant.steps == row.variant.steps
    assert any(row.reference for row in rows) or name in ("peers", "pictures")


def test_presets_are_held_against_what_they_were() -> None:
    rows = {row.name: row for row in TABLES["presets"].rows}
    assert {"Quality", "Balanced", "Fast", "Paper (60 %)"} < set(rows)
    for name, former in FORMER.items():
        assert former.method == PAPER
        before = dataclasses.replace(former, skip_unprofitable=False)
        reference = rows[name].reference
        assert (reference or rows[name]).variant.settings == before
    assert TABLES["defaults"].rows[1].variant == rows["Balanced, before"].variant
    assert TABLES["defaults"].rows[2].variant.settings == shipped()


def test_keys_at_equal_time_is_at_the_lowest_ratio_that_takes_no_longer() -> None:
    curve = {0.0: 1.0, 0.1: 0.9, 0.5: 1.7, 0.9375: 4.0}
    table = equal_time.at_equal_time("", {KEYS: curve, CORNER: {0.0: 0.92, 0.5: 1.5, 0.6: 5.0}})
    ratios = [(row.name, row.variant.ratio) for row in table.rows]
    assert ratios == [
        (UNMERGED, 0),
        # 1.21 times: at 0.1 + 0.4 * 0.31 / 0.8 = 0.255.
        *((KEYS, 0.26), (CORNER, 0.25)),
        # 1.5 times: at 0.1 + 0.4 * 0.6 / 0.8 = 0.4.
        *((KEYS, 0.4), (CORNER, 0.5)),
        # Keys never runs 5 times as fast, and nothing was timed at 0.75.
    ]
    assert [row.reference for row in table.rows[1:]] == [None, table.rows[1], None, table.rows[3]]
    # Something is always merged.
    slow = equal_time.at_equal_time("", {KEYS: curve, CORNER: {0.5: 0.5, 0.55: 0.6}})
    assert [(row.name, row.variant.ratio) for row in slow.rows[1:]] == [(KEYS, 0.01), (CORNER, 0.5)]


# Its pictures


def test_pictures_are_ldms_plms_of_their_seed_and_prompt() -> None:
    from ldm.models.diffusion.plms import PLMSSampler

    model, numbers = STUDIO.model(), STUDIO.captions(CHUNK + 3)
    number = CHUNK + 2
    x, _ = PLMSSampler(model).sample(
        S=4,
        batch_size=1,
        shape=model.image_shape,
        conditioning=model.encode_prompts([model.captions[numbers[number]]]),
        unconditional_conditioning=model.encode_prompts([""]),
        unconditional_guidance_scale=3.0,
        x_T=torch.randn(1, *model.image_shape, generator=torch.Generator().manual_seed(number)),
        verbose=False,
    )
    alone = torch.frombuffer(bytearray(model.to_images(x)[0].tobytes()), dtype=torch.uint8).view(
        8, 8, 3
    )
    pictures_of_chunk, seconds, merged, _ = STUDIO.make(WHOLE.variant, CHUNK)
    assert pictures_of_chunk.shape == (CHUNK, 8, 8, 3) and pictures_of_chunk.dtype == torch.uint8
    assert (pictures_of_chunk[2].int() - alone.int()).abs().max() <= 1
    assert seconds > 0 and merged == ""


def test_larger_pictures_have_more_tokens(bench: Callable, tmp_path: Path) -> None:
    bench("--tiny", "--tables", "where", "--side", 16)
    row = rows_of(tmp_path / "quality-where.csv")[1]
    assert (row["model"], row["side"]) == (UNTRAINED, "16")
    studio = dataclasses.replace(STUDIO, steps=2, side=16)
    plain, merged = (studio.make(variant, 0)[0][:6] for variant in (WHOLE.variant, ours()))
    assert plain.shape == (6, 16, 16, 3)
    assert float(row["psnr"]) == pytest.approx(float(distances.psnr(merged, plain).mean()), abs=0.2)
    with pytest.raises(SystemExit):
        main(["quality", "--tiny", "--side", "12"])


def test_the_merging_is_told_its_steps(watch: Callable) -> None:
    unet = STUDIO.model().model.diffusion_model
    with watch(unet) as inputs_of:
        merged = STUDIO.make(ours(schedule="step", ratio=0.75, late_ratio=0.25), 0).merged
    first, *_ = inputs_of.values()
    # PLMS runs the UNet twice in its first step.
    assert [tokens.shape[1] for tokens in first] == [16, 16, 16, 48, 48]
    assert {tokens.shape[0] for tokens in first} == {2 * CHUNK}
    assert "4 of 4 steps" in merged


@pytest.mark.parametrize("contender", [KEYS, RANDOM])
def test_pictures_depend_on_no_random_state_and_move_none(contender: str) -> None:
    pytest.importorskip("tomesd")
    variant = ours(KEYS) if contender == KEYS else Variant(contender, 0.75)
    random_state = torch.get_rng_state()
    first, again, plain = (STUDIO.make(each, 0)[0] for each in (variant, variant, WHOLE.variant))
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_pictures_depend_on_is_in_their_folders_name() -> None:
    variants = [
        WHOLE.variant,
        ours(),
        ours(ratio=0.4),
        ours(window=8),
        ours(KEYS),
        ours(UNWEIGHTED),
        ours(TOKENS),
    ]
    variants += [Variant(contender, 0.75) for contender in (CORNER, RANDOM, TODO)]
    studios = [
        STUDIO,
        *(
            dataclasses.replace(STUDIO, **{name: value})
            for name, value in (("steps", 5), ("scale", 2.0))
        ),
        *(
            dataclasses.replace(STUDIO, **{name: value})
            for name, value in (("attention", "plain"), ("dtype", "bfloat16"))
        ),
        *(
            dataclasses.replace(STUDIO, **other)
            for other in ({"name": "emoji"}, {"name": "photos"}, {"side": 16})
        ),
    ]
    digests = [studio.digest(variant) for studio in studios for variant in variants]
    assert len(set(digests)) == len(studios) * len(variants)
    assert STUDIO.digest(ours()) == STUDIO.digest(ours(partition="random"))
    # The steps that a variant says are the studio's, or others in its place.
    assert STUDIO.digest(dataclasses.replace(ours(), steps=4)) == STUDIO.digest(ours())
    assert studios[1].digest(dataclasses.replace(ours(), steps=4)) == STUDIO.digest(ours())


@pytest.mark.parametrize("module", ["hooks", "matching", "plan", "proportional"])
def test_pictures_depend_on_the_code_that_merges(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [ours(KEYS), Variant(CORNER, 0.5), WHOLE.variant]
    before = [STUDIO.digest(variant) for variant in variants]
    source = inspect.getsource
    monkeypatch.setattr(
        pictures.inspect,
        "getsource",
        lambda of: source(of) + "#" * (of.__name__ == f"tomesd_core.{module}"),
    )
    pictures._code_digest.cache_clear()
    changed = [
        STUDIO.digest(variant) != digest for variant, digest in zip(variants, before, strict=True)
    ]
    pictures._code_digest.cache_clear()
    assert changed == [True, False, False]


def test_chunks_are_made_in_turns_and_once(tmp_path: Path) -> None:
    album = Album(tmp_path, STUDIO)
    half, whole = ours(), WHOLE.variant
    everything = [(whole, 0), (half, 0), (whole, CHUNK), (half, CHUNK)]
    assert [*album.missing([whole, half, whole], CHUNK + 1).values()] == everything
    assert list(album.make(everything[:3], 1, 1)) == [whole, half, whole]
    assert [*album.missing([whole, half], CHUNK + 1).values()] == [(half, CHUNK)]
    series = album.read(whole, CHUNK + 1)
    expected = [STUDIO.make(whole, first)[0] for first in (0, CHUNK)]
    assert torch.equal(series.pictures, torch.cat(expected)[: CHUNK + 1])


# What is measured


def test_what_is_judged(bench: Callable, tmp_path: Path) -> None:
    bench("--tiny", "--tables", "where", "--samples", 6)
    studio = dataclasses.replace(STUDIO, steps=2)
    plain, merged = (studio.make(variant, 0)[0][:6] for variant in (WHOLE.variant, ours()))
    row = rows_of(tmp_path / "quality-where.csv")[1]
    assert row["row"] == "level 1"
    assert float(row["psnr"]) == pytest.approx(float(distances.psnr(merged, plain).mean()), abs=0.2)


def test_psnr_and_ssim() -> None:
    generator = torch.Generator().manual_seed(0)
    twins = torch.randint(0, 200, (2, 8, 8, 3), generator=generator, dtype=torch.uint8)
    brighter = twins + torch.tensor([0, 10], dtype=torch.uint8).view(2, 1, 1, 1)
    same, other = distances.psnr(brighter, twins).tolist()
    assert other == pytest.approx(20 * math.log10(255 / 10))
    assert same == pytest.approx(10 * math.log10(255**2 * 12))
    same, other = distances.ssim(brighter, twins).tolist()
    assert same == pytest.approx(1)
    assert 0.5 < other < 1


def test_differences_are_paired() -> None:
    numbers = distances.resamples(50)
    shared = 10 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    own = torch.randn(50, generator=torch.Generator().manual_seed(1))
    one, other = (
        distances.mean(shared, numbers),
        distances.mean(shared + own - own.mean() + 1, numbers),
    )
    difference = other.minus(one)
    assert difference.value == pytest.approx(1)
    assert difference.interval < 0.2 * one.interval
    assert distances.verdict(difference) == "better"
    assert distances.verdict(one.minus(other)) == "worse"
    assert distances.verdict(one.minus(one)) == "none"
    unsure = dataclasses.replace(difference, value=difference.interval * 0.99)
    assert distances.verdict(unsure) == "none"
