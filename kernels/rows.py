"""What the kernels share that read and write a batch's rows of a table, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from stem_fast.kernels import require, require_one_device
from torch import Tensor


def row_constants(weight: Tensor, most: int = 512) -> dict[str, object]:
    """The type of sums, and values at a time (up to ``most``), for rows of weight [R, width]."""
    return {
        "SUM": tl.float64 if weight.dtype == torch.float64 else tl.float32,
        "BLOCK": min(triton.next_power_of_2(weight.shape[1]), most),
        "num_warps": 1 if weight.shape[1] <= 128 else 4,
    }


def row_count(
    op: str, rows: Tensor | None, grad: Tensor | None, weight: Tensor, *state: Tensor
) -> int:
    """How many rows of weight [R, W] an op handles, those named or all; what it changes in place,
    and the gradients, checked."""
    require(weight.dim() == 2, f"{op}: weight must be [R, W]")
    fits = all(each.is_contiguous() for each in (weight, *state))
    require(fits, f"{op}: what is changed in place must be contiguous")
    fits = rows is None or (rows.dim() == 1 and rows.dtype == torch.int64)
    require(fits, f"{op}: rows must be int64 [U]")
    size = len(weight if rows is None else rows), weight.shape[1]
    fits = grad is None or (grad.shape == size and grad.dtype == weight.dtype)
    require(fits, f"{op}: grad must be {list(size)} of weight's type")
    require_one_device(op, weight, *state, rows, grad)
    return size[0]


def check_steps(
    op: str, weight: Tensor, last: Tensor, steps: Tensor, columns: int, clock: Tensor
) -> None:
    """The steps that rows may have missed."""
    fits = last.shape == (len(weight),) and last.dtype == torch.int32
    require(fits, f"{op}: last must be int32 [{len(weight)}]")
    fits = steps.dim() == 2 and steps.shape[1] == columns and clock.shape == (2,)
    fits = fits and steps.dtype == torch.float64 and clock.dtype == torch.int64
    fits = fits and steps.is_contiguous() and clock.is_contiguous()
    require(fits, f"{op}: steps must be float64 [N, {columns}] and clock int64 [2]")
    require_one_device(op, weight, steps, clock)
