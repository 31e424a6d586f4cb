"""Command line of the benchmark. Each of `SUBCOMMANDS` is a module of this package.

The first line of the module's docstring is its help. It has `add_arguments(parser)` and
`run(args)`, which raises `MissingPackage`, `FileNotFoundError` or `ValueError` for errors that the
user can fix, and may return an exit status.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence

from .packages import MissingPackage

SUBCOMMANDS = ("speed", "layer", "estimate", "memory", "quality", "soak")


def make_parser() -> argparse.ArgumentParser:
    """Parser of all subcommands; it sets `module` to the subcommand's module."""
    package = importlib.import_module(__package__)
    whole = argparse.ArgumentParser(prog="python -m lab.bench", description=package.__doc__)
    commands = whole.add_subparsers(required=True, metavar="|".join(SUBCOMMANDS))
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"{__package__}.{name}")
        command = commands.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(module=module)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 2 if something is missing or unmeasurable."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = make_parser().parse_args(arguments)
    args.command = shlex.join(["python", "-m", "lab.bench", *arguments])
    try:
        return args.module.run(args) or 0
    except (MissingPackage, FileNotFoundError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
