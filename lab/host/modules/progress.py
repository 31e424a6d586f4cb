"""Stands in for `modules.progress`: pending, running and finished tasks, for the page's bars."""

from __future__ import annotations

current_task: str | None = None
pending_tasks: dict[str, None] = {}
finished_tasks: list[str] = []


def add_task_to_queue(id_job: str) -> None:
    """Add a waiting task."""
    pending_tasks[id_job] = None


def start_task(id_task: str) -> None:
    """Mark a task as running."""
    global current_task
    current_task = id_task
    pending_tasks.pop(id_task, None)


def finish_task(id_task: str) -> None:
    """Mark a task as finished."""
    global current_task
    current_task = None
    finished_tasks.append(id_task)
