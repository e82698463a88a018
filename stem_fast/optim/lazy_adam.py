"""Adam that skips the steps a row misses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stem_fast.optim.exact_adam import ExactAdam


class LazyAdam(ExactAdam):
    """Adam that skips the steps a row misses, as ``torch.optim.SparseAdam`` does.

    This is not Adam's trajectory: a row's momentum and its L2 act only at steps whose batch reads
    the row. :class:`ExactAdam` costs hardly more. Arguments and errors are :class:`ExactAdam`'s.
    """

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        super()._update(weight, group, rows, values)
        self._logs[weight].caught_up()
        self._logs[weight].has_pending = False
