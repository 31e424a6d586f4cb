"""The axes of WebUI's X/Y/Z plot, and the pictures of its cells."""

from __future__ import annotations

from copy import copy
from types import ModuleType

import pytest
from in_host import HALVED, SIDE, left, pixels, running

from tomesd_core.settings import PANEL_FIELDS

NAMES = ["Enabled", "Preset", *(setting.label for setting in PANEL_FIELDS.values())]


@pytest.fixture
def axes(host):
    """The plot's axes by label, without `[ToMe]`."""
    from modules import scripts

    (plot,) = [data.module for data in scripts.scripts_data if data.path.endswith("xyz_grid.py")]
    return {option.label.removeprefix("[ToMe] "): option for option in plot.axis_options}


def replace_plot(monkeypatch, **modules):
    """Put modules, by their files' names, in the place of the plot's, which is the first."""
    from modules import scripts

    kind, others = scripts.ScriptClassData, scripts.scripts_data[1:]
    new = [kind(None, f"scripts/{name}.py", "", module) for name, module in modules.items()]
    monkeypatch.setattr(scripts, "scripts_data", [*new, *others])


@pytest.mark.parametrize("name", ["xyz_grid.py", "scripts.xyz_grid"])
def test_axes_are_there_once_whatever_the_plots_module_is_called(
    host, log_lines, monkeypatch, name
):
    """WebUI 1.9.0 and 1.9.1 call it `scripts.xyz_grid`."""
    from modules import scripts

    module = ModuleType(name)
    module.AxisOption = scripts.AxisOption
    module.axis_options = [scripts.AxisOption("Steps", int, None)]
    replace_plot(monkeypatch, other=ModuleType("other.py"), xyz_grid=module)
    for _ in range(2):
        running("webui.axes").add_axes()
    labels = [option.label for option in module.axis_options]
    assert labels == ["Steps", *(f"[ToMe] {name}" for name in NAMES)]
    assert log_lines == []


@pytest.mark.parametrize("modules", [{}, {"xyz_grid": ModuleType("xyz_grid.py")}])
def test_where_there_is_no_plot_this_is_logged(host, log_lines, monkeypatch, modules):
    """A fork may have a file of this name without axes."""
    replace_plot(monkeypatch, **modules)
    running("webui.axes").add_axes()
    assert len(log_lines) == 1
    assert "xyz_grid.py" in log_lines[0]


@pytest.fixture
def cells(make_p, axes):
    """Make a plot's cells: copies of one `p` on which axes have set their values."""
    from modules import processing, shared

    def make(tome, *cells):
        p = make_p(tome)
        for cell in cells:
            shared.state.begin()
            pc = copy(p)
            for name, text in cell.items():
                axes[name].apply(pc, axes[name].type(text), [])
            yield processing.process_images(pc)

    return make


def test_a_setting_is_swept_with_the_panel_off_and_on(cells, attention):
    for tome in ([False, *HALVED[1:]], HALVED):
        pictures = list(cells(tome, {"Ratio": "0.55"}, {"Ratio": "0.6"}))
        assert [one.extra_generation_params["ToMe ratio"] for one in pictures] == [0.55, 0.6]
    # A ratio alone never merges more late than early.
    assert attention.tokens == [left(ratio) for ratio in (0.55, 0.55, 0.6, 0.6)] * 2


def test_the_switch_and_the_presets_have_axes_and_the_switch_wins(cells, plain, merged, attention):
    off, on, preset, neither = cells(
        HALVED,
        {"Enabled": "False", "Ratio": "0.6"},
        {"Enabled": "true"},
        {"Preset": "Fast", "Ratio": "0.6"},
        {},
    )
    assert pixels(off) == plain and "ToMe" not in off.infotexts[0]
    assert pixels(on) == pixels(neither) == merged
    parameters = preset.extra_generation_params
    assert (parameters["ToMe ratio"], parameters["ToMe max downsample"]) == (0.6, 2)
    assert attention.tokens[:2] == [SIDE * SIDE] * 2


@pytest.mark.parametrize(
    ("label", "good", "wrong"),
    [
        ("Ratio", "0.3", "2"),
        ("Schedule", "step", "zigzag"),
        ("Max downsample", "2", "3"),
        ("Reuse matching (steps)", "2", "0"),
        ("Enabled", "False", "yes"),
        ("Preset", "Fast", "No such"),
    ],
)
def test_wrong_values_are_refused_before_the_first_picture(axes, label, good, wrong):
    option = axes[label]
    option.confirm(None, [option.type(good)])
    with pytest.raises(running("settings").SettingsError, match=wrong):
        option.confirm(None, [option.type(good), option.type(wrong)])
    if option.choices is not None:
        assert good in option.choices() and wrong not in option.choices()
