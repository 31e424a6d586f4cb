"""One generation: its arguments, read once and kept on its `p`, and what is written there for it.

WebUI and extensions copy `p`: docs/architecture.md, "Hosts", tells when and what follows.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from ..merge_map import MergeMap
from ..settings import PANEL_FIELDS, MergeSettings, SettingsError
from . import host, options
from .arguments import read_arguments, useful_fields
from .axes import OVERRIDES
from .log import log

ERROR_KEY = "ToMe error"
COMMENT = "ToMe: "
LEFT_TO_BUILT_IN = "WebUI's own token merging is on, and the settings page gives it precedence"

ON_P = f"{__name__}.generation"
"""The attribute of `p` for its `Generation`, named after this copy's module."""


@dataclasses.dataclass
class Generation:
    """The settings of a generation, and what was written on its `p`. Copies of `p` share it."""

    p: weakref.ref[Any]
    """The `p` that was prepared."""
    settings: MergeSettings | None = None
    """None if it doesn't merge."""
    map_place: tuple[int, int] | None = None
    """Step and layer of the merge map."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The parameters of a picture in which something merged."""
    overwritten: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The values that another copy of the extension had under the same keys."""
    comments: dict[str, str] = dataclasses.field(default_factory=dict)
    """The comments on `p`, keyed by the line without its suffix."""
    maps: Sequence[MergeMap] = ()
    """The maps of the last sampled batch, one per picture."""
    drawn_maps: dict[int, Image.Image] = dataclasses.field(default_factory=dict)
    """The maps drawn over their pictures, by the picture's number."""

    def token_merging_ratio(self, for_hr: bool = False) -> float:
        """Replace `p.get_token_merging_ratio`, so that WebUI doesn't merge too.

        A copy of p that wasn't prepared makes an unmerged picture: WebUI asks for this ratio before
        its first batch, and the copy is cleaned then.
        """
        own = self.p()
        p = host.p_in("process_images", otherwise=own)
        if p is not own and of(p) is self:
            erase(p)
        elif own is None or self.settings is not None:
            return 0
        else:
            p = own
        return float(type(p).get_token_merging_ratio(p, for_hr))


@dataclasses.dataclass
class Last:
    """The last generation."""

    settings: MergeSettings | None = None
    """None if it didn't merge."""
    summary: str | None = None
    """What it merged, or why not, in one line; None if merging was off."""


last = Last()


def of(p: Any) -> Generation | None:
    """The generation that `p` was prepared for; None if merging is off."""
    generation: Generation | None = vars(p).get(ON_P)
    return generation


def prepare(p: Any, args: Sequence[Any]) -> None:
    """Read the arguments and write the picture's parameters, before WebUI's own merging is applied.

    A wrong value switches merging off, with an error in the parameters, under the picture and in
    the log.
    """
    erase(p)
    try:
        arguments = read_arguments(args, getattr(p, OVERRIDES, None))
    except SettingsError as error:
        leave_unmerged(p, str(error))
        claim(p, has_merged=False, failure=str(error))
        # Recognize copies of p, unless another copy of the extension, which may merge, does so
        # already.
        vars(p).setdefault("get_token_merging_ratio", _begun(p).token_merging_ratio)
    else:
        if not arguments.enabled:
            last.settings = last.summary = None
        elif reason := _reason_unmerged(p, arguments.settings):
            leave_unmerged(p, reason)
        else:
            settings = arguments.settings
            useful = useful_fields(
                settings.schedule, settings.min_tokens, has_hires_pass(p), settings.full_steps
            )
            generation = _begun(p)
            generation.settings, generation.map_place = settings, arguments.map_place
            generation.parameters = {
                str(PANEL_FIELDS[name].infotext): value
                for name, value in settings.panel_values.items()
                if name in useful
            }
            written = p.extra_generation_params
            generation.overwritten = {
                key: written[key] for key in generation.parameters if key in written
            }
            claim(p, has_merged=True)
            p.get_token_merging_ratio = generation.token_merging_ratio


def leave_unmerged(p: Any, reason: str) -> None:
    """Report why p's generation doesn't merge, and take back the parameters that claim merging."""
    _begun(p).settings = None
    claim(p, has_merged=False)
    line = f"nothing merged: {reason}"
    last.settings, last.summary = None, line
    say(p, line)
    log.warning(line)


def claim(p: Any, has_merged: bool, failure: str | None = None) -> None:
    """Write the parameters of p's next pictures: the settings if something merged, or the error."""
    generation = _begun(p)
    own = {ERROR_KEY: failure} if failure else generation.parameters if has_merged else {}
    others = _without(p.extra_generation_params, (*generation.parameters, ERROR_KEY))
    p.extra_generation_params = {**others, **generation.overwritten, **own}


def say(p: Any, line: str, suffix: str = "") -> None:
    """Show a line under the picture, replacing an earlier batch's line with another `suffix`."""
    comments = _begun(p).comments
    p.comments.pop(comments.get(line), None)
    comments[line] = COMMENT + line + suffix
    p.comment(comments[line])


def erase(p: Any) -> None:
    """Remove a generation from p, which loops reuse, but not from the p that it was copied from."""
    generation: Generation | None = vars(p).pop(ON_P, None)
    if generation is not None:
        p.extra_generation_params = _without(
            p.extra_generation_params, (*generation.parameters, ERROR_KEY)
        )
        p.comments = _without(p.comments, generation.comments.values())
        if vars(p).get("get_token_merging_ratio") == generation.token_merging_ratio:
            del p.get_token_merging_ratio


def built_in_is_on(p: Any) -> bool:
    """Whether WebUI's own token merging would be on without the extension."""
    ratio = type(p).get_token_merging_ratio
    return bool(ratio(p) or (has_hires_pass(p) and ratio(p, for_hr=True)))


def has_hires_pass(p: Any) -> bool:
    """Whether hires fix is on."""
    return bool(getattr(p, "enable_hr", False))


def schedule_steps(p: Any, is_hires: bool) -> int | None:
    """The steps from pure noise; img2img and hires passes run only the last of them."""
    own = getattr(p, "hr_second_pass_steps", 0) if is_hires else 0
    return own or getattr(p, "steps", None)


def is_left_to_built_in(p: Any) -> bool:
    """Whether the settings page gives WebUI's own token merging precedence in p's generation."""
    return built_in_is_on(p) and not options.value_of(options.OVERRULE_BUILT_IN)


def _begun(p: Any) -> Generation:
    """The generation of p. From its first line on, p no longer shares parameters and comments."""
    generation = of(p)
    if generation is None:
        generation = Generation(weakref.ref(p))
        setattr(p, ON_P, generation)
        p.extra_generation_params, p.comments = dict(p.extra_generation_params), dict(p.comments)
    return generation


def _without(mapping: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _reason_unmerged(p: Any, settings: MergeSettings) -> str | None:
    """Reason why valid settings can't merge, as far as known before the model is loaded."""
    if settings.apply_to == "hires pass" and not has_hires_pass(p):
        where = "a picture without hires fix" if hasattr(p, "enable_hr") else "img2img"
        return f"apply to is {settings.apply_to!r}, and {where} has none"
    return LEFT_TO_BUILT_IN if is_left_to_built_in(p) else None
