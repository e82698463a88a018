"""SGD of a batch's rows with the steps that they missed; see stem_fast/optim/sgd.py."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_fast.reference.rows import real_rows


def sgd_rows(
    weight: Tensor,
    momentum_buffer: Tensor | None,
    last: Tensor,
    rows: Tensor | None,
    grad: Tensor | None,
    steps: Tensor,
    clock: Tensor,
) -> None:
    """SGD of some rows of a table, with the steps they missed; see :class:`stem_fast.optim.SGD`.

    Everything is changed in place.

    Args:
        weight: [R, W].
        momentum_buffer: [R, W], float32 (float64 for float64). None: no step had momentum.
        last, rows, grad, clock: as :func:`~stem_fast.reference.adam_rows`'s.
        steps: float64 [N, 7]; line i tells of step ``base + i``. Here: columns 0 .. 2 are the
            step's ``lr``, ``momentum`` and ``weight_decay``. The others are products that save the
            loop, see :class:`stem_fast.optim.sgd.Products`.
    """
    base, now = clock.tolist()
    rows, real = real_rows(weight, rows)
    grad = None if grad is None else grad[real]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = weight[rows].to(dtype)
    b = torch.zeros_like(w) if momentum_buffer is None else momentum_buffer[rows].to(dtype)
    made = last[rows].clamp(min=base)
    first = int(made.min()) + 1 if len(made) else now + 1
    for t in range(first, now + 1):
        lr, momentum, decay = (float(x) for x in steps[t - base, :3])
        g = torch.zeros_like(w) if grad is None or t < now else grad.to(dtype)
        g = g + decay * w
        new_b = momentum * b + g if momentum else b
        new_w = w - lr * (new_b if momentum else g)
        due = (made < t)[:, None]
        w, b = torch.where(due, new_w, w), torch.where(due, new_b, b)
    weight[rows] = w.to(weight.dtype)
    if momentum_buffer is not None:
        momentum_buffer[rows] = b.to(momentum_buffer.dtype)
    last[rows] = now
