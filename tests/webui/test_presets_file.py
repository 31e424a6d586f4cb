"""The presets' file: nothing is lost, whatever is in it and whatever the disk does."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from presets_file import MINE, NAMES, error_of, messages, names, on_disk, write

from tomesd_core.settings import SettingsError
from tomesd_core.webui import presets


def kept_aside(path):
    return sorted(path.parent.glob("presets.damaged-*"))


def test_unknown_content_survives(presets_path):
    future = {"ratio": 0.2, "sharpness": {"a": [1, None, "é"]}, "note": "\ud800"}
    odd = {"bad": {"ratio": 7, "x": 1}, "a": 5, "": {}, " s ": {}, "Fast": {"x": 2}}
    own = {"mine": future, "other": future, **odd}
    write(presets_path, own, comment="by hand")
    presets.save("mine", MINE)
    presets.save("new", MINE)
    document = on_disk(presets_path)
    assert document["comment"] == "by hand"
    mine, new = document["presets"].pop("mine"), document["presets"].pop("new")
    assert document["presets"] == {"other": future, **odd}
    assert mine == {**future, **new}
    assert new["ratio"] == MINE.ratio and presets.get("mine") == MINE


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"ratio": 0.95}, ["ratio", "0.9375", "0.95"]),
        ({"schedule": ["linear"]}, ["schedule", "linear"]),
        ([0.5], ["object", "[0.5]"]),
    ],
)
def test_one_bad_preset_is_reported_and_the_others_work(presets_path, entry, words):
    write(presets_path, {"before": {"ratio": 0.1}, "bad": entry, "after": {"ratio": 0.2}})
    content = presets_path.read_bytes()
    assert names() == [*NAMES, "before", "after"]
    (message,) = messages()
    assert all(word in message for word in ["'bad'", *words])
    assert message in error_of(presets.get, "bad")
    assert presets_path.read_bytes() == content and not kept_aside(presets_path)
    presets.save("bad", MINE)
    assert presets.get("bad") == MINE and not messages()


def test_an_unusable_preset_can_be_deleted(presets_path):
    write(presets_path, {"": {}, "Quality": {"ratio": 0.1}, "x" * 300: {}, "bad": 5})
    assert names() == NAMES
    assert len(messages()) == 4 and all(len(message) < 300 for message in messages())
    for name in ("", "Quality", "x" * 300, "bad"):
        presets.delete(name)
    assert on_disk(presets_path)["presets"] == {} and not messages()


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
def test_a_damaged_file_is_reported_and_kept_aside_at_a_save(presets_path, content, log_lines):
    presets_path.write_bytes(content)
    assert names() == NAMES
    (message,) = messages()
    assert str(presets_path) in message and "damaged" in message and len(message) < 400
    assert message in error_of(presets.get, "mine")
    assert presets_path.read_bytes() == content, "reading changes nothing"
    presets.save("mine", MINE)
    presets.save("other", MINE)
    assert names() == [*NAMES, "mine", "other"] and not messages()
    (aside,) = kept_aside(presets_path)
    (line,) = log_lines
    assert message in line and str(aside) in line
    presets_path.write_bytes(b"damaged again")
    presets.save("mine", MINE)
    assert [file.read_bytes() for file in kept_aside(presets_path)] == [content, b"damaged again"]


GOOD = '{"version": 1, "presets": {"ä": {"ratio": 0.2, "x": []}, "b": {"ratio": 0.1}}}'.encode()


@settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, len(GOOD)), st.integers(0, 255) | st.none())
def test_nothing_is_lost_of_a_file_with_one_byte_changed_or_cut(presets_path, position, byte):
    for file in presets_path.parent.iterdir():
        file.unlink()
    content = bytearray(GOOD)
    content[position:] = [] if byte is None else bytes([byte]) + content[position + 1 :]
    presets_path.write_bytes(content)
    assert names()[: len(NAMES)] == NAMES
    is_damaged = any("damaged" in message for message in messages())
    try:
        presets.save("mine", MINE)
    except SettingsError as error:
        assert "newer version" in str(error) and presets_path.read_bytes() == content
        return
    own = on_disk(presets_path)["presets"]
    if is_damaged:
        assert [aside.read_bytes() for aside in kept_aside(presets_path)] == [content]
    else:
        assert own == {**json.loads(content)["presets"], "mine": own["mine"]}


@pytest.mark.parametrize("version", ["2", "1.5", "1e400"])
def test_a_newer_file_is_not_changed(presets_path, version):
    content = f'{{"version": {version}, "sets": [{{"name": "mine"}}]}}'.encode()
    presets_path.write_bytes(content)
    (message,) = messages()
    assert "newer version" in message and str(presets_path) in message and names() == NAMES
    assert error_of(presets.save, "mine", MINE) == error_of(presets.delete, "mine") == message
    assert presets_path.read_bytes() == content and not kept_aside(presets_path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_file_as_it_was(presets_path, monkeypatch, function):
    """An interrupted save does too: the written file replaces the old one as a whole."""
    presets.save("mine", MINE)
    content = presets_path.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(presets.os, function, refuse)
        assert "No space left on device" in error_of(presets.save, "other", MINE)
    assert presets_path.read_bytes() == content
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert names() == NAMES and "can't be read" in messages()[0]
    assert error_of(presets.save, "other", MINE) == messages()[0], "it isn't replaced unread"


def test_a_read_only_file_is_not_replaced(presets_path, monkeypatch):
    write(presets_path, {"mine": {}})
    monkeypatch.setattr(presets.os, "access", lambda *_: False)  # To root every file is writable.
    assert "read-only" in error_of(presets.save, "other", MINE)
    assert list(on_disk(presets_path)["presets"]) == ["mine"]
    presets_path.unlink()
    presets_path.mkdir()
    assert names() == NAMES and "can't be read" in error_of(presets.save, "mine", MINE)


@pytest.mark.skipif(os.name == "nt", reason="symlinks need rights on Windows")
def test_a_symlink_stays_one(presets_path, tmp_path):
    (tmp_path / "kept").mkdir()
    presets_path.symlink_to(tmp_path / "kept" / "real.json")
    presets.save("mine", MINE)
    assert presets_path.is_symlink()
    assert "mine" in on_disk(tmp_path / "kept" / "real.json")["presets"]
