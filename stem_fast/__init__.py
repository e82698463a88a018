"""STEM-Net multi-task recommenders with custom kernels."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = version("stem_fast")

# The command imports these itself, where an interrupt or a wrong backend is one line.
if TYPE_CHECKING or Path((sys.argv or [""])[0]).name not in ("stem-fast", "stem-fast.exe", "-m"):
    from stem_fast import _moved as _moved
    from stem_fast.models import MODELS, PLE, MMoE, SharedBottom, SingleTask, STEMNet
    from stem_fast.ops.backends import backends

__all__ = ["MODELS", "PLE", "MMoE", "STEMNet", "SharedBottom", "SingleTask", "backends"]
