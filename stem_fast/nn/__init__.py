"""Modules that know the ops and no model.

``arena`` is the embedding table, ``grouped`` runs networks of one shape side by side, ``batched``
are their products in the numbers of ``precision``, ``experts`` is experts and mixture in one step
of autograd, ``parallel`` shares a table's gradients between ranks, ``modules`` walks over modules.
Imports ``reference`` and ``ops``.
"""

from stem_fast.nn.arena import EmbeddingArena
from stem_fast.nn.grouped import ACTIVATIONS, GroupedMLP

__all__ = ["ACTIVATIONS", "EmbeddingArena", "GroupedMLP"]
