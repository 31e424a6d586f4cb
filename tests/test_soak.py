"""The soak in the stand-in: what it counts and what it notices."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

from lab.bench import soak, soak_requests
from lab.bench.__main__ import main
from lab.demo.model import TinyModel
from tomesd_core.webui.arguments import read_arguments
from tomesd_core.webui.presets import BUILT_IN

pytestmark = pytest.mark.usefixtures("one_thread")


def last_lines(capsys: pytest.CaptureFixture) -> tuple[int, dict[str, str]]:
    """Run the soak; return its status and its last lines by their titles."""
    status = main(["soak", "--count", "13", "--seed", "3", "--sizes", "256x256", "128x192"])
    return status, dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_nothing_is_lost_and_wrong_requests_are_refused(capsys: pytest.CaptureFixture) -> None:
    status, lines = last_lines(capsys)
    titles = ["generations", "pictures lost", "unclean", "refused rightly", "memory growth"]
    assert list(lines) == titles
    assert (lines["generations"].split(",")[0], lines["pictures lost"]) == ("13", "0")
    unclean, _, compared, *_ = lines["unclean"].split(" ")
    assert unclean == "0" and int(compared) >= 2
    refused, wrong = lines["refused rightly"].split(" of ")
    assert refused == wrong != "0"
    assert "MB)" in lines["memory growth"] and status == 0


@pytest.mark.parametrize(("factor", "is_lost"), [(0.9, False), (float("nan"), True)])
def test_a_picture_that_changes_or_fails_is_noticed(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, factor: float, is_lost: bool
) -> None:
    runs, velocity = itertools.count(), TinyModel.velocity
    monkeypatch.setattr(
        TinyModel, "velocity", lambda *args: velocity(*args) * (1 if next(runs) < 20 else factor)
    )
    status, lines = last_lines(capsys)
    assert status == 1
    assert (lines["pictures lost"] != "0") == is_lost
    assert lines["unclean"].startswith("0 of ") == is_lost


def soaked(
    capsys: pytest.CaptureFixture,
    request: soak.Request,
    side: int,
    infotext: str,
    count: int = 1,
    pid: int | None = None,
) -> tuple[int, str]:
    """Soak a server that gives one picture for every request; return the status and the output."""
    answer = soak.Answer([Image.new("RGB", (side, side))], infotext)
    server = SimpleNamespace(make=lambda tab, body: answer, pid=pid)
    status = soak.soak(server, itertools.repeat(request), count, 0, lambda line: None)
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    ("infotext", "outcome", "lost", "refused"),
    [
        ("ToMe ratio: 0.5", "reported", 0, 0),
        ("ToMe error: ratio", "reported", 0, 1),
        ("", "refused", 0, 0),
        ("ToMe error: ratio", "made", 1, 0),
    ],
)
def test_a_wrong_request_that_merges_is_not_refused(
    capsys: pytest.CaptureFixture, infotext: str, outcome: str, lost: int, refused: int
) -> None:
    body = {"width": 8, "height": 8}
    status, printed = soaked(capsys, soak.Request(body, outcome=outcome), 8, infotext)
    assert status == (outcome == "made" or not refused)
    assert f"pictures lost: {lost}\n" in printed
    assert f"refused rightly: {refused} of {int(outcome != 'made')}\n" in printed


@pytest.mark.parametrize(("side", "lost"), [(81, 0), (128, 0), (160, 1)])
def test_a_host_may_round_the_size_of_a_hires_pass(
    capsys: pytest.CaptureFixture, side: int, lost: int
) -> None:
    body = {"width": 64, "height": 64, "hr_scale": 1.28}
    status, printed = soaked(capsys, soak.Request(body), side, "ToMe ratio: 0.5")
    assert status == lost and f"pictures lost: {lost}\n" in printed


@pytest.mark.parametrize(
    ("readings", "growth"),
    [([100, 100, 104, 106], "+6.0%"), ([200, *range(100, 119)], "-21.7%"), ([], "not measured")],
    ids=["grown", "only the warm-up", "unknown process"],
)
def test_growth_is_that_of_the_last_tenth_over_the_first(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, readings: list[int], growth: str
) -> None:
    memory = iter(readings)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(memory)))
    monkeypatch.setattr(psutil, "Process", lambda pid: process)
    request = soak.Request({"width": 8, "height": 8, soak.SCRIPTS: {}})
    count, pid = (len(readings), 1) if readings else (4, None)
    status, printed = soaked(capsys, request, 8, "", count, pid)
    assert growth in printed.partition("memory growth: ")[2]
    assert status == (growth == "+6.0%")


def drawn(seed: int) -> list[soak.Request]:
    """The first requests of a seed."""
    server = SimpleNamespace(
        pixels=1, samplers=["Euler", "DDIM"], presets=[*BUILT_IN], upscaler="Latent"
    )
    return [*itertools.islice(soak.requests(server, seed, [(64, 64)], 2), 300)]


def test_requests_follow_from_the_seed_and_have_every_kind() -> None:
    some = drawn(1)
    assert some == drawn(1) != drawn(2)
    assert {request.outcome for request in some} == {"made", "reported", "refused", "either"}
    assert some[0] is some[10] is some[290]
    assert 50 < sum(request.outcome != "made" for request in some) < 100
    assert {request.ends_by for request in some} == {None, "interrupt", "skip"}
    assert any("enable_hr" in request.body for request in some)
    assert "img2img" in {request.tab for request in some}
    arguments = [request.body[soak.SCRIPTS].get("ToMe", {}).get("args", []) for request in some]
    named = {name for args in arguments for arg in args if isinstance(arg, dict) for name in arg}
    assert {"preset", *soak_requests.SETTINGS} < named


def test_the_arguments_of_right_requests_are_valid_and_have_every_form() -> None:
    made = [request.body[soak.SCRIPTS] for request in drawn(1) if request.outcome == "made"]
    arguments = [scripts["ToMe"]["args"] for scripts in made if scripts]
    assert len([read_arguments(args).settings for args in arguments]) > 100
    assert {type(args[0]) for args in arguments} == {bool, dict}
    assert {args[0] for args in arguments if isinstance(args[0], bool)} == {True, False}
