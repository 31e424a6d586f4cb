"""Presets on disk: what is saved is found again, and nothing is lost, whatever happens to the file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tomesd_core.plan import pairs_left
from tomesd_core.settings import FIELDS, PANEL_FIELDS, MergeSettings, SettingsError
from tomesd_core.webui import presets

NAMES = ["Quality", "Balanced", "Fast", "Hires only", "Paper (60 %)"]
MINE = MergeSettings(ratio=0.4, schedule="step", late_ratio=0.1, max_downsample=4, min_tokens=512)


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """Where the presets are, instead of in this folder."""
    monkeypatch.setattr(presets, "PATH", tmp_path / "presets.json")
    return presets.PATH


def names():
    return list(presets.read()[0])


def messages():
    return presets.read()[1]


def write(path, own, **more):
    path.write_text(json.dumps({"version": 1, "presets": own, **more}), encoding="utf-8")


def on_disk(path):
    return json.loads(path.read_text(encoding="utf-8"))


def error_of(action, *args):
    with pytest.raises(SettingsError) as caught:
        action(*args)
    return str(caught.value)


def kept_aside(path):
    return sorted(path.parent.glob("presets.damaged-*"))


def test_a_preset_holds_every_field_of_the_panel_and_no_other(path):
    presets.save("mine", MergeSettings(ratio=0.4, stride=(4, 4), partition="uniform"))
    assert list(on_disk(path)["presets"]["mine"]) == list(PANEL_FIELDS)
    assert presets.get("mine") == MergeSettings(ratio=0.4)
    write(
        path,
        {"mine": {"ratio": 0.4, "stride": [4, 4], "enabled": True, "method": "keys"}, "none": {}},
    )
    assert presets.get("mine") == MergeSettings(ratio=0.4, full_steps=1)
    assert presets.get("none") == MergeSettings()
    assert (
        presets.named(MergeSettings(ratio=0.4, full_steps=1)) == "mine"
        and presets.named(MergeSettings()) == "Balanced"
    )
    assert presets.named(MergeSettings(ratio=0.41)) is None
    assert set(FIELDS) > set(PANEL_FIELDS) and not messages()


def test_a_preset_of_version_0_1_0_means_what_it_meant(path):
    """It had one method, and didn't name it."""
    former = {
        "ratio": 0.6,
        "late_ratio": 0.4,
        "schedule": "linear",
        "max_downsample": 1,
        "reuse_steps": 4,
    }
    write(path, {"mine": former})
    assert presets.get("mine") == MergeSettings(**former, method="paper", full_steps=1)


def test_a_ratio_that_only_an_expert_field_allows_is_refused(path):
    error = error_of(presets.save, "mine", MergeSettings(ratio=0.95, stride=(8, 8)))
    assert error == "ratio must lie in [0, 0.9375], got 0.95"
    assert not path.exists()


def test_the_built_in_presets(path):
    values, notes = presets.read()
    assert list(values) == NAMES and not notes
    pairs = [
        pairs_left(values[name].ratio, values[name].method)
        for name in ("Quality", "Balanced", "Fast")
    ]
    assert pairs == sorted(set(pairs), reverse=True)
    assert values["Balanced"] == MergeSettings()
    assert [name for name in NAMES if values[name].apply_to != "both passes"] == ["Hires only"]
    assert values["Paper (60 %)"] == MergeSettings(
        ratio=0.6, schedule="constant", method="paper", full_steps=1
    )
    lines = [line for _, line in presets.BUILT_IN.values()]
    assert all(20 < len(line) < 120 and line.endswith(".") for line in lines) and len(
        set(lines)
    ) == len(NAMES)
    assert not list(path.parent.iterdir()), "reading leaves nothing behind"


@pytest.mark.parametrize(
    "name", ["Quality", " Quality ", "quality", "HIRES ONLY", "hires   Only", "paper (60 %)"]
)
def test_a_built_in_one_is_found_in_any_case_and_never_replaced(path, name):
    presets.save("mine", MINE)
    before = path.read_bytes()
    assert "is a built-in preset" in error_of(presets.save, name, MINE)
    assert "is a built-in preset, which can't be deleted" in error_of(presets.delete, name)
    assert on_disk(path) == json.loads(before)
    assert presets.get(name) == presets.get(
        next(key for key in NAMES if key.lower() == " ".join(name.split()).lower())
    )


# A user's own


def test_saved_today_found_tomorrow_overwritten_and_deleted(path):
    assert presets.save("mine", MINE) == "mine"
    presets.save("other", MergeSettings(ratio=0.1))
    assert names() == [*NAMES, "mine", "other"]
    assert (presets.get("mine"), presets.get("other")) == (MINE, MergeSettings(ratio=0.1))
    presets.save("mine", MergeSettings(ratio=0.2))
    assert presets.get("mine").ratio == 0.2
    presets.delete("mine")
    assert names() == [*NAMES, "other"]
    error = error_of(presets.get, "mine")
    assert error == f"preset must be one of {', '.join(names())}, got 'mine'"
    assert "'mine'" in error_of(presets.delete, "mine")
    assert path.read_bytes().isascii() and path.read_text().startswith('{\n  "version": 1,\n')


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "<img src=x onerror=alert(1)>",
        "🖼️ 👩‍🎨",
        "C:\\con",
        "__proto__",
        "null",
        "ä" * 100,
        "مرحبا",
    ],
)
def test_any_text_is_a_name_and_stays_text(path, name):
    name = unicodedata.normalize("NFC", name)
    assert presets.save(f" {unicodedata.normalize('NFD', name)}\n", MINE) == name
    assert names() == [*NAMES, name] and presets.get(name) == MINE
    assert {entry.name for entry in path.parent.iterdir()} <= {"presets.json", "presets.json.lock"}
    presets.delete(name)
    assert names() == NAMES


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  \t\n",
        "\u200b\u2060",
        "x" * 101,
        "a\nb",
        "a\x00b",
        "a\x1b[31mb",
        "a\u2028b",
        "a\ud800b",
        None,
        7,
        ["x"],
    ],
    ids=ascii,
)
def test_a_name_that_cant_be_is_refused(path, name):
    assert "a preset's name must not be empty, and can have up to 100 characters" in error_of(
        presets.save, name, MINE
    )
    assert "preset must be one of" in error_of(presets.get, name)
    assert not path.exists()


# What isn't understood is kept


def test_unknown_fields_survive(path):
    future = {"ratio": 0.2, "sharpness": {"a": [1, None, "é"]}, "note": "\ud800"}
    own = {
        "mine": future,
        "other": future,
        "bad": {"ratio": 7, "x": 1},
        "a": 5,
        "": {},
        " s ": {},
        "Fast": {"x": 2},
    }
    write(path, own, comment="by hand")
    presets.save("mine", MINE)
    presets.save("new", MINE)
    document = on_disk(path)
    assert document["comment"] == "by hand"
    assert list(document["presets"]) == [*own, "new"]
    assert {**document["presets"], "mine": future, "new": None} == {**own, "new": None}, (
        "others are left as they are"
    )
    assert {**document["presets"]["mine"], **future} == {
        **document["presets"]["mine"],
        "ratio": 0.2,
        **future,
    }
    assert presets.get("mine") == MINE


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"ratio": 0.95}, "ratio must lie in [0, 0.9375], got 0.95"),
        ({"ratio": float("nan")}, "ratio must be a number in [0, 0.9375], got nan"),
        ({"schedule": ["linear"]}, "schedule must be one of"),
        ([0.5], "a preset must be an object of settings, got [0.5]"),
    ],
)
def test_one_bad_preset_is_told_and_the_others_work(path, entry, reason):
    write(path, {"before": {"ratio": 0.1}, "bad": entry, "after": {"ratio": 0.2}})
    content = path.read_bytes()
    assert names() == [*NAMES, "before", "after"]
    (message,) = messages()
    assert message.startswith("preset 'bad' can't be used: ") and reason in message
    assert message in error_of(presets.get, "bad")
    assert path.read_bytes() == content and not kept_aside(path)
    presets.save("bad", MINE)
    assert presets.get("bad") == MINE and not messages()


def test_a_preset_that_cant_be_used_can_be_deleted(path):
    write(path, {"": {}, "Quality": {"ratio": 0.1}, "x" * 300: {}, "bad": 5})
    assert (
        names() == NAMES
        and len(messages()) == 4
        and all(len(message) < 300 for message in messages())
    )
    for name in ("", "Quality", "x" * 300, "bad"):
        presets.delete(name)
    assert on_disk(path)["presets"] == {} and not messages()


# A file that can't be used

DAMAGED = {
    "half-written": b'{"version": 1, "presets": {"mine": {"ratio": 0.',
    "not UTF-8": '{"version": 1, "presets": {"Größe": {}}}'.encode("latin-1"),
    "zeros, as after a power cut": bytes(300),
    "a list": b"[]",
    "no version": b'{"presets": {}}',
    "version true": b'{"version": true, "presets": {}}',
    "version NaN": b'{"version": NaN, "presets": {}}',
    "presets a list": b'{"version": 1, "presets": [{"ratio": 0.5}]}',
    "a number too long": b'{"version": 1, "presets": {"a": {"x": ' + b"9" * 5000 + b"}}}",
    "far too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_told_and_kept_aside_at_the_next_save(path, content, log_lines):
    path.write_bytes(content)
    assert names() == NAMES
    (message,) = messages()
    assert message.startswith(f"{path} is damaged: ") and len(message) < 400
    assert message in error_of(presets.get, "mine")
    assert path.read_bytes() == content, "reading changes nothing"
    presets.save("mine", MINE)
    presets.save("other", MINE)
    assert names() == [*NAMES, "mine", "other"] and not messages()
    (aside,) = kept_aside(path)
    assert log_lines == [f"{message}. It is kept as {aside}"]
    path.write_bytes(b"damaged again")
    presets.save("mine", MINE)
    assert [file.read_bytes() for file in kept_aside(path)] == [content, b"damaged again"]


@settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 110), st.integers(0, 255) | st.none())
def test_of_a_good_file_with_one_byte_changed_or_cut_there_nothing_is_lost(path, position, byte):
    for file in path.parent.iterdir():
        file.unlink()
    content = bytearray(
        '{"version": 1, "presets": {"ä": {"ratio": 0.25, "x": [1]}, "b": {"late_ratio": 0.1}}}'.encode()
    )
    content[position:] = [] if byte is None else bytes([byte]) + content[position + 1 :]
    path.write_bytes(content)
    assert names()[: len(NAMES)] == NAMES
    is_damaged = any("is damaged" in message for message in messages())
    try:
        presets.save("mine", MINE)
    except SettingsError as error:
        assert "newer version" in str(error) and path.read_bytes() == content
        return
    own = on_disk(path)["presets"]
    if is_damaged:
        assert [aside.read_bytes() for aside in kept_aside(path)] == [content]
    else:
        assert own == {**json.loads(content)["presets"], "mine": own["mine"]}


@pytest.mark.parametrize("version", ["2", "1.5", "1e400"])
def test_a_newer_file_is_left_alone(path, version):
    content = f'{{"version": {version}, "sets": [{{"name": "mine"}}]}}'.encode()
    path.write_bytes(content)
    (message,) = messages()
    assert "newer version" in message and str(path) in message and names() == NAMES
    for action in (
        lambda: presets.save("mine", MINE),
        lambda: presets.delete("mine"),
    ):
        assert error_of(action) == message
    assert path.read_bytes() == content and not kept_aside(path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_file_as_it_was(path, monkeypatch, function):
    presets.save("mine", MINE)
    content = path.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(presets.os, function, refuse)
        assert "No space left on device" in error_of(presets.save, "other", MINE)
    assert path.read_bytes() == content
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert names() == NAMES and "can't be read" in messages()[0]
    assert error_of(presets.save, "other", MINE) == messages()[0], (
        "what can't be read isn't replaced"
    )


def test_a_read_only_file_is_not_replaced(path, monkeypatch):
    write(path, {"mine": {}})
    monkeypatch.setattr(presets.os, "access", lambda *_: False)  # To root every file is writable.
    assert error_of(presets.save, "other", MINE) == f"{path} can't be written: it is read-only"
    assert list(on_disk(path)["presets"]) == ["mine"]
    path.unlink()
    path.mkdir()
    assert names() == NAMES and "can't be read" in error_of(presets.save, "mine", MINE)


@pytest.mark.skipif(os.name == "nt", reason="symlinks need rights on Windows")
def test_a_symlink_stays_one(path, tmp_path):
    (tmp_path / "kept").mkdir()
    path.symlink_to(tmp_path / "kept" / "real.json")
    presets.save("mine", MINE)
    assert path.is_symlink() and "mine" in on_disk(tmp_path / "kept" / "real.json")["presets"]


# Several at once

ALONE = """
import sys, types
from pathlib import Path
for name, folder in (("tomesd_core", sys.argv[1]), ("tomesd_core.webui", sys.argv[1] + "/webui")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]  # Without the package's own imports: torch takes seconds.
from tomesd_core.settings import MergeSettings
from tomesd_core.webui import presets
assert "torch" not in sys.modules
presets.PATH = Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
"""
SAVE_FOR_EVER = """
import itertools
for number in itertools.count():
    presets.save(f"{number % 50} {'x' * 90}", MergeSettings())
    print(number, flush=True)
"""


def start(code, path, *args):
    """Another process that has imported the presets and runs `code` when it is told to."""
    folder = str(Path(presets.__file__).parents[1])
    command = [sys.executable, "-c", ALONE + code, folder, str(path), *map(str, args)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def test_threads_that_save_at_once_lose_nothing(path):
    threads = [
        threading.Thread(
            target=lambda who=who: [presets.save(f"{who} {number}", MINE) for number in range(12)]
        )
        for who in range(4)
    ]
    for thread in threads:
        thread.start()
    counts = []
    while any(thread.is_alive() for thread in threads):
        usable, notes = presets.read()
        counts.append(len(usable))
        assert not notes, "never half a file"
    assert counts == sorted(counts)
    assert set(names()[len(NAMES) :]) == {
        f"{who} {number}" for who in range(4) for number in range(12)
    }


@pytest.mark.parametrize("after", range(5))
def test_a_kill_in_the_middle_of_a_save_loses_nothing(path, after):
    process = start(SAVE_FOR_EVER, path)
    go(process)
    number = [int(process.stdout.readline()) for _ in range(10 + 7 * after)][-1]
    process.kill()
    process.communicate()
    assert not messages() and not kept_aside(path)
    assert len(names()) - len(NAMES) >= min(number + 1, 50)
    presets.save("mine", MINE)
    assert presets.get("mine") == MINE
