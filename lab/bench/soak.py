"""Many mixed generations in a running WebUI, or in the stand-in for it: none may be lost, and nothing may stay of any.

Sizes, samplers, batches, hires fix, img2img and all of ToMe's settings are drawn from --seed. A quarter of the requests
are wrong: each must be refused, or made without merging under a `ToMe error`. Some are interrupted or skipped. Every
tenth is the same picture without merging, which must be bit for bit what it was at first. Behind each of these the
memory of WebUI's process is read. Its growth is taken over what it was after --warmup generations, when allocators have
what they need; at both ends it is the median of a tenth of the readings. WebUI (A1111's or Forge) needs --api.
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from tomesd_core.settings import PANEL_FIELDS, Setting
from tomesd_core.webui.arguments import MAP_FIELDS
from tomesd_core.webui.presets import BUILT_IN

from ..demo.model import TinyModel
from ..host import Host
from .options import Size, picture_size, whole_number
from .packages import require
from .timing import progress

SIZES = [(256, 256), (320, 256), (256, 384), (128, 192)]
"""In pixels of WebUI; the last one's layers are too small to merge."""

SAMPLERS = ("Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ SDE", "DDIM", "PLMS", "LMS")
"""Used where the server has them."""

EVERY, WRONG, ENDED, MOST_GROWTH = 10, 0.25, 0.1, 0.05
SETTINGS: dict[str, Setting] = {**PANEL_FIELDS, **MAP_FIELDS}
WRONG_VALUES = ("abc", "", None, [], {}, True, -1, 1e9)


class RefusedError(Exception):
    """The server answered that it can't do what it was asked."""


class Answer(NamedTuple):
    """What came of a request: the pictures, without a grid of them, and the first one's parameters."""

    images: list[Image.Image]
    infotext: str


class WebUI:
    """A running WebUI, by its API. Raises `ValueError` where it doesn't answer."""

    pixels = 1
    """Of WebUI along one of this server's."""

    def __init__(self, url: str, pid: int | None) -> None:
        self._url = url.rstrip("/")
        self.samplers = [sampler["name"] for sampler in self._ask("GET", "/sdapi/v1/samplers")]
        self.presets = [preset["name"] for preset in self._ask("GET", "/tome/presets")]
        port = urlsplit(url).port
        listening = (one for one in require("psutil").net_connections("tcp") if one.status == "LISTEN")
        self.pid = pid or next((one.pid for one in listening if one.laddr.port == port), None)
        """The process whose memory is read; None where none of this machine is known."""

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        requests = require("requests")
        try:
            answer = requests.request(method, self._url + path, json=body, timeout=1200)
        except requests.RequestException as error:
            raise ValueError(f"{self._url} doesn't answer: {error}") from error
        if answer.ok:
            return answer.json()
        if method == "GET":
            raise ValueError(f"{self._url}{path} can't be had: is --api on, and ToMe there? {answer.text[:300]}")
        raise RefusedError(f"{answer.status_code}: {answer.text[:300]}")

    def make(self, tab: str, body: Mapping[str, Any]) -> Answer:
        """What the API makes of a request. Raises `RefusedError`."""
        made = self._ask("POST", f"/sdapi/v1/{tab}", body)
        info = json.loads(made["info"])
        return Answer([*map(_decoded, made["images"])][info["index_of_first_image"] :], info["infotexts"][0])

    def is_sampling(self) -> bool:
        """Whether a picture is being made, and its first step is done."""
        state = self._ask("GET", "/sdapi/v1/progress")["state"]
        return bool(state["job_count"] and state["sampling_step"])

    def end(self, how: str) -> None:
        """Ends what is being made: `interrupt` or `skip`."""
        self._ask("POST", f"/sdapi/v1/{how}", {})


class StandIn:
    """The stand-in for WebUI in this process, with a tiny model; otherwise as `WebUI`."""

    pixels = 8

    def __init__(self, host: Host) -> None:
        from modules import sd_samplers

        self._host = host
        self.samplers, self.presets, self.pid = list(sd_samplers.all_samplers_map), list(BUILT_IN), os.getpid()

    def make(self, tab: str, body: Mapping[str, Any]) -> Answer:
        from modules import devices, processing

        if body["sampler_name"] not in self.samplers or set(body.get("alwayson_scripts", {})) - {"ToMe"}:
            raise RefusedError("sampler or script not found")
        kind = processing.StableDiffusionProcessingTxt2Img
        if tab == "img2img":
            kind = processing.StableDiffusionProcessingImg2Img
            body = {**body, "init_images": [*map(_decoded, body["init_images"])]}
        known = {field.name for field in dataclasses.fields(kind) if field.init}
        tome = body.get("alwayson_scripts", {}).get("ToMe", {}).get("args")
        p = self._host.make_p(tome, tab, **{name: value for name, value in body.items() if name in known})
        try:
            made = processing.process_images(p)
        except devices.NansException as error:
            raise RefusedError(str(error)) from error
        return Answer(made.images[made.index_of_first_image :], made.infotexts[0])

    def is_sampling(self) -> bool:
        from modules import shared

        return shared.state.sampling_step > 0

    def end(self, how: str) -> None:
        from modules import shared

        getattr(shared.state, how)()


Server = WebUI | StandIn


@dataclasses.dataclass(frozen=True)
class Request:
    """One request, and what must come of it."""

    body: dict[str, Any]
    tab: str = "txt2img"
    outcome: str = "made"
    """`made`; `told` (made without merging, and said why); `refused`; or `either` of made and refused."""
    ends_by: str | None = None
    """What is pressed while it is made."""


class Requests:
    """Draws requests, the same ones from a seed for servers that have the same samplers and presets."""

    def __init__(self, server: Server, seed: int, sizes: Sequence[Size], steps: int) -> None:
        self._chance, self._steps, self._presets = random.Random(seed), steps, server.presets
        self._sizes = [{"width": wide // server.pixels, "height": high // server.pixels} for wide, high in sizes]
        self._samplers = [name for name in SAMPLERS if name in server.samplers]
        fixed = {"prompt": "cat", "seed": 1, "steps": steps, "sampler_name": "Euler", **self._sizes[0]}
        self.fixed = Request(_with_arguments(fixed, []))

    def draw(self, picture: Image.Image) -> Request:
        """Any request; img2img begins with `picture`."""
        is_wrong = self._chance.random() < WRONG
        # Of the fixed one it is known how it looks without merging.
        request = self.fixed if is_wrong and self._chance.random() < 0.5 else self._right(picture)
        return self._spoilt(request) if is_wrong else request

    def _right(self, picture: Image.Image) -> Request:
        choice = self._chance.choice
        body = {"prompt": choice(("cat", "red apple AND cat :0.5", "")), "seed": self._chance.randrange(2**32)}
        body |= {"steps": self._chance.randint(2, 2 * self._steps), "sampler_name": choice(self._samplers)}
        body |= {"cfg_scale": choice((1, 3, 7)), "batch_size": choice((1, 1, 2)), "n_iter": choice((1, 1, 2))}
        body |= {"denoising_strength": choice((0.6, 0.9)), **choice(self._sizes)}
        tab, ends_by = choice(("txt2img", "txt2img", "img2img")), None
        if tab == "img2img":
            body["init_images"] = [_encoded(picture)]
        elif self._chance.random() < 0.3:
            # Forge asks for the second pass's modules, and the others don't mind.
            body |= {"enable_hr": True, "hr_scale": 1.25, "hr_upscaler": "Latent"}
            body["hr_additional_modules"] = ["Use same choices"]
        if self._chance.random() < ENDED:
            ends_by, body["steps"] = choice(("interrupt", "skip")), 10 * self._steps
        return Request(_with_arguments(body, self._arguments()), tab, ends_by=ends_by)

    def _arguments(self) -> list[Any]:
        """The script's, in any form that it takes."""
        values = {name: self._value(setting) for name, setting in SETTINGS.items()}
        values["min_tokens"] = self._chance.choice((0, 0, 2048))  # Most of its range is above all sizes.
        some = dict(self._chance.sample(list(values.items()), self._chance.randint(1, 4)))
        whole, few = [True, *values.values()], [True, *values.values()][: self._chance.randint(1, len(values))]
        named = {"preset": self._chance.choice(self._presets), **some}
        return self._chance.choice((whole, few, [some], [named], [False, *values.values()], []))

    def _value(self, setting: Setting) -> Any:
        if setting.choices:
            return self._chance.choice(setting.choices)
        number = self._chance.randint(0, round((setting.maximum - setting.minimum) / setting.step))
        return type(setting.default)(round(setting.minimum + number * setting.step, 6))

    def _spoilt(self, request: Request) -> Request:
        """The same with something wrong, and not ended early."""
        name, value = self._chance.choice(list(SETTINGS)), self._chance.choice(WRONG_VALUES)
        defaults = {name: setting.default for name, setting in SETTINGS.items()}
        in_order = [True, *{**defaults, name: value}.values()]
        for_tome = (in_order, [{name: value}], [{f"{name}s": 1}], [{"preset": "no such one"}], ["yes", 0.5])
        outcomes: list[tuple[str, dict[str, Any]]] = [("told", _with_arguments({}, wrong)) for wrong in for_tome]
        outcomes += [("refused", {"sampler_name": "no such one"})]
        outcomes += [("refused", {"alwayson_scripts": {"no such one": {"args": []}}})]
        # Of such a guidance a model makes NaN, which WebUI looks for and Forge doesn't.
        outcomes += [("either", {"steps": 3, "cfg_scale": 1e38})]
        outcome, wrong = self._chance.choice(outcomes)
        return Request({**request.body, **wrong}, request.tab, outcome)


def _with_arguments(body: Mapping[str, Any], arguments: Sequence[Any]) -> dict[str, Any]:
    return {**body, "alwayson_scripts": {"ToMe": {"args": arguments}} if arguments else {}}


def _encoded(picture: Image.Image) -> str:
    """As PNG in base64."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _decoded(picture: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench soak`."""
    parser.add_argument("url", nargs="?", help="of a running WebUI; left out, the stand-in runs in this process")
    parser.add_argument("--count", type=whole_number, default=1000, metavar="N", help="generations (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument(
        "--sizes", type=picture_size, nargs="+", default=SIZES, metavar="WxH", help="the first is fixed"
    )
    parser.add_argument("--steps", type=whole_number, default=2, metavar="N", help="of the fixed picture (2)")
    parser.add_argument("--warmup", type=whole_number, default=100, metavar="N", help="at most half of --count (100)")
    parser.add_argument("--pid", type=int, help="WebUI's process (default: the one that listens at the URL's port)")


def run(args: argparse.Namespace) -> int:
    """Makes the generations, says which went wrong, then the sums. The status is 1 where anything did."""
    with _server(args) as server, progress(args.count) as tick:
        return soak(server, Requests(server, args.seed, args.sizes, args.steps), args.count, args.warmup, tick)


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[Server]:
    if args.url:
        yield WebUI(args.url, args.pid)
        return
    with Host({"tiny": lambda: TinyModel.random(channel_mult=[1, 1])}) as host:
        yield StandIn(host)


def soak(server: Server, requests: Requests, count: int, warmup: int, tick: Callable[[str], None]) -> int:
    """The run itself."""
    sums: Counter[str] = Counter()
    memory: list[tuple[int, int]] = []
    began = time.monotonic()
    fixed = requests.fixed
    expected = server.make(fixed.tab, fixed.body).images[0]
    for number in range(count):
        request = requests.draw(expected) if number % EVERY else fixed
        tick(f"{request.tab}, {request.outcome}")
        try:
            answer = _made(server, request)
        except RefusedError as error:
            answer, problem = None, "" if request.outcome in ("refused", "either") else f"lost: {error}"
        else:
            problem = _lost(request, answer)
            if request.outcome != "either" and {**request.body, "alwayson_scripts": {}} == fixed.body:
                sums["compared"] += 1
                if not problem and answer.images[0].tobytes() != expected.tobytes():
                    problem = "unclean: it differs from the first one without merging"
        sums["wrong"] += request.outcome in ("told", "refused")
        sums[problem.partition(":")[0]] += 1
        if problem:
            print(f"{number}: {problem}\n   {request}", file=sys.stderr)
        if request is fixed and server.pid:
            memory.append((number, require("psutil").Process(server.pid).memory_info().rss))
    print(f"generations: {count}, in {time.monotonic() - began:.0f} s")
    print(f"pictures lost: {sums['lost']}")
    print(f"unclean: {sums['unclean']} of {sums['compared']} that were compared")
    print(f"refused rightly: {sums['wrong'] - sums['not refused']} of {sums['wrong']}")
    grown = _growth([held for number, held in memory if number >= min(warmup, count // 2)])
    return int(sums["lost"] + sums["unclean"] + sums["not refused"] > 0 or grown > MOST_GROWTH)


def _made(server: Server, request: Request) -> Answer:
    """Makes it, and ends it early where it is to be."""
    with ThreadPoolExecutor(1) as aside:
        made = aside.submit(server.make, request.tab, request.body)
        if request.ends_by:
            while not made.done() and not server.is_sampling():
                time.sleep(0.01)
            server.end(request.ends_by)
        return made.result()


def _lost(request: Request, answer: Answer) -> str:
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
    if len(answer.images) < wanted or (answer.images[0].size != size and not request.ends_by):
        return f"lost: {len(answer.images)} pictures of {answer.images[0].size}, not {wanted} of {size}"
    return ""


def _growth(readings: Sequence[int]) -> float:
    """By how much the memory grew; 0 where it is not known. Prints it."""
    if not readings:
        print("memory growth: not measured, the process isn't known: give --pid")
        return 0.0
    tenth = math.ceil(len(readings) / 10)
    before, after = (statistics.median(some) for some in (readings[:tenth], readings[-tenth:]))
    print(f"memory growth: {after / before - 1:+.1%} ({before / 1e6:.0f} to {after / 1e6:.0f} MB)")
    return after / before - 1
