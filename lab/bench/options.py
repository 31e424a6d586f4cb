"""Options that the subcommands share."""

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
    """Parse `512x768` as (width, height) in pixels: multiples of 64, for the UNet's levels."""
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(size) or any(side % 64 for side in size):
        raise argparse.ArgumentTypeError(
            f"a size is WIDTHxHEIGHT, both multiples of 64 pixels, got {text!r}"
        )
    return size


def merge_ratio(text: str) -> float:
    """Parse a ratio that `MergeSettings` accepts."""
    try:
        return FIELDS["ratio"].check("ratio", float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def whole_number(text: str) -> int:
    """Parse a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 up is needed, got {text!r}")
    return int(text)


def picture_side(text: str) -> int:
    """Parse a side of a tiny model's pictures: a multiple of 8 pixels, for its three levels."""
    side = whole_number(text)
    if side % 8:
        raise argparse.ArgumentTypeError(f"a side is a multiple of 8 pixels, got {text!r}")
    return side


OPTIONS: dict[str, dict[str, Any]] = {
    "rounds": {"type": whole_number, "metavar": "N", "help": "number of measurements of each run"},
    "attention": {"choices": ATTENTION, "help": "ldm's own attention, or torch's fused one"},
    "dtype": {"choices": DTYPES, "default": "float32"},
    "device": {"type": torch.device, "help": "default: cuda if available, else cpu"},
    "threads": {"type": whole_number, "metavar": "N", "help": "torch's CPU threads"},
    "out": {"type": Path, "default": Path("out"), "metavar": "DIR", "help": "for files (./out)"},
    "quick": {"action": "store_true", "help": "smaller, fewer, shorter"},
    "tiny": {"action": "store_true", "help": "a tiny model, to try the command, not to measure"},
    "ratios": {"type": merge_ratio, "metavar": "R", "help": "fractions of tokens to remove"},
    "tokens": {"type": whole_number, "metavar": "SIDE", "help": "sides of square token grids"},
    "sizes": {"type": picture_size, "metavar": "WxH", "help": "pictures, in pixels"},
    "methods": {"choices": METHODS, "help": "of the extension (default: keys and paper)"},
    "force": {"action": "store_true", "help": "merge layers too small to pay too"},
    "diffusers": {"action": "store_true", "help": "diffusers' UNet of random weights, not ldm's"},
    "checkpoint": {"type": Path, "metavar": "FILE.safetensors", "help": "of SD 1 or 2"},
}
"""Arguments of `add_argument` by name; `fill_in` replaces options left at None."""
for _name in ("ratios", "tokens", "sizes", "methods"):
    OPTIONS[_name]["nargs"] = "+"

SHARED = ("attention", "dtype", "device", "threads", "out", "quick")


def add_options(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add some of `OPTIONS`."""
    for name in names:
        parser.add_argument(f"--{name}", **OPTIONS[name])


def add_unet(parser: argparse.ArgumentParser) -> None:
    """Add the options of a subcommand that runs a whole UNet."""
    add_options(parser, *SHARED, "rounds", "sizes", "ratios", "methods", "force", "diffusers")
    add_options(parser.add_mutually_exclusive_group(), "checkpoint", "tiny")


def fill_in(
    args: argparse.Namespace,
    usual: Mapping[str, Any],
    quick: Mapping[str, Any],
    tiny: Mapping[str, Any],
) -> None:
    """Fill in missing options by `--tiny`, `--quick` or `usual`; set device and threads.

    Raises `MissingPackage` before measuring rather than after it, and `ValueError` for a device
    that torch can't use.
    """
    chosen = {**usual, **(quick if args.quick else {}), **(tiny if args.tiny else {})}
    for name, value in chosen.items():
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
