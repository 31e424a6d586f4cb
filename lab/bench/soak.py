"""Many mixed generations in WebUI, or in its stand-in: none may be lost or affect the next ones.

Sizes, samplers, batches, hires fix, img2img and all of ToMe's settings are drawn from --seed. A
quarter of the requests are wrong: each must be refused, or made without merging under a `ToMe
error`. Some are interrupted or skipped. Every tenth is the same picture without merging, which must
stay equal bit for bit; after each of these the memory of WebUI's process is read. Its growth is
measured after --warmup generations, when allocators have what they need, between the medians of the
first and the last tenth of the readings. WebUI (A1111's or Forge) needs --api.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from ..demo.model import TinyModel
from .options import picture_size, whole_number
from .packages import require
from .soak_requests import Request, requests
from .soak_servers import SCRIPTS, Answer, RefusedError, Server, StandIn, WebUI
from .timing import progress

SIZES = [(256, 256), (320, 256), (256, 384), (128, 192)]
"""In pixels of WebUI; the last one's layers are too small to merge."""

MOST_GROWTH = 0.05
HIRES_STEP = 64
"""Multiple of pixels that some hosts round the sides of a hires pass to."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench soak`."""
    parser.add_argument("url", nargs="?", help="of a running WebUI (default: the stand-in)")
    number = {"type": whole_number, "metavar": "N"}
    parser.add_argument("--count", **number, default=1000, help="generations (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (0)")
    parser.add_argument("--sizes", type=picture_size, nargs="+", default=SIZES, metavar="WxH")
    parser.add_argument("--steps", **number, default=2, help="of the fixed picture (2)")
    parser.add_argument("--warmup", **number, default=200, help="at most half of --count (200)")
    parser.add_argument("--pid", type=int, help="WebUI's process (default: by the URL's port)")


def run(args: argparse.Namespace) -> int:
    """Make the generations and print errors and sums; the status is 1 if anything failed."""
    from ..host import Host  # It needs gradio, which no other subcommand does.

    host = None
    if not args.url:
        host = Host({"tiny": lambda: TinyModel.random(channel_mult=[1, 1])})
    with host or contextlib.nullcontext(), progress(args.count) as tick:
        server = WebUI(args.url, args.pid) if host is None else StandIn(host)
        drawn = requests(server, args.seed, args.sizes, args.steps)
        return soak(server, drawn, args.count, args.warmup, tick)


def soak(
    server: Server, drawn: Iterator[Request], count: int, warmup: int, tick: Callable[[str], None]
) -> int:
    """Send `count` requests, the first of which repeats; return the exit status."""
    sums: Counter[str] = Counter()
    memory: list[int] = []
    first = next(drawn)
    judge = _Judge(first)
    began = time.monotonic()
    for number, request in enumerate([first, *islice(drawn, count - 1)]):
        tick(f"{request.tab}, {request.outcome}")
        sums["wrong"] += request.outcome in ("reported", "refused")
        problem = judge.problem(server, request)
        sums[problem.partition(":")[0]] += 1
        if problem:
            print(f"{number}: {problem}\n   {request}", file=sys.stderr)
        if request is first and server.pid and number >= min(warmup, count // 2):
            memory.append(require("psutil").Process(server.pid).memory_info().rss)
    print(f"generations: {count}, in {time.monotonic() - began:.0f} s")
    print(f"pictures lost: {sums['lost']}")
    print(f"unclean: {sums['unclean']} of {judge.compared} that were compared")
    print(f"refused rightly: {sums['wrong'] - sums['not refused']} of {sums['wrong']}")
    has_failed = sums["lost"] + sums["unclean"] + sums["not refused"] > 0
    return int(_growth(memory) > MOST_GROWTH or has_failed)


class _Judge:
    """Checks answers, and that unmerged pictures of the first request stay equal bit for bit."""

    def __init__(self, first: Request) -> None:
        self._first = first
        self._expected: bytes | None = None
        self.compared = 0

    def problem(self, server: Server, request: Request) -> str:
        """Make a request; return its problem, or an empty string."""
        try:
            answer = _made(server, request)
        except RefusedError as error:
            return "" if request.outcome in ("refused", "either") else f"lost: {error}"
        unmerged = {**request.body, SCRIPTS: {}}
        problem = _problem(request, answer)
        if problem or request.outcome == "either" or unmerged != self._first.body:
            return problem
        self.compared += 1
        pixels = answer.images[0].tobytes()
        self._expected = self._expected or pixels
        return "" if pixels == self._expected else "unclean: it differs from the first one"


def _made(server: Server, request: Request) -> Answer:
    """Make a request, and end it early if it asks for that."""
    with ThreadPoolExecutor(1) as aside:
        answer = aside.submit(server.make, request.tab, request.body)
        if request.ends_by:
            while not answer.done() and not server.is_sampling():
                time.sleep(0.01)
            server.end(request.ends_by)
        return answer.result()


def _problem(request: Request, answer: Answer) -> str:
    """Problem of a picture that was made; empty if it has none."""
    body = request.body
    has_error, is_merged = (key in answer.infotext for key in ("ToMe error:", "ToMe ratio:"))
    is_accepted = request.outcome == "reported" and (is_merged or not has_error)
    if request.outcome == "refused" or is_accepted:
        return f"not refused: {answer.infotext}"
    if request.outcome == "made" and has_error:
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
    """Print and return the growth of memory; 0 if it wasn't measured."""
    if not readings:
        print("memory growth: not measured, since the process is unknown: use --pid")
        return 0.0
    tenth = math.ceil(len(readings) / 10)
    before, after = statistics.median(readings[:tenth]), statistics.median(readings[-tenth:])
    print(f"memory growth: {after / before - 1:+.1%} ({before / 1e6:.0f} to {after / 1e6:.0f} MB)")
    return after / before - 1
