"""Korean and Japanese texts of the panel: labels, tooltips, choices, messages and lines."""

from __future__ import annotations

import itertools
import json
import re
import sys
from types import SimpleNamespace

import pytest
from in_host import HIRES, ROOT, running

UNTRANSLATED = ("refresh", "measure_start", "measure_stop", "request")
UNTRANSLATED += ("enabled", "enabled-checkbox")
"""Components that are not shown, and the extension's name."""


@pytest.fixture(scope="module")
def texts(host):
    """Fixed English texts of the panel."""
    from modules import shared

    start, words = "script_txt2img_tome_", set()
    for block in host.demo.blocks.values():
        name = str(getattr(block, "elem_id", None))
        if name.startswith(start) and name.removeprefix(start) not in UNTRANSLATED:
            words |= {getattr(block, "label", None), getattr(block, "webui_tooltip", None)}
            words |= {block.value} if type(block).__name__ == "Button" else set()
    section = running("webui.options").SECTION
    words |= {info.label for info in shared.opts.data_labels.values() if info.section == section}
    for name, (_, what_for) in running("webui.presets").BUILT_IN.items():
        words |= {name, what_for}
    for field in running("settings").PANEL_FIELDS.values():
        words |= set(field.choices)
    settings, describe = running("settings").MergeSettings(), running("webui.preview").describe
    words |= {describe(settings, layers, (8, 8), "cpu") for layers in (None, [])}
    words |= {"Interrupt", "interrupted"}
    # Without signs.
    return {text for text in words - {None} if any(map(str.isalpha, str(text)))}


def parts_of(line):
    """The parts of a line that the page's script translates, with {0}, {1}, … for numbers."""
    for part in re.split(", |; |: ", line):
        between = re.split(r"\d+(?:\.\d+)?", part)
        yield "".join(f"{text}{{{place}}}" for place, text in enumerate(between[:-1])) + between[-1]


@pytest.fixture(scope="module")
def lines(host, make):
    """Titles, previews, summaries and results of Measure."""
    preview, every_layer = running("webui.preview"), running("webui.host").loaded_layers()
    settings = running("settings").MergeSettings
    lines = ["Last: x", "loaded at the first picture"]

    def look(layers=every_layer, device="cpu", **values):
        asked = settings(**values, skip_unprofitable=False)
        lines.extend([preview.title(asked), preview.describe(asked, layers, (64, 64), device)])

    for method, late in itertools.product(("keys", "tokens"), ({}, {"late_ratio": 0.6})):
        values = {"ratio": 0.75, "method": method, **late}
        look(**values)
        look(**values, max_downsample=2)
        lines.append(make([values], **HIRES).comments.strip())
    for apply_to in ("first pass", "hires pass"):
        look([every_layer[1]], apply_to=apply_to)
    look(device="cuda")
    look(min_tokens=65536)
    hires = settings(apply_to="hires pass")
    lines.append(preview.of_loaded_model(hires, 512, 512, has_hires_pass=False))
    for values in ({"min_tokens": 65536}, {"ratio": 0, "schedule": "constant"}, {"ratio": 0.3}):
        lines.append(make([values]).comments.strip())
    lines += [
        running("webui.times_faster").line_of("64x64", *result, 0.5, 0.5)
        for result in ((2.0, 0.01), (0.5, 0.01), (2.0, 0.5))
    ]
    return lines


@pytest.mark.parametrize("language", ["ko_KR", "ja_JP"])
def test_a_language_has_every_text_and_no_other(texts, lines, language):
    words = json.loads((ROOT / "localizations" / f"{language}.json").read_text(encoding="utf-8"))
    assert len(texts) > 50
    parts = {part for line in lines for part in parts_of(line)} - {"ToMe", "x"}
    others = set(words) - texts - parts
    rare = {part for part in others if "{0}" in part or part.startswith("WebUI's own")}
    assert set(words) == texts | parts | rare
    # Reasons that these tests don't produce must be in the code.
    code = "".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "tomesd_core").rglob("*.py")
    )
    assert [part for part in rare if max(re.split(r"\{\d\}", part), key=len) not in code] == []
    # None is left in English.
    assert all(not translation.isascii() for translation in words.values())


def test_before_1_7_another_extensions_file_of_a_language_is_used(host, monkeypatch):
    from modules import scripts

    leave = running("webui.host").leave_languages_to_others
    ours = str(ROOT / "localizations" / "ko_KR.json")
    theirs = "/webui/extensions/korean/localizations/ko_KR.json"
    files = [SimpleNamespace(path=path, filename="ko_KR.json") for path in (theirs, ours)]
    monkeypatch.setattr(scripts, "list_scripts", lambda folder, ending: files, raising=False)
    others = {"ja_JP": str(ROOT / "localizations" / "ja_JP.json"), "de_DE": "/webui/de_DE.json"}
    module = SimpleNamespace(localizations={**others, "ko_KR": ours})
    monkeypatch.setitem(sys.modules, "modules.localization", module)
    leave()
    assert module.localizations == {**others, "ko_KR": theirs}
    # WebUI from 1.7 on reads every file.
    module.localizations["ko_KR"] = [theirs, ours]
    leave()
    assert module.localizations["ko_KR"] == [theirs, ours]
