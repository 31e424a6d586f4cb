"""Presets on disk: what is saved is found again, and nothing is lost, whatever happens to the file."""

import errno
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tomesd_core import presets
from tomesd_core.presets import BUILT_IN, MAX_NAME, VERSION, PresetError, PresetFile, clean_name
from tomesd_core.settings import FIELDS, PANEL_FIELDS, MergeSettings

NAMES = ["Quality", "Balanced", "Fast", "Hires only", "Paper (60 %)"]
MINE = MergeSettings(ratio=0.4, schedule="step", late_ratio=0.1, max_downsample=4, min_tokens=512)
ODD_NAMES = [
    "../../x",
    "<img src=x onerror=alert(1)>",
    "🖼️ 👩‍🎨",
    "C:\\con",
    "a/b",
    "__proto__",
    "null",
    "ä" * 100,
    "مرحبا",
]

quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "presets.json"


@pytest.fixture
def file(path):
    return PresetFile(path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(presets, "BUSY_SECONDS", 0.1)


def write(path, own, **more):
    path.write_text(json.dumps({"version": VERSION, "presets": own, **more}), encoding="utf-8")


def stored(path):
    return json.loads(path.read_text(encoding="utf-8"))


def error_of(action, *args):
    with pytest.raises(PresetError) as caught:
        action(*args)
    return str(caught.value)


def kept_aside(path):
    return sorted(path.parent.glob("presets.damaged-*"))


def assert_built_ins_work(file):
    assert file.names()[: len(NAMES)] == NAMES
    assert file.get("Quality").ratio == 0.75


ALONE = """
import sys, types
package = types.ModuleType("tomesd_core")
package.__path__ = [sys.argv[1]]
sys.modules["tomesd_core"] = package  # Without the package's own imports: torch takes seconds.
from tomesd_core import presets
from tomesd_core.settings import MergeSettings
"""


def start(code, *args):
    """Another process, which has imported the presets module alone; what it prints can be read."""
    command = [sys.executable, "-c", ALONE + code, str(Path(presets.__file__).parent), *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_module_needs_nothing_but_the_settings():
    process = start("print(*sys.modules)")
    modules = process.communicate(timeout=60)[0].split()
    assert process.returncode == 0
    ours = {name for name in modules if name.startswith("tomesd_core.")}
    assert ours == {"tomesd_core.presets", "tomesd_core.settings", "tomesd_core.schedule"}
    assert not {name.partition(".")[0] for name in modules} & {"gradio", "modules", "torch", "numpy"}


# What a preset holds


def test_a_preset_holds_every_field_of_the_panel_and_not_the_switch(file, path):
    file.save("mine", MINE)
    panel = [name for name, setting in FIELDS.items() if setting.infotext]
    assert list(stored(path)["presets"]["mine"]) == panel == list(PANEL_FIELDS)
    assert "enabled" not in panel and "ratio" in panel
    assert file.get("mine") == MINE


def test_expert_fields_are_not_saved_and_not_read(file, path):
    file.save("mine", MergeSettings(ratio=0.4, stride=(4, 4), partition="uniform"))
    assert file.get("mine") == MergeSettings(ratio=0.4)
    write(path, {"mine": {"ratio": 0.4, "stride": [4, 4], "enabled": True}})
    assert file.get("mine") == MergeSettings(ratio=0.4)
    assert not file.messages


def test_a_ratio_that_only_an_expert_field_allows_is_refused(file, path):
    error = error_of(file.save, "mine", MergeSettings(ratio=0.95, stride=(8, 8)))
    assert error == "ratio must lie in [0, 0.9375], got 0.95"
    assert not path.exists()


def test_missing_fields_have_their_defaults(file, path):
    write(path, {"mine": {"ratio": 0.25}, "none": {}})
    assert file.get("mine") == MergeSettings(ratio=0.25)
    assert file.get("none") == MergeSettings()


# Built-in presets


def test_the_built_in_presets(file, path):
    assert file.names() == list(BUILT_IN) == NAMES
    values = {name: file.get(name) for name in NAMES}
    by_speed = [(values[name].ratio, values[name].late_ratio) for name in ("Quality", "Balanced", "Fast")]
    assert by_speed == sorted(set(by_speed)) and by_speed[0][1] < by_speed[1][1] < by_speed[2][1]
    assert values["Balanced"] == MergeSettings()
    assert values["Hires only"].apply_to == "hires pass"
    assert values["Fast"].max_downsample == 2
    paper = values["Paper (60 %)"]
    assert (paper.ratio, paper.schedule, paper.max_downsample, paper.reuse_steps) == (0.6, "constant", 1, 1)
    assert all(values[name].apply_to == "both passes" for name in NAMES if name != "Hires only")
    assert len(set(values.values())) == len(NAMES)
    assert not file.messages
    assert not list(path.parent.iterdir()), "reading leaves nothing behind"


def test_each_says_in_a_line_what_it_is_for(file):
    lines = [file.describe(name) for name in NAMES]
    assert all(20 < len(line) < 120 and "\n" not in line and line.endswith(".") for line in lines)
    assert len(set(lines)) == len(lines)


def test_a_users_own_is_described_by_what_it_sets(file):
    file.save("mine", MINE)
    file.save("plain", MergeSettings())
    assert file.describe(" mine ") == (
        "Your own: ratio 0.4, late ratio 0.1, schedule step, max downsample 4, min tokens 512."
    )
    assert file.describe("plain") == "Your own: the default settings."
    assert "no" in error_of(file.describe, "other")


@pytest.mark.parametrize("name", ["Quality", " Quality ", "quality", "HIRES ONLY", "hires   Only", "paper (60 %)"])
def test_a_built_in_one_is_read_only_also_in_another_case(file, path, name):
    file.save("mine", MINE)
    before = path.read_bytes()
    for action in (
        lambda: file.save(name, MINE),
        lambda: file.delete(name),
        lambda: file.rename(name, "other"),
        lambda: file.rename("mine", name),
    ):
        assert "is a built-in preset" in error_of(action)
    assert path.read_bytes() == before
    assert file.get(name) == file.get(next(key for key in NAMES if key.lower() == " ".join(name.split()).lower()))


# A user's own


def test_saved_today_found_tomorrow(file, path):
    assert file.save("mine", MINE) == "mine"
    assert file.save("other", MergeSettings(ratio=0.1)) == "other"
    tomorrow = PresetFile(str(path))
    assert tomorrow.names() == [*NAMES, "mine", "other"]
    assert (tomorrow.get("mine"), tomorrow.get("other")) == (MINE, MergeSettings(ratio=0.1))
    assert stored(path)["version"] == 1


def test_saving_again_overwrites_and_deleting_removes(file):
    file.save("mine", MINE)
    file.save("other", MINE)
    file.save("mine", MergeSettings(ratio=0.1))
    assert file.get("mine").ratio == 0.1
    file.delete("mine")
    assert file.names() == [*NAMES, "other"]
    assert "'mine'" in error_of(file.get, "mine")
    assert "'mine'" in error_of(file.delete, "mine")


def test_a_preset_is_renamed_in_its_place(file):
    for name in ("a", "b", "c"):
        file.save(name, MINE)
    assert file.rename("b", " B ") == "B"
    assert file.names() == [*NAMES, "a", "B", "c"]
    assert "already a preset 'c'" in error_of(file.rename, "a", "c")
    assert "no preset 'b'" in error_of(file.rename, "b", "d")
    assert file.rename("c", "c") == "c"
    assert file.names() == [*NAMES, "a", "B", "c"]


def test_another_tab_sees_at_once_what_is_saved(file, path):
    other = PresetFile(path)
    assert "mine" not in other.names()
    file.save("mine", MINE)
    assert other.get("mine") == MINE


# Names


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_text_is_a_name_and_stays_text(file, path, name):
    name = unicodedata.normalize("NFC", name)
    assert file.save(name, MINE) == name
    assert PresetFile(path).names() == [*NAMES, name]
    assert file.get(name) == MINE
    assert file.import_(file.export([name])).skipped == [f"{name!r}: it is already here as {name!r}"]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["presets.json", "presets.json.lock"]
    assert not [entry for entry in path.parent.parent.rglob("x*")]
    file.delete(name)
    assert file.names() == NAMES


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "must not be empty"),
        ("  \t\n", "must not be empty"),
        ("\u200b\u2060", "must not be empty"),
        ("x" * 300, "up to 100 characters, got 300"),
        ("x" * 101, "up to 100 characters, got 101"),
        ("a\nb", "line breaks or control characters"),
        ("a\rb", "line breaks or control characters"),
        ("a\x00b", "line breaks or control characters"),
        ("a\x1b[31mb", "line breaks or control characters"),
        ("a\u2028b", "line breaks or control characters"),
        ("a\ud800b", "line breaks or control characters"),
        (None, "must be text"),
        (7, "must be text"),
        (["x"], "must be text"),
    ],
)
def test_a_name_that_cant_be_is_refused_with_the_reason(file, path, name, reason):
    file.save("mine", MINE)
    before = path.read_bytes()
    assert reason in error_of(file.save, name, MINE)
    assert reason in error_of(file.rename, "mine", name)
    assert reason in error_of(file.get, name)
    assert path.read_bytes() == before


def test_a_name_is_stripped_and_normalised(file):
    decomposed = unicodedata.normalize("NFD", "Größe")
    assert file.save(f" {decomposed}\n", MINE) == "Größe"
    assert file.get(decomposed) == file.get("Größe") == MINE
    file.delete(decomposed)
    assert file.names() == NAMES


@quick
@given(st.text(max_size=120))
def test_every_name_is_refused_or_comes_back_unchanged(name):
    with tempfile.TemporaryDirectory() as folder:
        file = PresetFile(Path(folder, "presets.json"))
        try:
            saved = file.save(name, MINE)
        except PresetError:
            assert os.listdir(folder) == []
            return
        assert saved == clean_name(saved) == unicodedata.normalize("NFC", name).strip()
        assert 0 < len(saved) <= MAX_NAME
        assert file.names() == [*NAMES, saved]
        assert file.get(name) == file.get(saved) == MINE
        assert set(os.listdir(folder)) == {"presets.json", "presets.json.lock"}


# What isn't known is kept


def test_unknown_fields_survive_save_rename_and_a_round_trip(file, path, tmp_path):
    future = {"ratio": 0.2, "sharpness": {"a": [1, None, "é"]}, "note": "\ud800"}
    write(path, {"mine": future, "other": future}, comment="by hand", order=[1, 2])
    file.save("mine", MINE)
    file.rename("mine", "renamed")
    file.save("third", MINE)
    document = stored(path)
    unknown = {key: future[key] for key in ("sharpness", "note")}
    assert document["presets"]["other"] == future, "others are left as they are"
    assert {**document["presets"]["renamed"], **unknown} == document["presets"]["renamed"]
    assert (document["comment"], document["order"]) == ("by hand", [1, 2])
    assert file.get("renamed") == MINE

    elsewhere = PresetFile(tmp_path / "elsewhere.json")
    assert elsewhere.import_(file.export()).added == ["renamed", "other", "third"]
    assert stored(tmp_path / "elsewhere.json") == document
    assert elsewhere.import_(file.export()).added == []


def test_saving_keeps_the_other_presets_byte_for_byte_equal_json(file, path):
    own = {"b": {"ratio": 0.1}, "bad": {"ratio": 7, "x": 1}, "a": 5, "": {}, " s ": {}, "Fast": {"ratio": 0.7}}
    write(path, own)
    file.save("new", MINE)
    document = stored(path)
    assert list(document["presets"]) == [*own, "new"]
    assert {name: document["presets"][name] for name in own} == own


# Single bad presets


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"ratio": 0.95}, "ratio must lie in [0, 0.9375], got 0.95"),
        ({"ratio": "0.5"}, "ratio must be a number in [0, 0.9375], got '0.5'"),
        ({"ratio": float("nan")}, "ratio must be a number in [0, 0.9375], got nan"),
        ({"ratio": None}, "ratio must be a number"),
        ({"ratio": 10**400}, "ratio must lie in [0, 0.9375], got inf"),
        ({"schedule": "cosine"}, "schedule must be one of constant, linear, step, got 'cosine'"),
        ({"schedule": ["linear"]}, "schedule must be one of"),
        ({"max_downsample": 3}, "max_downsample must be one of 1, 2, 4, 8, got 3"),
        ({"min_tokens": -1}, "min_tokens must lie in [0, 65536], got -1"),
        ([0.5], "a preset must be an object of settings, got [0.5]"),
        ("fast", "a preset must be an object of settings, got 'fast'"),
        (None, "a preset must be an object of settings, got None"),
    ],
)
def test_one_bad_preset_is_told_and_the_others_work(file, path, entry, reason):
    write(path, {"before": {"ratio": 0.1}, "bad": entry, "after": {"ratio": 0.2}})
    content = path.read_bytes()
    assert file.names() == [*NAMES, "before", "after"]
    (message,) = file.messages
    assert message.startswith("preset 'bad' can't be used: ") and reason in message
    assert error_of(file.get, "bad") == message
    assert file.get("after").ratio == 0.2
    assert "bad" not in json.loads(file.export())["presets"]
    assert path.read_bytes() == content and not kept_aside(path)


def test_a_bad_preset_can_be_deleted_renamed_or_saved_over(file, path):
    write(path, {"": {}, "Quality": {"ratio": 0.1}, "x" * 300: {"ratio": 0.2}, "bad": 5, "worse": {"ratio": 9, "y": 1}})
    assert file.names() == NAMES
    assert len(file.messages) == 5
    file.delete("")
    assert file.rename("x" * 300, "short") == "short"
    assert file.rename("Quality", "Quality of mine") == "Quality of mine"
    file.save("bad", MINE)
    file.save("worse", MINE)
    assert file.names() == [*NAMES, "Quality of mine", "short", "bad", "worse"]
    assert stored(path)["presets"]["worse"]["y"] == 1
    assert file.messages == []


def test_a_message_stays_short(file, path):
    write(path, {"a" * 5000: {}, "b": {"ratio": "c" * 5000}, "d": ["e" * 5000]})
    assert len(file.messages) == 3
    assert all(len(message) < 800 for message in file.messages)
    assert "up to 100 characters, got 5000" in file.messages[0]


# A file that can't be used

DEEP = b'{"version": 1, "presets": {"a": ' + b'{"b":' * 400 + b"1" + b"}" * 402
DAMAGED = {
    "empty": b"",
    "half-written": b'{"version": 1, "presets": {"mine": {"ratio": 0.',
    "not JSON": b"ratio = 0.5",
    "not UTF-8": '{"version": 1, "presets": {"Größe": {}}}'.encode("latin-1"),
    "UTF-16": '{"version": 1, "presets": {}}'.encode("utf-16"),
    "zeros, as after a power cut": bytes(300),
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "no version": b'{"presets": {}}',
    "version as text": b'{"version": "1", "presets": {}}',
    "version true": b'{"version": true, "presets": {}}',
    "version 0": b'{"version": 0, "presets": {}}',
    "version NaN": b'{"version": NaN, "presets": {}}',
    "no presets": b'{"version": 1}',
    "presets a list": b'{"version": 1, "presets": [{"ratio": 0.5}]}',
    "presets null": b'{"version": 1, "presets": null}',
    "a name twice": b'{"version": 1, "presets": {"a": {"ratio": 0.1}, "a": {"ratio": 0.2}}}',
    "a number too long": b'{"version": 1, "presets": {"a": {"x": ' + b"9" * 5000 + b"}}}",
    "too deep": DEEP,
    "far too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_told_and_kept_aside_at_the_next_save(file, path, content):
    path.write_bytes(content)
    assert_built_ins_work(file)
    (message,) = file.messages
    assert message.startswith(f"{path} is damaged: ") and "The next save keeps it" in message and len(message) < 600
    assert message in error_of(file.get, "mine")
    assert error_of(file.export) == message
    assert error_of(file.delete, "mine")
    assert path.read_bytes() == content, "reading changes nothing"

    file.save("mine", MINE)
    assert file.names() == [*NAMES, "mine"]
    (aside,) = kept_aside(path)
    assert re.fullmatch(r"presets\.damaged-\d{8}-\d{6}\.json", aside.name)
    assert aside.read_bytes() == content
    (message,) = file.messages
    assert message.startswith(f"{path} is damaged: ") and message.endswith(f"It is kept as {aside.name}")
    file.save("other", MINE)
    assert kept_aside(path) == [aside]


def test_a_kept_file_is_never_overwritten(file, path, monkeypatch):
    monkeypatch.setattr(presets.time, "strftime", lambda _: "20240229-235959")
    for content in (b"one", b"two", b"three"):
        path.write_bytes(content)
        file.save("mine", MINE)
    names = ["presets.damaged-20240229-235959.json"] + [f"presets.damaged-20240229-235959-{i}.json" for i in (2, 3)]
    assert {name: (path.parent / name).read_bytes() for name in names} == dict(
        zip(names, (b"one", b"two", b"three"), strict=True)
    )
    assert len(kept_aside(path)) == 3
    assert len(file.messages) == 3


@quick
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["version", "presets", "ratio"]) | st.text(), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
@example(b'{"version": 1, "presets": {')
@example(b"\xff")
def test_whatever_the_bytes_are_the_built_in_presets_work_and_nothing_is_lost(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "presets.json")
        path.write_bytes(content)
        file = PresetFile(path)
        assert_built_ins_work(file)
        damaged = [message for message in file.messages if "is damaged" in message]
        if not damaged:  # By chance a good file, or a newer one; neither is likely.
            return
        file.save("mine", MINE)
        assert [aside.read_bytes() for aside in kept_aside(path)] == [content]
        assert file.get("mine") == MINE


@quick
@given(st.integers(0, 400), st.integers(0, 255) | st.none())
def test_a_good_file_with_one_byte_changed_or_cut_there(position, byte):
    document = {"version": 1, "presets": {"ä": {"ratio": 0.25, "x": [1]}, "b": {"schedule": "step", "late_ratio": 0.1}}}
    content = bytearray(json.dumps(document, ensure_ascii=False).encode())
    content[position:] = [] if byte is None else bytes([byte]) + content[position + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "presets.json")
        path.write_bytes(content)
        file = PresetFile(path)
        assert_built_ins_work(file)
        damaged = any("is damaged" in message for message in file.messages)
        try:
            before = json.loads(content)
        except ValueError:
            assert damaged
        try:
            file.save("mine", MINE)
        except PresetError as error:
            assert "newer version" in str(error) and path.read_bytes() == content
            return
        if damaged:
            assert [aside.read_bytes() for aside in kept_aside(path)] == [content]
        else:
            own = stored(path)["presets"]
            assert {name: own[name] for name in before["presets"]} == before["presets"]


def test_a_byte_order_mark_is_no_damage(file, path):
    path.write_bytes(b"\xef\xbb\xbf" + b'{"version": 1, "presets": {"mine": {"ratio": 0.25}}}')
    assert file.get("mine").ratio == 0.25
    assert not file.messages


@pytest.mark.parametrize("version", ["2", "1.5", "1e400", "9" * 4000])
def test_a_newer_file_is_left_alone(file, path, version):
    content = f'{{"version": {version}, "sets": [{{"name": "mine"}}]}}'.encode()
    path.write_bytes(content)
    assert_built_ins_work(file)
    (message,) = file.messages
    assert "newer version" in message and str(path) in message and "nothing can be saved" in message
    assert "is damaged" not in message and len(message) < 800
    for action in (
        lambda: file.save("mine", MINE),
        lambda: file.delete("mine"),
        lambda: file.rename("mine", "other"),
        lambda: file.export(),
        lambda: file.import_('{"version": 1, "presets": {"mine": {}}}'),
    ):
        assert error_of(action) == message
    assert path.read_bytes() == content
    assert not kept_aside(path)


def test_a_folder_in_its_place(file, path):
    path.mkdir()
    (path / "inside").write_text("x")
    assert_built_ins_work(file)
    assert file.messages == [f"{path} can't be read: it is a folder"]
    assert error_of(file.save, "mine", MINE) == file.messages[0]
    assert (path / "inside").read_text() == "x"


def test_a_folder_that_isnt_there(tmp_path):
    file = PresetFile(tmp_path / "gone" / "presets.json")
    assert_built_ins_work(file)
    assert not file.messages
    assert error_of(file.save, "mine", MINE).startswith(f"{file.path} can't be written: ")


def test_a_file_that_cant_be_read(file, path, monkeypatch):
    write(path, {"mine": {}})

    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert_built_ins_work(file)
        assert file.messages == [f"{path} can't be read: Permission denied"]
        assert error_of(file.save, "other", MINE) == file.messages[0]
    assert file.names() == [*NAMES, "mine"], "what can't be read isn't replaced"


def test_a_read_only_file_is_not_replaced(file, path, monkeypatch):
    write(path, {"mine": {}})
    content = path.read_bytes()
    monkeypatch.setattr(presets.os, "access", lambda *_: False)  # To root every file is writable.
    assert error_of(file.save, "other", MINE) == f"{path} can't be written: it is read-only"
    assert path.read_bytes() == content


# Writing


def refusing(times, monkeypatch, name="replace"):
    """Lets `os.replace` fail as Windows does while another process has the file open."""
    original, calls = getattr(os, name), []

    def replace(source, target):
        calls.append((Path(source), Path(target), Path(source).read_bytes()))
        if len(calls) <= times:
            raise PermissionError(errno.EACCES, "Access is denied")
        original(source, target)

    monkeypatch.setattr(presets.os, name, replace)
    return calls


def test_a_save_is_one_replacement_by_a_whole_synced_file_of_the_same_folder(file, path, monkeypatch):
    file.save("mine", MINE)
    calls, synced = refusing(0, monkeypatch), []
    fsync = os.fsync
    monkeypatch.setattr(presets.os, "fsync", lambda descriptor: (synced.append(len(calls)), fsync(descriptor)))
    before = path.read_bytes()
    file.save("other", MINE)
    ((source, target, content),) = calls
    assert (source.parent, target) == (path.parent, path)
    assert json.loads(content)["presets"].keys() == {"mine", "other"} and content != before
    assert synced == [0], "synced before the replacement"


def test_a_file_that_is_open_elsewhere_for_a_moment_is_waited_for(file, path, monkeypatch):
    file.save("mine", MINE)
    calls = refusing(2, monkeypatch)
    file.save("other", MINE)
    assert len(calls) == 3
    assert file.names() == [*NAMES, "mine", "other"]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_that_stays_open_elsewhere_is_an_error_and_stays_as_it_was(file, path, monkeypatch, damaged):
    write(path, {"mine": {"ratio": 0.1}})
    content = b"damaged" if damaged else path.read_bytes()
    path.write_bytes(content)
    refusing(10_000, monkeypatch, "rename" if damaged else "replace")
    assert error_of(file.save, "other", MINE) == f"{path} can't be written: Access is denied"
    assert path.read_bytes() == content
    assert {entry.name for entry in path.parent.iterdir()} == {"presets.json", "presets.json.lock"}


def test_a_full_disk_is_an_error_and_the_file_stays(file, path, monkeypatch):
    file.save("mine", MINE)
    content = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(presets.os, "fsync", full)
    assert error_of(file.save, "other", MINE) == f"{path} can't be written: No space left on device"
    assert path.read_bytes() == content
    assert {entry.name for entry in path.parent.iterdir()} == {"presets.json", "presets.json.lock"}


def test_the_written_file_is_plain_json_for_any_reader(file, path):
    file.save("Größe 🖼️", MINE)
    assert path.read_bytes().isascii()
    assert path.read_text().startswith('{\n  "version": 1,\n')


@pytest.mark.skipif(os.name == "nt", reason="symlinks need rights on Windows")
def test_a_symlink_stays_one(tmp_path):
    target, link = tmp_path / "kept" / "real.json", tmp_path / "presets.json"
    target.parent.mkdir()
    link.symlink_to(target)
    PresetFile(link).save("mine", MINE)
    assert link.is_symlink()
    assert "mine" in stored(target)["presets"]


# Two tabs, two processes


def save_many(path, who, barrier):
    file = PresetFile(path)
    barrier.wait()
    for number in range(10):
        file.save(f"{who} {number}", MergeSettings(ratio=number / 20))


SAVE_MANY = """
file = presets.PresetFile(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    file.save(f"{sys.argv[3]} {number}", MergeSettings(ratio=number / 20))
"""


def test_processes_that_save_at_once_lose_nothing(file, path):
    workers = [start(SAVE_MANY, path, who) for who in range(4)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * len(workers)
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=60)
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    assert set(file.names()[len(NAMES) :]) == {f"{who} {number}" for who in range(4) for number in range(10)}
    assert not file.messages and not kept_aside(path)


@pytest.mark.parametrize("locks", [True, False], ids=["", "no locks on the file system"])
def test_threads_that_save_at_once_lose_nothing(file, path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(presets.sqlite3, "connect", no_locks)
    barrier, seen = threading.Barrier(5), []

    def read():
        barrier.wait()
        while any(worker.is_alive() for worker in workers):
            seen.append((file.names(), file.messages))

    workers = [threading.Thread(target=save_many, args=(path, who, barrier)) for who in range(4)]
    reader = threading.Thread(target=read)
    for thread in [*workers, reader]:
        thread.start()
    for thread in [*workers, reader]:
        thread.join(60)
    assert set(file.names()[len(NAMES) :]) == {f"{who} {number}" for who in range(4) for number in range(10)}
    counts = [len(names) for names, _ in seen]
    assert counts == sorted(counts) and not any(messages for _, messages in seen), "never half a file"


def no_locks(*_, **__):
    raise sqlite3.OperationalError("disk I/O error")


HOLD = """
with presets._locked(sys.argv[2] + ".lock"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_is_waited_for_and_ends_with_its_process(file, path, monkeypatch):
    holder = start(HOLD, path)
    assert holder.stdout.readline() == "held\n"
    with monkeypatch.context() as patch:
        patch.setattr(presets, "LOCK_SECONDS", 0.2)
        error = error_of(file.save, "mine", MINE)
    assert str(path) in error and "another program" in error and "nothing was saved" in error
    assert not path.exists()
    assert_built_ins_work(file)
    killer = threading.Timer(0.3, holder.kill)
    killer.start()
    file.save("mine", MINE)
    assert holder.wait(30) != 0, "killed while it had the lock"
    holder.communicate()
    assert file.get("mine") == MINE


@pytest.mark.parametrize("content", [b"", b"not a database" * 100])
def test_without_a_lock_a_preset_is_saved_all_the_same(file, path, content):
    Path(f"{path}.lock").write_bytes(content)
    file.save("mine", MINE)
    assert file.get("mine") == MINE


def test_after_an_error_the_lock_is_free(file):
    error_of(file.delete, "mine")
    file.save("mine", MINE)
    error_of(file.rename, "mine", "Fast")
    assert file.rename("mine", "other") == "other"


# Export and import


def test_exported_presets_are_imported_elsewhere(file, tmp_path):
    file.save("mine", MINE)
    file.save("<b>other</b>", MergeSettings(ratio=0.1))
    elsewhere = PresetFile(tmp_path / "elsewhere.json")
    text = file.export()
    assert json.loads(text)["version"] == 1
    assert elsewhere.import_(text) == (["mine", "<b>other</b>"], [])
    assert elsewhere.get("mine") == MINE
    assert elsewhere.import_(f"\ufeff{file.export([' mine '])}".encode()).skipped == [
        "'mine': it is already here as 'mine'"
    ]
    assert "'gone'" in error_of(file.export, ["mine", "gone"])
    assert json.loads(PresetFile(tmp_path / "none.json").export()) == {"version": 1, "presets": {}}


def test_a_built_in_one_is_exported_by_its_name_and_never_replaced(file, path):
    text = file.export(["quality"])
    assert json.loads(text)["presets"].keys() == {"Quality"}
    assert file.import_(text) == ([], ["'Quality': it is already here as 'Quality'"])
    assert not path.exists(), "nothing to write"
    different = '{"version": 1, "presets": {"quality": {"ratio": 0.11}}}'
    assert file.import_(different).added == ["quality (2)"]
    assert (file.get("Quality").ratio, file.get("quality (2)").ratio) == (0.75, 0.11)


def test_a_namesake_gets_a_new_name_and_only_once(file):
    file.save("mine", MINE)
    text = '{"version": 1, "presets": {"mine": {"ratio": 0.11}}}'
    assert file.import_(text).added == ["mine (2)"]
    assert file.import_(text) == ([], ["'mine': it is already here as 'mine (2)'"])
    assert file.import_(text.replace("0.11", "0.12")).added == ["mine (3)"]
    assert [file.get(name).ratio for name in ("mine", "mine (2)", "mine (3)")] == [0.4, 0.11, 0.12]
    assert file.import_(text.replace("0.11", '0.11, "new": 1')).added == ["mine (4)"], "what isn't known differs"
    assert file.import_(text.replace("mine", "x" * 100)).added == ["x" * 100]
    assert file.import_(text.replace("mine", "x" * 100).replace("0.11", "0.12")).added == ["x" * 96 + " (2)"]


def test_a_namesake_that_cant_be_used_is_not_overwritten(file, path):
    write(path, {"mine": 5})
    assert file.import_('{"version": 1, "presets": {"mine": {}}}').added == ["mine (2)"]
    assert stored(path)["presets"] == {"mine": 5, "mine (2)": {}}


def test_of_an_import_the_good_ones_are_added_and_the_others_told(file, path):
    write(path, {}, comment="here")
    own = {"good": {"ratio": 0.1}, "bad": {"ratio": 9}, "": {}, "a\nb": {}, "y" * 300: {}, "list": [], " z ": {"q": 1}}
    result = file.import_(json.dumps({"version": 1, "presets": own, "comment": "there", "more": 1}))
    assert result.added == ["good", "z"]
    assert result.skipped[:2] == [
        "'bad': ratio must lie in [0, 0.9375], got 9",
        "'': a preset's name must not be empty",
    ]
    assert len(result.skipped) == 5 and all("\n" not in line for line in result.skipped)
    assert file.names() == [*NAMES, "good", "z"] and not file.messages
    assert stored(path) == {
        "version": 1,
        "presets": {"good": {"ratio": 0.1}, "z": {"q": 1}},
        "comment": "here",
        "more": 1,
    }


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_import_is_refused(file, path, content):
    file.save("mine", MINE)
    before = path.read_bytes()
    assert error_of(file.import_, content).startswith("the import is damaged: ")
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "x", '{"version": 1', "\ud800", '"\ud800"'])
def test_damaged_text_is_refused_too(file, text):
    assert error_of(file.import_, text).startswith("the import is damaged: ")


def test_an_import_of_a_newer_version_or_too_large_is_refused(file, path):
    assert "newer version" in error_of(file.import_, '{"version": 2, "presets": {}}')
    assert "up to 1000000 bytes" in error_of(file.import_, " " * 1_000_001)
    many = {str(number): {} for number in range(201)}
    assert "up to 200 presets, got 201" in error_of(file.import_, json.dumps({"version": 1, "presets": many}))
    assert not path.exists()
    del many["0"]
    assert len(file.import_(json.dumps({"version": 1, "presets": many})).added) == 200


def test_an_import_into_a_damaged_file_keeps_that_aside(file, path):
    path.write_bytes(b"damaged")
    assert file.import_('{"version": 1, "presets": {"mine": {}}}').added == ["mine"]
    assert [aside.read_bytes() for aside in kept_aside(path)] == [b"damaged"]
