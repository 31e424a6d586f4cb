"""The benchmark's command line. A subcommand is a module of this package, named in `SUBCOMMANDS`.

Such a module has a docstring whose first line is its help, `add_arguments(parser)`, and
`run(args)`, which raises `packages.MissingPackage`, `FileNotFoundError` and `ValueError` for what
the person can mend; it may return a status.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence

from .packages import MissingPackage

SUBCOMMANDS = ("speed", "layer", "estimate", "memory", "quality", "soak")


def parser() -> argparse.ArgumentParser:
    """The parser of every subcommand; `module` in what it returns is the subcommand's module."""
    whole = argparse.ArgumentParser(
        prog="python -m lab.bench", description=importlib.import_module(__package__).__doc__
    )
    commands = whole.add_subparsers(required=True, metavar="|".join(SUBCOMMANDS))
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"{__package__}.{name}")
        assert module.__doc__ is not None
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
    """Runs one subcommand; returns its exit status: mostly 0, and 2 where something is missing or
    can't be measured."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(arguments)
    args.command = shlex.join(["python", "-m", "lab.bench", *arguments])
    try:
        return args.module.run(args) or 0
    except (MissingPackage, FileNotFoundError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
