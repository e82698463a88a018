"""STEM-Net multi-task recommenders with custom kernels."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = version("stem_fast")


def _is_the_command() -> bool:
    """Whether this is imported to run as ``stem-fast`` or ``python -m stem_fast``."""
    name = Path((sys.argv or [""])[0]).name
    if name == "-m":  # so far, while the packages of whatever module it is are imported
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["stem_fast"]
    return name in ("stem-fast", "stem-fast.exe")


# The command imports these itself, where an interrupt or a wrong backend is one line.
if TYPE_CHECKING or not _is_the_command():
    from stem_fast import _moved as _moved
    from stem_fast.models import MODELS, PLE, MMoE, SharedBottom, SingleTask, STEMNet
    from stem_fast.ops.backends import backends

__all__ = ["MODELS", "PLE", "MMoE", "STEMNet", "SharedBottom", "SingleTask", "backends"]
