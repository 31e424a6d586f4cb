"""Compare a picture and its time with and without merging, by a tiny model in a stand-in for WebUI.

Without a prompt a page is served until Ctrl-C; with one, the pictures are made and saved without a
page.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import threading
from pathlib import Path

from ..host import Host
from . import page
from .compare import sheet
from .model import MODELS, TinyModel
from .page import SEED, SIDES, STEPS


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = make_parser().parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # The first model is loaded at the start.
    names = sorted(MODELS, key=lambda name: name != options.model)
    with Host({name: functools.partial(_load_model, name) for name in names}) as host:
        from modules import shared

        # The summary is shown with the pictures, not logged.
        shared.opts.set("tome_log_level", "WARNING")
        # torch's first run is slow, and belongs to neither picture's time.
        page.compare(host, host.script_args([True, 0.5]), steps=2)
        return _serve(host, options) if options.prompt is None else _save(host, options)


def _load_model(name: str) -> TinyModel:
    """Load a trained model; without its weights, say so and return a random one."""
    try:
        return TinyModel.load(name)
    except FileNotFoundError as error:
        print(f"No trained model ({error}); going on with random weights.")
        return TinyModel.random()


def make_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__)
    parser.add_argument("prompt", nargs="?", help="without it a page is served")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="default: emoji")
    parser.add_argument("--port", type=int, help="of the page (default: first free from 7860)")
    parser.add_argument("--theme", choices=["light", "dark"], help="of the page")
    saved = parser.add_argument_group("with a prompt")
    saved.add_argument("--ratio", type=float, default=0.5, help="of tokens to remove (0.5)")
    saved.add_argument("--size", type=_size, default=(32, 32), metavar="WxH", help="default: 32x32")
    saved.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    saved.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    saved.add_argument("--out", type=Path, default=Path("out/demo.png"), help="out/demo.png")
    return parser


def _size(text: str) -> tuple[int, int]:
    lowest, highest, step = SIDES.values()
    sides = [int(side) for side in re.findall(r"^(\d+)x(\d+)$", text) for side in side]
    if not sides or any(side < lowest or side > highest or side % step for side in sides):
        raise argparse.ArgumentTypeError(
            f"must be two multiples of {step} in [{lowest}, {highest}], such as 48x32, got {text!r}"
        )
    return sides[0], sides[1]


def _serve(host: Host, options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. Exits if the port is taken."""
    os.environ.setdefault("NO_PROXY", "127.0.0.1,localhost")  # gradio asks itself whether it is up
    host.load_page(page.build(host, options.theme))
    try:
        app, address, _ = host.demo.queue().launch(
            server_name="127.0.0.1",
            server_port=options.port,
            prevent_thread_lock=True,
            quiet=True,
            show_api=False,
        )
    except OSError as error:
        raise SystemExit(f"The page can't be served: {error}") from error
    # As WebUI does: gradio lets pages of other sites call this one.
    others = [one for one in app.user_middleware if one.cls.__name__ != "CORSMiddleware"]
    app.user_middleware = others
    app.middleware_stack = app.build_middleware_stack()
    host.start_app(app)
    try:
        print(f"The page: {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("Stopping.")
    finally:
        host.demo.close(verbose=False)
    return 0


def _save(host: Host, options: argparse.Namespace) -> int:
    tome = {"ratio": options.ratio, "schedule": "constant", "map_step": max(options.steps // 2, 1)}
    fields = {"prompt": options.prompt, "steps": options.steps, "seed": options.seed}
    fields |= zip(("width", "height"), options.size, strict=True)
    pictures, merged = page.compare(host, host.script_args([tome]), **fields)
    for word in host.sd_model.unknown_words(options.prompt):
        print(f"The model does not know the word {word!r}.")
    print(merged.comments.strip())
    if "ToMe error" in merged.extra_generation_params:
        return 2
    print(*(label for _, label in pictures[:2]), sep="\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(*zip(*pictures, strict=True), columns=len(pictures)).save(options.out)
    print(f"saved: {options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
