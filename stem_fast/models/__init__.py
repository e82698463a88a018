"""STEM-Net and its family: one network, and a table of who reads, sees and teaches whom.

``network`` is STEMNet, ``wiring`` describes a member of the family, ``family`` has the others,
``config`` checks a constructor's arguments, ``tasks`` tells what a task's kind does, ``official``
converts checkpoints of the official code. Imports ``ops`` and ``nn``.
"""

from stem_fast.models.family import MODELS, PLE, MMoE, SharedBottom, SingleTask
from stem_fast.models.network import STEMNet
from stem_fast.models.wiring import Wiring

__all__ = ["MODELS", "PLE", "MMoE", "STEMNet", "SharedBottom", "SingleTask", "Wiring"]
