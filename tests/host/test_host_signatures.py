"""The host against a real WebUI's source, read but not imported: names of parameters, and the order of callbacks.

Point WEBUI_DIR at a checkout of AUTOMATIC1111/stable-diffusion-webui 1.10.1.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
from functools import cache
from pathlib import Path

import pytest

from lab.host import FOLDER, Host

WEBUI_DIR = os.environ.get("WEBUI_DIR")


@pytest.fixture(scope="module", autouse=True)
def release() -> None:
    """Skips where there is nothing to compare with."""
    if not WEBUI_DIR:
        pytest.skip("WEBUI_DIR names no WebUI checkout to compare the host with")
    headings = Path(WEBUI_DIR, "CHANGELOG.md").read_text(encoding="utf8").split()
    if headings[1] not in ("1.10.0", "1.10.1"):
        pytest.skip(f"WEBUI_DIR holds WebUI {headings[1]}, and the host stands in for 1.10.1")


OWN = {
    "extensions.Extension.__init__": "a dataclass of four fields",
    "images.to_tensor": "WebUI writes it out where it needs it",
    "images.to_image": "WebUI writes it out where it needs it",
    "scripts.load_module": "WebUI's is in script_loading",
    "api.api.Api.generate": "what WebUI's two routes have in common",
    "ui.page_head": "WebUI's is in ui_gradio_extensions",
    "ui.generate_function": "WebUI's txt2img and img2img",
    "ui.slider": "a shorter way to write it",
    "ui.run_pnginfo": "WebUI's is in extras",
    "ui.plaintext_to_html": "WebUI imports it from ui_common",
    "ui.update_generation_info": "WebUI's is in ui_common",
    "ui.create_hires_controls": "a part of WebUI's create_ui",
    "ui.create_generation_tab": "a part of WebUI's create_ui",
    "ui.create_png_info_tab": "a part of WebUI's create_ui",
    "ui.create_settings_tab": "a part of WebUI's ui_settings",
    "gradio_extensons.reload_javascript": "WebUI's is in ui_gradio_extensions",
    "sd_hijack.TorchHijackForUnet.cat": "WebUI's is in sd_hijack_unet",
    "sd_hijack.hijack": "a method in WebUI",
    "sd_hijack.undo_hijack": "a method in WebUI",
}
"""What the host has and WebUI has not, or not there, and why that is so."""


def modules() -> list[str]:
    """Dotted names of the host's modules and own scripts' place under `modules`."""
    files = [f for f in (FOLDER / "modules").rglob("*.py") if "processing_scripts" not in f.parts]
    names = [".".join(f.relative_to(FOLDER / "modules").with_suffix("").parts) for f in files]
    return sorted(name for name in names if not name.endswith("__init__") and name != "paths_internal")


def parameters_of(function: ast.FunctionDef) -> list[str]:
    args = function.args
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [arg.arg for arg in every if arg]


@cache
def parsed(name: str) -> ast.Module:
    path = Path(WEBUI_DIR, "modules", *name.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf8")) if path.exists() else ast.Module([], [])


def bodies(name: str, class_name: str) -> list[ast.stmt]:
    """A class's statements and those of its bases in the same file."""
    found = next((n for n in parsed(name).body if isinstance(n, ast.ClassDef) and n.name == class_name), None)
    if found is None:
        return []
    bases = [b.id for b in found.bases if isinstance(b, ast.Name) and b.id != class_name]
    return [statement for base in bases for statement in bodies(name, base)] + found.body


def find(name: str, qualname: str) -> list[str] | None:
    """A function's parameters in WebUI, None where it has no such function. A dataclass's are its fields."""
    *class_name, function = qualname.split(".")
    body = bodies(name, class_name[0]) if class_name else parsed(name).body
    for statement in reversed(body):
        if isinstance(statement, ast.FunctionDef) and statement.name == function:
            return parameters_of(statement)
    fields = dict.fromkeys(s.target.id for s in body if isinstance(s, ast.AnnAssign))
    if function == "__init__" and class_name:
        return ["self", *fields]
    return None


def offered(name: str) -> dict[str, list[str]]:
    """The host's public functions and methods of one module, and their parameters."""
    module, found = importlib.import_module(f"modules.{name}"), {}
    for key, thing in vars(module).items():
        if key.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing):
            found[key] = thing
        elif inspect.isclass(thing):
            members = {k: v for k, v in vars(thing).items() if k == "__init__" or not k.startswith("_")}
            found.update({f"{key}.{k}": v for k, v in members.items() if inspect.isfunction(v)})
    return {key: list(inspect.signature(function).parameters) for key, function in found.items()}


def test_every_parameter_has_webuis_name(host: Host):
    strange = []
    for name in modules():
        for qualname, parameters in offered(name).items():
            if parameters == ["args", "kwargs"]:  # takes whatever it is given
                continue
            theirs = find(name, qualname)
            if f"{name}.{qualname}" in OWN:
                assert theirs is None or name == "extensions", f"{name}.{qualname} is in WebUI after all"
            elif theirs is None:
                strange.append(f"{name}.{qualname}: WebUI has no such function there")
            elif [p for p in parameters if p in theirs] != parameters:
                strange.append(f"{name}.{qualname}: {parameters} here, {theirs} in WebUI")
            elif [p for p in theirs if p in parameters] != parameters:
                strange.append(f"{name}.{qualname}: in another order, {parameters} here, {theirs} in WebUI")
    assert not strange, "\n".join(strange)


def steps(tree: ast.Module, path: str, names: set[str]) -> list[str]:
    """In which order a function mentions some names, `a.b.name` or `name`, in the source."""
    body: list[ast.stmt] = tree.body
    for part in path.split("."):
        found = next(n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part)
        body = found.body
    seen = [
        (node.lineno, node.col_offset, node.attr if isinstance(node, ast.Attribute) else node.id)
        for node in ast.walk(found)
        if isinstance(node, ast.Attribute | ast.Name)
    ]
    return [name for _, _, name in sorted(seen) if name in names]


def is_subsequence(few: list[str], many: list[str]) -> bool:
    rest = iter(many)
    return all(name in rest for name in few)


ORDERS = {
    "processing.process_images": """
        before_process reload_model_weights set apply_token_merging process_images_inner""",
    "processing.process_images_inner": """
        setup_prompts process init apply_unet reload_model_weights before_process_batch parse_extra_network_prompts
        process_batch setup_conds sample post_sample nextjob postprocess_batch postprocess_batch_list postprocess_image
        postprocess_image_after_composite postprocess""",
    "processing.StableDiffusionProcessingTxt2Img.sample": """
        create_sampler process_before_every_sampling sample reload_model_weights sample_hr_pass""",
    "processing.StableDiffusionProcessingTxt2Img.sample_hr_pass": """
        is_hr_pass create_sampler nextjob calculate_hr_conds apply_token_merging before_hr process_before_every_sampling
        sample_img2img""",
    "processing.StableDiffusionProcessingImg2Img.sample": """
        process_before_every_sampling sample_img2img on_mask_blend""",
    "sd_samplers_cfg_denoiser.CFGDenoiser.forward": """
        apply_refiner cfg_denoiser_callback inner_model cfg_denoised_callback store_latent cfg_after_cfg_callback""",
    "sd_samplers_common.apply_refiner": "reload_model_weights setup_conds update_inner_model",
    "sd_samplers_kdiffusion.KDiffusionSampler.sample_img2img": "setup_img2img_steps get_sigmas init_latent",
    "sd_samplers_timesteps.CompVisSampler.sample_img2img": "setup_img2img_steps get_timesteps init_latent",
    "api.api.Api.__init__": "add_api_route init_default_script_args",
    "ui.create_ui": "scripts_txt2img scripts_img2img ui_tabs_callback connect_paste_params_buttons",
}
"""Functions, and what of that which they mention must come in WebUI's order."""


@pytest.mark.parametrize("function", ORDERS)
def test_things_happen_in_webuis_order(host: Host, function: str):
    module = next(name for name in modules() if function.startswith(f"{name}."))
    path, names = function[len(module) + 1 :], set(ORDERS[function].split())
    own_file = (FOLDER / "modules").joinpath(*module.split(".")).with_suffix(".py")
    ours = steps(ast.parse(own_file.read_text(encoding="utf8")), path, names)
    theirs = steps(parsed(module), path, names)
    assert set(ours) == names
    assert is_subsequence(ours, theirs), f"{ours} here, {theirs} in WebUI"
