"""What the subcommands' command lines share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tomesd_core.settings import FIELDS, METHODS

from . import packages

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ATTENTION = ("plain", "sdp")

Size = tuple[int, int]
"""Pixels of a picture: (width, height)."""


def picture_size(text: str) -> Size:
    """`512x768` as (width, height) in pixels; both must be multiples of 64, so that the UNet's
    levels divide."""
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(size) or any(side % 64 for side in size):
        raise argparse.ArgumentTypeError(
            f"a size is WIDTHxHEIGHT, both multiples of 64 pixels, got {text!r}"
        )
    return size


def merge_ratio(text: str) -> float:
    """A ratio that `MergeSettings` takes."""
    try:
        return FIELDS["ratio"].check("ratio", float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def whole_number(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 up is needed, got {text!r}")
    return int(text)


def picture_side(text: str) -> int:
    """A side of a tiny model's pictures, in pixels: its levels halve it twice."""
    side = whole_number(text)
    if side % 8:
        raise argparse.ArgumentTypeError(f"a side is a multiple of 8 pixels, got {text!r}")
    return side


def add_shared(parser: argparse.ArgumentParser, rounds: bool = True) -> None:
    """The options of every subcommand, and of one that measures in rounds. None is `fill_in`'s to
    replace."""
    if rounds:
        parser.add_argument(
            "--rounds", type=whole_number, metavar="N", help="how often everything is measured"
        )
    parser.add_argument(
        "--attention", choices=ATTENTION, help="ldm's own attention, or torch's fused one"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--device",
        type=torch.device,
        default=None,
        help="default: cuda where there is one, else cpu",
    )
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="threads of torch on the CPU"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="where files go (./out)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller, fewer, shorter")


def add_unet(parser: argparse.ArgumentParser) -> None:
    """The options of a subcommand that runs a whole UNet."""
    parser.add_argument(
        "--sizes", type=picture_size, nargs="+", metavar="WxH", help="pictures, in pixels"
    )
    parser.add_argument(
        "--ratios", type=merge_ratio, nargs="+", metavar="R", help="shares of the tokens to remove"
    )
    parser.add_argument(
        "--methods", choices=METHODS, nargs="+", help="how ours merges (default: keys and paper)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="merge also where it can't pay (skip_unprofitable=False)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", type=Path, metavar="FILE.safetensors", help="of Stable Diffusion 1 or 2"
    )
    parser.add_argument(
        "--diffusers",
        action="store_true",
        help="diffusers' UNet of random weights in place of ldm's",
    )
    which.add_argument(
        "--tiny", action="store_true", help="a tiny UNet: tries the command, and measures nothing"
    )


def fill_in(
    args: argparse.Namespace,
    usual: Mapping[str, Any],
    quick: Mapping[str, Any],
    tiny: Mapping[str, Any],
) -> None:
    """Sets what was not given, by `--tiny`, `--quick` or else `usual`; the device and torch's
    threads too.

    Raises `MissingPackage` for what would be missed only after the measuring, `ValueError` for a
    device that torch doesn't have.
    """
    for name, value in {
        **usual,
        **(quick if args.quick else {}),
        **(tiny if args.tiny else {}),
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for package in ("matplotlib", "tqdm"):
        packages.require(package)
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"this torch can't use the device {args.device}: {error}") from error
    if args.threads:
        torch.set_num_threads(args.threads)
    args.torch_dtype = DTYPES[args.dtype]
