"""Stands in for `modules.prompt_parser`: prompts joined by AND, with weights. Emphasis and schedules are left out."""

from __future__ import annotations

import re

import torch


class MulticondLearnedConditioning:
    """A batch of prompts: for each, its encoded parts and their weights."""

    def __init__(self, shape, batch):
        self.shape, self.batch = shape, batch


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    """Encodes prompts: one [L, C] each. Lengths may differ between calls."""
    return list(model.encode_prompts(list(prompts)))


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    """Encodes prompts whose parts are joined by AND, each with a weight behind a colon: `cat AND dog :0.5`."""
    batch = []
    for prompt in prompts:
        parts = [
            re.fullmatch(r"(.*?)(?:\s*:\s*([-+]?\d*\.?\d+))?\s*", part, re.S) for part in re.split(r"\bAND\b", prompt)
        ]
        encoded = get_learned_conditioning(model, [part[1] for part in parts], steps)
        batch.append([(tokens, float(part[2] or 1)) for tokens, part in zip(encoded, parts, strict=True)])
    return MulticondLearnedConditioning((len(prompts),), batch)


def _stack(encoded: list[torch.Tensor]) -> torch.Tensor:
    """[N, L, C]; shorter prompts are filled up with their last vector."""
    length = max(len(tokens) for tokens in encoded)
    return torch.stack([torch.cat([tokens, tokens[-1:].repeat(length - len(tokens), 1)]) for tokens in encoded])


def reconstruct_cond_batch(c, current_step):
    """The encoded prompts at a step: [B, L, C]."""
    return _stack(c)


def reconstruct_multicond_batch(c, current_step):
    """Which rows belong to which picture, with what weight; and all rows: [N, L, C]."""
    rows, conds_list = [], []
    for parts in c.batch:
        conds_list.append([(len(rows) + i, weight) for i, (_, weight) in enumerate(parts)])
        rows += [tokens for tokens, _ in parts]
    return conds_list, _stack(rows)
