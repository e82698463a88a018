"""What the kernels share that read and write a batch's rows of a table, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def row_constants(weight: Tensor, most: int = 512) -> dict[str, object]:
    """The type of sums, and values at a time (up to ``most``), for rows of weight [R, width]."""
    return {
        "SUM": tl.float64 if weight.dtype == torch.float64 else tl.float32,
        "BLOCK": min(triton.next_power_of_2(weight.shape[1]), most),
        "num_warps": 1 if weight.shape[1] <= 128 else 4,
    }
