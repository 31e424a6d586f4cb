"""One setting: its label, range and help, and the check of a value."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Iterable
from typing import Any


class SettingsError(ValueError):
    """A setting has an invalid value. The message names the setting, the value and the range."""


def refuse_unknown(names: Iterable[str], known: Collection[str], kind: str) -> None:
    """Raises `SettingsError` for names that aren't `known`; `kind` is the word for one of them."""
    if unknown := [repr(name) for name in names if name not in known]:
        raise SettingsError(
            f"unknown {kind} {', '.join(unknown)}: the {kind}s are {', '.join(known)}"
        )


@dataclasses.dataclass(frozen=True)
class Setting:
    """Name, bounds and help of one field of `MergeSettings`.

    `kind` is `number`, `integer`, `choice`, `flag`, or `pair` (two integers). The panel shows the
    fields that have a label; the others are for experts.
    """

    default: Any
    kind: str
    label: str = ""
    help: str = ""
    minimum: float = -math.inf
    maximum: float = math.inf
    step: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False
    former_label: str = ""
    """The label of an older version, which parameters and `ui-config.json` still use."""
    where: str = ""
    """Appended to the range in an error if the range depends on other settings."""

    @property
    def infotext(self) -> str | None:
        """The field's key in a picture's parameters; None for an expert field."""
        return f"ToMe {(self.former_label or self.label).lower()}" if self.label else None

    def check(self, name: str, value: Any) -> Any:
        """Return `value` in the field's type. Raises `SettingsError` if it is invalid."""
        if value is None and self.optional:
            return None
        if self.kind == "flag":
            if not isinstance(value, bool):
                raise SettingsError(f"{name} must be true or false, got {value!r}")
            return value
        if self.kind == "choice":
            return self._choice(name, value)
        if self.kind == "pair":
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise SettingsError(f"{name} must be two integers {self._range}, got {value!r}")
            return tuple(self._number(name, side) for side in value)
        return self._number(name, value)

    @property
    def _range(self) -> str:
        return f"in [{self.minimum:g}, {self.maximum:g}]"

    def _choice(self, name: str, value: Any) -> Any:
        # A number chosen on a page comes back as text or as a float. True is not the choice 1.
        for choice in self.choices:
            if value in (choice, str(choice)) and not isinstance(value, bool):
                return choice
        choices = ", ".join(map(str, self.choices))
        raise SettingsError(f"{name} must be one of {choices}, got {value!r}")

    def _number(self, name: str, value: Any) -> int | float:
        is_integer = self.kind != "number"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_number = is_number and value == value
        # An int beyond the largest float is out of every range, and may have too many digits to
        # print.
        if is_number and abs(value) > sys.float_info.max:
            value = math.inf if value > 0 else -math.inf
        if not is_number or (is_integer and math.isfinite(value) and value != int(value)):
            kind = "an integer" if is_integer else "a number"
            raise SettingsError(f"{name} must be {kind} {self._range}, got {value!r}")
        if not self.minimum <= value <= self.maximum:
            raise SettingsError(f"{name} must lie {self._range}{self.where}, got {value!r}")
        return int(value) if is_integer else float(value)
