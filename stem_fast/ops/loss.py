"""The mean loss of each task over the rows that have its label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stem_fast import reference
from stem_fast.ops.registry import define, refuse_gradient, transformed


@define(
    "task_losses(Tensor logits, Tensor labels, int[] regression, Tensor? mask, Tensor? "
    "sample_weights, Tensor? counts) -> (Tensor, Tensor)"
)
def _task_losses_fake(
    logits: Tensor, labels: Tensor, regression: list[int], *rest: Tensor | None
) -> tuple[Tensor, Tensor]:
    tasks, wide = logits.shape[1], torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(tasks, dtype=wide), logits.new_empty(tasks, dtype=torch.int64)


@define(
    "task_losses_backward(Tensor grad, Tensor logits, Tensor labels, int[] regression, "
    "Tensor? mask, Tensor? sample_weights, Tensor divisors) -> Tensor",
    second_derivative=False,
)
def _task_losses_backward_fake(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


def task_losses(
    logits: Tensor,
    labels: Tensor,
    regression: Sequence[int],
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Mean loss of each task over the rows that have its label, [T].

    The arguments are those of :func:`reference.task_losses`.

    Raises:
        ValueError: an argument of another shape or type.
    """
    batch, tasks = logits.shape
    for name, value, shape, dtype in (
        ("labels", labels, (batch, tasks), None),
        ("mask", mask, (batch, tasks), torch.bool),
        ("sample_weights", sample_weights, (batch,), None),
        ("counts", counts, (tasks,), torch.int64),
    ):
        if value is not None and (value.shape != shape or (dtype or value.dtype) != value.dtype):
            raise ValueError(
                f"{name}: expected {dtype or 'numbers of shape'} {list(shape)}, got {value.dtype} "
                f"{list(value.shape)}"
            )
    if len(regression) != tasks:
        raise ValueError(
            f"regression: expected {tasks} tasks as in the logits, got {len(regression)}"
        )
    arguments = logits, labels, list(regression), mask, sample_weights, counts
    own = (each is not None and each.requires_grad for each in (labels, sample_weights))
    if transformed() or any(own):
        return reference.task_losses(*arguments)[0]  # the op has a gradient of the logits alone
    return _TaskLosses.apply(*arguments)


class _TaskLosses(torch.autograd.Function):
    """:func:`task_losses` with a gradient of the logits. It would take half as long again on CPU
    if it were registered with the op, as the mixture's gradient is."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, regression: list[int], *rest: Tensor | None
    ) -> Tensor:
        means, divisors = torch.ops.stem_fast.task_losses(logits, labels, regression, *rest)
        ctx.save_for_backward(logits, labels, *rest[:2], divisors)
        ctx.regression = regression
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, *rest = ctx.saved_tensors
        back = torch.ops.stem_fast.task_losses_backward
        return back(grad, logits, labels, ctx.regression, *rest), *(None,) * 5


refuse_gradient("task_losses", "stem_fast.ops.task_losses has one")
