"""ui-config.json: no ranges and no unchosen defaults of the extension, and all chosen ones."""

from __future__ import annotations

import json

import pytest
from in_host import running

CHOSEN = {"Ratio": 0.5, "Late ratio": 0.25, "Schedule": "step", "Switch at": 0.25}
CHOSEN |= {"Min tokens": 1024.0, "Apply to": "hires pass", "Max downsample": 4}
CHOSEN |= {"Merge map: step": 3.0, "ToMe": True}


def key(label, field, tab="txt2img"):
    return f"customscript/tome.py/{tab}/{label}/{field}"


def written(highest, **values):
    """A file as WebUI wrote it with version 0.1.0, whose highest ratio was 0.75, or 1.0.0."""
    ranges = {"minimum": 0, "maximum": highest, "step": 0.01}
    content = {"txt2img/Steps/value": 20, "customscript/tome.py/txt2img/Ratio/visible": True}
    for tab in ("txt2img", "img2img"):
        content |= {key(label, "value", tab): value for label, value in values.items()}
        content |= {
            key(label, field, tab): value
            for label in ("Ratio", "Late ratio")
            for field, value in ranges.items()
        }
    return content


OF_0_1_0 = {"Ratio": 0.6, "Late ratio": 0.4, "Schedule": "linear", "Switch at": 0.5}
OF_0_1_0 |= {"Max downsample": 1, "Min tokens": 0.0, "Apply to": "both passes"}
OF_0_1_0 |= {"Rematch every": 4.0, "ToMe": False}
OF_1_0_0 = {**OF_0_1_0, "Ratio": 0.9375, "Late ratio": 0.75, "Rematch every": 1.0, "Method": "keys"}
FILES = {
    "0.1.0": written(0.75, **OF_0_1_0),
    "0.1.0, then 1.0.0": written(0.75, **OF_0_1_0, Method="keys"),
    "1.0.0": written(0.9375, **OF_1_0_0),
}


@pytest.fixture
def defaults(host):
    return running("webui.defaults")


@pytest.fixture
def path(host, tmp_path, monkeypatch):
    """WebUI's file, in the test's folder."""
    from modules import shared

    path = tmp_path / "ui-config.json"
    monkeypatch.setattr(shared.cmd_opts, "ui_config_file", str(path))
    return path


def values_of(content):
    return {
        name.split("/", 2)[2]: value
        for name, value in content.items()
        if "tome.py/" in name and "/value" in name
    }


@pytest.mark.parametrize("version", FILES)
def test_ranges_and_unchosen_defaults_are_the_current_ones(defaults, version):
    after = defaults.updated(FILES[version])
    assert values_of(after) == {}
    assert not any(field in name for name in after for field in ("minimum", "maximum", "step"))
    assert after["txt2img/Steps/value"] == 20
    assert after["customscript/tome.py/txt2img/Ratio/visible"] is True
    assert defaults.updated(after) == after


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("label", CHOSEN)
def test_a_chosen_default_stays(defaults, version, label):
    before = FILES[version] | {key(label, "value", "img2img"): CHOSEN[label]}
    after = defaults.updated(before)
    expected = str(CHOSEN[label]) if label == "Max downsample" else CHOSEN[label]
    chosen = {f"img2img/{label}/value": expected}
    if label == "Ratio":
        chosen["img2img/Late ratio/value"] = 0.5  # Never above the ratio that was chosen.
    assert values_of(after) == chosen
    assert defaults.updated(after) == after


def test_a_later_version_updates_defaults_that_were_not_chosen(defaults):
    chosen = {key("Schedule", "value"): "step", key("Ratio", "value"): 0.775}
    later = defaults.updated(FILES["1.0.0"] | chosen)
    # WebUI writes the others.
    later |= {key("Late ratio", "value"): 0.75, key("Rematch every", "value"): 1.0}
    later[defaults.COPY]["reuse_steps"] = 1
    after = {"txt2img/Schedule/value": "step", "txt2img/Ratio/value": 0.775}
    assert values_of(defaults.updated(later)) == after
    later[defaults.COPY]["reuse_steps"] = 2
    after["txt2img/Reuse matching (steps)/value"] = 1.0
    assert values_of(defaults.updated(later)) == after, "it was chosen where 2 was the default"


def test_a_max_downsample_of_version_1_0_0_is_corrected(defaults):
    """Its page showed 1, and Settings, Defaults, Apply wrote the choice at index 1."""
    assert values_of(defaults.updated(FILES["1.0.0"] | {key("Max downsample", "value"): "2"})) == {}
    changed = values_of(defaults.updated(FILES["1.0.0"] | {key("Max downsample", "value"): "4"}))
    assert changed == {"txt2img/Max downsample/value": "2"}
    current = defaults.updated({}) | {key("Max downsample", "value"): "2"}
    assert values_of(defaults.updated(current)) == {"txt2img/Max downsample/value": "2"}


@pytest.mark.parametrize(
    ("label", "value"),
    [("Ratio", 7), ("Ratio", "much"), ("Max downsample", "3"), ("Min tokens", None), ("ToMe", 1)],
)
def test_an_unusable_value_gives_the_default_and_is_logged_once(defaults, log_lines, label, value):
    after = defaults.updated(FILES["1.0.0"] | {key(label, "value"): value})
    assert values_of(after) == {} and len(log_lines) == 1
    assert all(part in log_lines[0] for part in ("ui-config.json", "txt2img", repr(value)))
    defaults.updated(after)
    assert len(log_lines) == 1


def test_the_file_is_written_before_webui_reads_it_and_only_if_it_changes(path, host, defaults):
    path.write_text(json.dumps(FILES["0.1.0"]), encoding="utf-8")
    host.reload_ui()
    assert json.loads(path.read_text(encoding="utf-8")) == defaults.updated(FILES["0.1.0"])
    before = path.stat().st_mtime_ns
    defaults.update_file()
    assert path.stat().st_mtime_ns == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_new_file_gets_the_copy_of_the_defaults(path, defaults):
    defaults.update_file()
    ((key, copy),) = json.loads(path.read_text(encoding="utf-8")).items()
    assert key == defaults.COPY and copy["ratio"] > 0


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "5"])
def test_a_damaged_file_is_not_changed(path, defaults, content):
    path.write_text(content, encoding="utf-8")
    defaults.update_file()
    assert path.read_text(encoding="utf-8") == content
