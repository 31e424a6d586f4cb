"""Presets: the built-in ones, and the user's own, saved, found, overwritten and deleted."""

from __future__ import annotations

import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
from presets_file import MINE, NAMES, error_of, messages, names, on_disk, write

from tomesd_core.plan import pairs_left
from tomesd_core.settings import PANEL_FIELDS, MergeSettings
from tomesd_core.webui import presets


def test_a_preset_holds_the_panels_fields_alone(presets_path):
    presets.save("mine", MergeSettings(ratio=0.4, stride=(4, 4), partition="uniform"))
    assert list(on_disk(presets_path)["presets"]["mine"]) == list(PANEL_FIELDS)
    assert presets.get("mine") == MergeSettings(ratio=0.4)


def test_presets_by_hand_and_of_version_0_1_0_keep_their_meaning_and_name_settings(presets_path):
    by_hand = {"ratio": 0.4, "stride": [4, 4], "enabled": True, "method": "keys"}
    # That version had one method and didn't name it.
    former = {"ratio": 0.6, "late_ratio": 0.4, "schedule": "linear", "reuse_steps": 4}
    write(presets_path, {"mine": by_hand, "former": former, "none": {}})
    settings = MergeSettings(ratio=0.4, full_steps=1)
    assert presets.get("mine") == settings and presets.named(settings) == "mine"
    assert presets.get("former") == MergeSettings(**former, method="paper", full_steps=1)
    assert presets.get("none") == MergeSettings() and not messages()
    assert presets.named(MergeSettings()) == "Balanced", "the first of these settings"
    assert presets.named(MergeSettings(ratio=0.41)) is None


def test_the_built_in_presets(presets_path):
    values, notes = presets.read()
    assert list(values) == NAMES and not notes
    first = [values[name] for name in NAMES[:3]]
    pairs = [pairs_left(each.ratio, each.method) for each in first]
    assert pairs == sorted(set(pairs), reverse=True)
    assert values["Balanced"] == MergeSettings()
    assert [name for name in NAMES if values[name].apply_to != "both passes"] == ["Hires only"]
    assert values["Paper (60 %)"] == MergeSettings(
        ratio=0.6, schedule="constant", method="paper", full_steps=1
    )
    assert len({line for _, line in presets.BUILT_IN.values() if line}) == len(NAMES)
    assert not list(presets_path.parent.iterdir()), "reading writes nothing"


@pytest.mark.parametrize("name", ["Quality", " Quality ", "HIRES ONLY", "hires   Only"])
def test_a_built_in_preset_is_found_in_any_case_and_never_replaced(presets_path, name):
    presets.save("mine", MINE)
    before = on_disk(presets_path)
    for refused in (error_of(presets.save, name, MINE), error_of(presets.delete, name)):
        assert "built-in" in refused
    assert on_disk(presets_path) == before
    same = " ".join(name.split()).lower()
    assert presets.get(name) == presets.get(next(key for key in NAMES if key.lower() == same))


def test_presets_are_saved_found_overwritten_and_deleted(presets_path):
    assert presets.save("mine", MINE) == "mine"
    presets.save("other", MergeSettings(ratio=0.1))
    assert names() == [*NAMES, "mine", "other"]
    assert (presets.get("mine"), presets.get("other")) == (MINE, MergeSettings(ratio=0.1))
    presets.save("mine", MergeSettings(ratio=0.2))
    assert presets.get("mine").ratio == 0.2
    presets.delete("mine")
    assert names() == [*NAMES, "other"]
    assert all(name in error_of(presets.get, "mine") for name in [*names(), "'mine'"])
    assert "'mine'" in error_of(presets.delete, "mine")
    assert presets_path.read_bytes().isascii()


@pytest.mark.parametrize(
    "name", ["../../x", "<img src=x>", "🖼️ 👩‍🎨", "C:\\con", "null", "ä" * 100, "مرحبا"]
)
def test_any_text_is_a_name(presets_path, name):
    name = unicodedata.normalize("NFC", name)
    assert presets.save(f" {unicodedata.normalize('NFD', name)}\n", MINE) == name
    assert names() == [*NAMES, name] and presets.get(name) == MINE
    assert [entry.name for entry in presets_path.parent.iterdir()] == ["presets.json"]
    presets.delete(name)
    assert names() == NAMES


INVISIBLE = ["", "  \t\n", "\u200b\u2060"]
CONTROL = ["a\nb", "a\x00b", "a\x1b[31mb", "a\u2028b", "a\ud800b"]


@pytest.mark.parametrize("name", [*INVISIBLE, *CONTROL, "x" * 101, None, 7, ["x"]], ids=ascii)
def test_an_unusable_name_is_refused(presets_path, name):
    assert "100 characters" in error_of(presets.save, name, MINE)
    assert "Balanced" in error_of(presets.get, name)
    assert not presets_path.exists()


def test_threads_that_save_at_once_lose_nothing(presets_path):
    own, counts = [f"mine {number}" for number in range(48)], []
    with ThreadPoolExecutor(4) as pool:
        saves = [pool.submit(presets.save, name, MINE) for name in own]
        while not all(save.done() for save in saves):
            usable, notes = presets.read()
            counts.append(len(usable))
            assert not notes, "never half a file"
    assert counts == sorted(counts)
    assert set(names()) == {*NAMES, *own}
