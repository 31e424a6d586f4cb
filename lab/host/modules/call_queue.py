"""Stands in for `modules.call_queue`: one generation at a time, and how the page runs one."""

from __future__ import annotations

import html
import threading
import time
from functools import wraps

from modules import errors, progress, shared

queue_lock = threading.Lock()


def wrap_queued_call(func):
    """Waits for its turn."""

    def f(*args, **kwargs):
        with queue_lock:
            return func(*args, **kwargs)

    return f


def wrap_gradio_gpu_call(func, extra_outputs=None):
    """A generation: waits for its turn and begins a job; like WebUI's, it does not end it when `func` raises."""

    @wraps(func)
    def f(*args, **kwargs):
        with queue_lock:
            id_task = args[0] if args and isinstance(args[0], str) else None
            shared.state.begin(job=id_task)
            progress.start_task(id_task)
            try:
                res = func(*args, **kwargs)
            finally:
                progress.finish_task(id_task)
            shared.state.end()
        return res

    return wrap_gradio_call(f, extra_outputs=extra_outputs, add_stats=True)


def wrap_gradio_call(func, extra_outputs=None, add_stats=False):
    """Shows an exception in the last output, and the time taken; the state is idle afterwards."""

    @wraps(func)
    def f(*args, **kwargs):
        start = time.perf_counter()
        state = shared.state
        try:
            res = list(func(*args, **kwargs))
        except Exception as e:
            errors.report("Error completing request", exc_info=True)
            outputs = [None, ""] if extra_outputs is None else extra_outputs
            res = [*outputs, f"<div class='error'>{html.escape(f'{type(e).__name__}: {e}')}</div>"]
        finally:
            state.skipped = state.interrupted = state.stopping_generation = False
            state.job_count, state.job = 0, ""
        if add_stats:
            taken = f"<span class='measurement'>{time.perf_counter() - start:.1f} sec.</span>"
            res[-1] += f"<div class='performance'><p class='time'>Time taken: {taken}</p></div>"
        return tuple(res)

    return f
