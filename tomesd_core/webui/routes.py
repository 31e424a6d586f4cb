"""`GET /tome/presets`, `GET /tome/status` and `POST /tome/measure`."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import Body, Depends, FastAPI, HTTPException

from ..settings import SettingsError
from ..version import VERSION
from . import generation, host, measure, presets, sampling
from .log import EXPECTED, failed, guarded

API = "/sdapi/"
"""The path of WebUI's own API, whose routes have its login."""


def add_routes(demo: Any, app: FastAPI) -> None:
    """Add the routes to WebUI's app, behind its login."""
    login = _login(app)
    for path, answer in (("/tome/presets", get_presets), ("/tome/status", get_status)):
        app.get(path, dependencies=login)(guarded(f"GET {path}", answer, _refuse))
    app.post("/tome/measure", dependencies=login)(post_measure)


def _refuse(line: str) -> None:
    raise HTTPException(500, line)


def get_presets() -> list[dict[str, Any]]:
    """Every usable preset: name, description and settings."""
    return [
        {
            "name": name,
            "description": presets.BUILT_IN.get(name, ("", ""))[1],
            "settings": settings.panel_values,
        }
        for name, settings in presets.read()[0].items()
    ]


def get_status() -> dict[str, Any]:
    """Version, layers of the loaded model (None: no model), settings in use, last summary."""
    layers = host.loaded_layers()
    settings = sampling.settings_in_use()
    return {
        "version": VERSION,
        "layers": None
        if layers is None
        else [{"name": layer.name, "level": layer.level} for layer in layers],
        "settings": None if settings is None else settings.panel_values,
        "summary": generation.last.summary,
    }


def post_measure(request: dict[str, Any] = Body({})) -> list[dict[str, Any]]:  # noqa: B008 - FastAPI's way
    """The results of `measure.measure`, one per size."""
    try:
        return [dataclasses.asdict(result) for result in measure.measure(request)]
    except EXPECTED as error:
        raise HTTPException(422 if isinstance(error, SettingsError) else 500, str(error)) from error
    except Exception as error:
        raise HTTPException(500, failed("POST /tome/measure", error)) from error


def _login(app: Any) -> list[Any]:
    """Dependencies that enforce the login of the API (`--api-auth`), or else of the page."""
    for route in app.routes:
        login = getattr(route, "dependencies", None)
        if login and route.path.startswith(API):
            return list(login)
    # Gradio's own check. An app without a page (`--nowebui`) has no such route and no login.
    return [
        Depends(route.endpoint)
        for route in app.routes
        if getattr(route, "path", None) == "/login_check"
    ]
