"""Adam of a batch's rows with the steps that they missed; see docs/exact-adam.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_fast.reference.rows import real_rows

# Columns of a line of the table of steps; csrc/adam_table.h has the same.
SIZE, ROOT, DECAY, LEFT, MOMENTS = 0, 1, 2, 3, 4  # the last: the first of POWERS moments
POWERS = 7  # moments of the steps that a row has missed, see adam_schedule; the zeroth included
NEW = MOMENTS  # with L2 in their place: three series of weights that no gradient has touched
SERIES = 8  # terms of each of them, see new_rows
GROWTH = NEW + 3 * SERIES
COLUMNS = GROWTH + 1
CONVERGED = 0.5  # up to this growth times the weight, the series are exact in float32
LEAST_GROWTH = 1e-30  # so that it can be divided by
UNKNOWN = 2.0**100  # in its place where the series are not known
NEGLIGIBLE_MOMENTUM = 2.0**-60  # of which no more is left moves nothing
LOOK = 16  # steps with L2 after which a row is looked at: it may have been pulled to nothing


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
    """Adam of some rows of a table, with the steps they missed; see :mod:`stem_fast.optim`.

    A row that no sample of a batch reads has a gradient of zero (and of ``decay * w`` with L2), and
    dense Adam moves it all the same. That is a recurrence of the row with itself, run here when the
    row is next needed. Everything is changed in place.

    Args:
        weight: [R, W].
        exp_avg: [R, W], Adam's m, in bfloat16, float32 or weight's type.
        exp_avg_sq: [R, W], v, in float32 or float64: a number of few digits times ``beta2`` is
            itself.
        last: int32 [R], the newest step that each row has made.
        rows: int64 [U], each once; row 0 is padding and left out (a CUDA plan repeats it). None:
            all rows.
        grad: [U, W], their gradient in the newest step. None: every gradient is zero.
        steps: float64 [N, 29]; line i tells of step ``base + i``. Here: column 0 is the step's
            ``lr / (1 - beta1^t)``, 1 is ``1 / sqrt(1 - beta2^t)``, 2 the coupled ``weight_decay``
            or the factor ``1 - lr * weight_decay``. The others are sums, or with L2 series, that
            save the loop, see :class:`stem_fast.optim.step_table.AdamStepTable`.
        clock: int64 [2], (base, now): no row is older than step ``base``; ``now`` is the newest.
        beta1, beta2, eps, decoupled: as in ``torch.optim.Adam``.
        l2: whether a coupled weight decay is above 0 in any step (a hint to faster versions).
    """
    base, now = clock.tolist()
    rows, real = real_rows(weight, rows)
    grad = None if grad is None else grad[real]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w, m, v = (table[rows].to(dtype) for table in (weight, exp_avg, exp_avg_sq))
    made = last[rows].clamp(min=base)
    first = int(made.min()) + 1 if len(made) else now + 1
    for t in range(first, now + 1):
        size, root, decay = (float(x) for x in steps[t - base, :LEFT])
        g = torch.zeros_like(w) if grad is None or t < now else grad.to(dtype)
        kept = w * decay if decoupled else w
        g = g if decoupled else g + decay * w
        new_m = m + (g - m) * (1 - beta1)
        new_v = v * beta2 + (1 - beta2) * g * g
        new_w = kept - size * new_m / (new_v.sqrt() * root + eps)
        due = (made < t)[:, None]
        w, m, v = (torch.where(due, *pair) for pair in ((new_w, w), (new_m, m), (new_v, v)))
    for table, changed in ((weight, w), (exp_avg, m), (exp_avg_sq, v)):
        table[rows] = changed.to(table.dtype)
    last[rows] = now


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
    """A new step in the table that :func:`adam_rows` reads; see
    :class:`stem_fast.optim.step_table.AdamStepTable`.

    Args:
        steps: float64 [N, 29]: a line is written, and the sums of lines before it grow.
        clock: int64 [2], (base, now): now grows by 1, and stays below ``base + N``.
        options: float64 [2], the step's lr and weight_decay.
        beta1, beta2, eps, decoupled: as in ``torch.optim.Adam``.
        l2: no sums, which tell of rows without any gradient; :func:`new_rows` instead.
    """
    clock[1] += 1
    line = clock[1:] - clock[:1]  # not a scalar: an index of those would be waited for
    t = clock[1:].double()
    lr, decay = options[:1], options[1:]
    if decoupled:
        decay = 1 - lr * decay
    left = steps[line - 1, LEFT] * decay if decoupled else torch.ones_like(t)
    size, root = lr / (1 - beta1**t), (1 - beta2**t).rsqrt()
    if l2:
        first = torch.eye(1, COLUMNS - NEW, dtype=t.dtype, device=t.device)
        before = torch.where(line == 1, first, steps[line - 1, NEW:])[0]
        rest = new_rows(before, size, root, decay, beta1, beta2, eps)
    else:
        rest = t.new_zeros(COLUMNS - NEW)
        rest[-1].fill_(UNKNOWN)  # a number assigned is a copy from the host
    steps.index_copy_(0, line, torch.cat([size, root, decay, left, rest])[None])
    if l2:
        return
    # The lines of rows that made their last step not too long ago gain a term.
    longest = math.log(NEGLIGIBLE_MOMENTUM) / math.log(beta1) if beta1 else 1
    age = torch.arange(1, int(longest) + 2, device=t.device)
    half = age.double() / 2
    start = (line - age).clamp(min=0)
    weight = torch.where(age <= line, size * beta1 ** (2 * half) / left, 0) * steps[start, LEFT]
    distance = beta2**half * root - beta2**0.5 * steps[start + 1, ROOT]
    terms = weight[:, None] * distance[:, None] ** torch.arange(POWERS, device=t.device)
    steps[:, MOMENTS : MOMENTS + POWERS].index_add_(0, start, terms)


def new_rows(
    before: Tensor,
    size: Tensor,
    root: Tensor,
    decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """What a step with L2 alone makes of weights that no gradient has touched.

    Such a weight, W at first, is W times a number that depends on the steps and on |W| alone; its m
    is W times, its v W^2 times such a number. All three are kept as the first terms of their power
    series in |W|.

    Args:
        before: float64 [25]: of w, m and v eight terms each, the k-th over the k-th power of their
            growth, and the growth.
        size, root, decay: float64 [1], columns 0 .. 2 of the step's line.

    Returns:
        The same after the step. The growth is the least number g with which the k-th term of each
        series is at most ``g^k / k!`` times as large as the zeroth; for w and m that is the zeroth
        of w and what m can still move it by. Where ``g |W|`` is up to 0.5 the terms left out begin
        with ``0.5^8 / 8!``, 1e-7. Where a term is not finite the terms are 0, the growth is 2^100,
        and so they stay.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        terms = [(a[: p + 1] * b[: p + 1].flip(0)).sum() for p in range(SERIES)]
        return torch.stack(terms)

    powers = torch.arange(SERIES, dtype=before.dtype, device=before.device)
    w, m, v = before[:-1].view(3, SERIES) * before[-1:].clamp(min=LEAST_GROWTH) ** powers
    grad = decay * w
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * product(grad, grad)
    # The root of v. Over eps it comes with a factor |W|: its terms are those of one place later.
    s = [v[0].sqrt()]
    twice = torch.where(s[0] > 0, 2 * s[0], 1)
    for p in range(1, SERIES - 1):
        squares = sum((s[i] * s[p - i] for i in range(1, p)), start=torch.zeros_like(twice))
        s.append((v[p] - squares) / twice)
    q = torch.stack([torch.zeros_like(twice), *s]) * root / eps
    inverse = [torch.ones_like(twice)]  # of 1 + q
    for p in range(1, SERIES):
        parts = [q[i] * inverse[p - i] for i in range(1, p + 1)]
        inverse.append(-torch.stack(parts).sum(0))
    w = w - size / eps * product(m, torch.stack(inverse))
    # How far a weight still goes for each unit of m, along a decaying wave or to rest.
    rate = size / eps
    reach = rate / (1 - beta1)
    reach = torch.where(decay > 0, torch.minimum((reach / decay).sqrt(), reach), reach)
    least = w[0].abs() + reach * m[0].abs()
    units = (w, least), (reach * m, least), (v, v[0])
    ratios = torch.stack([torch.where(unit > 0, part / unit, 0) for part, unit in units])
    factorials = torch.lgamma(powers + 1).exp()
    roots = (ratios.abs() * factorials)[:, 1:] ** (1 / powers[1:])
    growth = roots.amax().reshape(1).clamp(min=LEAST_GROWTH)
    known = torch.isfinite(growth) & (before[-1] < UNKNOWN)
    unknown = torch.zeros_like(before)
    unknown[-1].fill_(UNKNOWN)
    terms = torch.stack([w, m, v]) / growth**powers
    return torch.where(known, torch.cat([terms.flatten(), growth]), unknown)
