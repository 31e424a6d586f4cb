"""What merging does to a picture and to the time, in a miniature WebUI with a tiny model.

Without a prompt a page is served until Ctrl-C; with one, the pictures are made and saved without a page.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..host import Host, start
from ..host.__main__ import load_model, serve
from .compare import SCRIPT, sheet

EXTENSIONS = [Path(__file__).resolve().parents[2], Path(__file__).resolve().parent / "extension"]
STEPS, SAMPLER, CFG, SEED = 20, "Euler", 3.0, 1
SIDES = {"minimum": 16, "maximum": 96, "step": 8}
"""What the model can make, in pixels; it was trained at 32."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; gives its exit status."""
    options = _parser().parse_args(argv)
    model = load_model()
    with tempfile.TemporaryDirectory(prefix="tome-demo-") as data:
        Path(data, "ui-config.json").write_text(json.dumps(_page_defaults()), encoding="utf-8")
        # What was merged is said beside the pictures.
        Path(data, "config.json").write_text(json.dumps({"tome_log_level": "WARNING"}), encoding="utf-8")
        with start({"tiny": model}, EXTENSIONS, data, theme=options.theme) as host:
            # The first run of anything in torch is slow: it is neither picture's time.
            _make(host, "", [True, 0.5], steps=2)
            if options.prompt is None:
                serve(host, options.port)
                return 0
            return _save(host, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__)
    parser.add_argument("prompt", nargs="?", help="what to make; left out, a page is served")
    parser.add_argument("--port", type=int, help="the page's port (default: the first free one from 7860)")
    parser.add_argument("--theme", choices=["light", "dark"], help="the page's colours (default: the browser's)")
    saved = parser.add_argument_group("with a prompt")
    saved.add_argument("--ratio", type=float, default=0.5, help="share of the tokens removed, up to 0.9375 (0.5)")
    saved.add_argument("--size", type=_size, default=(32, 32), metavar="WIDTHxHEIGHT", help="default: 32x32")
    saved.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    saved.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    saved.add_argument("--out", type=Path, default=Path("out/demo.png"), help="default: out/demo.png")
    return parser


def _size(text: str) -> tuple[int, int]:
    lowest, highest, step = SIDES.values()
    sides = [int(side) for side in re.findall(r"^(\d+)x(\d+)$", text) for side in side]
    if not sides or any(side < lowest or side > highest or side % step for side in sides):
        raise argparse.ArgumentTypeError(
            f"must be two multiples of {step} in [{lowest}, {highest}], such as 48x32, got {text!r}"
        )
    return sides[0], sides[1]


def _page_defaults() -> dict[str, Any]:
    """The page's first values, as WebUI keeps them: by the controls' labels."""
    sides = {f"txt2img/{side}/{name}": value for side in ("Width", "Height") for name, value in SIDES.items()}
    return {
        **sides,
        "txt2img/Prompt/value": "cat face",
        "txt2img/CFG Scale/value": CFG,
        "txt2img/Script/value": SCRIPT,
        "customscript/builtin.py/txt2img/Sampling method/value": SAMPLER,
        "customscript/builtin.py/txt2img/Sampling steps/value": STEPS,
        "customscript/builtin.py/txt2img/Seed/value": SEED,
        "customscript/tome.py/txt2img/ToMe/value": True,
        "customscript/tome.py/txt2img/Merge map: step/value": STEPS // 2,
    }


def _make(host: Host, prompt: str, tome: list[Any] | dict[str, Any], **request: Any) -> Any:
    """The comparison; `tome` are the script's arguments."""
    arguments = {"args": tome if isinstance(tome, list) else [tome]}
    fields = {"steps": STEPS, "seed": SEED, "width": 32, "height": 32, "cfg_scale": CFG, "sampler_name": SAMPLER}
    return host.txt2img(prompt=prompt, script_name=SCRIPT, alwayson_scripts={"ToMe": arguments}, **fields | request)


def _save(host: Host, options: argparse.Namespace) -> int:
    width, height = options.size
    tome = {"ratio": options.ratio, "schedule": "constant", "map_step": max(options.steps // 2, 1)}
    made = _make(host, options.prompt, tome, steps=options.steps, seed=options.seed, width=width, height=height)
    print(made.comments.strip())
    if "ToMe error" in made.extra_generation_params:
        return 2
    pictures = made.images[made.index_of_first_image :]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, [picture.info["label"] for picture in pictures], columns=len(pictures)).save(options.out)
    print(f"saved: {options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
