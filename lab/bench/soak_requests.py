"""The requests of `bench soak`, drawn from a seed."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from tomesd_core.settings import Setting
from tomesd_core.webui.arguments import CONTROLS

from .options import Size
from .soak_servers import SCRIPTS, Server

EVERY, WRONG, ENDED = 10, 0.25, 0.1
"""Interval of the fixed request, and probabilities of a wrong request and of one ended early."""

SETTINGS = {name: setting for name, setting in CONTROLS.items() if name != "enabled"}
"""The settings in the order of the script's arguments, after its switch."""
WRONG_VALUES = ("abc", "", [], {}, True, -1, 1e9)
"""Wrong values of a setting. None is right, it is the default."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A request and its expected outcome."""

    body: dict[str, Any]
    tab: str = "txt2img"
    outcome: str = "made"
    """`made`; `reported` (unmerged, with an error); `refused`; or `either` of made and refused."""
    ends_by: str | None = None
    """Button that ends it: `interrupt` or `skip`."""


def requests(server: Server, seed: int, sizes: Sequence[Size], steps: int) -> Iterator[Request]:
    """Yield requests forever, the same ones for a seed; the first one again as every tenth."""
    chance = random.Random(seed)
    sides = [
        {"width": wide // server.pixels, "height": high // server.pixels} for wide, high in sizes
    ]
    body = {"prompt": "cat", "seed": 1, "steps": steps, "sampler_name": "Euler", **sides[0]}
    fixed = Request({**body, SCRIPTS: {}})
    while True:
        yield fixed
        for _ in range(EVERY - 1):
            is_wrong = chance.random() < WRONG
            # Wrong variants of the fixed request are compared with its unmerged picture.
            is_fixed = is_wrong and chance.random() < 0.5
            right = fixed if is_fixed else _right(chance, server, sides, steps)
            yield _wrong(chance, right) if is_wrong else right


def _right(
    chance: random.Random, server: Server, sides: Sequence[Mapping[str, int]], steps: int
) -> Request:
    choice = chance.choice
    body = {
        "prompt": choice(("cat", "red apple AND cat :0.5", "")),
        "seed": chance.randrange(2**32),
        **choice(sides),
        "steps": chance.randint(2, 2 * steps),
        "sampler_name": choice(server.samplers),
        "cfg_scale": choice((1, 3, 7)),
        "batch_size": choice((1, 1, 2)),
        "n_iter": choice((1, 1, 2)),
        "denoising_strength": choice((0.6, 0.9)),
        SCRIPTS: _arguments(chance, server.presets),
    }
    tab, ends_by = choice(("txt2img", "txt2img", "img2img")), None
    if tab == "img2img":
        file = io.BytesIO()
        Image.radial_gradient("L").save(file, "PNG")
        body["init_images"] = [base64.b64encode(file.getvalue()).decode()]
    elif chance.random() < 0.3:
        # Forge requires the second pass's modules, and the others ignore them.
        body |= {"enable_hr": True, "hr_scale": 1.25, "hr_upscaler": server.upscaler}
        body["hr_additional_modules"] = ["Use same choices"]
    if chance.random() < ENDED:
        ends_by, body["steps"] = choice(("interrupt", "skip")), 10 * steps
    return Request(body, tab, ends_by=ends_by)


def _arguments(chance: random.Random, presets: Sequence[str]) -> dict[str, Any]:
    """The scripts' arguments, in any form of the extension's, or none."""
    values = {name: _value(chance, setting) for name, setting in SETTINGS.items()}
    values["min_tokens"] = chance.choice((0, 0, 2048))  # Most of its range is above all sizes.
    some = dict(chance.sample(list(values.items()), chance.randint(1, 4)))
    whole = [True, *values.values()]
    few = whole[: chance.randint(1, len(values))]
    preset = {"preset": chance.choice(presets), **some}
    form = chance.choice((whole, few, [some], [preset], [False, *values.values()], None))
    return {} if form is None else {"ToMe": {"args": form}}


def _value(chance: random.Random, setting: Setting) -> Any:
    if setting.choices:
        return chance.choice(setting.choices)
    number = chance.randint(0, round((setting.maximum - setting.minimum) / setting.step))
    return type(setting.default)(round(setting.minimum + number * setting.step, 6))


def _wrong(chance: random.Random, request: Request) -> Request:
    """The request with an error in it, and not ended early."""
    name, value = chance.choice(list(SETTINGS)), chance.choice(WRONG_VALUES)
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    for_tome = (
        [True, *{**defaults, name: value}.values()],
        [{name: value}],
        [{f"{name}s": 1}],
        [{"preset": "no such one"}],
        ["yes", 0.5],
    )
    outcomes: list[tuple[str, dict[str, Any]]] = [
        ("reported", {SCRIPTS: {"ToMe": {"args": one}}}) for one in for_tome
    ]
    # WebUI 1.10 has a sampler for every name, and Forge doesn't check for the NaN that such a
    # guidance makes.
    outcomes += [("either", {"sampler_name": "no such one"})]
    outcomes += [("either", {"steps": 3, "cfg_scale": 1e38})]
    outcomes += [("refused", {SCRIPTS: {"no such one": {"args": []}}})]
    outcome, wrong = chance.choice(outcomes)
    return Request({**request.body, **wrong}, request.tab, outcome)
