"""The loss of several tasks, some of whose labels are missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def task_losses(
    logits: Tensor,
    labels: Tensor,
    regression: Sequence[int],
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean loss of each task over the rows that have its label.

    Binary cross entropy for binary tasks, squared error for regression ones.

    Args:
        logits: [B, T].
        labels: [B, T], of any type; NaN is a missing label.
        regression: T, 1 for a regression and 0 for a binary task.
        mask: bool [B, T], False for labels to leave out beside the missing ones.
        sample_weights: [B], a factor on each row's losses.
        counts: int64 [T], the labels that the means divide by; default those that are there.

    Returns:
        means [T], float32 (float64 for float64); a task without any label has 0.
        divisors int64 [T], the counts, at least 1.
    """
    present, logits, labels = _wide(logits, labels, mask)
    # Cross entropy as a sum of two: torch's own, a difference, loses a negative's small losses.
    losses = -labels * F.logsigmoid(logits) - (1 - labels) * F.logsigmoid(-logits)
    if any(regression):
        squares = (logits - labels).square()
        losses = torch.where(_tasks(regression, logits), squares, losses)
    if sample_weights is not None:
        losses = losses * sample_weights.to(losses.dtype)[:, None]
    divisors = (present.sum(0) if counts is None else counts).clamp(min=1)
    return torch.where(present, losses, 0).sum(0) / divisors, divisors


def task_losses_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    regression: Sequence[int],
    mask: Tensor | None,
    sample_weights: Tensor | None,
    divisors: Tensor,
) -> Tensor:
    """Gradient of the means of :func:`task_losses` with respect to the logits.

    Args:
        grad: [T], gradient of the means.
        logits, labels, regression, mask, sample_weights: as there.
        divisors: as returned there.

    Returns:
        [B, T] of the logits' type, laid out as torch.empty_like(logits).
    """
    kind = logits.dtype
    present, logits, labels = _wide(logits, labels, mask)
    scale = grad / divisors
    if sample_weights is not None:
        scale = scale * sample_weights.to(scale.dtype)[:, None]
    slope = logits.sigmoid() - labels
    if any(regression):
        slope = torch.where(_tasks(regression, logits), 2 * (logits - labels), slope)
    return (slope * scale).masked_fill_(~present, 0).to(kind)


def _wide(logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which labels count; logits, and labels with 0 in place of those that do not, in the type of
    sums."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    present = ~labels.isnan()
    if mask is not None:
        present = present & mask
    return present, logits.to(wide), torch.where(present, labels, 0).to(wide)


def _tasks(chosen: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(chosen, device=like.device) != 0
