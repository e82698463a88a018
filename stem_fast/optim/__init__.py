"""Optimizers of embedding tables whose cost is that of a batch's rows.

``base`` is what they share. ``exact_adam`` is torch's Adam, whose rows catch up on missed steps
from ``step_table``; ``lazy_adam``, ``sgd`` and ``adagrad`` are the others. Imports ``reference``,
``ops`` and ``nn``; knows no model.
"""

from collections.abc import Callable

from stem_fast.optim.adagrad import Adagrad, RowWiseAdagrad
from stem_fast.optim.base import TableOptimizer
from stem_fast.optim.exact_adam import ExactAdam
from stem_fast.optim.lazy_adam import LazyAdam
from stem_fast.optim.sgd import SGD

OPTIMIZERS: dict[str, Callable[..., TableOptimizer]] = {
    "adam": ExactAdam,
    "lazy_adam": LazyAdam,
    "sgd": SGD,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
}

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adagrad",
    "ExactAdam",
    "LazyAdam",
    "RowWiseAdagrad",
    "TableOptimizer",
]
