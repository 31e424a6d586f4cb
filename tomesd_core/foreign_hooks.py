"""Forward hooks of this package and of others, told apart by class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Prefixes of a module's dicts of hooks, and of their options, by number."""


class Hook:
    """A hook of this package; a copy of it does nothing."""

    merges_tokens = True
    """Also marks hooks of other copies of this package, which don't rely on the token count."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Call the function, if there is one."""
        return None if self._call is None else self._call(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def remove_hooks(model: nn.Module) -> None:
    """Remove the package's hooks from `model`, also those copied along with a merging model."""
    for module in model.modules():
        named = vars(module).items()
        dicts = [kept for name, kept in named if name.startswith(HOOKS) and isinstance(kept, dict)]
        for hooks in dicts:
            for number in [number for number, hook in hooks.items() if isinstance(hook, Hook)]:
                for each in dicts:
                    each.pop(number, None)


def whose_forward(module: nn.Module) -> str | None:
    """The Python module that replaced `forward` on this instance, or None."""
    forward = vars(module).get("forward")
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return None
    return _home(forward)


def whose_hook(module: nn.Module) -> str | None:
    """The Python module of a foreign forward hook on this module, or None."""
    others = (
        hook for hook in module._forward_hooks.values() if not getattr(hook, "merges_tokens", False)
    )
    return next(map(_home, others), None)


def _home(function: Any) -> str:
    """The Python module that defines `function`, seen through `functools.wraps` and `partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    written_in = getattr(function, "__globals__", {}).get("__name__")
    return str(written_in or getattr(function, "__module__", None) or type(function).__module__)
