"""Generations that fail or are ended, and what is hooked outside of sampling: nothing."""

from __future__ import annotations

import re

import pytest
from in_host import HALVED, HIRES, failing_unet, hooked, pixels
from torch import nn


@pytest.mark.parametrize("how", ["fails", "interrupt", "skip", "stop_generating"])
@pytest.mark.parametrize("at", [1, 3])
def test_an_unfinished_generation_leaves_nothing(host, make, merged, at_evaluation, how, at):
    from modules import shared

    if how == "fails":
        with failing_unet(host, at), pytest.raises(ValueError, match="on purpose"):
            make(HALVED, n_iter=2)
    else:
        at_evaluation(at, getattr(shared.state, how))
        assert make(HALVED, n_iter=2).images
    assert hooked(host.sd_model) == []
    assert pixels(make(HALVED)) == merged


def test_between_generations_nothing_is_attached(host, make, add_script):
    """Other scripts may run the model there."""
    hooks = []
    names = ("process_batch", "post_sample", "postprocess_batch", "postprocess_image")
    note = lambda *_, **__: hooks.append(hooked(host.sd_model))  # noqa: E731
    add_script(**dict.fromkeys([*names, "postprocess"], note))
    make(HALVED, n_iter=2)
    assert hooks == [[]] * 9


class Untouchable:
    def __getattribute__(self, name):
        raise AssertionError(f"{name} was read")


def test_off_registers_no_hook_and_reads_nothing(host, make, sampling, monkeypatch, add_script):
    registered = []
    for name in (name for name in dir(nn.Module) if re.match("register_.*hook", name)):
        before = getattr(nn.Module, name)

        def register(*args, before=before, **kwargs):
            registered.append(before.__name__)
            return before(*args, **kwargs)

        monkeypatch.setattr(nn.Module, name, register)
    wrapped = []
    add_script(process_batch=lambda p, **_: wrapped.append("sample" in vars(p)))
    # Loading a model may register hooks.
    host.sd_model.state_dict()
    make([False], **HIRES)
    make(None)
    assert registered == []
    assert wrapped == [False, False]
    sampling.on_denoise(Untouchable())
    make(HALVED)
    assert registered, "this test notices hooks"
