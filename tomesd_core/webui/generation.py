"""One generation: what its arguments ask for, read once and kept on its `p`, and all that is
written there for it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from ..merge_map import MergeMap
from ..settings import PANEL_FIELDS, MergeSettings, SettingsError
from . import host, options, presets
from .arguments import panel_values, read_arguments, useful_fields
from .axes import OVERRIDES
from .log import log

ERROR_KEY = "ToMe error"
COMMENT = "ToMe: "
LEFT_TO_BUILT_IN = "WebUI's own token merging is on, and the settings say not to overrule it"

ON_P = f"{__name__}.generation"
"""The attribute of `p` that holds its `Generation`. It is named after this module, so that a second
copy of the extension, whose modules have other names, has one of its own."""


@dataclasses.dataclass
class Generation:
    """What was decided about a generation, and what was written on its `p`. Copies of `p` share it."""

    p: weakref.ref[Any]
    """The one that it was begun for."""
    settings: MergeSettings | None = None
    """None where it doesn't merge."""
    map_place: tuple[int, int] | None = None
    """Step and layer of the merge map."""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Those of a picture in which something merged."""
    overwritten: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What another copy of the extension had under the same keys."""
    comments: dict[str, str] = dataclasses.field(default_factory=dict)
    """Each as it stands on `p`, by its line without its suffix."""
    maps: Sequence[MergeMap] = ()
    """The maps of the batch that was sampled last, one a picture."""
    drawn_maps: dict[int, Image.Image] = dataclasses.field(default_factory=dict)
    """The maps drawn over their pictures, by the picture's number."""

    def token_merging_ratio(self, for_hr: bool = False) -> float:
        """In place of `p.get_token_merging_ratio`: never merge twice.

        A copy of p makes a picture of its own, unmerged unless it is prepared too: what it took
        along is erased when WebUI asks for this, before its first batch.
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
    """None where it didn't merge."""
    summary: str | None = None
    """What it merged, or why it didn't, in one line; None where it wasn't asked to."""


last = Last()


def of(p: Any) -> Generation | None:
    """The generation that `p` was prepared for; None where merging is off and there is nothing to
    say of it."""
    generation: Generation | None = vars(p).get(ON_P)
    return generation


def prepare(p: Any, args: Sequence[Any]) -> None:
    """Before WebUI applies its own token merging: writes what is asked for to the picture's
    parameters.

    A wrong value switches merging off for this generation, and is said there, under the picture and
    in the log.
    """
    erase(p)
    try:
        arguments = read_arguments(args, getattr(p, OVERRIDES, None), presets.get)
    except SettingsError as error:
        leave_unmerged(p, str(error))
        claim(p, has_merged=False, failure=str(error))
        # Copies of p are to be told; another copy of the extension may merge, and has its own
        # there.
        vars(p).setdefault("get_token_merging_ratio", _begun(p).token_merging_ratio)
    else:
        if not arguments.enabled:
            last.settings = last.summary = None
        elif why_not := _why_not(p, arguments.settings):
            leave_unmerged(p, why_not)
        else:
            settings = arguments.settings
            useful = useful_fields(
                settings.schedule, settings.min_tokens, has_hires_pass(p), settings.full_steps
            )
            values = panel_values(settings)
            generation = _begun(p)
            generation.settings, generation.map_place = arguments.settings, arguments.map_place
            named = {name: value for name, value in values.items() if name in useful}
            generation.parameters = {
                str(PANEL_FIELDS[name].infotext): value for name, value in named.items()
            }
            written = p.extra_generation_params
            generation.overwritten = {
                key: written[key] for key in generation.parameters if key in written
            }
            claim(p, has_merged=True)
            p.get_token_merging_ratio = generation.token_merging_ratio


def leave_unmerged(p: Any, why: str) -> None:
    """Says that p's generation doesn't merge although it was asked to, and takes back what claims
    that it does."""
    _begun(p).settings = None
    claim(p, has_merged=False)
    line = f"nothing merged: {why}"
    last.settings, last.summary = None, line
    say(p, line)
    log.warning(line)


def claim(p: Any, has_merged: bool, failure: str | None = None) -> None:
    """Writes the parameters of p's coming pictures: ours if something merged and nothing failed, or
    the failure."""
    generation = _begun(p)
    own = {ERROR_KEY: failure} if failure else generation.parameters if has_merged else {}
    others = _without(p.extra_generation_params, (*generation.parameters, ERROR_KEY))
    p.extra_generation_params = {**others, **generation.overwritten, **own}


def say(p: Any, line: str, suffix: str = "") -> None:
    """Shows a line under the picture; where an earlier batch said the same with another `suffix`,
    in its place."""
    comments = _begun(p).comments
    p.comments.pop(comments.get(line), None)
    comments[line] = COMMENT + line + suffix
    p.comment(comments[line])


def erase(p: Any) -> None:
    """Takes what was written for a generation off p, which loops use again; not off a p that it is
    a copy of."""
    generation: Generation | None = vars(p).pop(ON_P, None)
    if generation is not None:
        p.extra_generation_params = _without(
            p.extra_generation_params, (*generation.parameters, ERROR_KEY)
        )
        p.comments = _without(p.comments, generation.comments.values())
        if vars(p).get("get_token_merging_ratio") == generation.token_merging_ratio:
            del p.get_token_merging_ratio


def built_in_is_on(p: Any) -> bool:
    """Whether WebUI's own token merging would be on, whatever stands in the place of p's method."""
    ratio = type(p).get_token_merging_ratio
    return bool(ratio(p) or (has_hires_pass(p) and ratio(p, for_hr=True)))


def has_hires_pass(p: Any) -> bool:
    """Whether hires fix is on."""
    return bool(getattr(p, "enable_hr", False))


def schedule_steps(p: Any, is_hires: bool) -> int | None:
    """The steps from pure noise, of which img2img and a hires pass take only the last ones."""
    own = getattr(p, "hr_second_pass_steps", 0) if is_hires else 0
    return own or getattr(p, "steps", None)


def is_left_to_built_in(p: Any) -> bool:
    """Whether the settings page says to leave p's generation to WebUI's own token merging."""
    return built_in_is_on(p) and not options.option(options.OVERRULE_BUILT_IN)


def _begun(p: Any) -> Generation:
    """The generation of p; from its first line on, p has parameters and comments of its own: copies
    of p share them."""
    generation = of(p)
    if generation is None:
        generation = Generation(weakref.ref(p))
        setattr(p, ON_P, generation)
        p.extra_generation_params, p.comments = dict(p.extra_generation_params), dict(p.comments)
    return generation


def _without(mapping: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _why_not(p: Any, settings: MergeSettings) -> str | None:
    """Why a generation with right settings can't merge, as far as can be told before its model is
    loaded; or None."""
    if settings.apply_to == "hires pass" and not has_hires_pass(p):
        where = "a picture without hires fix" if hasattr(p, "enable_hr") else "img2img"
        return f"apply to is {settings.apply_to!r}, and {where} has none"
    return LEFT_TO_BUILT_IN if is_left_to_built_in(p) else None
