"""The README's table of settings is the field list."""

from __future__ import annotations

import re
from pathlib import Path

from tomesd_core.settings import FIELDS, Setting

HEAD = "| setting | values | default | what it does |\n| --- | --- | --- | --- |"
README = Path(__file__).parent.parent / "README.md"


def row(setting: Setting) -> str:
    if setting.choices:
        values = ", ".join(str(choice) for choice in setting.choices)
    else:
        values = f"{setting.minimum:g} to {setting.maximum:g}"
    return f"| {setting.label} (`{setting.infotext}`) | {values} | {setting.default} | {setting.help} |"


def test_the_table_of_settings_is_the_field_list():
    table = "\n".join([HEAD, *(row(setting) for setting in FIELDS.values() if setting.infotext)])
    found = re.search("<!-- settings -->\n(.*?)\n<!-- /settings -->", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, "the README has no table of settings"
    assert found.group(1) == table, f"the table should be:\n{table}"
