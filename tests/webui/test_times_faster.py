"""How Measure makes one figure of the seconds of its steps, and what the page and the API get."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from in_host import ROOT, SIDE, element_events, failing_unet, running
from starlette.testclient import TestClient

from tomesd_core.webui.times_faster import times_faster

ASKED = {"width": SIDE, "height": SIDE, "settings": {"ratio": 0.6}}


@given(st.floats(0.01, 10), st.floats(0.2, 5), st.integers(2, 30))
def test_pairs_of_one_quotient_give_it_without_a_spread(seconds, times, pairs):
    quotient, spread = times_faster([([seconds] * 2, [seconds / times] * 2)] * pairs)
    assert (quotient, spread) == (pytest.approx(times), pytest.approx(0, abs=1e-9))


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.2), st.floats(0.2, 5))
@settings(max_examples=30, deadline=None)
def test_the_spread_is_the_standard_error(seed, deviation, times):
    """Of 200 measurements with normal noise."""
    noise = np.random.default_rng(seed).normal(0, deviation, (200, 25, 2, 2))
    seconds = np.exp(noise) * [[1], [1 / times]]
    results = np.array([times_faster(pairs) for pairs in seconds])
    assert results[:, 0].std() / times == pytest.approx(np.median(results[:, 1]), rel=0.5)


@given(st.integers(6, 30), st.data())
def test_one_slow_step_changes_nothing(rounds, data):
    times = np.tile([[1.0], [0.5]], (rounds, 1, 2))
    slow = tuple(data.draw(st.integers(0, most - 1)) for most in times.shape)
    times[slow] *= 50
    assert times_faster(times) == pytest.approx((2.0, 0.0))


@pytest.mark.parametrize(
    ("times", "spread", "words"),
    [(2.0, 0.01, ["2.00"]), (0.5, 0.01, ["no faster"]), (2.0, 0.25, ["noisy", "1.60", "2.50"])],
)
def test_the_line_has_a_figure_or_the_range_of_a_noisy_one(host, times, spread, words):
    line = running("webui.times_faster").line_of("32x32", times, spread, 0.5, None)
    assert all(word in line for word in [*words, "32x32"])


@pytest.fixture
def post(measure, host):
    app = FastAPI()
    host.start_app(app)
    client = TestClient(app)
    return lambda body: client.post("/tome/measure", json=body)


def test_the_route_gives_one_result_per_size(post):
    (result,) = post({**ASKED, "settings": {"preset": "Fast", "ratio": 0.6}}).json()
    assert list(result) == ["line", "times_faster", "spread", "attention_share", "memory_saved"]
    assert "32x32" in result["line"] and result["times_faster"] > 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"width": 8}, ["width", "8", "[16, 16384]"]),
        ({"height": "32"}, ["height", "'32'", "[16, 16384]"]),
        ({"batch_size": 0}, ["batch_size", "0", "[1, 256]"]),
        ({"cfg_scale": 1e38}, ["cfg_scale", "1e+38", "[0, 100]"]),
        ({"settings": {"ratio": 2}}, ["ratio", "2", "[0, 0.9375]"]),
        ({"settings": {"preset": "No such"}}, ["preset", "No such", "Balanced"]),
        ({"settings": [0.5]}, ["settings", "[0.5]", "object"]),
        ({"step": 20}, ["'step'", "width"]),
    ],
)
def test_the_route_names_the_wrong_value(post, attention, body, words):
    answer = post(body)
    assert answer.status_code == 422
    assert all(word in answer.json()["detail"] for word in words)
    assert attention.tokens == []


def test_the_route_reports_a_failure(post, host, log_lines):
    with failing_unet(host, 1):
        answer = post(ASKED)
    assert answer.status_code == 500
    assert all(word in answer.json()["detail"] for word in ("32x32", "ValueError: on purpose"))


def test_the_button_shows_one_line_per_size_or_the_wrong_value(measure, host):
    ((press, inputs),) = element_events(host.demo, "script_txt2img_tome_measure_start")
    values = {block.elem_id: block.value for block in inputs[1:]}
    sizes = {"width": 32, "height": 32, "hires_width": 40, "hires_height": 40}
    lines = press(json.dumps(sizes), *values.values())
    assert "32x32" in lines and "<br>" in lines and "40x40" in lines
    assert "width" in press('{"width": 1}', *values.values())
    assert "ratio" in press("{}", *{**values, "script_txt2img_tome_ratio": 9}.values())


def test_the_request_of_the_documentation(post):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    body = json.loads(re.search(r"/tome/measure .*? -d '(.*?)'", page, re.DOTALL)[1])
    assert {"width", "height", "batch_size", "cfg_scale", "steps", "settings"} == set(body)
    (result,) = post({**body, "width": SIDE, "height": SIDE}).json()
    assert all(f"`{name}`" in page for name in result)
