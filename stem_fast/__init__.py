"""STEM-Net multi-task recommenders with custom kernels."""

from importlib.metadata import version

from stem_fast.models.family import MODELS, PLE, MMoE, SharedBottom, SingleTask
from stem_fast.models.network import STEMNet
from stem_fast.ops import backends

__version__ = version("stem_fast")
__all__ = ["MODELS", "PLE", "MMoE", "STEMNet", "SharedBottom", "SingleTask", "backends"]
