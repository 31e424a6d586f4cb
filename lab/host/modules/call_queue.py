"""Stands in for `modules.call_queue`: the lock around the model."""

from __future__ import annotations

import threading

queue_lock = threading.Lock()
