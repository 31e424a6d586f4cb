"""Stands in for `modules.sd_models`: a list of checkpoints, and the one model (or few) that is loaded.

A checkpoint is a function that returns a model, not a file. How one is swapped for another is WebUI's: with one model
allowed and the same architecture, the weights go into the module that is there; with another architecture, that module
is thrown away (moved to the meta device); with more allowed, replaced models stay in memory.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable

import torch
from modules import devices, errors, script_callbacks, sd_hijack, sd_unet, shared

checkpoints_list: dict[str, CheckpointInfo] = {}
checkpoint_aliases: dict[str, CheckpointInfo] = {}


class CheckpointInfo:
    """A checkpoint's names. The hash is made from the name, there being no file; `load` makes the model."""

    load: Callable[[], torch.nn.Module]

    def __init__(self, filename):
        self.filename = self.name = filename
        self.name_for_extra = self.model_name = filename.rsplit(".", 1)[0]
        self.sha256 = hashlib.sha256(filename.encode()).hexdigest()
        self.shorthash, self.hash = self.sha256[:10], self.sha256[:8]
        self.title = f"{self.name} [{self.shorthash}]"
        self.short_title = f"{self.name_for_extra} [{self.shorthash}]"
        self.ids = [
            self.hash,
            self.name,
            self.name_for_extra,
            self.title,
            self.short_title,
            self.shorthash,
            self.sha256,
        ]

    def register(self):
        """Puts it on the list."""
        checkpoints_list[self.title] = self
        checkpoint_aliases.update({name: self for name in self.ids})


def checkpoint_tiles(use_short=False):
    """All titles."""
    return [info.short_title if use_short else info.title for info in checkpoints_list.values()]


def get_closet_checkpoint_match(search_string):
    """The checkpoint of this name, or with this text in its title; None if there is none."""
    if not search_string:
        return None
    found = [info for info in checkpoints_list.values() if search_string in info.title]
    return checkpoint_aliases.get(search_string) or min(found, key=lambda info: len(info.title), default=None)


def select_checkpoint():
    """The checkpoint that the settings name, else the first."""
    wanted = shared.opts.sd_model_checkpoint
    info = checkpoint_aliases.get(wanted)
    if info is None:
        if not checkpoints_list:
            raise FileNotFoundError("No checkpoints found.")
        info = next(iter(checkpoints_list.values()))
        if wanted is not None:
            print(f"Checkpoint {wanted} not found; loading fallback {info.title}", file=sys.stderr)
    return info


class SkipWritingToConfig:
    """While open, swapping models does not change the setting that names the checkpoint."""

    skip = False

    def __enter__(self):
        self.previous, SkipWritingToConfig.skip = SkipWritingToConfig.skip, True

    def __exit__(self, *_):
        SkipWritingToConfig.skip = self.previous


class SdModelData:
    """The model in use, and those kept in memory."""

    def __init__(self):
        self.sd_model = None
        self.loaded_sd_models = []
        self.was_loaded_at_least_once = False
        self.lock = threading.Lock()

    def get_sd_model(self):
        """The model in use; loads it if none ever was."""
        if self.was_loaded_at_least_once:
            return self.sd_model
        with self.lock:
            if self.sd_model is None and not self.was_loaded_at_least_once:
                try:
                    load_model()
                except Exception as e:
                    errors.display(e, "loading stable diffusion model", full_traceback=True)
                    self.sd_model = None
        return self.sd_model

    def set_sd_model(self, v, already_loaded=False):
        """Makes a model the one in use."""
        self.sd_model = v
        self.loaded_sd_models[:] = [model for model in self.loaded_sd_models if model is not v]
        if v is not None:
            self.loaded_sd_models.insert(0, v)


model_data = SdModelData()


def _architecture(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def _take_on(sd_model: torch.nn.Module, info: CheckpointInfo) -> None:
    """Marks a model with the checkpoint that its weights are from and with what WebUI's models carry."""
    sd_model.sd_checkpoint_info = info
    sd_model.sd_model_checkpoint, sd_model.sd_model_hash = info.filename, info.shorthash
    sd_model.model.conditioning_key = "crossattn"
    sd_model.cond_stage_key, sd_model.parameterization, sd_model.lowvram = "txt", "eps", False
    sd_model.is_sdxl = sd_model.is_sd2 = sd_model.is_sd3 = sd_model.is_ssd = False
    sd_model.is_sd1 = True
    shared.opts.data["sd_checkpoint_hash"] = info.sha256
    if not SkipWritingToConfig.skip:
        shared.opts.data["sd_model_checkpoint"] = info.title


def send_model_to_trash(m):
    """Frees a model's weights, whoever still holds the module."""
    m.to(device="meta")
    devices.torch_gc()


def load_model(checkpoint_info=None, already_loaded_state_dict=None):
    """Loads a checkpoint into a new model; the one in use is thrown away."""
    info = checkpoint_info or select_checkpoint()
    if model_data.sd_model is not None:
        send_model_to_trash(model_data.sd_model)
        model_data.sd_model = None
    sd_model = info.load().to(devices.device).eval()
    sd_hijack.hijack()
    _take_on(sd_model, info)
    model_data.set_sd_model(sd_model)
    model_data.was_loaded_at_least_once = True
    script_callbacks.model_loaded_callback(sd_model)
    with torch.no_grad():
        sd_model.cond_stage_model_empty_prompt = sd_model.encode_prompts([""])
    return sd_model


def reuse_model_from_already_loaded(sd_model, checkpoint_info, timer=None):
    """The wanted model if it is in memory, else the one to put its weights into, else None."""
    if sd_model is not None and sd_model.sd_checkpoint_info.filename == checkpoint_info.filename:
        return sd_model
    loaded, limit = model_data.loaded_sd_models, shared.opts.sd_checkpoints_limit
    wanted = next((m for m in loaded if m.sd_checkpoint_info.filename == checkpoint_info.filename), None)
    for model in [m for m in reversed(loaded) if m is not wanted]:
        if len(loaded) > limit > 0:
            loaded.remove(model)
            send_model_to_trash(model)
    if wanted is not None:
        model_data.set_sd_model(wanted, already_loaded=True)
        _take_on(wanted, checkpoint_info)
        return wanted
    if limit > 1 and len(loaded) < limit:
        model_data.sd_model = None
        return load_model(checkpoint_info)
    model_data.sd_model = loaded.pop() if loaded else None
    return model_data.sd_model


def reload_model_weights(sd_model=None, info=None, forced_reload=False):
    """Makes the wanted checkpoint (the settings' one by default) the one in use."""
    info = info or select_checkpoint()
    sd_model = sd_model or model_data.sd_model
    if sd_model is not None and sd_model.sd_model_checkpoint == info.filename and not forced_reload:
        return sd_model
    sd_model = reuse_model_from_already_loaded(sd_model, info)
    if not forced_reload and sd_model is not None and sd_model.sd_checkpoint_info.filename == info.filename:
        return sd_model
    fresh = info.load()
    if sd_model is None or _architecture(fresh) != _architecture(sd_model):
        if sd_model is not None:
            sd_unet.apply_unet("None")
            send_model_to_trash(sd_model)
            model_data.sd_model = None
        return load_model(info)
    sd_model.load_state_dict(fresh.state_dict())
    _take_on(sd_model, info)
    script_callbacks.model_loaded_callback(sd_model)
    model_data.set_sd_model(sd_model)
    sd_unet.apply_unet()
    return sd_model


def apply_token_merging(sd_model, token_merging_ratio):
    """WebUI's own token merging: the package `tomesd`, which swaps the class of the transformer blocks."""
    applied = getattr(sd_model, "applied_token_merged_ratio", 0)
    if applied == token_merging_ratio:
        return
    import tomesd  # only where somebody asks for it: the host does not depend on it

    if applied > 0:
        tomesd.remove_patch(sd_model)
    if token_merging_ratio > 0:
        tomesd.apply_patch(sd_model, ratio=token_merging_ratio, use_rand=False)
    sd_model.applied_token_merged_ratio = token_merging_ratio
