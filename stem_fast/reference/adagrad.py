"""Adagrad of a batch's rows."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_fast.reference.rows import real_rows


def adagrad_rows(
    weight: Tensor, sum: Tensor, rows: Tensor | None, grad: Tensor, options: Tensor, eps: float
) -> None:
    """A step of Adagrad of some rows of a table, in place.

    Args:
        weight: [R, W].
        sum: of the squared gradients of all steps, float32 (float64 for float64): [R, W], or [R] of
            their mean over a row (FBGEMM's EXACT_ROWWISE_ADAGRAD).
        rows, grad: as :func:`~stem_fast.reference.adam_rows`'s.
        options: float64 [2], the step's ``lr`` and ``weight_decay``.
        eps: as in ``torch.optim.Adagrad``.
    """
    lr, decay = options.tolist()
    rows, real = real_rows(weight, rows)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = weight[rows].to(dtype)
    g = grad[real].to(dtype) + decay * w
    total = sum[rows].to(dtype) + (g.square().mean(1) if sum.dim() == 1 else g.square())
    sum[rows] = total.to(sum.dtype)
    weight[rows] = (w - lr * g / (total.sqrt().view(len(total), -1) + eps)).to(weight.dtype)
