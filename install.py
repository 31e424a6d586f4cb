"""Reports an unsuitable environment at every start of WebUI. It installs nothing."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def problems() -> list[str]:
    """What keeps the extension from working here, one line each."""
    lines = []
    if sys.version_info < (3, 10):  # noqa: UP036 - an older Python may run this
        lines.append(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    # Read from the packages' metadata: importing torch would delay every start by seconds.
    for package, least in (("torch", (2, 0)), ("gradio", (3, 41))):
        try:
            text = version(package)
        except PackageNotFoundError:
            lines.append(
                f"{package} {'.'.join(map(str, least))} or newer is needed, and none is installed"
            )
            continue
        digits = text.split("+")[0].split(".")[:2]
        if all(part.isdigit() for part in digits) and tuple(map(int, digits)) < least:
            lines.append(
                f"{package} {'.'.join(map(str, least))} or newer is needed, this is {text}"
            )
    return lines


if __name__ == "__main__":
    for line in problems():
        print(f"ToMe: {line}")
