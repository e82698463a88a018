"""Adagrad of a batch's rows: one read and one write of a row's weight and sum. A row belongs to one
program, so results repeat bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from stem_fast.kernels import require, require_one_device
from stem_fast.kernels.rows import row_constants, row_count
from torch import Tensor


@triton.jit
def _load(weight, grad, at, at_grad, decay, inside, SUM):
    """w and the gradient with L2."""
    w = tl.load(weight + at, mask=inside, other=0.0).to(SUM)
    return w, tl.load(grad + at_grad, mask=inside, other=0.0).to(SUM) + decay * w


@triton.jit
def _adagrad_rows(
    weight,  # [R, width]
    sums,  # [R, width] or [R]
    rows,  # [U]
    grad,  # [U, width]
    lr_decay,  # [2]
    size,  # R
    width,
    EPS: tl.constexpr,
    NAMED: tl.constexpr,  # whether there are rows; else all
    ROW_WISE: tl.constexpr,  # whether sums are of rows
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + u) if NAMED else u
    lr, decay = tl.load(lr_decay).to(SUM), tl.load(lr_decay + 1).to(SUM)
    # Row 0 is padding where rows are named: a plan repeats it. No row leaves the table.
    if (row < size) & ((row > 0) | (not NAMED)):
        column = tl.arange(0, BLOCK)
        rate = lr
        if ROW_WISE:
            squares = tl.zeros([BLOCK], SUM)
            for start in range(0, width, BLOCK):  # the second reading is from cache
                here, inside = start + column, start + column < width
                _, g = _load(weight, grad, row * width + here, u * width + here, decay, inside, SUM)
                squares += g * g
            total = tl.load(sums + row).to(SUM) + tl.sum(squares) / width
            tl.debug_barrier()  # every warp has read for itself
            tl.store(sums + row, total.to(sums.dtype.element_ty))
            rate = lr / (tl.sqrt(total) + EPS)
        for start in range(0, width, BLOCK):
            here, inside = start + column, start + column < width
            at = row * width + here
            w, g = _load(weight, grad, at, u * width + here, decay, inside, SUM)
            if ROW_WISE:
                w -= rate * g
            else:
                total = tl.load(sums + at, mask=inside, other=0.0).to(SUM) + g * g
                tl.store(sums + at, total.to(sums.dtype.element_ty), mask=inside)
                w -= lr * g / (tl.sqrt(total) + EPS)
            tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)


def adagrad_rows(
    weight: Tensor, sum: Tensor, rows: Tensor | None, grad: Tensor, options: Tensor, eps: float
) -> None:
    """Triton version of :func:`stem_fast.reference.adagrad_rows`."""
    count = row_count("adagrad_rows", rows, grad, weight, sum)
    size, width = weight.shape
    require(
        sum.shape in ((size,), (size, width)),
        f"adagrad_rows: sum must be [{size}] or [{size}, {width}]",
    )
    fits = options.shape == (2,) and options.dtype == torch.float64 and options.is_contiguous()
    require(fits, "adagrad_rows: options must be float64 [2]")
    require_one_device("adagrad_rows", weight, options)
    if not count or not width:
        return
    with torch.cuda.device_of(weight):
        _adagrad_rows[(count,)](
            weight,
            sum,
            weight if rows is None else rows.contiguous(),
            grad.contiguous(),
            options,
            size=size,
            width=width,
            EPS=eps,
            NAMED=rows is not None,
            ROW_WISE=sum.dim() == 1,
            **row_constants(weight),
        )
