"""Adam of a batch's rows with the steps that they missed: one read and one write of a row's weight
and state. A row belongs to one program, so results repeat bit for bit."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from stem_fast.kernels import require, require_one_device
from stem_fast.kernels.rows import check_steps, row_constants, row_count
from torch import Tensor

COLUMNS = tl.constexpr(17)  # of the table of steps, see stem_fast.optim.Schedule
MOMENTS = tl.constexpr(4)  # the first of them; with L2 of the series in their place
POWERS = tl.constexpr(7)
STEEP = tl.constexpr(16)
STEEPEST = tl.constexpr(1e6)  # that is kept there
WAKE = tl.constexpr(0.04)  # up to this, times the weight, the series are exact
UNKNOWN = tl.constexpr(2.0**100)  # in its place, where they are not known
SPENT = tl.constexpr(2.0**-60)  # momentum of which so little is left moves nothing
LEAP = tl.constexpr(16)  # steps
TERMS = tl.constexpr(8)  # of each polynomial of leaps
POLYNOMIALS = tl.constexpr(3)  # the first lines of the table of leaps
LEAP_COLUMNS = tl.constexpr(22)


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
def _polynomial(leaps, number: tl.constexpr, z, SUM: tl.constexpr):
    """Value of a polynomial of leaps without its first term, over z; and the first term."""
    line = leaps + number * LEAP_COLUMNS
    total = tl.zeros_like(z) + tl.load(line + TERMS - 1).to(SUM)
    for i in tl.static_range(2, TERMS):
        total = tl.load(line + TERMS - i).to(SUM) + z * total
    return total, tl.load(line).to(SUM)


@triton.jit
def _series(line, first: tl.constexpr, f, h, SUM: tl.constexpr):
    """f times the sum over p of (-h)^p times column first + p."""
    c2 = tl.load(line + first + 2).to(SUM) - h * tl.load(line + first + 3).to(SUM)
    c1 = tl.load(line + first + 1).to(SUM) - h * c2
    return f * (tl.load(line + first).to(SUM) - h * c1)


@triton.jit
def _leap(w, m, v, leaps, line, BETA1, EPS, KEEP, SUM):
    """LEAP steps with L2 alone at once, by their line in the table: w, m, v, and whether what it
    leaves out is small. See stem_fast/optim.py."""
    mean, l2 = tl.load(line + 1).to(SUM), tl.load(line + 11).to(SUM)
    gain = 0.5 * (1 - KEEP) * tl.load(line + 13).to(SUM)
    gained = gain * w * w
    middle = v + gained
    s = tl.sqrt(middle) * tl.load(line).to(SUM)
    f = 1 / (s + EPS)
    h = s * f
    rate = f * (mean + h * h * tl.load(line + 2).to(SUM))
    z = rate * l2
    # How the rate bends by what v gains, and altogether.
    grown = h * gained / (middle + 1.1754944e-38)
    own = -grown / LEAP
    slope = own + tl.load(line + 15).to(SUM) - h * tl.load(line + 16).to(SUM)
    du, u0 = _polynomial(leaps, 0, z, SUM)
    dr, r0 = _polynomial(leaps, 1, z, SUM)
    db, b0 = _polynomial(leaps, 2, z, SUM)
    u = u0 + z * du
    db *= z
    bent = own * b0 + slope * db
    w_of_m = BETA1 * rate * (u + bent) + _series(line, 3, f, h, SUM)
    w_of_m -= rate * rate * tl.load(line + 20).to(SUM)
    w_of_w = z * (dr + (1 - BETA1) * (du - u) + BETA1 * bent) - _series(line, 7, f, h, SUM)
    w_of_w += rate * rate * tl.load(line + 18).to(SUM)
    late = z * slope * (b0 + db)
    m_of_m = r0 + z * dr - BETA1 * late - rate * tl.load(line + 21).to(SUM)
    m_of_w = l2 * (1 - BETA1) * (u - late) + tl.load(line + 12).to(SUM)
    m_of_w -= rate * tl.load(line + 19).to(SUM)
    to = w + (w * w_of_w - m * w_of_m)
    most = tl.maximum(tl.abs(w), tl.abs(to))
    spread = h * tl.load(line + 14).to(SUM)
    both = spread + grown + tl.load(line + 17).to(SUM)
    exact = (spread * spread <= 1e-3) & (
        gain * most * most * tl.maximum(h, 200 * z * z) <= 1e-4 * middle
    )
    exact &= (both * both * z * most <= 1e-6 * tl.maximum(most, mean)) & (z <= 0.2)
    new_v = KEEP * v + gain * (w * w + w * to + to * to) * (2 / 3)
    return to, w * m_of_w + m * m_of_m, new_v, tl.min(exact.to(tl.int32)) == 1


@triton.jit
def _value(column, size, SUM: tl.constexpr):
    """Value of a series of four terms, from its first column, at each size."""
    c2 = tl.load(column + 2).to(SUM) + size * tl.load(column + 3).to(SUM)
    return tl.load(column).to(SUM) + size * (tl.load(column + 1).to(SUM) + size * c2)


@triton.jit
def _wake(w, m, v, steps, due, LOG2, SUM: tl.constexpr):
    """Steps 1 .. due with L2 alone, where m and v are zero before: w, m, v, and whether they were,
    and w is small enough. A weight that is zero stays, whatever v is."""
    line = steps + due * COLUMNS
    steep = tl.load(line + STEEP)
    size = tl.abs(w)
    known = (m == 0) & ((v == 0) | (w == 0)) & (size * steep.to(SUM) <= WAKE)
    woke = (tl.min(known.to(tl.int32)) == 1) & (steep <= STEEPEST)
    left = tl.exp2(due.to(tl.float64) * LOG2).to(SUM)
    series = line + MOMENTS
    new_v = v * left + w * w * _value(series + 8, size, SUM)
    return w * _value(series, size, SUM), w * _value(series + 4, size, SUM), new_v, woke


@triton.jit
def _alive(w, m, LEAST):
    """Whether L2 has anything left to pull; NaN counts."""
    still = (tl.abs(w) <= LEAST) & (tl.abs(m) <= LEAST)
    return tl.min(still.to(tl.int32)) == 0


@triton.jit
def _replay(w, m, v, steps, leaps, made, due, BETA1, BETA2, EPS, KEEP, LOG2, LEAST, SUM):
    """Steps made + 1 .. due with L2 alone, until nothing moves any more."""
    t = made
    alive = _alive(w, m, LEAST)
    # float64 wants more digits than a series or a leap has.
    if SUM == tl.float32:  # noqa: SIM102, SIM300
        if made == 0:
            new_w, new_m, new_v, woke = _wake(w, m, v, steps, due, LOG2, SUM)
            w, m, v = tl.where(woke, new_w, w), tl.where(woke, new_m, m), tl.where(woke, new_v, v)
            alive |= woke
            t = tl.where(woke, due, t)
    while (t < due) & alive:
        leapt = False
        if SUM == tl.float32:  # noqa: SIM102, SIM300
            if (t % LEAP == 0) & (t + LEAP <= due):
                line = leaps + (POLYNOMIALS + t // LEAP) * LEAP_COLUMNS
                new_w, new_m, new_v, leapt = _leap(w, m, v, leaps, line, BETA1, EPS, KEEP, SUM)
                w, m, v = (
                    tl.where(leapt, new_w, w),
                    tl.where(leapt, new_m, m),
                    tl.where(leapt, new_v, v),
                )
        if leapt:
            t += LEAP
        else:
            t += 1
            w, m, v = _make_step(
                w, m, v, tl.zeros_like(w), steps + t * COLUMNS, BETA1, BETA2, EPS, False, SUM
            )
        if t % LEAP == 0:
            alive = _alive(w, m, LEAST)
    left = tl.exp2((due - t).to(tl.float64) * LOG2).to(SUM)
    return tl.where(alive, w, 0.0), tl.where(alive, m, 0.0), v * left


@triton.jit
def _coast(
    w, m, v, steps, made, due, BETA1, BETA2, EPS, LOG1, LOG2, ROOT2, MOST, SUMMED, LEAST, SUM
):  # fmt: skip
    """Steps made + 1 .. due without any gradient, at once: see stem_fast/optim.py."""
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
def _product(a0, a1, a2, a3, b0, b1, b2, b3):
    """Of two series of four terms."""
    p2 = a0 * b2 + a1 * b1 + a2 * b0
    return a0 * b0, a0 * b1 + a1 * b0, p2, a0 * b3 + a1 * b2 + a2 * b1 + a3 * b0


@triton.jit
def _four(column):
    return tl.load(column), tl.load(column + 1), tl.load(column + 2), tl.load(column + 3)


@triton.jit
def _store_four(column, known, c0, c1, c2, c3):
    tl.store(column, tl.where(known, c0, 0.0))
    tl.store(column + 1, tl.where(known, c1, 0.0))
    tl.store(column + 2, tl.where(known, c2, 0.0))
    tl.store(column + 3, tl.where(known, c3, 0.0))


@triton.jit
def _extend(before, own, first, lr, size, root, decay, BETA1, BETA2, EPS):
    """reference.new_rows, from a line's columns to the next line's."""
    w0, w1, w2, w3 = _four(before)
    w0 = tl.where(first, 1.0, w0)
    g0, g1, g2, g3 = decay * w0, decay * w1, decay * w2, decay * w3
    m0, m1, m2, m3 = _four(before + 4)  # zero in the first line, as v is
    m0, m1 = BETA1 * m0 + (1 - BETA1) * g0, BETA1 * m1 + (1 - BETA1) * g1
    m2, m3 = BETA1 * m2 + (1 - BETA1) * g2, BETA1 * m3 + (1 - BETA1) * g3
    s0, s1, s2, s3 = _product(g0, g1, g2, g3, g0, g1, g2, g3)
    v0, v1, v2, v3 = _four(before + 8)
    v0, v1 = BETA2 * v0 + (1 - BETA2) * s0, BETA2 * v1 + (1 - BETA2) * s1
    v2, v3 = BETA2 * v2 + (1 - BETA2) * s2, BETA2 * v3 + (1 - BETA2) * s3
    q1 = tl.sqrt(v0)
    twice = tl.where(q1 > 0, 2 * q1, 1.0)
    q2 = v1 / twice
    q3 = (v2 - q2 * q2) / twice
    q1, q2, q3 = q1 * root / EPS, q2 * root / EPS, q3 * root / EPS
    # 1 - q + q^2 - q^3, where q has no constant term.
    i2, i3 = q1 * q1 - q2, 2 * q1 * q2 - q3 - q1 * q1 * q1
    m = _product(m0, m1, m2, m3, tl.full([], 1.0, tl.float64), -q1, i2, i3)
    rate = size / EPS
    steep = q1 * tl.sqrt(1 + 4 * lr * decay / EPS)
    most = tl.maximum(tl.load(before + 12), steep)
    known = (most <= STEEPEST) & (steep <= STEEPEST)  # NaN is not
    _store_four(own, known, w0 - rate * m[0], w1 - rate * m[1], w2 - rate * m[2], w3 - rate * m[3])
    _store_four(own + 4, known, m0, m1, m2, m3)
    _store_four(own + 8, known, v0, v1, v2, v3)
    tl.store(own + 12, tl.where(known, most, UNKNOWN))


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
        tl.store(steps + 3, 0.0)  # Schedule.advance looks there
    else:
        own = steps + line * COLUMNS
        lr, decay = tl.load(lr_decay), tl.load(lr_decay + 1)
        t = now.to(tl.float64)
        size = lr / (1 - tl.exp2(LOG1 * t))
        root = 1 / tl.sqrt(1 - tl.exp2(LOG2 * t))
        left = tl.full([], 1.0, tl.float64)
        if DECOUPLED:
            decay = 1 - lr * decay
            left = tl.load(own - COLUMNS + 3) * decay
        tl.store(own, size)
        tl.store(own + 1, root)
        tl.store(own + 2, decay)
        tl.store(own + 3, left)
        first = own + MOMENTS
        if L2:
            _extend(first - COLUMNS, first, line == 1, lr, size, root, decay, BETA1, BETA2, EPS)
        else:
            for p in tl.static_range(STEEP - MOMENTS):
                tl.store(first + p, 0.0)
            tl.store(own + STEEP, UNKNOWN)
            # The lines of rows that made their last step not too long ago gain a term.
            p = tl.arange(0, 8)[None, :]  # POWERS of them
            for begin in range(0, LONGEST, AGES):
                age = begin + tl.arange(0, AGES) + 1
                start = line - age
                inside = (start >= 0) & (age <= LONGEST)
                at = steps + start * COLUMNS
                # This program's own root is not to be read before it is written.
                after = tl.load(at + COLUMNS + 1, mask=inside, other=0.0)
                after = tl.where(age == 1, root, after)
                distance = tl.exp2(0.5 * LOG2 * age.to(tl.float64)) * root
                distance -= tl.exp2(tl.full([], 0.5 * LOG2, tl.float64)) * after
                term = size * tl.exp2(LOG1 * age.to(tl.float64)) / left
                term *= tl.load(at + 3, mask=inside, other=0.0)
                d = distance[:, None]
                to_p = tl.where(p & 1 != 0, d, 1.0) * tl.where(p & 2 != 0, d * d, 1.0)
                to_p *= tl.where(p & 4 != 0, d * d * d * d, 1.0)
                sums = at[:, None] + MOMENTS + p
                gains = inside[:, None] & (p < POWERS)
                old = tl.load(sums, mask=gains, other=0.0)
                tl.store(sums, old + term[:, None] * to_p, mask=gains)


@triton.jit
def _lagged(lag, values):
    """lag [LEAP, LEAP] times values [LEAP]."""
    return tl.sum(lag * values[None, :], 1)


@triton.jit
def _second_order(lag, momentum, decay, j):
    """What weight_decay [LEAP] adds to the second order in c: to w and m of w, then of m."""
    earlier = tl.where(j[None, :] < j[:, None], 1.0, 0.0)
    of_w = _lagged(lag, decay * _lagged(earlier, _lagged(lag, decay)))
    of_m = _lagged(lag, decay * _lagged(earlier, momentum))
    last = j == LEAP
    return tl.sum(of_w), _at(of_w, last), tl.sum(of_m), _at(of_m, last)


@triton.jit
def _at(values, here):
    return tl.sum(tl.where(here, values, 0.0))


@triton.jit
def _adam_leap(
    steps,  # [N, COLUMNS]
    leaps,  # [POLYNOMIALS + N // LEAP, LEAP_COLUMNS]
    clock,  # [2]
    lines,  # N
    BETA1: tl.constexpr,
    LOG1: tl.constexpr,
    LOG2: tl.constexpr,
):
    newest = tl.load(clock + 1) - tl.load(clock)
    if (newest % LEAP == 0) & (newest > 0) & (newest < lines):
        j = tl.arange(0, LEAP) + 1
        age = j.to(tl.float64)
        own = steps + (newest - LEAP + j) * COLUMNS
        size, root, decay = tl.load(own), tl.load(own + 1), tl.load(own + 2)
        momentum = tl.exp2(LOG1 * age)
        behind = age[:, None] - age[None, :]
        lag = tl.where(behind >= 0, (1 - BETA1) * tl.exp2(LOG1 * tl.maximum(behind, 0.0)), 0.0)
        middle = age - (LEAP + 1) / 2
        slope = middle / tl.sum(middle * middle)
        total = tl.sum(size)
        share = tl.where(total > 0, size / tl.where(total > 0, total, 1.0), 1.0 / LEAP)
        x = root * tl.exp2(0.5 * LOG2 * age)
        mean_x = tl.sum(share * x)
        d = x / mean_x - 1
        mean, bend, l2 = total / LEAP, tl.sum(size * d * d) / LEAP, tl.sum(share * decay)
        lagged = _lagged(lag, decay)
        left, spent = tl.sum(momentum), tl.sum(1 - momentum)
        line = leaps + (POLYNOMIALS + newest // LEAP - 1) * LEAP_COLUMNS
        tl.store(line, mean_x)
        tl.store(line + 1, mean)
        tl.store(line + 2, bend)
        fast, pull = size * momentum, size * lagged
        for p in tl.static_range(4):
            # What c at its mean makes of them is in the powers of the matrix.
            constant = mean if p == 0 else (bend if p == 2 else mean * 0)
            tl.store(line + 3 + p, tl.sum(fast) - left * constant)
            tl.store(line + 7 + p, tl.sum(pull) - l2 * spent * constant)
            fast *= d
            pull *= d
        last = j == LEAP
        tl.store(line + 11, l2)
        tl.store(line + 12, _at(lagged, last) - l2 * (1 - _at(momentum, last)))
        tl.store(line + 13, tl.sum(decay * decay) / LEAP)
        tl.store(line + 14, tl.max(tl.abs(d)))
        tl.store(line + 15, tl.sum(slope * share) * LEAP)
        tl.store(line + 16, tl.sum(slope * d))
        tl.store(line + 17, tl.max(tl.abs(share * LEAP - 1)))
        own_second = _second_order(lag, momentum, decay, j)
        even_second = _second_order(lag, momentum, tl.zeros_like(decay) + l2, j)
        for i in tl.static_range(4):
            tl.store(line + 18 + i, own_second[i] - even_second[i])


@triton.jit
def _row(
    u, weight, exp_avg, exp_avg_sq, last, rows, grad, steps, leaps, base, now, size, width,
    BETA1, BETA2, EPS, KEEP, LOG1, LOG2, ROOT2, MOST, LEAST, NAMED, GRAD, DECOUPLED, L2, SUM, BLOCK,
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
            v = tl.load(exp_avg_sq + at, mask=inside, other=1.0).to(SUM)  # 0 would refuse a leap
            if GRAD:
                g = tl.load(grad + u * width + column, mask=inside, other=0.0).to(SUM)
            if made < due:
                if L2:
                    w, m, v = _replay(
                        w, m, v, steps, leaps, made - base, due - base, BETA1, BETA2, EPS, KEEP,
                        LOG2, LEAST, SUM,
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
    leaps,  # [POLYNOMIALS + N // LEAP, LEAP_COLUMNS]
    clock,  # [2]
    count,  # U
    size,  # R
    width,
    lines,  # N
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    KEEP: tl.constexpr,  # BETA2 ** LEAP
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
                begin, weight, exp_avg, exp_avg_sq, last, rows, grad, steps, leaps, base, now, size,
                width, BETA1, BETA2, EPS, KEEP, LOG1, LOG2, ROOT2, MOST, LEAST, NAMED, GRAD,
                DECOUPLED, L2, SUM, BLOCK,
            )  # fmt: skip
        elif _newest_step(
            begin, weight, exp_avg, exp_avg_sq, last, rows, grad, steps, base, now, count, size,
            width, BETA1, BETA2, EPS, NAMED, DECOUPLED, SUM, ROWS, BLOCK,
        ):  # fmt: skip
            for u in range(begin, tl.minimum(begin + ROWS, count)):
                _row(
                    u, weight, exp_avg, exp_avg_sq, last, rows, grad, steps, leaps, base, now, size,
                    width, BETA1, BETA2, EPS, KEEP, LOG1, LOG2, ROOT2, MOST, LEAST, NAMED, GRAD,
                    DECOUPLED, L2, SUM, BLOCK,
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
        "KEEP": beta2**LEAP.value,
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
    leaps: Tensor,
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
    lines = POLYNOMIALS.value + len(steps) // LEAP.value
    fits = leaps.dim() == 2 and len(leaps) >= lines and leaps.shape[1] == LEAP_COLUMNS.value
    fits = fits and leaps.dtype == torch.float64 and leaps.is_contiguous()
    require(fits, f"adam_rows: leaps must be float64 [{lines}, {LEAP_COLUMNS.value}]")
    require_one_device("adam_rows", weight, leaps)
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
            leaps,
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
    longest = int(math.log(SPENT.value) / math.log(beta1)) + 1 if beta1 else 1
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


def _leap_constants(beta1: float, beta2: float) -> dict[str, object]:
    return {
        "BETA1": beta1,
        "LOG1": math.log2(max(beta1, 1e-300)),
        "LOG2": math.log2(max(beta2, 1e-300)),
        "num_warps": 1,
    }


def adam_leap(steps: Tensor, leaps: Tensor, clock: Tensor, beta1: float, beta2: float) -> None:
    """Triton version of :func:`stem_fast.reference.adam_leap`."""
    with torch.cuda.device_of(steps):
        constants = _leap_constants(beta1, beta2)
        _adam_leap[(1,)](steps, leaps, clock, lines=len(steps), **constants)
