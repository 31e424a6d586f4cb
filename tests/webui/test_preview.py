"""The preview's line."""

from __future__ import annotations

import pytest
from in_host import running


@pytest.mark.parametrize(
    ("device", "side", "is_little"), [("cuda", 64, True), ("cuda", 96, False), ("cpu", 64, False)]
)
def test_the_line_shows_where_a_gpu_gains_little(host, device, side, is_little):
    settings = running("settings").MergeSettings(skip_unprofitable=False)
    layers = running("webui.host").loaded_layers()
    line = running("webui.preview").describe(settings, layers, (side, side), device)
    assert ("little to gain" in line) == is_little and "→" in line


def test_the_line_for_a_model_that_is_loaded_later(host, monkeypatch):
    from modules import sd_models

    describe, settings = running("webui.preview").describe, running("settings").MergeSettings()
    monkeypatch.setattr(sd_models.model_data, "sd_model", None)
    assert "no model" in describe(settings, None, (64, 64), "cpu")
    chosen = {"checkpoint_info": object()}
    monkeypatch.setattr(sd_models.model_data, "forge_loading_parameters", chosen, raising=False)
    assert "first picture" in describe(settings, None, (64, 64), "cpu")


@pytest.mark.parametrize(
    ("apply_to", "has_hires_pass", "merges"),
    [("hires pass", False, False), ("hires pass", True, True), ("first pass", False, True)],
)
def test_a_tab_without_a_hires_pass_promises_none(host, apply_to, has_hires_pass, merges):
    settings = running("settings").MergeSettings(apply_to=apply_to, skip_unprofitable=False)
    line = running("webui.preview").of_loaded_model(settings, 512, 512, has_hires_pass)
    assert ("→" in line) == merges and ("no hires pass" in line) != merges
