"""Stands in for `modules.paths`. `Host` sets `data_path` and `extensions_dir` when it starts: read them when needed."""

from __future__ import annotations

import os

script_path = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
data_path = script_path
models_path = os.path.join(data_path, "models")
extensions_dir = os.path.join(data_path, "extensions")
extensions_builtin_dir = os.path.join(script_path, "extensions-builtin")
