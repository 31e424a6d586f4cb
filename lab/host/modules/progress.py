"""Stands in for `modules.progress`: how far the page's own generation is. Queue positions and previews are left out."""

from __future__ import annotations

import time

from fastapi import FastAPI
from modules import shared
from pydantic import BaseModel

current_task: str | None = None
finished_tasks: list[str] = []


def start_task(id_task):
    """A generation begins."""
    global current_task
    current_task = id_task


def finish_task(id_task):
    """A generation has ended; the last sixteen are remembered."""
    global current_task
    current_task = None
    finished_tasks.append(id_task)
    del finished_tasks[:-16]


class ProgressRequest(BaseModel):
    """Which generation is asked about."""

    id_task: str | None = None


class ProgressResponse(BaseModel):
    """How far it is, from 0 to 1, and for how many seconds yet."""

    active: bool
    completed: bool
    progress: float | None = None
    eta: float | None = None
    textinfo: str | None = None


def progressapi(req: ProgressRequest) -> ProgressResponse:
    """Answers the page."""
    active, completed = req.id_task == current_task, req.id_task in finished_tasks
    state = shared.state
    if not active or state.job_count <= 0:
        return ProgressResponse(active=active, completed=completed, textinfo=None if active else "Waiting...")
    in_job = state.sampling_step / state.sampling_steps if state.sampling_steps else 0
    progress = min((state.job_no + in_job) / state.job_count, 1)
    taken = time.time() - state.time_start
    eta = taken / progress - taken if progress else None
    return ProgressResponse(active=active, completed=completed, progress=progress, eta=eta, textinfo=state.textinfo)


def setup_progress_api(app: FastAPI):
    """Adds the page's own routes."""
    app.add_api_route("/internal/ping", lambda: {}, methods=["GET"])
    return app.add_api_route("/internal/progress", progressapi, methods=["POST"], response_model=ProgressResponse)
