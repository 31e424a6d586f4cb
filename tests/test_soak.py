"""The soak in the stand-in: what it counts, and that it notices what it is there for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("ldm")
pytest.importorskip("psutil")
pytest.importorskip("tqdm")

from lab.bench import soak
from lab.bench.__main__ import main
from lab.demo.model import TinyModel

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = ("soak", "--count", "13", "--seed", "3", "--sizes", "256x256", "128x192")


@pytest.fixture
def last_lines(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, dict[str, str]]]:
    """Runs the soak; gives its exit status and what its last lines say."""

    def run(*arguments: str) -> tuple[int, dict[str, str]]:
        status = main([*COMMAND, *arguments])
        return status, dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    return run


@pytest.fixture
def unet_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Hooks a function on the UNet of every model that the soak makes."""
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
    assert list(lines) == [
        "generations",
        "pictures lost",
        "unclean",
        "refused rightly",
        "memory growth",
    ]
    assert (lines["generations"].split(",")[0], lines["pictures lost"]) == ("13", "0")
    compared, (refused, wrong) = (
        lines["unclean"].split(" ")[2],
        lines["refused rightly"].split(" of "),
    )
    assert lines["unclean"].startswith("0 of ") and int(compared) >= 2 and refused == wrong != "0"
    assert "MB)" in lines["memory growth"] and status == 0


def test_an_unmerged_picture_that_changes_is_noticed(
    last_lines: Callable, unet_forward: Callable
) -> None:
    runs = []
    unet_forward(lambda out: out * (1 if runs.append(1) or len(runs) < 20 else 0.9))
    status, lines = last_lines()
    assert (
        status == 1 and not lines["unclean"].startswith("0 of ") and lines["pictures lost"] == "0"
    )


def test_a_picture_that_fails_is_lost(last_lines: Callable, unet_forward: Callable) -> None:
    runs = []
    unet_forward(lambda out: out * (1 if runs.append(1) or len(runs) < 20 else float("nan")))
    status, lines = last_lines()
    assert status == 1 and int(lines["pictures lost"]) > 0


def test_a_wrong_request_that_merges_is_not_refused() -> None:
    picture, body = soak.Image.new("RGB", (8, 8)), {"width": 8, "height": 8}
    for infotext, outcome, problem in (
        ("ToMe ratio: 0.5", "told", "not refused"),
        ("ToMe error: ratio", "told", ""),
        ("", "refused", "not refused"),
        ("ToMe error: ratio", "made", "lost"),
    ):
        answer = soak.Answer([picture], infotext)
        assert (
            soak._problem(soak.Request(body, outcome=outcome), answer).partition(":")[0] == problem
        )


@pytest.mark.parametrize(("side", "problem"), [(81, ""), (128, ""), (160, "lost")])
def test_a_host_may_round_the_size_of_a_hires_pass(side: int, problem: str) -> None:
    body = {"width": 64, "height": 64, "hr_scale": 1.28}
    answer = soak.Answer([soak.Image.new("RGB", (side, side))], "ToMe ratio: 0.5")
    assert soak._problem(soak.Request(body), answer).partition(":")[0] == problem


def test_what_is_drawn_is_a_seeds_own_and_has_every_kind() -> None:
    class Server:
        pixels, samplers, presets, upscaler = 8, ("Euler", "DDIM"), ("Fast", "Quality"), "Latent"

    def some_requests(seed: int) -> list[soak.Request]:
        return [*itertools.islice(soak.requests(Server, seed, soak.SIZES, 2), 300)]

    assert some_requests(1) == some_requests(1) != some_requests(2)
    some = some_requests(1)
    assert {request.outcome for request in some} == {"made", "told", "refused", "either"}
    assert some[0] is some[10] is some[290]
    assert 50 < sum(request.outcome != "made" for request in some) < 100
    assert {request.ends_by for request in some} == {None, "interrupt", "skip"}
    assert any("enable_hr" in request.body for request in some) and {"img2img"} < {
        one.tab for one in some
    }
    arguments = [request.body[soak.SCRIPTS].get("ToMe", {}).get("args", []) for request in some]
    assert {
        name for args in arguments for name in (args or [{}])[0:1] if isinstance(name, bool)
    } == {True, False}
    named = {name for args in arguments for arg in args if isinstance(arg, dict) for name in arg}
    assert {"preset", *soak.SETTINGS} < named


def test_growth_is_taken_behind_the_warm_up(capsys: pytest.CaptureFixture) -> None:
    assert soak._growth([100, 100, 104, 106]) == pytest.approx(0.06)
    assert soak._growth([200, *range(100, 119)]) == pytest.approx(117.5 / 150 - 1)
    assert soak._growth([]) == 0 and "not measured" in capsys.readouterr().out
