"""Stands in for `modules.paths_internal`: another name of `modules.paths`."""

import sys

from modules import paths

sys.modules[__name__] = paths
