"""The soak in the stand-in: what it counts and what it notices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("ldm")
pytest.importorskip("psutil")
pytest.importorskip("tqdm")

import psutil

from lab.bench import soak, soak_requests
from lab.bench.__main__ import main
from lab.demo.model import TinyModel
from tomesd_core.webui.arguments import read_arguments
from tomesd_core.webui.presets import BUILT_IN

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = ("soak", "--count", "13", "--seed", "3", "--sizes", "256x256", "128x192")


@pytest.fixture
def last_lines(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, dict[str, str]]]:
    """Run the soak; return its status and its last lines by their titles."""

    def run(*arguments: str) -> tuple[int, dict[str, str]]:
        status = main([*COMMAND, *arguments])
        return status, dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    return run


@pytest.fixture
def unet_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Hook a function on the UNet of every model that the soak makes."""
    hooks = []
    random = TinyModel.random

    def hooked(*args: object, **shape: object) -> TinyModel:
        model = random(*args, **shape)
        model.model.diffusion_model.register_forward_hook(lambda _, args, out: hooks[0](out))
        return model

    monkeypatch.setattr(soak.TinyModel, "random", hooked)
    return hooks.append


def test_nothing_is_lost_and_wrong_requests_are_refused(last_lines: Callable) -> None:
    status, lines = last_lines()
    titles = ["generations", "pictures lost", "unclean", "refused rightly", "memory growth"]
    assert list(lines) == titles
    assert (lines["generations"].split(",")[0], lines["pictures lost"]) == ("13", "0")
    unclean, _, compared, *_ = lines["unclean"].split(" ")
    assert unclean == "0" and int(compared) >= 2
    refused, wrong = lines["refused rightly"].split(" of ")
    assert refused == wrong != "0"
    assert "MB)" in lines["memory growth"] and status == 0


def test_the_arguments_of_right_requests_are_valid() -> None:
    server = SimpleNamespace(
        pixels=1, samplers=["Euler"], presets=[*BUILT_IN], upscaler="None", model=None
    )
    drawn = itertools.islice(soak_requests.requests(server, 5, [(64, 64)], 1), 500)
    made = [request.body[soak_requests.SCRIPTS] for request in drawn if request.outcome == "made"]
    arguments = [scripts["ToMe"]["args"] for scripts in made if scripts]
    assert len({type(args[0]) for args in arguments}) == 2, "lists and objects"
    assert len([read_arguments(args).settings for args in arguments]) > 100


def test_an_unmerged_picture_that_changes_is_noticed(
    last_lines: Callable, unet_forward: Callable
) -> None:
    runs = []
    unet_forward(lambda out: out * (1 if runs.append(1) or len(runs) < 20 else 0.9))
    status, lines = last_lines()
    assert status == 1
    assert not lines["unclean"].startswith("0 of ")
    assert lines["pictures lost"] == "0"


def test_a_picture_that_fails_is_lost(last_lines: Callable, unet_forward: Callable) -> None:
    runs = []
    unet_forward(lambda out: out * (1 if runs.append(1) or len(runs) < 20 else float("nan")))
    status, lines = last_lines()
    assert status == 1 and int(lines["pictures lost"]) > 0


@pytest.fixture
def soaked(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Soak a server that gives one answer to every request; return the status and the output."""

    def run(request: soak.Request, answer: soak.Answer, count: int, pid: int | None = None):
        server = SimpleNamespace(make=lambda tab, body: answer, pid=pid)
        status = soak.soak(server, itertools.repeat(request), count, 0, lambda line: None)
        return status, capsys.readouterr().out

    return run


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
    soaked: Callable, infotext: str, outcome: str, lost: int, refused: int
) -> None:
    body = {"width": 8, "height": 8}
    answer = soak.Answer([Image.new("RGB", (8, 8))], infotext)
    status, printed = soaked(soak.Request(body, outcome=outcome), answer, 1)
    assert status == (outcome == "made" or not refused)
    assert f"pictures lost: {lost}\n" in printed
    assert f"refused rightly: {refused} of {int(outcome != 'made')}\n" in printed


@pytest.mark.parametrize(("side", "lost"), [(81, 0), (128, 0), (160, 1)])
def test_a_host_may_round_the_size_of_a_hires_pass(soaked: Callable, side: int, lost: int) -> None:
    body = {"width": 64, "height": 64, "hr_scale": 1.28}
    answer = soak.Answer([Image.new("RGB", (side, side))], "ToMe ratio: 0.5")
    status, printed = soaked(soak.Request(body), answer, 1)
    assert status == lost and f"pictures lost: {lost}\n" in printed


@pytest.mark.parametrize(
    ("readings", "growth"),
    [([100, 100, 104, 106], "+6.0%"), ([200, *range(100, 119)], "-21.7%"), ([], "not measured")],
    ids=["grown", "only the warm-up", "unknown process"],
)
def test_growth_is_that_of_the_last_tenth_over_the_first(
    soaked: Callable, monkeypatch: pytest.MonkeyPatch, readings: list[int], growth: str
) -> None:
    memory = iter(readings)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(memory)))
    monkeypatch.setattr(psutil, "Process", lambda pid: process)
    request = soak.Request({"width": 8, "height": 8, soak.SCRIPTS: {}})
    answer = soak.Answer([Image.new("RGB", (8, 8))], "")
    status, printed = soaked(request, answer, len(readings) or 4, 1 if readings else None)
    assert growth in printed.partition("memory growth: ")[2]
    assert status == (growth == "+6.0%")


def test_requests_follow_from_the_seed_and_have_every_kind() -> None:
    class Server:
        pixels, samplers, presets, upscaler = 8, ("Euler", "DDIM"), ("Fast", "Quality"), "Latent"

    def some_requests(seed: int) -> list[soak.Request]:
        return [*itertools.islice(soak.requests(Server, seed, soak.SIZES, 2), 300)]

    assert some_requests(1) == some_requests(1) != some_requests(2)
    some = some_requests(1)
    assert {request.outcome for request in some} == {"made", "reported", "refused", "either"}
    assert some[0] is some[10] is some[290]
    assert 50 < sum(request.outcome != "made" for request in some) < 100
    assert {request.ends_by for request in some} == {None, "interrupt", "skip"}
    assert any("enable_hr" in request.body for request in some)
    assert {"img2img"} < {one.tab for one in some}
    arguments = [request.body[soak.SCRIPTS].get("ToMe", {}).get("args", []) for request in some]
    assert {
        name for args in arguments for name in (args or [{}])[0:1] if isinstance(name, bool)
    } == {True, False}
    named = {name for args in arguments for arg in args if isinstance(arg, dict) for name in arg}
    assert {"preset", *soak_requests.SETTINGS} < named
