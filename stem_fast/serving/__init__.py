"""Trained models made ready to answer requests.

``inference`` is a model with nothing of training. Imports ``models`` and the rooms below it.
"""

from stem_fast.serving.inference import Inference

__all__ = ["Inference"]
