"""Stands in for `modules.api.api`: the HTTP API, as far as a generation and its settings go.

Pictures are never taken from another server, and `save_images` saves nothing.
"""

from __future__ import annotations

import base64
import io
import time
from contextlib import closing
from secrets import compare_digest
from typing import Any

import gradio as gr
from fastapi import Depends, FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import errors, images, infotext_utils, script_callbacks, scripts, sd_models, sd_samplers, shared
from modules.api import models
from modules.processing import StableDiffusionProcessingImg2Img, StableDiffusionProcessingTxt2Img, process_images
from PIL import Image, PngImagePlugin
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware


def script_name_to_index(name, scripts):
    """Where a script is in a list, by its title in any case."""
    try:
        return [script.title().lower() for script in scripts].index(name.lower())
    except Exception as e:
        raise HTTPException(status_code=422, detail=f"Script '{name}' not found") from e


def validate_sampler_name(name):
    """The name itself, if there is such a sampler."""
    if name not in sd_samplers.all_samplers_map:
        raise HTTPException(status_code=400, detail="Sampler not found")
    return name


def decode_base64_to_image(encoding):
    """A picture from its file in base64."""
    try:
        encoded = encoding.split(";")[1].split(",")[1] if encoding.startswith("data:image/") else encoding
        return Image.open(io.BytesIO(base64.b64decode(encoded)))
    except Exception as e:
        raise HTTPException(status_code=500, detail="Invalid encoded image") from e


def encode_pil_to_base64(image):
    """A PNG in base64, with the picture's parameters in it."""
    metadata = PngImagePlugin.PngInfo()
    for key, value in image.info.items():
        if isinstance(key, str) and isinstance(value, str):
            metadata.add_text(key, value)
    with io.BytesIO() as file:
        image.save(file, format="PNG", pnginfo=metadata)
        return base64.b64encode(file.getvalue())


def api_middleware(app: FastAPI):
    """Errors come as JSON, in WebUI's form."""

    def handle_exception(request: Request, e: Exception):
        detail = {"error": type(e).__name__, "detail": vars(e).get("detail", ""), "body": vars(e).get("body", "")}
        if not isinstance(e, HTTPException):
            errors.report(f"API error: {request.method}: {request.url} {detail}", exc_info=True)
        status = vars(e).get("status_code", 500)
        return JSONResponse(status_code=status, content=jsonable_encoder({**detail, "errors": str(e)}))

    async def exception_handling(request: Request, call_next):
        try:
            return await call_next(request)
        except Exception as e:
            return handle_exception(request, e)

    # `app.middleware` refuses once a request has come, and the page's server is up before the API is there.
    app.user_middleware.insert(0, Middleware(BaseHTTPMiddleware, dispatch=exception_handling))

    @app.exception_handler(HTTPException)
    async def http_exception_handler(request: Request, e: HTTPException):
        return handle_exception(request, e)


class Api:
    """The routes under `/sdapi/v1`."""

    def __init__(self, app: FastAPI, queue_lock):
        self.app, self.queue_lock = app, queue_lock
        logins = shared.cmd_opts.api_auth.split(",") if shared.cmd_opts.api_auth else []
        self.credentials = dict(login.split(":", maxsplit=1) for login in logins)
        api_middleware(app)
        self.default_script_arg_txt2img = self.init_default_script_args(scripts.scripts_txt2img)
        self.default_script_arg_img2img = self.init_default_script_args(scripts.scripts_img2img)
        for path, endpoint, methods in [
            ("txt2img", self.text2imgapi, ["POST"]),
            ("img2img", self.img2imgapi, ["POST"]),
            ("png-info", self.pnginfoapi, ["POST"]),
            ("progress", self.progressapi, ["GET"]),
            ("interrupt", self.interruptapi, ["POST"]),
            ("skip", self.skip, ["POST"]),
            ("options", self.get_config, ["GET"]),
            ("options", self.set_config, ["POST"]),
            ("samplers", self.get_samplers, ["GET"]),
            ("sd-models", self.get_sd_models, ["GET"]),
            ("scripts", self.get_scripts_list, ["GET"]),
            ("script-info", self.get_script_info, ["GET"]),
        ]:
            self.add_api_route(f"/sdapi/v1/{path}", endpoint, methods=methods)

    def add_api_route(self, path: str, endpoint, **kwargs):
        """Adds a route, behind the credentials if there are any."""
        if self.credentials:
            kwargs["dependencies"] = [Depends(self.auth)]
        return self.app.add_api_route(path, endpoint, **kwargs)

    def auth(self, credentials: HTTPBasicCredentials = Depends(HTTPBasic())):  # noqa: B008
        """Lets nobody pass who is not on the list."""
        known = self.credentials.get(credentials.username)
        if known is not None and compare_digest(credentials.password.encode(), known.encode()):
            return True
        headers = {"WWW-Authenticate": "Basic"}
        raise HTTPException(status_code=401, detail="Incorrect username or password", headers=headers)

    def init_default_script_args(self, script_runner):
        """The defaults that are coded. Like WebUI, this calls every script's `ui` twice more."""
        args = [0] + [None] * (max([1, *(script.args_to for script in script_runner.scripts)]) - 1)
        with gr.Blocks():
            for script in script_runner.scripts:
                if script.ui(script.is_img2img):
                    args[script.args_from : script.args_to] = [c.value for c in script.ui(script.is_img2img)]
        return args

    def init_script_args(
        self, request, default_script_args, selectable_scripts, selectable_idx, script_runner, *, input_script_args=None
    ):
        """All arguments: the defaults, then what the infotext says, then what the request says."""
        args = list(default_script_args)
        for index, value in (input_script_args or {}).items():
            args[index] = value
        if selectable_scripts:
            args[selectable_scripts.args_from : selectable_scripts.args_to] = request.script_args
            args[0] = selectable_idx + 1
        for name, entry in (request.alwayson_scripts or {}).items():
            script = script_runner.scripts[script_name_to_index(name, script_runner.scripts)]
            if not script.alwayson:
                raise HTTPException(422, "Cannot have a selectable script in the always on scripts params")
            given = entry.get("args", [])[: script.args_to - script.args_from]
            args[script.args_from : script.args_from + len(given)] = given
        return args

    def apply_infotext(self, request, tabname, *, script_runner=None, mentioned_script_args=None):
        """Fills what the request leaves open from its infotext, scripts' arguments too."""
        if not request.infotext:
            return
        possible_fields = infotext_utils.paste_fields[tabname]["fields"]
        already_set = request.dict(exclude_unset=True)
        params = infotext_utils.parse_generation_parameters(request.infotext)

        def field_value(field):
            value = field.function(params) if field.function else params.get(field.label)
            if value is None:
                return None
            known = request.__fields__.get(field.api)
            kind = known.type_ if known else type(field.component.value)
            if kind is type(None):
                return None
            if isinstance(value, dict) and value.get("__type__") == "generic_update":
                value = value.get("value")
            return value if value is None or isinstance(value, kind) else kind(value)

        for field in possible_fields:
            if field.api and field.api not in already_set:
                value = field_value(field)
                if value is not None:
                    setattr(request, field.api, value)
        request.override_settings = request.override_settings or {}
        for _, setting_name, value in infotext_utils.get_override_settings(params):
            request.override_settings.setdefault(setting_name, value)
        indexes = {component: i for i, component in enumerate(script_runner.inputs)}
        for field in possible_fields:
            if field.component in indexes and (value := field_value(field)) is not None:
                mentioned_script_args[indexes[field.component]] = value

    def generate(self, request, tabname):
        """Runs a request; the host's own, shared by both routes and by `Host`. Returns `Processed`."""
        img2img = tabname == "img2img"
        runner = scripts.scripts_img2img if img2img else scripts.scripts_txt2img
        defaults = self.default_script_arg_img2img if img2img else self.default_script_arg_txt2img
        from_infotext: dict[int, Any] = {}
        self.apply_infotext(request, tabname, script_runner=runner, mentioned_script_args=from_infotext)
        script = index = None
        if request.script_name:
            index = script_name_to_index(request.script_name, runner.selectable_scripts)
            script = runner.selectable_scripts[index]
        args = {name: getattr(request, name) for name in request.__fields__}
        sampler, _ = sd_samplers.get_sampler_and_scheduler(request.sampler_name or request.sampler_index, None)
        args["sampler_name"] = validate_sampler_name(sampler)
        for name in [
            "sampler_index",
            "script_name",
            "script_args",
            "alwayson_scripts",
            "infotext",
            "send_images",
            "save_images",
        ]:
            args.pop(name)
        script_args = self.init_script_args(request, defaults, script, index, runner, input_script_args=from_infotext)
        if img2img:
            args.pop("include_init_images")
            if args["init_images"] is None:
                raise HTTPException(status_code=404, detail="Init image not found")
            opened = [x if isinstance(x, Image.Image) else decode_base64_to_image(x) for x in args["init_images"]]
            mask = decode_base64_to_image(args["mask"]) if isinstance(args["mask"], str) else args["mask"]
            args.update(init_images=opened, mask=mask)
        make = StableDiffusionProcessingImg2Img if img2img else StableDiffusionProcessingTxt2Img
        with self.queue_lock, closing(make(sd_model=shared.sd_model, **args)) as p:
            p.is_api = True
            p.scripts = runner
            try:
                shared.state.begin(job=f"scripts_{tabname}")
                p.script_args = tuple(script_args)
                return runner.run(p, *script_args) if script is not None else process_images(p)
            finally:
                shared.state.end()

    def text2imgapi(self, txt2imgreq: models.StableDiffusionTxt2ImgProcessingAPI):
        """From a prompt."""
        return self._reply(txt2imgreq, self.generate(txt2imgreq, "txt2img"))

    def img2imgapi(self, img2imgreq: models.StableDiffusionImg2ImgProcessingAPI):
        """From a picture."""
        processed = self.generate(img2imgreq, "img2img")
        if not img2imgreq.include_init_images:
            img2imgreq.init_images = img2imgreq.mask = None
        return self._reply(img2imgreq, processed)

    def _reply(self, request, processed) -> models.TextToImageResponse:
        encoded = [encode_pil_to_base64(image) for image in processed.images] if request.send_images else []
        return models.TextToImageResponse(images=encoded, parameters=vars(request), info=processed.js())

    def pnginfoapi(self, req: models.PNGInfoRequest):
        """A picture's parameters."""
        geninfo, items = images.read_info_from_image(decode_base64_to_image(req.image.strip()))
        params = infotext_utils.parse_generation_parameters(geninfo or "")
        script_callbacks.infotext_pasted_callback(geninfo or "", params)
        return models.PNGInfoResponse(info=geninfo or "", items=items, parameters=params)

    def progressapi(self, req: models.ProgressRequest = Depends()):  # noqa: B008
        """How far the current job is."""
        state = shared.state
        if state.job_count == 0:
            return models.ProgressResponse(progress=0, eta_relative=0, state=state.dict(), textinfo=state.textinfo)
        progress = 0.01
        if state.job_count > 0:
            progress += state.job_no / state.job_count
        if state.sampling_steps > 0:
            progress += 1 / state.job_count * state.sampling_step / state.sampling_steps
        taken = time.time() - state.time_start
        return models.ProgressResponse(
            progress=min(progress, 1),
            eta_relative=taken / progress - taken,
            state=state.dict(),
            textinfo=state.textinfo,
        )

    def interruptapi(self):
        """Stops the generation."""
        shared.state.interrupt()
        return {}

    def skip(self):
        """Goes on with the next batch."""
        shared.state.skip()

    def get_config(self):
        """All settings."""
        return dict(shared.opts.data)

    def set_config(self, req: dict[str, Any]):
        """Changes settings and saves them."""
        name = req.get("sd_model_checkpoint")
        if name is not None and name not in sd_models.checkpoint_aliases:
            raise RuntimeError(f"model {name!r} not found")
        for key, value in req.items():
            shared.opts.set(key, value, is_api=True)
        shared.opts.save(shared.config_filename)

    def get_samplers(self):
        """All samplers."""
        return [{"name": s.name, "aliases": s.aliases, "options": s.options} for s in sd_samplers.all_samplers]

    def get_sd_models(self):
        """All checkpoints."""
        return [
            {
                "title": x.title,
                "model_name": x.model_name,
                "hash": x.shorthash,
                "sha256": x.sha256,
                "filename": x.filename,
                "config": None,
            }
            for x in sd_models.checkpoints_list.values()
        ]

    def get_scripts_list(self):
        """All scripts' names."""
        runners = {"txt2img": scripts.scripts_txt2img, "img2img": scripts.scripts_img2img}
        return {tab: [s.name for s in runner.scripts if s.name is not None] for tab, runner in runners.items()}

    def get_script_info(self):
        """All scripts' arguments."""
        both = [*scripts.scripts_txt2img.scripts, *scripts.scripts_img2img.scripts]
        return [script.api_info for script in both if script.api_info is not None]
