"""Stands in for `modules.sd_models`: checkpoints by name, and the loaded models.

A checkpoint is a function that makes a model. Checkpoints are swapped as in WebUI: with one model
allowed and the same architecture, the weights are loaded into the existing module; with another
architecture, that module is moved to the meta device; with more models allowed, replaced ones stay.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from modules import devices, shared

checkpoints: dict[str, Callable[[], torch.nn.Module]] = {}
"""The first one is loaded at the start."""
model_data = SimpleNamespace(sd_model=None, loaded_sd_models=[])
"""Current model, and the models in memory, the last used first."""


def _architecture(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def _use(model: torch.nn.Module, name: str) -> None:
    model.sd_checkpoint_info = SimpleNamespace(model_name=name)
    others = [other for other in model_data.loaded_sd_models if other is not model]
    model_data.sd_model, model_data.loaded_sd_models = model, [model, *others]


def reload_model_weights(info: str | None = None) -> torch.nn.Module:
    """Load a checkpoint, by default the settings' one, and return its model."""
    name = info or shared.opts.sd_model_checkpoint or next(iter(checkpoints))
    model, loaded = model_data.sd_model, model_data.loaded_sd_models
    limit = shared.opts.sd_checkpoints_limit
    if model is not None and model.sd_checkpoint_info.model_name == name:
        return model
    for old in loaded[::-1]:
        if len(loaded) > limit and old.sd_checkpoint_info.model_name != name:
            loaded.remove(old)
            old.to("meta")
    for old in loaded:
        if old.sd_checkpoint_info.model_name == name:
            _use(old, name)
            return old
    fresh = checkpoints[name]().to(devices.device).eval()
    if len(loaded) >= limit:
        old = loaded.pop()
        if _architecture(old) == _architecture(fresh):
            old.load_state_dict(fresh.state_dict())
            fresh = old
        else:
            old.to("meta")
    _use(fresh, name)
    return fresh


def apply_token_merging(sd_model: Any, token_merging_ratio: float) -> None:
    """WebUI's own token merging, by `tomesd`."""
    applied = getattr(sd_model, "applied_token_merged_ratio", 0)
    if applied == token_merging_ratio:
        return
    import tomesd

    if applied > 0:
        tomesd.remove_patch(sd_model)
    if token_merging_ratio > 0:
        tomesd.apply_patch(sd_model, ratio=token_merging_ratio, use_rand=False)
    sd_model.applied_token_merged_ratio = token_merging_ratio
