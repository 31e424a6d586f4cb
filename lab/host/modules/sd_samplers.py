"""Stands in for `modules.sd_samplers`: the list of samplers."""

from __future__ import annotations

import logging

from modules import sd_samplers_common, sd_samplers_kdiffusion, sd_samplers_timesteps

all_samplers: list[sd_samplers_common.SamplerData] = [
    *sd_samplers_kdiffusion.samplers_data_k_diffusion,
    *sd_samplers_timesteps.samplers_data_timesteps,
]
all_samplers_map = {sampler.name: sampler for sampler in all_samplers}
samplers = samplers_for_img2img = all_samplers
samplers_map = {alias.lower(): s.name for s in all_samplers for alias in [s.name, *s.aliases]}


def find_sampler_config(name):
    """The sampler of this name; the first one for None."""
    return all_samplers[0] if name is None else all_samplers_map.get(name)


def create_sampler(name, model):
    """A sampler for one pass."""
    config = find_sampler_config(name)
    assert config is not None, f"bad sampler name: {name}"
    sampler = config.constructor(model)
    sampler.config = config
    return sampler


def visible_sampler_names():
    """All names."""
    return [sampler.name for sampler in all_samplers]


def visible_samplers():
    """All samplers."""
    return all_samplers


def get_sampler_from_infotext(d: dict):
    """The sampler that an infotext names, else the first."""
    return d["Sampler"] if d.get("Sampler") in all_samplers_map else all_samplers[0].name


def get_sampler_and_scheduler(sampler_name, scheduler_name, *, convert_automatic=True):
    """(sampler, schedule type); like WebUI, it takes the first sampler for an unknown one."""
    return sampler_name if sampler_name in all_samplers_map else all_samplers[0].name, scheduler_name


def fix_p_invalid_sampler_and_scheduler(p):
    """Replaces an unknown sampler, and says so in the log."""
    given, (p.sampler_name, p.scheduler) = p.sampler_name, get_sampler_and_scheduler(p.sampler_name, p.scheduler)
    if given != p.sampler_name:
        logging.warning('Sampler Scheduler autocorrection: "%s" -> "%s"', given, p.sampler_name)
