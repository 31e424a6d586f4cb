"""The text side of the tiny models: a vocabulary of words, and their embedding."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn


def split_words(prompt: str) -> list[str]:
    """Words of `prompt` in lower case, without punctuation; `"T-Rex!"` is `["t", "rex"]`."""
    return re.findall(r"[^\W_]+", prompt.lower())


class WordEncoder(nn.Module):
    """Learnt word and position embeddings, and an MLP that sees the mean of all words.

    With the mean, "red" can have different meanings in "red apple" and "red heart".
    """

    def __init__(self, words: int, length: int, dim: int) -> None:
        super().__init__()
        # Number 0 is the padding; padding alone is the empty prompt.
        self.word = nn.Embedding(words + 1, dim)
        self.position = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.mix = nn.Sequential(
            nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode word numbers, LongTensor [B, L], as the UNet's context, [B, L, dim]."""
        h = self.word(ids)
        # Padding has no weight, so that the length doesn't dilute the mean; alone it is the mean.
        weight = (ids > 0).to(h.dtype).unsqueeze(-1)
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, torch.ones_like(weight))
        mean = (h * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        h = h + self.position
        return self.norm(h + self.mix(torch.cat([h, mean.expand_as(h)], dim=-1)))
