"""Measure: what it runs, what it reports, what it leaves, and how it ends."""

from __future__ import annotations

import json
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from in_host import HALVED, HIRES, REQUEST, ROOT, SIDE, failing_unet, left, pixels, running
from starlette.testclient import TestClient

from tomesd_core.settings import MergeSettings

HALF, FULL = left(0.5), left(0.0)
SETTINGS = {"ratio": 0.5, "schedule": "constant", "method": "paper"}
ASKED = {"width": SIDE, "height": SIDE, "settings": SETTINGS}
WARM_UP = [FULL, HALF, FULL]
PAIR = [FULL, HALF, HALF, FULL]
MERGES = [False, True, False] + 2 * [False, True, True, False]


@pytest.fixture
def measure(host, monkeypatch):
    """The module, which measures as few rounds as it may; no task waits, no lock is held and no
    task is left."""
    from modules import call_queue, progress, shared

    module = running("webui.measure")
    monkeypatch.setattr(module, "SECONDS", 0)
    monkeypatch.setattr(module, "MOST_SECONDS", 0)
    module._stopped.clear()
    yield module
    assert progress.pending_tasks == {} and progress.current_task is None
    assert not call_queue.queue_lock.locked()
    assert (shared.state.job, shared.state.interrupted, shared.state.skipped) == ("", False, False)


def test_unmerged_and_merged_steps_in_turn_after_a_warm_up(measure, attention):
    (result,) = measure.measure(ASKED)
    assert attention.tokens == WARM_UP + 2 * PAIR
    assert 0 < result.attention_share < 1 and result.times_faster > 0 and result.spread >= 0
    assert result.memory_saved is None, "the CPU doesn't say"
    faster = rf"\d\.\d\d times faster at {SIDE}x{SIDE} \(± \d+ %\), on this machine"
    slower = rf"no faster at {SIDE}x{SIDE}: attention is \d+ % of a step here"
    noisy = rf"too noisy to tell at {SIDE}x{SIDE}: between \d+\.\d\d and \d+\.\d\d times faster"
    assert re.fullmatch(f"{faster}|{slower}|{noisy}", result.line)


def test_the_schedule_is_walked_and_a_matching_is_kept_as_long_as_in_a_picture(measure, attention):
    linear = {"ratio": 0.7, "late_ratio": 0.2, "method": "paper"}
    measure.measure({**ASKED, "settings": linear})
    assert attention.tokens[3:] == [
        FULL,
        left(0.7),
        left(0.7),
        FULL,
        FULL,
        left(0.2),
        left(0.2),
        FULL,
    ]
    attention.tokens.clear()
    measure.measure({**ASKED, "settings": {**SETTINGS, "reuse_steps": 2}})
    assert attention.tokens == WARM_UP + [FULL, HALF, HALF, HALF, HALF, FULL] * 2


def test_it_walks_on_while_its_spread_is_too_large(measure, attention, monkeypatch):
    spreads = iter([0.5, 0.2, 0.05, 0.05])
    monkeypatch.setattr(measure, "MOST_SECONDS", 600)
    monkeypatch.setattr(measure, "times_faster", lambda pairs: (2.0, next(spreads)))
    (result,) = measure.measure(ASKED)
    assert attention.tokens == WARM_UP + 3 * 2 * PAIR
    assert (result.times_faster, result.spread) == (2.0, 0.05)


def test_what_stays_too_noisy_gives_no_figure_but_its_range(measure, monkeypatch):
    monkeypatch.setattr(measure, "times_faster", lambda pairs: (2.0, 0.25))
    (result,) = measure.measure(ASKED)
    assert result.line == "too noisy to tell at 32x32: between 1.60 and 2.50 times faster"


def test_a_host_that_halves_every_other_step_changes_nothing(measure, host):
    """As WebUI's "Negative Guidance minimum sigma" does."""
    seconds = {}
    for halves in (False, True):
        run = measure._Run(host.make_p(**REQUEST), MergeSettings(**SETTINGS), lambda: False)
        run._seconds = [
            1.0 / (1 + run_merges) / (1 + (halves and step % 2))
            for step, run_merges in enumerate(MERGES)
        ]
        seconds[halves] = run._measured()
    assert seconds[True] == pytest.approx(seconds[False])


def test_it_asks_the_models_own_device(measure, monkeypatch):
    from modules import devices

    asked = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: asked.append(device) or 0)
    monkeypatch.setattr(devices, "device", torch.device("cuda:1"))
    (result,) = measure.measure(ASKED)
    assert set(asked) == {torch.device("cuda:1")} and result.memory_saved is None


def test_a_device_without_a_word_for_it_is_waited_for_too(measure, operations, monkeypatch):
    from modules import devices

    monkeypatch.setattr(devices, "device", torch.device("meta"))
    with operations() as operations_run, pytest.raises(NotImplementedError, match="meta"):
        running("webui.clock").now()
    assert operations_run.names == ["zeros.default", "_to_copy.default"]


def test_a_model_that_needs_a_picture_gives_the_reason(measure, host, monkeypatch, attention):
    monkeypatch.setattr(host.sd_model.model.diffusion_model, "in_channels", 8)
    with pytest.raises(measure.NoResultError, match="InstructPix2Pix"):
        measure.measure(ASKED)
    assert attention.tokens == []


def test_a_batch_with_its_guidance_as_generations_run_it(measure, host):
    sizes = []
    unet = host.sd_model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    measure.measure({**ASKED, "batch_size": 3})
    handle.remove()
    assert set(sizes) == {6}


def test_with_hires_fix_its_size_is_measured_too(measure, attention):
    results = measure.measure({**ASKED, "hires_width": 48, "hires_height": 40})
    assert len(results) == 2 and "32x32" in results[0].line and "48x40" in results[1].line
    full, half = 48 * 40, left(0.5, 48 * 40)
    assert attention.tokens[11:] == [full, half, full] + [full, half, half, full] * 2


def test_nothing_of_it_is_in_the_next_picture(measure, make, merged, plain, tmp_path, monkeypatch):
    from modules import shared

    monkeypatch.setattr(shared, "data_path", str(tmp_path))
    make(HALVED)
    last = running("webui.generation").last
    before = (
        (tmp_path / "params.txt").read_bytes(),
        last.settings,
        last.summary,
        torch.get_rng_state().tolist(),
    )
    measure.measure(ASKED)
    after = (
        (tmp_path / "params.txt").read_bytes(),
        last.settings,
        last.summary,
        torch.get_rng_state().tolist(),
    )
    assert before == after
    assert pixels(make(HALVED)) == merged and pixels(make()) == plain


def test_no_parameters_are_left_where_there_were_none(measure, tmp_path, monkeypatch):
    from modules import shared

    monkeypatch.setattr(shared, "data_path", str(tmp_path))
    measure.measure(ASKED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stopped", [False, True])
def test_it_waits_for_its_turn_and_can_be_stopped_meanwhile(measure, attention, stopped):
    from modules import call_queue, progress

    results = []

    def run():
        try:
            results.extend(measure.measure(ASKED, "task(one)"))
        except measure.NoResultError as error:
            results.append(error)

    with call_queue.queue_lock:
        thread = threading.Thread(target=run)
        thread.start()
        while "task(one)" not in progress.pending_tasks:
            pass
        if stopped:
            measure.stop("task(one)")
        assert attention.tokens == []
    thread.join(60)
    assert [str(error) for error in results if isinstance(error, Exception)] == (
        ["interrupted"] if stopped else []
    )
    assert len(attention.tokens) == (0 if stopped else 11)
    assert progress.finished_tasks[-1] == "task(one)"


@pytest.mark.parametrize("how", ["interrupt", "skip", "stop_generating", "stop"])
def test_it_can_be_interrupted(measure, attention, on_denoised, how):
    from modules import shared

    def end(_):
        if len(attention.tokens) == 4:
            getattr(shared.state, how)() if how != "stop" else measure.stop("task(one)")

    on_denoised(end)
    with pytest.raises(measure.NoResultError, match=r"^interrupted$"):
        measure.measure({**ASKED, "hires_width": 64, "hires_height": 64}, "task(one)")
    assert len(attention.tokens) == 4


@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_failure_is_said(measure, host, log_lines, at):
    with (
        failing_unet(host, at),
        pytest.raises(measure.NoResultError, match="ValueError: on purpose"),
    ):
        measure.measure(ASKED)


def test_too_little_memory_is_said(measure, host):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    handle = host.sd_model.model.diffusion_model.register_forward_hook(fail)
    with pytest.raises(measure.NoResultError, match=r"^too little memory to measure at 32x32$"):
        measure.measure(ASKED)
    handle.remove()


def test_a_failure_of_merging_is_said(measure, sampling, monkeypatch, log_lines):
    def fail(*_):
        raise LookupError("on purpose")

    monkeypatch.setattr(sampling, "attach", fail)
    with pytest.raises(measure.NoResultError, match=r"failed: .*LookupError: on purpose"):
        measure.measure(ASKED)
    assert any("LookupError: on purpose" in line for line in log_lines)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"apply_to": "hires pass"}, "no faster at 32x32: apply to is 'hires pass'"),
        ({"min_tokens": 4096}, "no faster at 32x32: nothing merged: "),
        ({"ratio": 0, "schedule": "constant"}, "no faster at 32x32: nothing merged: "),
    ],
)
def test_settings_that_merge_nothing(measure, settings, line):
    (result,) = measure.measure({**ASKED, "settings": settings})
    assert result.line.startswith(line) and result.times_faster is None


def test_a_model_without_such_layers(measure, host):
    from modules import sd_models, shared

    shared.opts.sd_model_checkpoint = "joint"
    (result,) = measure.measure(ASKED)
    assert (
        result.line
        == "no faster at 32x32: this model has no self-attention layers that can be merged"
    )
    shared.opts.sd_model_checkpoint = "base"
    sd_models.reload_model_weights()


def test_webuis_own_merging_wins_where_the_settings_say_so(measure, attention):
    from modules import shared

    shared.opts.data.update(token_merging_ratio=0.4, tome_overrule_built_in=False)
    (result,) = measure.measure(ASKED)
    assert "WebUI's own token merging is on" in result.line and attention.tokens == []


def test_the_progress_is_that_of_the_steps(measure, on_denoised):
    from modules import progress, shared

    progress_a_step = []
    on_denoised(
        lambda _: progress_a_step.append(
            (progress.current_task, shared.state.job_count, shared.state.sampling_steps)
        )
    )
    measure.measure(ASKED, "task(one)")
    # From the first step on the bar knows how many there will be.
    assert progress_a_step == [("task(one)", 1, 11)] * 11


@given(st.floats(0.01, 10), st.floats(0.2, 5), st.integers(2, 30))
def test_pairs_of_one_quotient_give_it_without_a_spread(seconds, times, pairs):
    quotient, spread = running("webui.measure").times_faster(
        [([seconds] * 2, [seconds / times] * 2)] * pairs
    )
    assert (quotient, spread) == (pytest.approx(times), pytest.approx(0, abs=1e-9))


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.2), st.floats(0.2, 5))
@settings(max_examples=30, deadline=None)
def test_the_spread_is_the_standard_error(seed, deviation, times):
    """Of 200 measurements of normal noise."""
    noise = np.random.default_rng(seed).normal(0, deviation, (200, 25, 2, 2))
    seconds = np.exp(noise) * [[1], [1 / times]]
    results = np.array([running("webui.measure").times_faster(pairs) for pairs in seconds])
    assert results[:, 0].std() / times == pytest.approx(np.median(results[:, 1]), rel=0.5)


@given(st.integers(6, 30), st.data())
def test_a_hiccup_changes_nothing(rounds, data):
    times = np.tile([[1.0], [0.5]], (rounds, 1, 2))
    times[
        data.draw(st.integers(0, rounds - 1)),
        data.draw(st.integers(0, 1)),
        data.draw(st.integers(0, 1)),
    ] *= 50
    assert running("webui.measure").times_faster(times) == pytest.approx((2.0, 0.0))


# The route


@pytest.fixture
def post(measure, host):
    app = FastAPI()
    host.start_app(app)
    client = TestClient(app)
    return lambda body: client.post("/tome/measure", json=body)


def test_the_route_gives_a_result_a_size(post):
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
        ({"step": 20}, ["unknown field", "'step'", "width"]),
    ],
)
def test_the_route_says_what_is_wrong(post, attention, body, words):
    answer = post(body)
    assert answer.status_code == 422
    assert all(word in answer.json()["detail"] for word in words)
    assert attention.tokens == []


def test_the_route_says_a_failure(post, host, log_lines):
    with failing_unet(host, 1):
        answer = post(ASKED)
    assert (
        answer.status_code == 500
        and "measuring at 32x32 failed (ValueError: on purpose)" in answer.json()["detail"]
    )


def test_the_panel_shows_the_line_of_each_size(measure, host):
    from modules import scripts

    row = running("webui.measure_row")
    values = [control.value for control in scripts.scripts_txt2img.script("ToMe").controls]
    text = row._measure(
        '{"task": "task(one)", "width": 32, "height": 32, "hires_width": 40, "hires_height": 40}',
        *values,
    )
    assert "32x32" in text and "<br>" in text and "40x40" in text
    with pytest.raises(measure.SettingsError, match=r"width must lie in \[16, 16384\], got 1"):
        row._measure('{"width": 1}', *values)
    with pytest.raises(measure.SettingsError, match="ratio must lie in"):
        row._measure("{}", True, 9, *values[2:])


# The time in a picture's summary


def test_the_summary_says_how_long_sampling_took_and_compares_nothing(make):
    make([False])
    for fields in ({}, {"n_iter": 2}, HIRES):
        comments = make(HALVED, **fields).comments
        assert (
            re.search(r"; sampled in \d+\.\d s\n", comments) and comments.count("sampled in") == 1
        )
        assert "faster" not in comments
    assert "sampled in" not in make([True, 9]).comments


def test_a_sampling_that_was_cut_short_has_no_time(make, host, on_denoised):
    from modules import script_callbacks, shared

    def end(_):
        shared.state.interrupt()

    on_denoised(end)
    assert "sampled in" not in make(HALVED).comments
    script_callbacks.remove_callbacks_for_function(end)
    with failing_unet(host), pytest.raises(ValueError):
        make(HALVED)
    assert "sampled in" not in running("webui.generation").last.summary


def test_a_hosts_main_thread_runs_it_and_loses_no_exception(measure, monkeypatch):
    """As Forge's."""
    import sys

    threads = []

    def run_and_wait_result(function):
        thread = threading.Thread(target=function)
        threads.append(thread)
        thread.start()
        thread.join()

    module = SimpleNamespace(main_thread=SimpleNamespace(run_and_wait_result=run_and_wait_result))
    monkeypatch.setitem(sys.modules, "modules.txt2img", module)
    assert len(measure.measure(ASKED)) == 1 and len(threads) == 1
    measure.stop("task(one)")
    with pytest.raises(measure.NoResultError, match="interrupted"):
        measure.measure(ASKED, "task(one)")


def test_the_request_of_the_documentation(post):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    body = json.loads(re.search(r"/tome/measure .*? -d '(.*?)'", page, re.DOTALL)[1])
    assert {"width", "height", "batch_size", "cfg_scale", "steps", "settings"} == set(body)
    (result,) = post({**body, "width": SIDE, "height": SIDE}).json()
    assert all(f"`{name}`" in page for name in result)
