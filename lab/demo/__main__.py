"""What merging does to a picture and to the time, with one of two tiny models in a stand-in for
WebUI.

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
    """Runs the command; gives its exit status."""
    options = _parser().parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # The chosen one is the first, and so the one to begin with.
    names = sorted(MODELS, key=lambda name: name != options.model)
    with Host({name: functools.partial(_load_model, name) for name in names}) as host:
        from modules import shared

        # What was merged is said beside the pictures.
        shared.opts.set("tome_log_level", "WARNING")
        # The first run of anything in torch is slow: it is neither picture's time.
        page.compare(host, host.script_args([True, 0.5]), steps=2)
        return _serve(host, options) if options.prompt is None else _save(host, options)


def _load_model(name: str) -> TinyModel:
    """A trained model; without its weights, it says so and gives a random one."""
    try:
        return TinyModel.load(name)
    except FileNotFoundError as error:
        print(f"No trained model ({error}); going on with random weights.")
        return TinyModel.random()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__)
    parser.add_argument("prompt", nargs="?", help="what to make; left out, a page is served")
    parser.add_argument(
        "--model",
        choices=MODELS,
        default=MODELS[0],
        help="by what it was trained on (default: emoji)",
    )
    parser.add_argument(
        "--port", type=int, help="the page's port (default: the first free one from 7860)"
    )
    parser.add_argument(
        "--theme", choices=["light", "dark"], help="the page's colours (default: the browser's)"
    )
    saved = parser.add_argument_group("with a prompt")
    saved.add_argument(
        "--ratio", type=float, default=0.5, help="share of the tokens removed, up to 0.9375 (0.5)"
    )
    saved.add_argument(
        "--size", type=_size, default=(32, 32), metavar="WIDTHxHEIGHT", help="default: 32x32"
    )
    saved.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    saved.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    saved.add_argument(
        "--out", type=Path, default=Path("out/demo.png"), help="default: out/demo.png"
    )
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
    """Serves the page until Ctrl-C. Exits where the port is taken."""
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
    # As WebUI does: gradio lets any other page call this one.
    app.user_middleware = [m for m in app.user_middleware if m.cls.__name__ != "CORSMiddleware"]
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
    fields = {
        "steps": options.steps,
        "seed": options.seed,
        "width": options.size[0],
        "height": options.size[1],
    }
    pictures, merged = page.compare(host, host.script_args([tome]), prompt=options.prompt, **fields)
    unknown = [
        f"The model does not know the word {word!r}."
        for word in host.sd_model.unknown_words(options.prompt)
    ]
    print(*unknown, merged.comments.strip(), sep="\n")
    if "ToMe error" in merged.extra_generation_params:
        return 2
    print(*(label for _, label in pictures[:2]), sep="\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(*zip(*pictures, strict=True), columns=len(pictures)).save(options.out)
    print(f"saved: {options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
