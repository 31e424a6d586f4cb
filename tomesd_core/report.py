"""Reports of what was merged, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections import Counter


@dataclasses.dataclass
class LayerReport:
    """What happened in one self-attention layer."""

    name: str
    level: int | None
    """The downsample factor as measured in the last call; at first, from the structure."""
    tokens: int = 0
    """Tokens per item in the last call."""
    merged_tokens: int = 0
    """Tokens left in the last merged call."""
    calls: int = 0
    merged_calls: int = 0
    reason: str | None = None
    """Why the last unmerged call wasn't merged."""
    unmerged_calls: Counter[str] = dataclasses.field(default_factory=Counter)
    """Unmerged calls by reason, except those in which the step's ratio removed nothing."""
    fewest_tokens: int = 0
    most_tokens: int = 0
    """With `fewest_tokens`, the range of `merged_tokens` under a schedule."""
    conflict: str | None = None
    """The reason, if foreign code inside the attention prevented merging in the last call."""
    method: str = "paper"
    """`MergeSettings.method`."""

    def count_merged(self, tokens: int) -> None:
        """Count a call merged to `tokens` tokens."""
        self.merged_calls += 1
        self.merged_tokens = tokens
        self.fewest_tokens = min(self.fewest_tokens or tokens, tokens)
        self.most_tokens = max(self.most_tokens, tokens)

    def count_unmerged(self, reason: str, by_ratio: bool = False) -> None:
        """Count an unmerged call; `by_ratio` if the step's ratio removes nothing there."""
        self.reason = reason
        self.unmerged_calls[reason] += not by_ratio

    def copy(self) -> LayerReport:
        """A copy that later calls don't change."""
        return dataclasses.replace(self, unmerged_calls=Counter(self.unmerged_calls))

    @property
    def change(self) -> str:
        """Tokens before and after, as text."""
        fewest = self.fewest_tokens or self.merged_tokens
        most = self.most_tokens or self.merged_tokens
        left = str(fewest) if fewest == most else f"{fewest} to {most}"
        return f"{self.tokens} → {left} {'keys' if self.method == 'keys' else 'tokens'}"


@dataclasses.dataclass
class Report:
    """What one `attach` merged; `str()` formats it for people."""

    layers: list[LayerReport]
    steps: int
    """Steps that reached the UNet."""
    merged_steps: int
    """Steps in which at least one layer merged."""
    ratio: float | None
    """The ratio of the last step; None before the first."""
    notes: list[str]
    """Notes about the model, such as a fallback level or missing layers."""
    failure: str | None = None
    """The error of merging itself that ended merging."""

    @property
    def merged_layers(self) -> list[LayerReport]:
        """The layers that merged at least once."""
        return [layer for layer in self.layers if layer.merged_calls]

    @property
    def summary(self) -> str:
        """One line: layers, tokens, steps, unmerged calls, conflicts, notes, the failure."""
        merged, failure = self.merged_layers, [self.failure] if self.failure else []
        if not merged:
            reasons = sorted({layer.reason for layer in self.layers if layer.reason})
            why = "; ".join(dict.fromkeys(failure or [*reasons, *self.notes]))
            return f"nothing merged{f': {why}' if why else ''}"
        # Largest first, without duplicates.
        changes = dict.fromkeys(
            layer.change for layer in sorted(merged, key=lambda layer: -layer.tokens)
        )
        line = f"{len(merged)} of {len(self.layers)} self-attention layers, {', '.join(changes)}"
        line += f", {self.merged_steps} of {self.steps} steps"
        calls = sum(layer.calls for layer in merged)
        by_reason = sum((layer.unmerged_calls for layer in merged), Counter())
        unmerged = [
            f"{count} of {calls} calls not merged: {reason}"
            for reason, count in by_reason.items()
            if reason not in (*self.notes, self.failure)
        ]
        conflicts = Counter(
            layer.conflict for layer in self.layers if layer.conflict and not layer.merged_calls
        )
        foreign = [f"{count} not merged: {reason}" for reason, count in conflicts.items()]
        return "; ".join([line, *unmerged, *foreign, *self.notes, *failure])

    def __str__(self) -> str:
        lines = [f"token merging: {self.summary}"]
        for layer in self.layers:
            calls = f"in {layer.merged_calls} of {layer.calls} calls"
            what = [f"{layer.change} {calls}" if layer.merged_calls else "not merged"]
            if layer.reason:
                what.append(layer.reason)
            lines.append(f"  {layer.name} (level {layer.level}): {', '.join(what)}")
        return "\n".join(lines)
