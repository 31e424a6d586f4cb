"""Merging through the API of a running WebUI."""

from __future__ import annotations

import threading
import time
from urllib.parse import urlsplit

import pytest
from webui_api import HIRES


@pytest.fixture(autouse=True)
def off_is_still_the_baseline(webui, baseline):
    """After every test a picture without merging is bit for bit as before."""
    yield
    assert webui.make().pixels == baseline.pixels


def test_the_script_is_listed_for_both_tabs(webui):
    answer = webui.get("/sdapi/v1/script-info")
    if answer.status_code == 500 and "ValidationError" in answer.text:
        pytest.skip("WebUI 1.6 can't list its scripts with gradio 3.41")
    tabs = {
        script["is_img2img"]
        for script in answer.json()
        if script["name"] == "tome" and script["is_alwayson"]
    }
    assert tabs == {False, True}


def test_on_changes_the_picture_and_writes_its_parameters(webui, baseline):
    picture = webui.make([True, 0.5, 0.2, "constant"])
    assert picture.pixels != baseline.pixels
    assert picture.parameters["ToMe ratio"] == 0.5
    assert "ToMe ratio: 0.5" in picture.infotext
    assert "ToMe late ratio" not in picture.infotext


def test_equal_requests_give_equal_pictures(webui):
    assert webui.make([True, 0.6]).pixels == webui.make([True, 0.6]).pixels


def test_a_schedule_differs_from_both_its_ends(webui):
    linear = webui.make([True, 0.7, 0.1, "linear"])
    assert linear.parameters["ToMe late ratio"] == 0.1
    assert linear.parameters["ToMe schedule"] == "linear"
    ends = [webui.make([True, ratio, 0.4, "constant"]) for ratio in (0.7, 0.1)]
    assert len({linear.pixels, *(end.pixels for end in ends)}) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([True, 1.5], ("ratio", "1.5", "[0, 0.9375]")),
        ([True, "abc"], ("ratio", "abc", "[0, 0.9375]")),
        ([True, [0.5]], ("ratio", "[0.5]", "[0, 0.9375]")),
        ([True, 0.5, 0.2, "zigzag"], ("schedule", "zigzag", "constant, linear, step")),
        (["yes"], ("enabled", "yes", "true or false")),
    ],
)
def test_a_wrong_value_leaves_the_picture_unmerged(webui, baseline, arguments, words):
    picture = webui.make(arguments)
    assert picture.pixels == baseline.pixels
    assert all(word in picture.parameters["ToMe error"] for word in words)
    assert "ToMe ratio" not in picture.infotext


def test_hires_fix_merges_in_the_chosen_pass_only(webui):
    def make(apply_to):
        return webui.make([True, 0.6, 0.2, "constant", 0.5, 1, 0, apply_to], steps=2, **HIRES)

    pictures = {
        apply_to: make(apply_to) for apply_to in ("both passes", "first pass", "hires pass")
    }
    plain = webui.make(steps=2, **HIRES)
    assert len({plain.pixels, *(picture.pixels for picture in pictures.values())}) == 4
    for apply_to, picture in pictures.items():
        assert picture.parameters["ToMe apply to"] == apply_to


@pytest.mark.parametrize(
    "arguments",
    [[False, 0.5], [True, 0.6, 0.2, "constant", 0.5, 1, 0, "hires pass"]],
    ids=["off", "in the hires pass without hires fix"],
)
def test_what_merges_nothing_writes_nothing(webui, baseline, arguments):
    picture = webui.make(arguments)
    assert picture.pixels == baseline.pixels
    assert "ToMe" not in picture.infotext


def test_an_object_switches_merging_on(webui):
    picture = webui.make([{"ratio": 0.6, "late_ratio": 0.3}])
    assert picture.parameters["ToMe schedule"] == "linear"
    assert picture.pixels == webui.make([True, 0.6, 0.3, "linear"]).pixels


def test_a_preset_by_name(webui):
    presets = {preset["name"]: preset["settings"] for preset in webui.get("/tome/presets").json()}
    picture = webui.make([{"preset": "Fast"}])
    assert picture.parameters["ToMe ratio"] == presets["Fast"]["ratio"]


def test_the_client_webuiapi(webui):
    webuiapi = pytest.importorskip("webuiapi")
    address = urlsplit(webui.url)
    api = webuiapi.WebUIApi(
        host=address.hostname, port=address.port, use_https=address.scheme == "https"
    )
    try:
        api.txt2img(**webui.request())
    except RuntimeError as error:
        pytest.skip(f"the client and this host don't get along without ToMe either: {error}")
    for arguments in (
        [{"ratio": 0.6, "late_ratio": 0.3}],
        [{"preset": "Fast", "late_ratio": 0.3}],
        [True, 0.6],
    ):
        answer = api.txt2img(**webui.request(arguments))
        assert answer.image.convert("RGB").tobytes() == webui.make(arguments).pixels
        assert "ToMe ratio" in answer.info["extra_generation_params"]


def test_the_status_names_the_layers_of_the_loaded_model(webui):
    status = webui.get("/tome/status").json()
    assert status["version"]
    assert status["layers"] and min(layer["level"] for layer in status["layers"]) >= 1


def test_measure_answers_and_refuses_wrong_values(webui):
    request = {"width": webui.side, "height": webui.side, "settings": {"ratio": 0.9}}
    (result,) = webui.post("/tome/measure", request).json()
    assert f"{webui.side}x{webui.side}" in result["line"] and result["times_faster"] > 0
    assert 0 < result["attention_share"] < 1
    wrong = webui.post("/tome/measure", {"width": 1})
    assert wrong.status_code == 422 and "[16, 16384]" in wrong.json()["detail"]


def test_img2img_merges(webui, baseline):
    request = {"path": "img2img", "init_images": [baseline.png], "denoising_strength": 0.7}
    merged, plain = webui.make([True, 0.6], **request), webui.make(**request)
    assert merged.pixels != plain.pixels
    assert merged.parameters["ToMe ratio"] == 0.6


def test_pictures_of_a_batch_are_those_made_alone(webui):
    batch = webui.make([True, 0.5], n_iter=2, steps=2)
    second = webui.make([True, 0.5], seed=2, steps=2)
    assert batch.images[-1].convert("RGB").tobytes() == second.pixels


def test_a_request_that_fails_while_sampling_leaves_nothing_behind(webui):
    if not webui.checks_for_nan:
        pytest.skip("this host makes a picture of NaN")
    # Such a guidance makes NaN in the first step, and WebUI's check raises in the second.
    answer = webui.post("/sdapi/v1/txt2img", webui.request([True], cfg_scale=1e38))
    assert answer.status_code >= 400, answer.text[:300]


def test_an_interrupted_generation_leaves_nothing_behind(webui):
    generation = threading.Thread(target=webui.make, args=([True, 0.5],), kwargs={"steps": 40})
    generation.start()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if webui.get("/sdapi/v1/progress").json()["state"]["sampling_step"] > 0:
            break
        time.sleep(0.2)
    webui.post("/sdapi/v1/interrupt", {})
    generation.join(600)
    assert not generation.is_alive()


def test_webuis_own_merging_is_off_while_merging_and_keeps_its_option(webui):
    options = webui.get("/sdapi/v1/options").json()
    before = options.get("token_merging_ratio")
    webui.post("/sdapi/v1/options", {"token_merging_ratio": 0.3})
    try:
        with_both = webui.make([True, 0.5])
        assert "Token merging ratio" not in with_both.infotext
        own = webui.make([False])
        assert "Token merging ratio: 0.3" in own.infotext
        assert webui.get("/sdapi/v1/options").json()["token_merging_ratio"] == 0.3
    finally:
        webui.post("/sdapi/v1/options", {"token_merging_ratio": before or 0.0})
    assert with_both.pixels == webui.make([True, 0.5]).pixels
