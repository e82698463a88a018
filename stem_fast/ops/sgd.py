"""SGD of a batch's rows, with the steps that they missed.

The ops change their arguments in place; :mod:`stem_fast.optim` calls them.
"""

from __future__ import annotations

from typing import Any

from stem_fast.ops.registry import define


@define(
    "sgd_rows(Tensor(a!) weight, Tensor(b!)? momentum_buffer, Tensor(c!) last, Tensor? "
    "rows, Tensor? grad, Tensor steps, Tensor clock) -> ()"
)
def _sgd_rows_fake(*arguments: Any) -> None:
    """Everything is changed in place."""
