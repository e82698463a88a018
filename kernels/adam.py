"""Adam of a batch's rows with the steps that they missed: one read and one write of a row's weight
and state. A row belongs to one program, so results repeat bit for bit."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = tl.constexpr(11)  # of the table of steps, see stem_fast.optim.Schedule
MOMENTS = tl.constexpr(4)  # the first of them
SPENT = tl.constexpr(2.0**-60)  # momentum of which so little is left moves nothing
LOOK = tl.constexpr(32)  # steps of a replay between two looks at whether anything still moves


@triton.jit
def _make_step(w, m, v, grad, step, BETA1, BETA2, EPS, DECOUPLED, SUM):
    """One step of a row with a gradient, by its line in the table."""
    size, root = tl.load(step).to(SUM), tl.load(step + 1).to(SUM)
    decay = tl.load(step + 2).to(SUM)
    if DECOUPLED:
        w *= decay
    else:
        grad += decay * w
    m += (grad - m) * (1 - BETA1)
    v = v * BETA2 + (1 - BETA2) * grad * grad
    w -= size * m / (tl.sqrt(v) * root + EPS)
    return w, m, v


@triton.jit
def _replay(w, m, v, steps, made, due, BETA1, BETA2, EPS, LOG2, LEAST, SUM):
    """Steps made + 1 .. due with L2 alone, until nothing moves any more."""
    t = made
    alive = tl.max(tl.maximum(tl.abs(w), tl.abs(m))) >= 0
    while (t < due) & alive:
        end = tl.minimum(t + LOOK, due)
        while t < end:
            t += 1
            w, m, v = _make_step(
                w, m, v, tl.zeros_like(w), steps + t * COLUMNS, BETA1, BETA2, EPS, False, SUM
            )
        alive = tl.max(tl.maximum(tl.abs(w), tl.abs(m))) > LEAST
    left = tl.exp2((due - t).to(tl.float64) * LOG2).to(SUM)
    return tl.where(alive, w, 0.0), tl.where(alive, m, 0.0), v * left


@triton.jit
def _coast(
    w, m, v, steps, made, due, BETA1, BETA2, EPS, LOG1, LOG2, ROOT2, MOST, SUMMED, LEAST, SUM
):  # fmt: skip
    """Steps made + 1 .. due without any gradient, at once: see stem_fast/optim.py."""
    start = steps + made * COLUMNS
    first = tl.load(start + MOMENTS)
    weight = tl.where(first != 0, first, 1.0)
    n1 = tl.load(start + MOMENTS + 1) / weight
    n2 = tl.load(start + MOMENTS + 2) / weight
    n3 = tl.load(start + MOMENTS + 3) / weight
    n4 = tl.load(start + MOMENTS + 4) / weight
    n5 = tl.load(start + MOMENTS + 5) / weight
    n6 = tl.load(start + MOMENTS + 6) / weight
    d2 = n1 * n1
    d3 = d2 * n1
    mean = tl.load(start + COLUMNS + 1) * ROOT2 + n1
    c2 = n2 - d2
    c3 = n3 - 3 * n1 * n2 + 2 * d3
    c4 = n4 - 4 * n1 * n3 + 6 * d2 * n2 - 3 * d2 * d2
    c5 = n5 - 5 * n1 * n4 + 10 * d2 * n3 - 10 * d3 * n2 + 4 * d2 * d3
    c6 = n6 - 6 * n1 * n5 + 15 * d2 * n4 - 20 * d3 * n3 + 15 * d2 * d2 * n2 - 5 * d3 * d3
    cube = mean * mean * mean
    converges = SUMMED & (first != 0) & (tl.abs(c6) <= MOST * cube * cube)
    total = tl.zeros_like(w)
    root = tl.sqrt(v)
    if converges:
        f = 1 / (root * mean.to(SUM) + EPS)
        h = root * f
        inner = c4.to(SUM) - h * (c5.to(SUM) - h * c6.to(SUM))
        total = first.to(SUM) * f * (1 + h * h * (c2.to(SUM) - h * (c3.to(SUM) - h * inner)))
    else:
        if tl.max(tl.abs(m)) > LEAST:
            momentum = tl.full([], BETA1, tl.float64)
            second = tl.full([], ROOT2, tl.float64)
            kept = tl.load(start + 3)
            t = made
            while (t < due) & (momentum > SPENT):
                t += 1
                step = steps + t * COLUMNS
                part = tl.load(step) * momentum * kept / tl.load(step + 3)
                x = second * tl.load(step + 1)
                total += part.to(SUM) / (root * x.to(SUM) + EPS)
                momentum *= BETA1
                second *= ROOT2
    missed = (due - made).to(tl.float64)
    kept = tl.load(steps + due * COLUMNS + 3) / tl.load(start + 3)
    w = kept.to(SUM) * (w - m * total)
    return w, m * tl.exp2(missed * LOG1).to(SUM), v * tl.exp2(missed * LOG2).to(SUM)


@triton.jit
def _adam_rows(
    weight,  # [R, width]
    exp_avg,  # [R, width]
    exp_avg_sq,  # [R, width]
    last,  # [R]
    rows,  # [U]
    grad,  # [U, width]
    steps,  # [N, COLUMNS]
    clock,  # [2]
    width,
    lines,  # N
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LOG1: tl.constexpr,  # log2(BETA1)
    LOG2: tl.constexpr,
    ROOT2: tl.constexpr,  # sqrt(BETA2)
    MOST: tl.constexpr,
    LEAST: tl.constexpr,
    NAMED: tl.constexpr,  # whether there are rows; else all
    GRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    L2: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + u) if NAMED else u
    base, now = tl.load(clock), tl.load(clock + 1)
    made = tl.maximum(tl.load(last + row).to(tl.int64), base)
    # Row 0 is padding where rows are named: a plan repeats it.
    if (made < now) & ((row != 0) | (not NAMED)) & (now - base < lines):
        due = now - 1 if GRAD else now
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            at = row * width + column
            w = tl.load(weight + at, mask=inside, other=0.0).to(SUM)
            m = tl.load(exp_avg + at, mask=inside, other=0.0).to(SUM)
            v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(SUM)
            if made < due:
                if L2:
                    w, m, v = _replay(
                        w, m, v, steps, made - base, due - base, BETA1, BETA2, EPS, LOG2, LEAST, SUM
                    )
                else:
                    w, m, v = _coast(
                        w, m, v, steps, made - base, due - base, BETA1, BETA2, EPS, LOG1, LOG2,
                        ROOT2, MOST, not GRAD, LEAST, SUM,
                    )  # fmt: skip
            if GRAD:
                g = tl.load(grad + u * width + column, mask=inside, other=0.0).to(SUM)
                step = steps + (now - base) * COLUMNS
                w, m, v = _make_step(w, m, v, g, step, BETA1, BETA2, EPS, DECOUPLED, SUM)
            tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
            tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
            tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
        tl.store(last + row, now.to(tl.int32))


def _constants(
    weight: Tensor, beta1: float, beta2: float, eps: float, decoupled: bool, l2: bool
) -> dict[str, object]:
    wide = weight.dtype == torch.float64
    return {
        "BETA1": beta1,
        "BETA2": beta2,
        "EPS": eps,
        "LOG1": math.log2(max(beta1, 1e-300)),
        "LOG2": math.log2(max(beta2, 1e-300)),
        "ROOT2": math.sqrt(beta2),
        "MOST": 1e-11 if wide else 1e-7,
        "LEAST": 1e-200 if wide else 1e-30,
        "DECOUPLED": decoupled,
        "L2": l2,
        "SUM": tl.float64 if wide else tl.float32,
        "BLOCK": min(triton.next_power_of_2(weight.shape[1]), 512),
        "num_warps": 1 if weight.shape[1] <= 128 else 4,
    }


def adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last: Tensor,
    rows: Tensor | None,
    grad: Tensor | None,
    steps: Tensor,
    clock: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decoupled: bool,
    l2: bool,
) -> None:
    """Triton version of :func:`stem_fast.reference.adam_rows`."""
    count = len(weight) if rows is None else len(rows)
    if not count or not weight.shape[1]:
        return
    with torch.cuda.device_of(weight):
        _adam_rows[(count,)](
            weight,
            exp_avg,
            exp_avg_sq,
            last,
            last if rows is None else rows.contiguous(),
            weight if grad is None else grad.contiguous(),
            steps,
            clock,
            width=weight.shape[1],
            lines=len(steps),
            NAMED=rows is not None,
            GRAD=grad is not None,
            **_constants(weight, beta1, beta2, eps, decoupled, l2),
        )
