"""Adam of a batch's rows with the steps that they missed: one read and one write of a row's weight
and state. A row belongs to one program, so results repeat bit for bit."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from stem_fast.kernels import require
from stem_fast.kernels.rows import check_steps, row_constants, row_count
from torch import Tensor

from stem_fast.reference import adam as reference

# Columns of a line of the table of steps, and the constants of the method.
SIZE = tl.constexpr(reference.SIZE)
ROOT = tl.constexpr(reference.ROOT)
DECAY = tl.constexpr(reference.DECAY)
LEFT = tl.constexpr(reference.LEFT)
MOMENTS = tl.constexpr(reference.MOMENTS)
POWERS = tl.constexpr(reference.POWERS)
NEW = tl.constexpr(reference.NEW)
SERIES = tl.constexpr(reference.SERIES)
GROWTH = tl.constexpr(reference.GROWTH)
COLUMNS = tl.constexpr(reference.COLUMNS)
CONVERGED = tl.constexpr(reference.CONVERGED)
LEAST_GROWTH = tl.constexpr(reference.LEAST_GROWTH)
UNKNOWN = tl.constexpr(reference.UNKNOWN)
NEGLIGIBLE_MOMENTUM = tl.constexpr(reference.NEGLIGIBLE_MOMENTUM)
LOOK = tl.constexpr(reference.LOOK)


@triton.jit
def _make_step(w, m, v, grad, step, BETA1, BETA2, EPS, DECOUPLED, SUM):
    """One step of a row with a gradient, by its line in the table."""
    size, root = tl.load(step + SIZE).to(SUM), tl.load(step + ROOT).to(SUM)
    decay = tl.load(step + DECAY).to(SUM)
    if DECOUPLED:
        w *= decay
    else:
        grad += decay * w
    m += (grad - m) * (1 - BETA1)
    # Not as BETA2 * v, whose rounding is the same at every step and adds up.
    v += (grad * grad - v) * (1 - BETA2)
    w -= size * m / (tl.sqrt(v) * root + EPS)
    return w, m, v


@triton.jit
def _value(column, size, SUM: tl.constexpr):
    """Value of a series, from its first column, at each size, in units of the growth."""
    total = tl.zeros_like(size)
    for p in tl.static_range(SERIES):
        total = tl.load(column + SERIES - 1 - p).to(SUM) + size * total
    return total


@triton.jit
def _new_row(w, m, v, line, SUM: tl.constexpr):
    """The steps up to a line's with L2 alone of weights that no gradient has touched: w, m, what v
    gains, and whether they are such, m and v zero, and small enough. A weight that is zero stays,
    whatever v is."""
    growth = tl.load(line + GROWTH)
    size = tl.abs(w) * growth.to(SUM)
    small = (m == 0) & ((v == 0) | (w == 0)) & (size <= CONVERGED)
    known = (tl.min(small.to(tl.int32)) == 1) & (growth < UNKNOWN)
    size = tl.minimum(size, CONVERGED)  # no overflow where they are not known
    series = line + NEW
    gained = w * w * _value(series + 2 * SERIES, size, SUM)
    new_m = w * _value(series + SERIES, size, SUM)
    return w * _value(series, size, SUM), new_m, gained, known


@triton.jit
def _alive(w, m, LEAST):
    """Whether L2 has anything left to pull; NaN counts."""
    still = (tl.abs(w) <= LEAST) & (tl.abs(m) <= LEAST)
    return tl.min(still.to(tl.int32)) == 0


@triton.jit
def _replay(w, m, v, steps, made, due, BETA1, BETA2, EPS, LOG2, LEAST, SUM):
    """Steps made + 1 .. due with L2 alone, until nothing moves any more."""
    t, stop = made, due
    alive = _alive(w, m, LEAST)
    gained = tl.zeros_like(v)
    # float64 wants more digits than the series have.
    if SUM == tl.float32:  # noqa: SIM102, SIM300
        if made == 0:
            new_w, new_m, new, known = _new_row(w, m, v, steps + due * COLUMNS, SUM)
            w, m = tl.where(known, new_w, w), tl.where(known, new_m, m)
            gained = tl.where(known, new, gained)
            alive |= known
            stop = tl.where(known, made, due)
    while (t < stop) & alive:
        t += 1
        w, m, v = _make_step(
            w, m, v, tl.zeros_like(w), steps + t * COLUMNS, BETA1, BETA2, EPS, False, SUM
        )
        if t % LOOK == 0:
            alive = _alive(w, m, LEAST)
    left = tl.exp2((due - t).to(tl.float64) * LOG2).to(SUM)
    return tl.where(alive, w, 0.0), tl.where(alive, m, 0.0), v * left + gained


@triton.jit
def _coast(
    w, m, v, steps, made, due, BETA1, BETA2, EPS, LOG1, LOG2, ROOT2, MOST, SUMMED, LEAST, SUM
):  # fmt: skip
    """Steps made + 1 .. due without any gradient, at once: see docs/exact-adam.md."""
    start = steps + made * COLUMNS
    first = tl.load(start + MOMENTS)
    share = 1 / tl.where(first != 0, first, 1.0)
    n1 = tl.load(start + MOMENTS + 1) * share
    n2 = tl.load(start + MOMENTS + 2) * share
    n3 = tl.load(start + MOMENTS + 3) * share
    n4 = tl.load(start + MOMENTS + 4) * share
    n5 = tl.load(start + MOMENTS + 5) * share
    n6 = tl.load(start + MOMENTS + 6) * share
    d2 = n1 * n1
    d3 = d2 * n1
    mean = tl.load(start + COLUMNS + ROOT) * ROOT2 + n1
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
            kept = tl.load(start + LEFT)
            t = made
            while (t < due) & (momentum > NEGLIGIBLE_MOMENTUM):
                t += 1
                step = steps + t * COLUMNS
                part = tl.load(step + SIZE) * momentum * kept / tl.load(step + LEFT)
                x = second * tl.load(step + ROOT)
                total += part.to(SUM) / (root * x.to(SUM) + EPS)
                momentum *= BETA1
                second *= ROOT2
    missed = (due - made).to(tl.float64)
    kept = tl.load(steps + due * COLUMNS + LEFT) / tl.load(start + LEFT)
    w = kept.to(SUM) * (w - m * total)
    return w, m * tl.exp2(missed * LOG1).to(SUM), v * tl.exp2(missed * LOG2).to(SUM)


@triton.jit
def _product(a, b, CUBE: tl.constexpr):
    """Of two series [CUBE]."""
    p = tl.arange(0, CUBE)
    pairs = p[None, :, None] + p[None, None, :] == p[:, None, None]
    terms = tl.where(pairs, a[None, :, None] * b[None, None, :], 0.0)
    return tl.sum(tl.sum(terms, 2), 1)


@triton.jit
def _powers(x, p):
    """x^p for p of 0 .. 7."""
    x2 = x * x
    low = tl.where(p & 1 != 0, x, 1.0) * tl.where(p & 2 != 0, x2, 1.0)
    return low * tl.where(p & 4 != 0, x2 * x2, 1.0)


@triton.jit
def _extend(before, own, first, size, root, decay, BETA1, BETA2, EPS, CUBE: tl.constexpr):
    """reference.new_rows, from a line's columns to the next line's. CUBE is SERIES."""
    p = tl.arange(0, CUBE)
    # The terms stand over powers of the growth. In the first line all but w is zero.
    powers = _powers(tl.load(before + 3 * SERIES), p)
    w = tl.where(first, tl.where(p == 0, 1.0, 0.0), tl.load(before + p) * powers)
    m = BETA1 * tl.load(before + SERIES + p) * powers + (1 - BETA1) * decay * w
    v = BETA2 * tl.load(before + 2 * SERIES + p) * powers
    v += (1 - BETA2) * decay * decay * _product(w, w, CUBE)
    v0 = tl.sum(tl.where(p == 0, v, 0.0))
    root0 = tl.sqrt(v0)
    twice = tl.where(root0 > 0, 2 * root0, 1.0)
    # The root of v, term by term. Over eps it comes with a factor |W|: its terms are those of one
    # place later.
    s = tl.where(p == 0, root0, 0.0)
    for i in tl.static_range(1, CUBE - 1):
        rest = tl.sum(tl.where(p == i, v - _product(s, s, CUBE), 0.0))
        s += tl.where(p == i, rest / twice, 0.0)
    q = _product(tl.where(p == 1, root / EPS, 0.0), s, CUBE)
    inverse = tl.where(p == 0, 1.0, 0.0)  # of 1 + q
    for i in tl.static_range(1, CUBE):
        inverse -= tl.where(p == i, _product(q, inverse, CUBE), 0.0)
    rate = size / EPS
    w -= rate * _product(m, inverse, CUBE)
    # How far a weight still goes for each unit of m, along a decaying wave or to rest.
    reach = rate / (1 - BETA1)
    wave = tl.sqrt(reach / tl.where(decay > 0, decay, 1.0))
    reach = tl.where((decay > 0) & (wave < reach), wave, reach)
    least = tl.sum(tl.where(p == 0, tl.abs(w) + reach * tl.abs(m), 0.0))
    order = tl.maximum(p, 1).to(tl.float64)
    factorial = tl.where(p > 0, 1.0, 0.0).to(tl.float64)
    for i in tl.static_range(2, CUBE):
        factorial *= tl.where(p >= i, i, 1.0)
    most = tl.where(least > 0, tl.maximum(tl.abs(w), reach * tl.abs(m)) / least, 0.0)
    most = tl.maximum(most, tl.where(v0 > 0, tl.abs(v) / v0, 0.0))
    growth = tl.max(tl.exp2(tl.log2(most * factorial) / order))
    # NaN gets lost in a maximum; what is left of an infinite term is NaN.
    finite = tl.sum(tl.where((w - w == 0) & (m - m == 0) & (v - v == 0), 0, 1)) == 0
    finite &= (growth - growth == 0) & (least - least == 0)
    known = finite & (first | (tl.load(before + 3 * SERIES) < UNKNOWN))
    growth = tl.maximum(growth, LEAST_GROWTH)
    unit = _powers(1 / growth, p)
    tl.store(own + p, tl.where(known, w * unit, 0.0))
    tl.store(own + SERIES + p, tl.where(known, m * unit, 0.0))
    tl.store(own + 2 * SERIES + p, tl.where(known, v * unit, 0.0))
    tl.store(own + 3 * SERIES, tl.where(known, growth, UNKNOWN))


@triton.jit
def _adam_schedule(
    steps,  # [N, COLUMNS]
    clock,  # [2]
    lr_decay,  # [2]
    lines,  # N
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    LOG1: tl.constexpr,
    LOG2: tl.constexpr,
    DECOUPLED: tl.constexpr,
    L2: tl.constexpr,
    LONGEST: tl.constexpr,  # steps that a row's momentum lives
    AGES: tl.constexpr,  # of them at a time
):
    now = tl.load(clock + 1) + 1
    line = now - tl.load(clock)
    tl.debug_barrier()  # every warp reads the clock for itself
    tl.store(clock + 1, now)
    if line >= lines:
        tl.store(steps + LEFT, 0.0)  # AdamStepTable.advance looks there
    else:
        own = steps + line * COLUMNS
        lr, decay = tl.load(lr_decay), tl.load(lr_decay + 1)
        t = now.to(tl.float64)
        size = lr / (1 - tl.exp2(LOG1 * t))
        root = 1 / tl.sqrt(1 - tl.exp2(LOG2 * t))
        left = tl.full([], 1.0, tl.float64)
        if DECOUPLED:
            decay = 1 - lr * decay
            left = tl.load(own - COLUMNS + LEFT) * decay
        tl.store(own + SIZE, size)
        tl.store(own + ROOT, root)
        tl.store(own + DECAY, decay)
        tl.store(own + LEFT, left)
        first = own + NEW
        if L2:
            _extend(first - COLUMNS, first, line == 1, size, root, decay, BETA1, BETA2, EPS, SERIES)
        else:
            for p in tl.static_range(GROWTH - MOMENTS):
                tl.store(first + p, 0.0)
            tl.store(own + GROWTH, UNKNOWN)
            # The lines of rows that made their last step not too long ago gain a term.
            p = tl.arange(0, 8)[None, :]  # POWERS of them
            for begin in range(0, LONGEST, AGES):
                age = begin + tl.arange(0, AGES) + 1
                start = line - age
                inside = (start >= 0) & (age <= LONGEST)
                at = steps + start * COLUMNS
                # This program's own root is not to be read before it is written.
                after = tl.load(at + COLUMNS + ROOT, mask=inside, other=0.0)
                after = tl.where(age == 1, root, after)
                distance = tl.exp2(0.5 * LOG2 * age.to(tl.float64)) * root
                distance -= tl.exp2(tl.full([], 0.5 * LOG2, tl.float64)) * after
                term = size * tl.exp2(LOG1 * age.to(tl.float64)) / left
                term *= tl.load(at + LEFT, mask=inside, other=0.0)
                to_p = _powers(distance[:, None], p)
                sums = at[:, None] + MOMENTS + p
                gains = inside[:, None] & (p < POWERS)
                old = tl.load(sums, mask=gains, other=0.0)
                tl.store(sums, old + term[:, None] * to_p, mask=gains)


@triton.jit
def _row(
    u, weight, exp_avg, exp_avg_sq, last, rows, grad, steps, base, now, size, width,
    BETA1, BETA2, EPS, LOG1, LOG2, ROOT2, MOST, LEAST, NAMED, GRAD, DECOUPLED, L2, SUM, BLOCK,
):  # fmt: skip
    """One row, with the steps that it missed."""
    row = tl.load(rows + u) if NAMED else u
    # Row 0 is padding where rows are named: a plan repeats it. No row leaves the table.
    if (row < size) & ((row > 0) | (not NAMED)):
        # What the row holds is asked for before it is known what it owes: memory is far away.
        made = tl.maximum(tl.load(last + row).to(tl.int64), base)
        due = now - 1 if GRAD else now
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            at = row * width + column
            w = tl.load(weight + at, mask=inside, other=0.0).to(SUM)
            m = tl.load(exp_avg + at, mask=inside, other=0.0).to(SUM)
            v = tl.load(exp_avg_sq + at, mask=inside, other=1.0).to(SUM)  # eps may be 0
            if GRAD:
                g = tl.load(grad + u * width + column, mask=inside, other=0.0).to(SUM)
            if made < due:
                if L2:
                    w, m, v = _replay(
                        w, m, v, steps, made - base, due - base, BETA1, BETA2, EPS, LOG2, LEAST,
                        SUM,
                    )  # fmt: skip
                else:
                    w, m, v = _coast(
                        w, m, v, steps, made - base, due - base, BETA1, BETA2, EPS, LOG1, LOG2,
                        ROOT2, MOST, not GRAD, LEAST, SUM,
                    )  # fmt: skip
            if GRAD:
                step = steps + (now - base) * COLUMNS
                w, m, v = _make_step(w, m, v, g, step, BETA1, BETA2, EPS, DECOUPLED, SUM)
            if made < now:
                tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
                tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
                tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # every warp has read for itself when the row made its last step
        tl.store(last + row, now.to(tl.int32))


@triton.jit
def _newest_step(
    begin, weight, exp_avg, exp_avg_sq, last, rows, grad, steps, base, now, count, size, width,
    BETA1, BETA2, EPS, NAMED, DECOUPLED, SUM, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step with the gradient of several rows at once, if they owe no other, as after a batch's
    catch-up. Returns whether they do: then nothing is done."""
    u = begin + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    row = tl.load(rows + u, mask=u < count, other=-1) if NAMED else u
    known = (u < count) & (row < size) & ((row > 0) | (not NAMED))
    inside = known & (column < width)
    at = row * width + column
    made = tl.load(last + row, mask=known, other=0).to(tl.int64)
    w = tl.load(weight + at, mask=inside, other=0.0).to(SUM)
    m = tl.load(exp_avg + at, mask=inside, other=0.0).to(SUM)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(SUM)
    g = tl.load(grad + u * width + column, mask=inside, other=0.0).to(SUM)
    made = tl.where(known, tl.maximum(made, base), now)
    owing = tl.min(made) < now - 1
    if not owing:
        inside &= made < now
        step = steps + (now - base) * COLUMNS
        w, m, v = _make_step(w, m, v, g, step, BETA1, BETA2, EPS, DECOUPLED, SUM)
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
        tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # every warp has read for itself when the rows made their last step
        newest = tl.zeros_like(row).to(tl.int32) + now.to(tl.int32)
        tl.store(last + row, newest, mask=known)
    return owing


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
    count,  # U
    size,  # R
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
    ROWS: tl.constexpr,  # of a program; above 1 with gradients
    BLOCK: tl.constexpr,  # above 1 row not less than width
):
    base, now = tl.load(clock), tl.load(clock + 1)
    begin = tl.program_id(0).to(tl.int64) * ROWS
    if now - base < lines:
        if ROWS == 1:  # not as a loop of one, in which registers of wide rows spill
            _row(
                begin, weight, exp_avg, exp_avg_sq, last, rows, grad, steps, base, now, size, width,
                BETA1, BETA2, EPS, LOG1, LOG2, ROOT2, MOST, LEAST, NAMED, GRAD, DECOUPLED, L2, SUM,
                BLOCK,
            )  # fmt: skip
        elif _newest_step(
            begin, weight, exp_avg, exp_avg_sq, last, rows, grad, steps, base, now, count, size,
            width, BETA1, BETA2, EPS, NAMED, DECOUPLED, SUM, ROWS, BLOCK,
        ):  # fmt: skip
            for u in range(begin, tl.minimum(begin + ROWS, count)):
                _row(
                    u, weight, exp_avg, exp_avg_sq, last, rows, grad, steps, base, now, size, width,
                    BETA1, BETA2, EPS, LOG1, LOG2, ROOT2, MOST, LEAST, NAMED, GRAD, DECOUPLED, L2,
                    SUM, BLOCK,
                )  # fmt: skip


def _constants(
    weight: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decoupled: bool,
    l2: bool,
    grads: bool,
) -> dict[str, object]:
    wide = weight.dtype == torch.float64
    shape = row_constants(weight, 256)  # of more, registers spill
    return {
        # A processor runs 32 programs at once: of a short row each they would leave memory idle.
        "ROWS": max(1, min(16, 256 // shape["BLOCK"])) if grads else 1,
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
        **shape,
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
    count = row_count("adam_rows", rows, grad, weight, exp_avg, exp_avg_sq, last)
    fits = exp_avg.shape == exp_avg_sq.shape == weight.shape
    require(fits, f"adam_rows: exp_avg and exp_avg_sq must be as weight, {list(weight.shape)}")
    require(exp_avg_sq.itemsize >= 4, "adam_rows: exp_avg_sq must be float32 or float64")
    check_steps("adam_rows", weight, last, steps, COLUMNS.value, clock)
    if not count or not weight.shape[1]:
        return
    with torch.cuda.device_of(weight):
        constants = _constants(weight, beta1, beta2, eps, decoupled, l2, grad is not None)
        _adam_rows[(triton.cdiv(count, constants["ROWS"]),)](
            weight,
            exp_avg,
            exp_avg_sq,
            last,
            last if rows is None else rows.contiguous(),
            weight if grad is None else grad.contiguous(),
            steps,
            clock,
            count=count,
            size=len(weight),
            width=weight.shape[1],
            lines=len(steps),
            NAMED=rows is not None,
            GRAD=grad is not None,
            **constants,
        )


def _schedule_constants(
    beta1: float, beta2: float, eps: float, decoupled: bool, l2: bool
) -> dict[str, object]:
    longest = int(math.log(NEGLIGIBLE_MOMENTUM.value) / math.log(beta1)) + 1 if beta1 else 1
    return {
        "BETA1": beta1,
        "BETA2": beta2,
        "EPS": eps,
        "LOG1": math.log2(max(beta1, 1e-300)),
        "LOG2": math.log2(max(beta2, 1e-300)),
        "DECOUPLED": decoupled,
        "L2": l2,
        "LONGEST": longest,
        "AGES": min(triton.next_power_of_2(longest), 512),
        "num_warps": 1 if l2 else 8,
    }


def adam_schedule(
    steps: Tensor,
    clock: Tensor,
    options: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decoupled: bool,
    l2: bool,
) -> None:
    """Triton version of :func:`stem_fast.reference.adam_schedule`."""
    with torch.cuda.device_of(steps):
        constants = _schedule_constants(beta1, beta2, eps, decoupled, l2)
        _adam_schedule[(1,)](steps, clock, options, lines=len(steps), **constants)
