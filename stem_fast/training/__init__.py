"""Training: settings, one step, epochs with early stopping, and run folders.

``options`` checks settings, ``step`` is one training step, ``fit`` runs epochs, ``checks`` looks at
data before they begin, ``checkpoint`` writes and reads run folders. Imports the rooms below:
``data``, ``models``, ``optim``, ``nn``, ``ops``.
"""

from stem_fast.training.checkpoint import create_run, load_run
from stem_fast.training.options import TrainingConfig
from stem_fast.training.step import TrainStep, clip_grad_norm_, make_optimizers

__all__ = [
    "TrainStep",
    "TrainingConfig",
    "clip_grad_norm_",
    "create_run",
    "load_run",
    "make_optimizers",
]
