"""Stands in for `modules.infotext_utils`: parameters as text, written and read."""

from __future__ import annotations

import json
import re
from typing import Any

re_param = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
re_imagesize = re.compile(r"^(\d+)x(\d+)$")


def quote(text: Any) -> Any:
    """Quote a text as JSON if it has a separator in it."""
    return json.dumps(text, ensure_ascii=False) if set(str(text)) & set(",\n:") else text


def unquote(text: str) -> Any:
    """Inverse of `quote`."""
    try:
        return json.loads(text) if len(text) > 0 and text[0] == text[-1] == '"' else text
    except ValueError:
        return text


def parse_generation_parameters(x: str) -> dict[str, Any]:
    """Read an infotext's last line; a value like `8x8` becomes two keys, `…-1` and `…-2`."""
    parameters: dict[str, Any] = {}
    for key, value in re_param.findall(x.strip().split("\n")[-1]):
        value = unquote(value)
        size = re_imagesize.match(str(value))
        parameters.update({f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: value})
    return parameters
