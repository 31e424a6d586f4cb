"""Many mixed generations in a running WebUI, or in the stand-in for it: none may be lost, and
nothing may stay of any.

Sizes, samplers, batches, hires fix, img2img and all of ToMe's settings are drawn from --seed. A
quarter of the requests are wrong: each must be refused, or made without merging under a `ToMe
error`. Some are interrupted or skipped. Every tenth is the same picture without merging, which must
be bit for bit what it was at first. Behind each of these the memory of WebUI's process is read. Its
growth is taken over what it was after --warmup generations, when allocators have what they need; at
both ends it is the median of a tenth of the readings. WebUI (A1111's or Forge) needs --api.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import statistics
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from tomesd_core.settings import PANEL_FIELDS, Setting
from tomesd_core.webui.arguments import MAP_FIELDS
from tomesd_core.webui.presets import BUILT_IN

from ..demo.model import TinyModel
from .options import Size, picture_size, whole_number
from .packages import require
from .timing import progress

SIZES = [(256, 256), (320, 256), (256, 384), (128, 192)]
"""In pixels of WebUI; the last one's layers are too small to merge."""

SAMPLERS = ("Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ SDE", "DDIM", "PLMS", "LMS")
"""Used where the server has them."""

SCRIPTS = "alwayson_scripts"
EVERY, WRONG, ENDED, MOST_GROWTH = 10, 0.25, 0.1, 0.05
SETTINGS: dict[str, Setting] = {**PANEL_FIELDS, **MAP_FIELDS}
WRONG_VALUES = ("abc", "", [], {}, True, -1, 1e9)
"""Of a setting. None is right: it is the default."""


HIRES_STEP = 64
"""Pixels that some hosts round the sides of a hires pass to."""


class RefusedError(ValueError):
    """The server answered that it can't do what it was asked."""


Answer = namedtuple("Answer", ["images", "infotext"])
"""What came of a request: PIL pictures, without a grid of them, and the first one's parameters as
text."""


class WebUI:
    """A running WebUI, by its API. Raises `ValueError` where it doesn't answer."""

    pixels = 1
    """Of WebUI along one of this server's."""

    def __init__(self, url: str, pid: int | None) -> None:
        self._url = url.rstrip("/")
        self.samplers = [
            one["name"] for one in self._ask("GET", "/sdapi/v1/samplers") if one["name"] in SAMPLERS
        ]
        self.presets = [preset["name"] for preset in self._ask("GET", "/tome/presets")]
        self.upscaler = next(
            (mode["name"] for mode in self._ask("GET", "/sdapi/v1/latent-upscale-modes")), "None"
        )
        listening = (
            one for one in require("psutil").net_connections("tcp") if one.status == "LISTEN"
        )
        self.pid = pid or next(
            (one.pid for one in listening if one.laddr.port == urlsplit(url).port), None
        )
        """The process whose memory is read; None where none of this machine is known."""

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        requests = require("requests")
        try:
            answer = requests.request(method, self._url + path, json=body, timeout=1200)
        except requests.RequestException as error:
            raise ValueError(f"{self._url} doesn't answer: {error}") from error
        if answer.ok:
            return answer.json()
        raise RefusedError(f"{self._url}{path} answers {answer.status_code}: {answer.text[:300]}")

    def make(self, tab: str, body: Mapping[str, Any]) -> Answer:
        """What the API makes of a request. Raises `RefusedError`."""
        answer = self._ask("POST", f"/sdapi/v1/{tab}", body)
        info = json.loads(answer["info"])
        return Answer(
            [*map(_decoded, answer["images"])][info["index_of_first_image"] :], info["infotexts"][0]
        )

    def is_sampling(self) -> bool:
        """Whether a picture is being made, and its first step is done."""
        state = self._ask("GET", "/sdapi/v1/progress")["state"]
        return bool(state["job_count"] and state["sampling_step"])

    def end(self, how: str) -> None:
        """Ends what is being made: `interrupt` or `skip`."""
        self._ask("POST", f"/sdapi/v1/{how}", {})


class StandIn:
    """The stand-in for WebUI in this process, with a tiny model; otherwise as `WebUI`."""

    pixels, upscaler = 8, "Latent"

    def __init__(self, host: Any) -> None:
        from modules import devices, processing, sd_samplers, shared

        self._host, self._processing, self._state, self._nans = (
            host,
            processing,
            shared.state,
            devices.NansException,
        )
        self.samplers = [name for name in SAMPLERS if name in sd_samplers.all_samplers_map]
        self.presets, self.pid = list(BUILT_IN), os.getpid()

    def make(self, tab: str, body: Mapping[str, Any]) -> Answer:
        if body["sampler_name"] not in self.samplers or set(body[SCRIPTS]) - {"ToMe"}:
            raise RefusedError("sampler or script not found")
        kind = self._processing.StableDiffusionProcessingTxt2Img
        if tab == "img2img":
            kind = self._processing.StableDiffusionProcessingImg2Img
            body = {**body, "init_images": [*map(_decoded, body["init_images"])]}
        fields = {field.name for field in dataclasses.fields(kind) if field.init}
        tome = body[SCRIPTS].get("ToMe", {}).get("args")
        p = self._host.make_p(
            tome, tab, **{name: value for name, value in body.items() if name in fields}
        )
        try:
            processed = self._processing.process_images(p)
        except self._nans as error:
            raise RefusedError(str(error)) from error
        return Answer(processed.images[processed.index_of_first_image :], processed.infotexts[0])

    def is_sampling(self) -> bool:
        return self._state.sampling_step > 0

    def end(self, how: str) -> None:
        getattr(self._state, how)()


Server = WebUI | StandIn


@dataclasses.dataclass(frozen=True)
class Request:
    """One request, and what must come of it."""

    body: dict[str, Any]
    tab: str = "txt2img"
    outcome: str = "made"
    """`made`; `told` (made without merging, and said why); `refused`; or `either` of made and
    refused."""
    ends_by: str | None = None
    """What is pressed while it is made."""


def requests(server: Server, seed: int, sizes: Sequence[Size], steps: int) -> Iterator[Request]:
    """Without end, and the same ones from a seed. The first is fixed, and comes back as every
    tenth."""
    chance = random.Random(seed)
    sides = [
        {"width": wide // server.pixels, "height": high // server.pixels} for wide, high in sizes
    ]
    fixed = Request(
        {
            "prompt": "cat",
            "seed": 1,
            "steps": steps,
            "sampler_name": "Euler",
            **sides[0],
            SCRIPTS: {},
        }
    )
    while True:
        yield fixed
        for _ in range(EVERY - 1):
            is_wrong = chance.random() < WRONG
            # Of the fixed one it is known how it looks without merging.
            right = (
                fixed
                if is_wrong and chance.random() < 0.5
                else _right(chance, server, sides, steps)
            )
            yield _spoilt(chance, right) if is_wrong else right


def _right(
    chance: random.Random, server: Server, sides: Sequence[Mapping[str, int]], steps: int
) -> Request:
    choice = chance.choice
    body = {
        "prompt": choice(("cat", "red apple AND cat :0.5", "")),
        "seed": chance.randrange(2**32),
        **choice(sides),
    }
    body |= {"steps": chance.randint(2, 2 * steps), "sampler_name": choice(server.samplers)}
    body |= {
        "cfg_scale": choice((1, 3, 7)),
        "batch_size": choice((1, 1, 2)),
        "n_iter": choice((1, 1, 2)),
    }
    body |= {"denoising_strength": choice((0.6, 0.9)), SCRIPTS: _arguments(chance, server.presets)}
    tab, ends_by = choice(("txt2img", "txt2img", "img2img")), None
    if tab == "img2img":
        file = io.BytesIO()
        Image.radial_gradient("L").save(file, "PNG")
        body["init_images"] = [base64.b64encode(file.getvalue()).decode()]
    elif chance.random() < 0.3:
        # Forge asks for the second pass's modules, and the others don't mind.
        body |= {"enable_hr": True, "hr_scale": 1.25, "hr_upscaler": server.upscaler}
        body["hr_additional_modules"] = ["Use same choices"]
    if chance.random() < ENDED:
        ends_by, body["steps"] = choice(("interrupt", "skip")), 10 * steps
    return Request(body, tab, ends_by=ends_by)


def _arguments(chance: random.Random, presets: Sequence[str]) -> dict[str, Any]:
    """The scripts' arguments: ours in any form, or none."""
    values = {name: _value(chance, setting) for name, setting in SETTINGS.items()}
    values["min_tokens"] = chance.choice((0, 0, 2048))  # Most of its range is above all sizes.
    some = dict(chance.sample(list(values.items()), chance.randint(1, 4)))
    whole, few = (
        [True, *values.values()],
        [True, *values.values()][: chance.randint(1, len(values))],
    )
    forms = (
        whole,
        few,
        [some],
        [{"preset": chance.choice(presets), **some}],
        [False, *values.values()],
        None,
    )
    form = chance.choice(forms)
    return {} if form is None else {"ToMe": {"args": form}}


def _value(chance: random.Random, setting: Setting) -> Any:
    if setting.choices:
        return chance.choice(setting.choices)
    number = chance.randint(0, round((setting.maximum - setting.minimum) / setting.step))
    return type(setting.default)(round(setting.minimum + number * setting.step, 6))


def _spoilt(chance: random.Random, request: Request) -> Request:
    """The same with something wrong, and not ended early."""
    name, value = chance.choice(list(SETTINGS)), chance.choice(WRONG_VALUES)
    in_order = {
        **{name: setting.default for name, setting in SETTINGS.items()},
        name: value,
    }.values()
    for_tome = (
        [True, *in_order],
        [{name: value}],
        [{f"{name}s": 1}],
        [{"preset": "no such one"}],
        ["yes", 0.5],
    )
    outcomes: list[tuple[str, dict[str, Any]]] = [
        ("told", {SCRIPTS: {"ToMe": {"args": one}}}) for one in for_tome
    ]
    # WebUI 1.10 has a sampler for every name, and Forge doesn't look for the NaN that such a
    # guidance makes.
    outcomes += [
        ("either", {"sampler_name": "no such one"}),
        ("either", {"steps": 3, "cfg_scale": 1e38}),
    ]
    outcomes += [("refused", {SCRIPTS: {"no such one": {"args": []}}})]
    outcome, wrong = chance.choice(outcomes)
    return Request({**request.body, **wrong}, request.tab, outcome)


def _decoded(picture: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench soak`."""
    parser.add_argument(
        "url", nargs="?", help="of a running WebUI; left out, the stand-in runs in this process"
    )
    parser.add_argument(
        "--count", type=whole_number, default=1000, metavar="N", help="generations (1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument(
        "--sizes",
        type=picture_size,
        nargs="+",
        default=SIZES,
        metavar="WxH",
        help="of the pictures",
    )
    parser.add_argument(
        "--steps", type=whole_number, default=2, metavar="N", help="of the fixed picture (2)"
    )
    parser.add_argument(
        "--warmup",
        type=whole_number,
        default=200,
        metavar="N",
        help="at most half of --count (200)",
    )
    parser.add_argument(
        "--pid", type=int, help="WebUI's process (default: the one that listens at the URL's port)"
    )


def run(args: argparse.Namespace) -> int:
    """Makes the generations, says which went wrong, then the sums. The status is 1 where anything
    did."""
    from ..host import Host  # It needs gradio, which no other subcommand does.

    standing_in = (
        Host({"tiny": lambda: TinyModel.random(channel_mult=[1, 1])}) if not args.url else None
    )
    with standing_in or contextlib.nullcontext(), progress(args.count) as tick:
        server = StandIn(standing_in) if standing_in else WebUI(args.url, args.pid)
        return soak(
            server,
            requests(server, args.seed, args.sizes, args.steps),
            args.count,
            args.warmup,
            tick,
        )


def soak(
    server: Server, some: Iterator[Request], count: int, warmup: int, tick: Callable[[str], None]
) -> int:
    """The run itself."""
    sums: Counter[str] = Counter()
    memory: list[int] = []
    began, fixed, expected = time.monotonic(), None, None
    for number, request in enumerate(islice(some, count)):
        fixed = fixed or request
        tick(f"{request.tab}, {request.outcome}")
        sums["wrong"] += request.outcome in ("told", "refused")
        try:
            answer = _made(server, request)
        except RefusedError as error:
            problem = "" if request.outcome in ("refused", "either") else f"lost: {error}"
        else:
            problem = _problem(request, answer)
            if (
                not problem
                and request.outcome != "either"
                and {**request.body, SCRIPTS: {}} == fixed.body
            ):
                sums["compared"] += 1
                expected = expected or answer.images[0].tobytes()
                if answer.images[0].tobytes() != expected:
                    problem = "unclean: it differs from the first one without merging"
        sums[problem.partition(":")[0]] += 1
        if problem:
            print(f"{number}: {problem}\n   {request}", file=sys.stderr)
        if request is fixed and server.pid and number >= min(warmup, count // 2):
            memory.append(require("psutil").Process(server.pid).memory_info().rss)
    print(
        f"generations: {count}, in {time.monotonic() - began:.0f} s\npictures lost: {sums['lost']}"
    )
    print(f"unclean: {sums['unclean']} of {sums['compared']} that were compared")
    print(f"refused rightly: {sums['wrong'] - sums['not refused']} of {sums['wrong']}")
    return int(
        _growth(memory) > MOST_GROWTH or sums["lost"] + sums["unclean"] + sums["not refused"] > 0
    )


def _made(server: Server, request: Request) -> Answer:
    """Makes it, and ends it early where it is to be."""
    with ThreadPoolExecutor(1) as aside:
        answer = aside.submit(server.make, request.tab, request.body)
        if request.ends_by:
            while not answer.done() and not server.is_sampling():
                time.sleep(0.01)
            server.end(request.ends_by)
        return answer.result()


def _problem(request: Request, answer: Answer) -> str:
    """What is wrong with a picture that was made; empty where nothing is."""
    body = request.body
    is_told, is_merged = (key in answer.infotext for key in ("ToMe error:", "ToMe ratio:"))
    if request.outcome == "refused" or (request.outcome == "told" and (is_merged or not is_told)):
        return f"not refused: {answer.infotext}"
    if request.outcome == "made" and is_told:
        return f"lost: {answer.infotext}"
    wanted = 1 if request.ends_by else body.get("batch_size", 1) * body.get("n_iter", 1)
    scale = body.get("hr_scale", 1)
    size = int(body["width"] * scale), int(body["height"] * scale)
    sizes = [image.size for image in answer.images]
    is_size = bool(sizes) and all(
        abs(side - asked) < HIRES_STEP for side, asked in zip(sizes[0], size, strict=True)
    )
    if len(sizes) < wanted or not (is_size or request.ends_by):
        return f"lost: there are {sizes}, not {wanted} of {size}"
    return ""


def _growth(readings: Sequence[int]) -> float:
    """By how much the memory grew; 0 where it is not known. Prints it."""
    if not readings:
        print("memory growth: not measured, the process isn't known: give --pid")
        return 0.0
    tenth = math.ceil(len(readings) / 10)
    before, after = statistics.median(readings[:tenth]), statistics.median(readings[-tenth:])
    print(f"memory growth: {after / before - 1:+.1%} ({before / 1e6:.0f} to {after / 1e6:.0f} MB)")
    return after / before - 1
