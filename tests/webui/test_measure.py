"""Measure: the steps that it runs, what it reports, and how it ends."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from in_host import HALVED, fail, failing_unet, left, pixels, running

SIDE = 16
FULL, HALF = SIDE**2, left(0.5, SIDE**2)
SETTINGS = {"ratio": 0.5, "schedule": "constant", "method": "paper"}
ASKED = {"width": SIDE, "height": SIDE, "settings": SETTINGS}
WARM_UP = [FULL, HALF, FULL]
PAIR = [FULL, HALF, HALF, FULL]


def test_unmerged_and_merged_steps_alternate_after_a_warm_up(measure, attention):
    (result,) = measure.measure(ASKED)
    assert attention.tokens == WARM_UP + 2 * PAIR
    assert 0 < result.attention_share < 1 and result.times_faster > 0 and result.spread >= 0
    assert result.memory_saved is None, "unknown on the CPU"
    assert f"{SIDE}x{SIDE}" in result.line


def test_the_schedule_is_followed_and_matchings_are_reused_as_in_a_picture(measure, attention):
    linear = {"ratio": 0.7, "late_ratio": 0.4, "method": "paper"}
    measure.measure({**ASKED, "settings": linear})
    early, late = left(0.7, FULL), left(0.4, FULL)
    assert attention.tokens[3:] == [FULL, early, early, FULL, FULL, late, late, FULL]
    attention.tokens.clear()
    measure.measure({**ASKED, "settings": {**SETTINGS, "reuse_steps": 2}})
    assert attention.tokens == WARM_UP + [FULL, HALF, HALF, HALF, HALF, FULL] * 2


def test_it_repeats_the_schedule_while_its_spread_is_high(measure, rounds, attention, monkeypatch):
    spreads = iter([0.5, 0.2, 0.05, 0.05])
    monkeypatch.setattr(rounds, "MOST_SECONDS", 600)
    monkeypatch.setattr(rounds, "times_faster", lambda pairs: (2.0, next(spreads)))
    (result,) = measure.measure(ASKED)
    assert attention.tokens == WARM_UP + 3 * 2 * PAIR
    assert (result.times_faster, result.spread) == (2.0, 0.05)


def test_halves_of_every_other_step_change_nothing(measure, rounds, host, attention, monkeypatch):
    """WebUI's "Negative Guidance minimum sigma" skips the other halves."""
    clock = [0.0]
    monkeypatch.setattr(rounds.host, "now", lambda: clock[0])

    def advance(*_):
        seconds = 1.0 if attention.tokens[-1] == FULL else 0.5
        clock[0] += seconds / (2 if len(attention.tokens) % 2 else 1)

    with host.sd_model.model.diffusion_model.register_forward_hook(advance):
        (result,) = measure.measure(ASKED)
    assert (result.times_faster, result.spread) == (pytest.approx(2), pytest.approx(0))


def test_it_asks_the_models_own_device(measure, monkeypatch):
    from modules import devices

    asked = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: asked.append(device) or 0)
    monkeypatch.setattr(devices, "device", torch.device("cuda:1"))
    (result,) = measure.measure(ASKED)
    assert set(asked) == {torch.device("cuda:1")} and result.memory_saved is None


def test_the_clock_waits_for_a_device_without_a_synchronize(measure, operations, monkeypatch):
    from modules import devices

    monkeypatch.setattr(devices, "device", torch.device("meta"))
    with operations() as operations_run, pytest.raises(NotImplementedError, match="meta"):
        running("webui.host").now()
    assert operations_run.names == ["zeros.default", "_to_copy.default"]


def test_with_hires_fix_its_size_is_measured_too(measure, attention):
    results = measure.measure({**ASKED, "hires_width": 24, "hires_height": 20})
    assert all(size in one.line for size, one in zip(("16x16", "24x20"), results, strict=True))
    full, half = 24 * 20, left(0.5, 24 * 20)
    assert attention.tokens[11:] == [full, half, full] + [full, half, half, full] * 2


def test_it_leaves_no_trace_in_later_pictures(measure, make, merged, plain, tmp_path, monkeypatch):
    from modules import shared

    monkeypatch.setattr(shared, "data_path", str(tmp_path))
    measure.measure(ASKED)
    assert list(tmp_path.iterdir()) == [], "no parameters where there were none"
    make(HALVED)
    last = running("webui.generation").last

    def state():
        parameters = (tmp_path / "params.txt").read_bytes()
        return parameters, last.settings, last.summary, torch.get_rng_state().tolist()

    before = state()
    measure.measure(ASKED)
    assert state() == before
    assert pixels(make(HALVED)) == merged and pixels(make()) == plain


@pytest.mark.parametrize("stopped", [False, True])
def test_it_waits_for_its_turn_and_can_be_stopped_meanwhile(measure, task, attention, stopped):
    from modules import call_queue, progress

    with ThreadPoolExecutor() as pool:
        with call_queue.queue_lock:
            measuring = pool.submit(measure.measure, ASKED, task)
            while task not in progress.pending_tasks:
                pass
            if stopped:
                measure.stop(task)
            assert attention.tokens == []
        assert str(measuring.exception(60)) == ("interrupted" if stopped else "None")
    assert len(attention.tokens) == (0 if stopped else 11)
    assert progress.finished_tasks[-1] == task


@pytest.mark.parametrize("how", ["interrupt", "skip", "stop_generating", "stop"])
def test_it_can_be_interrupted(measure, task, attention, on_denoised, how):
    from modules import shared

    def end(_):
        if len(attention.tokens) == 4:
            getattr(shared.state, how)() if how != "stop" else measure.stop(task)

    on_denoised(end)
    with pytest.raises(measure.NoResultError, match="interrupted"):
        measure.measure({**ASKED, "hires_width": 32, "hires_height": 32}, task)
    assert len(attention.tokens) == 4


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("on purpose"), "ValueError: on purpose"),
        (RuntimeError("CUDA out of memory"), "memory .*16x16"),
    ],
    ids=["a failure", "too little memory"],
)
def test_the_error_of_a_step_is_the_reason(measure, host, log_lines, error, words):
    with failing_unet(host, 4, error), pytest.raises(measure.NoResultError, match=words):
        measure.measure(ASKED)


def test_a_failure_of_merging_is_the_reason(measure, sampling, monkeypatch, log_lines):
    monkeypatch.setattr(sampling, "attach", fail)
    with pytest.raises(measure.NoResultError, match="ValueError: on purpose"):
        measure.measure(ASKED)
    assert any("ValueError: on purpose" in line for line in log_lines)


def test_a_model_that_needs_a_picture_is_the_reason(measure, host, monkeypatch, attention):
    monkeypatch.setattr(host.sd_model.model.diffusion_model, "in_channels", 8)
    with pytest.raises(measure.NoResultError, match="InstructPix2Pix"):
        measure.measure(ASKED)
    assert attention.tokens == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"apply_to": "hires pass"}, "'hires pass'"),
        ({"min_tokens": 4096}, "min tokens"),
        ({"ratio": 0, "schedule": "constant"}, "ratio 0"),
    ],
)
def test_settings_that_merge_nothing_are_no_faster(measure, settings, words):
    (result,) = measure.measure({**ASKED, "settings": settings})
    assert "no faster at 16x16" in result.line and words in result.line
    assert result.times_faster is None


def test_a_model_without_mergeable_layers_is_no_faster(measure, host):
    from modules import sd_models, shared

    shared.opts.sd_model_checkpoint = "joint"
    (result,) = measure.measure(ASKED)
    assert "no faster at 16x16" in result.line and "no self-attention layers" in result.line
    shared.opts.sd_model_checkpoint = "base"
    sd_models.reload_model_weights()


def test_the_option_lets_webuis_own_merging_win(measure, attention):
    from modules import shared

    shared.opts.data.update(token_merging_ratio=0.4, tome_overrule_built_in=False)
    (result,) = measure.measure(ASKED)
    assert "WebUI's own token merging" in result.line and attention.tokens == []


def test_each_step_is_counted_and_runs_the_batch_with_its_guidance(measure, task, on_denoised):
    from modules import progress, shared

    seen, state = [], shared.state

    def look(params):
        seen.append((len(params.x), progress.current_task, state.job_count, state.sampling_steps))

    on_denoised(look)
    measure.measure({**ASKED, "batch_size": 3}, task)
    assert seen == [(6, task, 1, 11)] * 11


def test_it_runs_in_the_hosts_main_thread_and_loses_no_exception(measure, task, monkeypatch):
    """As Forge runs generations."""
    threads = []

    def run_and_wait_result(function):
        threads.append(threading.Thread(target=function))
        threads[-1].start()
        threads[-1].join()

    module = SimpleNamespace(main_thread=SimpleNamespace(run_and_wait_result=run_and_wait_result))
    monkeypatch.setitem(sys.modules, "modules.txt2img", module)
    assert len(measure.measure(ASKED)) == 1 and len(threads) == 1
    measure.stop(task)
    with pytest.raises(measure.NoResultError, match="interrupted"):
        measure.measure(ASKED, task)
