"""Stands in for `modules.call_queue`: one at a time has the model."""

from __future__ import annotations

import threading

queue_lock = threading.Lock()
