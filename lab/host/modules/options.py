"""Stands in for `modules.options`: the settings, what describes them, and their file."""

from __future__ import annotations

import json
import sys
from typing import Any, ClassVar


class OptionInfo:
    """Describes one setting: its default, its label, and the component that shows it."""

    def __init__(
        self,
        default=None,
        label="",
        component=None,
        component_args=None,
        onchange=None,
        section=None,
        refresh=None,
        comment_before="",
        comment_after="",
        infotext=None,
        restrict_api=False,
        category_id=None,
    ):
        self.default, self.label, self.infotext = default, label, infotext
        self.component, self.component_args, self.refresh = component, component_args, refresh
        self.onchange, self.section, self.category_id = onchange, section, category_id
        self.comment_before, self.comment_after = comment_before, comment_after
        self.restrict_api = restrict_api
        self.do_not_save = False

    def info(self, info: str) -> OptionInfo:
        """Adds a remark in brackets behind the label."""
        return self.html(f"<span class='info'>({info})</span>")

    def html(self, html: str) -> OptionInfo:
        """Adds HTML behind the label."""
        self.comment_after += html
        return self

    def link(self, label: str, url: str) -> OptionInfo:
        """Adds a link before the label."""
        self.comment_before += f"[<a href='{url}' target='_blank'>{label}</a>]"
        return self

    def needs_restart(self) -> OptionInfo:
        """Says that the setting takes effect after a restart."""
        return self.info("requires restart")

    def needs_reload_ui(self) -> OptionInfo:
        """Says that the setting takes effect after Reload UI."""
        return self.info("requires Reload UI")


class OptionHTML(OptionInfo):
    """A text between settings, itself none."""

    def __init__(self, text):
        import gradio as gr

        super().__init__(str(text).strip(), component=lambda **kwargs: gr.HTML(elem_classes="settings-info", **kwargs))
        self.do_not_save = True


def options_section(section_identifier: tuple, options_dict: dict[str, OptionInfo]) -> dict[str, OptionInfo]:
    """Puts all options of a dict into one section."""
    for option in options_dict.values():
        option.section = section_identifier[:2]
        if len(section_identifier) == 3:
            option.category_id = section_identifier[2]
    return options_dict


class Options:
    """The settings' values, readable and settable as attributes."""

    typemap: ClassVar = {int: float}

    def __init__(self, data_labels: dict[str, OptionInfo], restricted_opts):
        self.__dict__.update(data_labels=data_labels, restricted_opts=restricted_opts, data={})
        self.data.update({key: info.default for key, info in data_labels.items() if not info.do_not_save})

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.__dict__ or not (key in self.data or key in self.data_labels):
            self.__dict__[key] = value
        else:
            self.data[key] = value

    def __getattr__(self, item: str) -> Any:
        if item in self.__dict__.get("data", {}):
            return self.data[item]
        if item in self.__dict__.get("data_labels", {}):
            return self.data_labels[item].default
        raise AttributeError(item)

    def set(self, key: str, value: Any, is_api: bool = False, run_callbacks: bool = True) -> bool:
        """Sets an option and calls its `onchange`; says whether it changed. Raises KeyError for an unknown one."""
        old = self.data.get(key)
        option = self.data_labels[key] if old != value else None
        if option is None or option.do_not_save or (is_api and option.restrict_api):
            return False
        self.data[key] = value
        if run_callbacks and option.onchange is not None:
            try:
                option.onchange()
            except Exception as e:
                from modules import errors

                errors.display(e, f"changing setting {key} to {value}")
                self.data[key] = old
                return False
        return True

    def onchange(self, key: str, func, call: bool = True) -> None:
        """Calls `func()` whenever the option changes, and once now."""
        self.data_labels[key].onchange = func
        if call:
            func()

    def get_default(self, key: str) -> Any:
        """An option's default, None for an unknown one."""
        return self.data_labels[key].default if key in self.data_labels else None

    def add_option(self, key: str, info: OptionInfo) -> None:
        """Adds a setting, or replaces its description."""
        self.data_labels[key] = info
        if not info.do_not_save:
            self.data.setdefault(key, info.default)

    def save(self, filename: str) -> None:
        """Writes the values as JSON."""
        with open(filename, "w", encoding="utf8") as file:
            json.dump(self.data, file, indent=4, ensure_ascii=False)

    def load(self, filename: str) -> None:
        """Replaces the values by a file's, as WebUI does: what is not in the file falls back to the defaults."""
        try:
            with open(filename, encoding="utf8") as file:
                self.__dict__["data"] = json.load(file)
        except FileNotFoundError:
            self.__dict__["data"] = {}
        for key, value in self.data.items():
            if key in self.data_labels and not self.same_type(self.data_labels[key].default, value):
                print(f"Warning: bad setting value: {key}: {value}", file=sys.stderr)

    def same_type(self, x: Any, y: Any) -> bool:
        """Whether two values have one type; int and float count as one, None as any."""
        if x is None or y is None:
            return True
        return self.typemap.get(type(x), type(x)) == self.typemap.get(type(y), type(y))

    def cast_value(self, key: str, value: Any) -> Any:
        """Casts a value read from an infotext to the option's type."""
        default = self.data_labels[key].default
        if value is None or default is None:
            return None
        return False if isinstance(default, bool) and value == "False" else type(default)(value)

    def dumpjson(self) -> str:
        """All values as JSON, for the page."""
        return json.dumps(
            {key: self.data.get(key, info.default) for key, info in self.data_labels.items()}, default=str
        )
