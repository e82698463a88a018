"""SGD of a batch's rows with the steps that they missed: one read and one write of a row's weight
and momentum. A row belongs to one program, so results repeat bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from stem_fast.kernels import require
from stem_fast.kernels.rows import check_steps, row_constants, row_count
from torch import Tensor

COLUMNS = tl.constexpr(7)  # of the table of steps, see stem_fast.optim.sgd.Products
PRODUCT = tl.constexpr(3)  # the first of a product's four


@triton.jit
def _sgd_rows(
    weight,  # [R, width]
    momentum_buffer,  # [R, width]
    last,  # [R]
    rows,  # [U]
    grad,  # [U, width]
    steps,  # [N, COLUMNS]
    clock,  # [2]
    size,  # R
    width,
    lines,  # N
    MOMENTUM: tl.constexpr,  # whether there is a momentum_buffer
    NAMED: tl.constexpr,  # whether there are rows; else all
    GRAD: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + u) if NAMED else u
    base, now = tl.load(clock), tl.load(clock + 1)
    # Row 0 is padding where rows are named: a plan repeats it. No row leaves the table.
    real = (row < size) & ((row > 0) | (not NAMED)) & (now - base < lines)
    made = tl.maximum(tl.load(last + row, mask=real, other=0).to(tl.int64), base)
    if real & (made < now):
        # What steps without a gradient do to (w, b).
        line, end = made - base, now - base
        ww = tl.full([], 1.0, tl.float64)
        wb = tl.full([], 0.0, tl.float64)
        bw = tl.full([], 0.0, tl.float64)
        bb = tl.full([], 1.0, tl.float64)
        while line < end:
            product = steps + line * COLUMNS + PRODUCT
            p0, p1 = tl.load(product), tl.load(product + 1)
            p2, p3 = tl.load(product + 2), tl.load(product + 3)
            ww, bw = p0 * ww + p1 * bw, p2 * ww + p3 * bw
            wb, bb = p0 * wb + p1 * bb, p2 * wb + p3 * bb
            line = tl.where(line == 0, end, line + (line & -line))
        newest = steps + end * COLUMNS
        # What a gradient adds to w and to b.
        rate = -tl.load(newest).to(SUM)
        one = tl.where(tl.load(newest + 1) != 0, 1.0, 0.0).to(SUM)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            at = row * width + column
            w = tl.load(weight + at, mask=inside, other=0.0).to(SUM)
            new_w = (ww - 1).to(SUM) * w
            if GRAD:
                g = tl.load(grad + u * width + column, mask=inside, other=0.0).to(SUM)
                new_w += rate * g
            if MOMENTUM:
                b = tl.load(momentum_buffer + at, mask=inside, other=0.0).to(SUM)
                new_w += wb.to(SUM) * b
                b = bw.to(SUM) * w + bb.to(SUM) * b
                if GRAD:
                    b += one * g
                tl.store(momentum_buffer + at, b.to(momentum_buffer.dtype.element_ty), mask=inside)
            tl.store(weight + at, (w + new_w).to(weight.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # every warp has read for itself when the row made its last step
        tl.store(last + row, now.to(tl.int32))


def sgd_rows(
    weight: Tensor,
    momentum_buffer: Tensor | None,
    last: Tensor,
    rows: Tensor | None,
    grad: Tensor | None,
    steps: Tensor,
    clock: Tensor,
) -> None:
    """Triton version of :func:`stem_fast.reference.sgd_rows`."""
    buffers = () if momentum_buffer is None else (momentum_buffer,)
    count = row_count("sgd_rows", rows, grad, weight, *buffers, last)
    for buffer in buffers:
        fits = buffer.shape == weight.shape
        require(fits, f"sgd_rows: momentum_buffer must be as weight, {list(weight.shape)}")
    check_steps("sgd_rows", weight, last, steps, COLUMNS.value, clock)
    if not count or not weight.shape[1]:
        return
    with torch.cuda.device_of(weight):
        _sgd_rows[(count,)](
            weight,
            weight if momentum_buffer is None else momentum_buffer,
            last,
            last if rows is None else rows.contiguous(),
            weight if grad is None else grad.contiguous(),
            steps,
            clock,
            size=len(weight),
            width=weight.shape[1],
            lines=len(steps),
            MOMENTUM=momentum_buffer is not None,
            NAMED=rows is not None,
            GRAD=grad is not None,
            **row_constants(weight),
        )
