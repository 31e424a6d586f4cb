"""Token merging for Stable Diffusion's self-attention (Bolya and Hoffman, arXiv 2303.17604)."""

from .compat import apply_patch, remove_patch
from .hooks import Merging, attach
from .matching import match_tokens
from .report import Report
from .settings import MergeSettings, SettingsError
from .token_map import TokenMap
from .version import VERSION

__version__ = VERSION
__all__ = [
    "MergeSettings",
    "Merging",
    "Report",
    "SettingsError",
    "TokenMap",
    "apply_patch",
    "attach",
    "match_tokens",
    "remove_patch",
]
