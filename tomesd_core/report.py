"""What was merged, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections import Counter


@dataclasses.dataclass
class LayerReport:
    """What happened in one self-attention layer."""

    name: str
    level: int | None
    """The downsample factor: as measured in the last call, or, before the first, as the structure
    says."""
    tokens: int = 0
    """Tokens of an item in the last call."""
    merged_tokens: int = 0
    """How many of them attention saw when it last merged."""
    calls: int = 0
    merged_calls: int = 0
    reason: str | None = None
    """Why the last call that wasn't merged wasn't."""
    whole_calls: Counter[str] = dataclasses.field(default_factory=Counter)
    """Calls that weren't merged, by reason, but for those in which the step's ratio removed
    nothing."""
    fewest_tokens: int = 0
    most_tokens: int = 0
    """Between which numbers `merged_tokens` lay, under a schedule."""
    conflict: str | None = None
    """Whose code inside its attention it was left to, in the last call that could have merged."""
    method: str = "paper"
    """How tokens are merged: `MergeSettings.method`."""

    def count_merged(self, tokens: int) -> None:
        """Notes a call that was merged to so many tokens."""
        self.merged_calls += 1
        self.merged_tokens = tokens
        self.fewest_tokens = min(self.fewest_tokens or tokens, tokens)
        self.most_tokens = max(self.most_tokens, tokens)

    def count_whole(self, reason: str, by_ratio: bool = False) -> None:
        """Notes a call that wasn't merged; `by_ratio`: since the step's ratio removes nothing
        there."""
        self.reason = reason
        self.whole_calls[reason] += not by_ratio

    def copy(self) -> LayerReport:
        """What is known now; the copy doesn't change any more."""
        return dataclasses.replace(self, whole_calls=Counter(self.whole_calls))

    @property
    def change(self) -> str:
        """Tokens before and after, in words."""
        fewest, most = (
            self.fewest_tokens or self.merged_tokens,
            self.most_tokens or self.merged_tokens,
        )
        what = "keys" if self.method == "keys" else "tokens"
        return f"{self.tokens} → {fewest if fewest == most else f'{fewest} to {most}'} {what}"


@dataclasses.dataclass
class Report:
    """What one `attach` merged. `str()` of it is for people."""

    layers: list[LayerReport]
    steps: int
    """Steps that reached the UNet."""
    merged_steps: int
    """Steps in which at least one layer merged."""
    ratio: float | None
    """The ratio of the last step; None before the first."""
    notes: list[str]
    """What a person should know: a fallback level, a model without layers."""
    failure: str | None = None
    """The error of merging itself after which nothing merged any more."""

    @property
    def merged_layers(self) -> list[LayerReport]:
        """The layers in which tokens were merged."""
        return [layer for layer in self.layers if layer.merged_calls]

    @property
    def summary(self) -> str:
        """One line: layers, tokens, steps, calls that merged layers left whole, conflicts, notes,
        the failure."""
        merged = self.merged_layers
        if self.failure and not merged:
            return f"nothing merged: {self.failure}"
        if not merged:
            reasons = sorted({layer.reason for layer in self.layers if layer.reason})
            why = "; ".join(dict.fromkeys([*reasons, *self.notes]))
            return f"nothing merged{f': {why}' if why else ''}"
        # Largest first; a dict keeps one of each.
        changes = dict.fromkeys(
            layer.change for layer in sorted(merged, key=lambda layer: -layer.tokens)
        )
        line = f"{len(merged)} of {len(self.layers)} self-attention layers, {', '.join(changes)}"
        line += f", {self.merged_steps} of {self.steps} steps"
        calls = sum(layer.calls for layer in merged)
        whole = sum((layer.whole_calls for layer in merged), Counter())
        unmerged = [
            f"{count} of {calls} calls not merged: {reason}"
            for reason, count in whole.items()
            if reason not in (*self.notes, self.failure)
        ]
        conflicts = Counter(
            layer.conflict for layer in self.layers if layer.conflict and not layer.merged_calls
        )
        foreign = [f"{count} left out: {why}" for why, count in conflicts.items()]
        failure = [self.failure] if self.failure else []
        return "; ".join([line, *unmerged, *foreign, *self.notes, *failure])

    def __str__(self) -> str:
        lines = [f"token merging: {self.summary}"]
        for layer in self.layers:
            calls = f"in {layer.merged_calls} of {layer.calls} calls"
            what = f"{layer.change} {calls}" if layer.merged_calls else "not merged"
            lines.append(
                f"  {layer.name} (level {layer.level}): {what}{f', {layer.reason}' if layer.reason else ''}"
            )
        return "\n".join(lines)
