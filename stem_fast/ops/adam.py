"""Adam of a batch's rows, with the steps that they missed.

The ops change their arguments in place; :mod:`stem_fast.optim` calls them.
"""

from __future__ import annotations

from typing import Any

from stem_fast.ops.registry import define


@define(
    "adam_rows(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) "
    "last, Tensor? rows, Tensor? grad, Tensor steps, Tensor clock, float beta1, float "
    "beta2, float eps, bool decoupled, bool l2) -> ()"
)
def _adam_rows_fake(*arguments: Any) -> None:
    """Everything is changed in place."""


@define(
    "adam_schedule(Tensor(a!) steps, Tensor(b!) clock, Tensor options, float beta1, float "
    "beta2, float eps, bool decoupled, bool l2) -> ()"
)
def _adam_schedule_fake(*arguments: Any) -> None:
    """Everything is changed in place."""
