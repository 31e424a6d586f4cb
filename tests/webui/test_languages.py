"""The panel's words in Korean and Japanese: every label, tooltip and message that is always the same."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from in_host import ROOT, running

NOT_SHOWN = ("refresh", "measure_start", "measure_stop", "measure_asked")
"""Components that only the page's script uses."""


@pytest.fixture
def texts(host):
    """What is always said in the same words, in English."""
    from modules import shared

    start, words = "script_txt2img_tome_", set()
    for block in host.demo.blocks.values():
        name = str(getattr(block, "elem_id", None))
        if name.startswith(start) and name.removeprefix(start) not in (*NOT_SHOWN, "enabled", "enabled-checkbox"):
            words |= {getattr(block, "label", None), block.webui_tooltip}
            words |= {block.value} if type(block).__name__ == "Button" else set()
    section = running("webui.options").SECTION
    words |= {info.label for info in shared.opts.data_labels.values() if info.section == section}
    words |= {what_for for _, what_for in running("webui.presets").BUILT_IN.values()}
    settings, describe = running("settings").MergeSettings(), running("webui.preview").describe
    words |= {describe(settings, layers, (8, 8), "cpu") for layers in (None, [])}
    words |= {running("webui.preset_row")._export()[0], "Interrupt", "interrupted"}
    # A sign is no word, and the hidden numbers, which the page's script reads off the tab, keep gradio's own label.
    return {text for text in words - {None, "Number"} if any(map(str.isalpha, text))}


@pytest.mark.parametrize("language", ["ko_KR", "ja_JP"])
def test_a_language_has_every_text_and_no_other(texts, language):
    words = json.loads((ROOT / "localizations" / f"{language}.json").read_text(encoding="utf-8"))
    assert len(texts) > 35
    assert set(words) == texts
    # Another alphabet's: none was left in English.
    assert all(not translation.isascii() for translation in words.values())


def test_before_1_7_another_extensions_file_of_a_language_is_the_one_that_counts(host, monkeypatch):
    from modules import scripts

    leave = running("webui.host").leave_languages_to_others
    ours, theirs = str(ROOT / "localizations" / "ko_KR.json"), "/webui/extensions/korean/localizations/ko_KR.json"
    files = [SimpleNamespace(path=path, filename="ko_KR.json") for path in (theirs, ours)]
    monkeypatch.setattr(scripts, "list_scripts", lambda folder, ending: files, raising=False)
    languages = {"ko_KR": ours, "ja_JP": str(ROOT / "localizations" / "ja_JP.json"), "de_DE": "/webui/de_DE.json"}
    before = dict(languages)
    monkeypatch.setitem(sys.modules, "modules.localization", SimpleNamespace(localizations=languages))
    leave()
    assert languages == {**before, "ko_KR": theirs}
    # Later ones take words from each file.
    languages["ko_KR"] = [theirs, ours]
    leave()
    assert languages["ko_KR"] == [theirs, ours]
