"""Adam that leaves out the steps a row misses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stem_fast.optim.exact_adam import ExactAdam


class LazyAdam(ExactAdam):
    """Adam that leaves out the steps which a row misses, as ``torch.optim.SparseAdam`` does.

    Not Adam's trajectory: a row's momentum stands still while no batch reads it, and L2 pulls it
    only then. :class:`ExactAdam` costs hardly more.
    """

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        super()._update(weight, group, rows, values)
        self._logs[weight].caught_up()
        self._logs[weight].has_pending = False
