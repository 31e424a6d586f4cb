"""Stands in for `modules.infotext_utils`: parameters written as text, read back, and put into the page's controls."""

from __future__ import annotations

import json
import os
import re
import sys

import gradio as gr
from modules import errors, paths, script_callbacks, shared

sys.modules["modules.generation_parameters_copypaste"] = sys.modules[__name__]  # the name before 1.8

re_param = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
re_imagesize = re.compile(r"^(\d+)x(\d+)$")


class ParamBinding:
    """A button that sends a picture and its parameters to a tab."""

    def __init__(
        self,
        paste_button,
        tabname,
        source_text_component=None,
        source_image_component=None,
        source_tabname=None,
        override_settings_component=None,
        paste_field_names=None,
    ):
        self.paste_button, self.tabname, self.source_tabname = paste_button, tabname, source_tabname
        self.source_text_component, self.source_image_component = source_text_component, source_image_component
        self.override_settings_component = override_settings_component
        self.paste_field_names = paste_field_names or []


class PasteField(tuple):
    """A component, and the infotext key, or function of the parsed infotext, that gives its value."""

    def __new__(cls, component, target, *, api=None):
        return super().__new__(cls, (component, target))

    def __init__(self, component, target, *, api=None):
        self.api, self.component = api, component
        self.label = target if isinstance(target, str) else None
        self.function = target if callable(target) else None


paste_fields: dict[str, dict] = {}
registered_param_bindings: list[ParamBinding] = []


def reset():
    """Forgets the page's fields and buttons."""
    paste_fields.clear()
    registered_param_bindings.clear()


def quote(text):
    """JSON, if the text has what would end it early."""
    return json.dumps(text, ensure_ascii=False) if set(str(text)) & set(",\n:") else text


def unquote(text):
    """The reverse of `quote`."""
    try:
        return json.loads(text) if len(text) > 0 and text[0] == text[-1] == '"' else text
    except ValueError:
        return text


def add_paste_fields(tabname, init_img, fields, override_settings_component=None):
    """Notes a tab's fields."""
    fields = [f if isinstance(f, PasteField) else PasteField(*f) for f in fields]
    paste_fields[tabname] = {
        "init_img": init_img,
        "fields": fields,
        "override_settings_component": override_settings_component,
    }


def register_paste_params_button(binding: ParamBinding):
    """Notes a button; `connect_paste_params_buttons` brings it to life."""
    registered_param_bindings.append(binding)


def connect_paste_params_buttons():
    """Binds all noted buttons, once all tabs exist."""
    for binding in registered_param_bindings:
        tab = paste_fields[binding.tabname]
        if binding.source_image_component and tab["init_img"]:
            gallery = isinstance(binding.source_image_component, gr.Gallery)
            binding.paste_button.click(
                lambda x: x[0]["name"] if isinstance(x, list) and x else x,
                _js="extract_image_from_gallery" if gallery else None,
                inputs=[binding.source_image_component],
                outputs=[tab["init_img"]],
                show_progress=False,
            )
        if binding.source_text_component is not None:
            connect_paste(
                binding.paste_button,
                tab["fields"],
                binding.source_text_component,
                tab["override_settings_component"],
                binding.tabname,
            )
        if binding.source_tabname is not None:
            names = [
                "Prompt",
                "Negative prompt",
                "Steps",
                *(["Seed"] if shared.opts.send_seed else []),
                *binding.paste_field_names,
            ]
            source = paste_fields[binding.source_tabname]["fields"]
            binding.paste_button.click(
                lambda *x: x,
                inputs=[component for component, name in source if name in names],
                outputs=[component for component, name in tab["fields"] if name in names],
                show_progress=False,
            )
        binding.paste_button.click(None, _js=f"switch_to_{binding.tabname}", show_progress=False)


def parse_generation_parameters(x: str, skip_fields: list[str] | None = None):
    """Reads an infotext into a dict of texts. A value like `8x8` becomes two keys, `…-1` and `…-2`."""
    res, texts, target = {}, {"Prompt": [], "Negative prompt": []}, "Prompt"
    *lines, lastline = x.strip().split("\n")
    if len(re_param.findall(lastline)) < 3:
        lines, lastline = [*lines, lastline], ""
    for line in (line.strip() for line in lines):
        if line.startswith("Negative prompt:"):
            target, line = "Negative prompt", line[16:].strip()
        texts[target].append(line)
    for key, value in re_param.findall(lastline):
        value = unquote(value)
        size = re_imagesize.match(str(value))
        res.update({f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: value})
    res.update({key: "\n".join(lines) for key, lines in texts.items()})
    absent = {
        "Clip skip": "1",
        "Hires resize-1": 0,
        "Hires resize-2": 0,
        "Hires sampler": "Use same sampler",
        "Hires checkpoint": "Use same checkpoint",
        "Hires prompt": "",
        "Hires negative prompt": "",
        "Schedule type": "Automatic",
    }
    res = {**absent, **res}
    for key in shared.opts.infotext_skip_pasting if skip_fields is None else skip_fields:
        res.pop(key, None)
    return res


def create_override_settings_dict(text_pairs):
    """From the page's list (`Clip skip: 2`) to `override_settings`."""
    params = dict(pair.split(":", maxsplit=1) for pair in text_pairs or [])
    keys = {info.infotext: key for key, info in shared.opts.data_labels.items() if info.infotext in params}
    return {key: shared.opts.cast_value(key, params[name].strip()) for name, key in keys.items()}


def get_override_settings(params, *, skip_fields=None):
    """Settings that an infotext names and that are not so now: (key, setting, value)."""
    res = []
    for setting_name, info in shared.opts.data_labels.items():
        if info.infotext and info.infotext not in (skip_fields or {}) and params.get(info.infotext) is not None:
            value = shared.opts.cast_value(setting_name, params[info.infotext])
            if value != getattr(shared.opts, setting_name, None):
                res.append((info.infotext, setting_name, value))
    return res


def connect_paste(button, paste_fields, input_comp, override_settings_component, tabname):
    """Makes a button read an infotext (the last generation's if the box is empty) into the tab's controls."""

    def value_for(component, key, params):
        if callable(key):
            try:
                value = key(params)
            except Exception:
                errors.report(f"Error executing {key}", exc_info=True)
                value = None
        else:
            value = params.get(key)
        if value is None or isinstance(value, dict):
            return value or gr.update()
        try:
            kind = type(component.value)
            value = False if kind is bool and value == "False" else float(value) if kind is int else kind(value)
            return gr.update(value=value)
        except Exception:
            return gr.update()

    def paste_func(prompt):
        if not prompt and os.path.exists(path := os.path.join(paths.data_path, "params.txt")):
            with open(path, encoding="utf8") as file:
                prompt = file.read()
        params = parse_generation_parameters(prompt or "")
        script_callbacks.infotext_pasted_callback(prompt, params)
        return [value_for(component, key, params) for component, key in fields]

    fields = list(paste_fields)
    if override_settings_component is not None:

        def paste_settings(params):
            found = get_override_settings(params, skip_fields={key for _, key in paste_fields})
            pairs = [f"{name}: {value}" for name, _, value in found]
            return gr.update(value=pairs, choices=pairs, visible=bool(pairs))

        fields.append((override_settings_component, paste_settings))
    button.click(paste_func, inputs=[input_comp], outputs=[component for component, _ in fields], show_progress=False)
