"""`python -m tomesd_core.demo "red apple" --ratio 0.5 --out apple.png`: a picture with and without merging."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from PIL import Image

from .host import start
from .model import WEIGHTS, TinyModel

SCALE = 8
"""Pixels of the saved picture for each of the model's: its own are too small to look at."""


def main(argv: list[str] | None = None) -> int:
    """Makes both pictures in the miniature host, saves them side by side, and says what merging did."""
    parser = argparse.ArgumentParser(prog="python -m tomesd_core.demo", description=__doc__)
    parser.add_argument("prompt", nargs="?", default="cat face")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens removed, 0 to 0.75")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"))
    options = parser.parse_args(argv)

    model = TinyModel.load() if (WEIGHTS / "tiny.safetensors").exists() else TinyModel.random()
    unknown = model.unknown_words(options.prompt)
    if unknown:
        print(f"The model doesn't know {', '.join(unknown)}.")
    with start(model) as host:

        def make(*arguments: Any) -> tuple[Any, float]:
            began = time.perf_counter()
            processed = host.txt2img(
                prompt=options.prompt,
                steps=options.steps,
                seed=options.seed,
                width=model.image_shape[2],
                height=model.image_shape[1],
                cfg_scale=3.0,
                sampler_name="Euler",
                alwayson_scripts={"ToMe": {"args": list(arguments)}},
            )
            return processed, time.perf_counter() - began

        # The first run of anything in torch is slow: it is neither picture's time.
        make(False)
        plain, plain_seconds = make(False)
        merged, merged_seconds = make(True, options.ratio)
    error = merged.extra_generation_params.get("ToMe error")
    if error:
        print(f"Nothing was merged: {error}")
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(plain.images[0], merged.images[0]).save(options.out)
    print(f"without merging: {plain_seconds:.2f} s")
    print(f"with merging:    {merged_seconds:.2f} s")
    print(merged.comments.strip())
    print(f"side by side, without and with: {options.out.resolve()}")
    return 0


def side_by_side(*pictures: Image.Image) -> Image.Image:
    """The pictures in a row, enlarged without smoothing."""
    width, height = pictures[0].width * SCALE, pictures[0].height * SCALE
    row = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        row.paste(picture.convert("RGB").resize((width, height), Image.NEAREST), (number * width, 0))
    return row


if __name__ == "__main__":
    raise SystemExit(main())
