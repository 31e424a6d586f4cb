"""Our forward hooks and those of others: each told from the other by its class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
"""Where a module keeps its hooks by number, and what it knows of them besides."""


class Hook:
    """A function as one of our hooks. What is copied or pickled with its module is a hook that does
    nothing."""

    merges_tokens = True
    """Tells a hook of another copy of this package, whose class is another: it counts on nothing.
    """

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return None if self._call is None else self._call(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def remove_hooks(model: nn.Module) -> None:
    """Takes every hook of ours off `model`, also those that came with a copy of a merging model."""
    for module in model.modules():
        for name in HOOKS:
            hooks = vars(module).get(name) or {}
            for number in [number for number, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[number]
                for flag in FLAGS:
                    vars(module).get(flag, {}).pop(number, None)


def whose_forward(module: nn.Module) -> str | None:
    """The name of the Python module whose `forward` stands on the instance in the place of its
    class's; None: none."""
    forward = vars(module).get("forward")
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return None
    return _home(forward)


def whose_hook(module: nn.Module) -> str | None:
    """The name of the Python module that put a forward hook on this one; None where there are no
    others than ours."""
    others = (
        hook for hook in module._forward_hooks.values() if not getattr(hook, "merges_tokens", False)
    )
    return next(map(_home, others), None)


def _home(function: Any) -> str:
    """The module in which a function is written: `functools.wraps` gives it `__module__` of the one
    that it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    written_in = getattr(function, "__globals__", {}).get("__name__")
    return str(written_in or getattr(function, "__module__", None) or type(function).__module__)
