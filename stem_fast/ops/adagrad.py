"""Adagrad of a batch's rows.

The ops change their arguments in place; :mod:`stem_fast.optim` calls them.
"""

from __future__ import annotations

from typing import Any

from stem_fast.ops.registry import define


@define(
    "adagrad_rows(Tensor(a!) weight, Tensor(b!) sum, Tensor? rows, Tensor grad, Tensor "
    "options, float eps) -> ()"
)
def _adagrad_rows_fake(*arguments: Any) -> None:
    """Everything is changed in place."""
