"""Adam of a batch's rows with the steps that they missed; see stem_fast/optim.py."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from stem_fast.reference.rows import real_rows

MOMENTS = 7  # of the steps that a row has missed, see adam_schedule; the zeroth included
SERIES = 4  # of the series of weights that were never trained, see new_rows
STEEPEST, UNKNOWN = 1e6, 2.0**100  # the most of them, and what stands there where it is not known
SPENT = 2.0**-60  # momentum of which so little is left moves nothing
LEAP = 16  # steps with L2 alone that are made at once, see adam_leap
POLYNOMIALS = 3  # the first lines of the table of leaps


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
        steps: float64 [N, 17]; line i tells of step ``base + i``. Here: column 0 is the step's
            ``lr / (1 - beta1^t)``, 1 is ``1 / sqrt(1 - beta2^t)``, 2 the coupled ``weight_decay``
            or the factor ``1 - lr * weight_decay``. The others are sums, or with L2 series, that
            save the loop, see :class:`stem_fast.optim.Schedule`.
        leaps: float64 [3 + N // 16, 22], sums that save the loop with L2; not used here.
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
        size, root, decay = (float(x) for x in steps[t - base, :3])
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
    """A new step in the table that :func:`adam_rows` reads; see :class:`stem_fast.optim.Schedule`.

    Args:
        steps: float64 [N, 17]: a line is written, and the sums of lines before it grow.
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
    left = steps[line - 1, 3] * decay if decoupled else torch.ones_like(t)
    size, root = lr / (1 - beta1**t), (1 - beta2**t).rsqrt()
    if l2:
        first = torch.eye(1, 3 * SERIES + 1, dtype=t.dtype, device=t.device)
        before = torch.where(line == 1, first, steps[line - 1, 4:])[0]
        rest = new_rows(before, lr, size, root, decay, beta1, beta2, eps)
    else:
        rest = t.new_zeros(3 * SERIES + 1)
        rest[-1].fill_(UNKNOWN)  # a number assigned is a copy from the host
    steps.index_copy_(0, line, torch.cat([size, root, decay, left, rest])[None])
    if l2:
        return
    # The lines of rows that made their last step not too long ago gain a term.
    longest = math.log(SPENT) / math.log(beta1) if beta1 else 1
    age = torch.arange(1, int(longest) + 2, device=t.device)
    half = age.double() / 2
    start = (line - age).clamp(min=0)
    weight = torch.where(age <= line, size * beta1 ** (2 * half) / left, 0) * steps[start, 3]
    distance = beta2**half * root - beta2**0.5 * steps[start + 1, 1]
    terms = weight[:, None] * distance[:, None] ** torch.arange(MOMENTS, device=t.device)
    steps[:, 4 : 4 + MOMENTS].index_add_(0, start, terms)


def new_rows(
    before: Tensor,
    lr: Tensor,
    size: Tensor,
    root: Tensor,
    decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """What a step with L2 alone makes of weights that no gradient has touched.

    Such a weight, W at first, is W times a number that depends on the steps and on |W| alone; its m
    is W times, its v W^2 times such a number. All three are kept as the first terms of their series
    in |W|.

    Args:
        before: float64 [13]: of w, m and v four terms each, and the most that ``sqrt(v) * root /
            (eps * |W|)`` has been, times ``sqrt(1 + 4 * lr * decay / eps)``: where L2 is so strong
            that w swings, its phase gathers the error of many steps.
        lr: float64 [1], the step's.
        size, root, decay: float64 [1], columns 0 .. 2 of the step's line.

    Returns:
        The same after the step. It is exact to float32's rounding where the most, times |W|, is
        up to 0.04. Beyond 1e6 the most is 2^100, the terms are 0, and nothing more is known.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        terms = [(a[: p + 1] * b[: p + 1].flip(0)).sum() for p in range(SERIES)]
        return torch.stack(terms)

    w, m, v = before[:-1].view(3, SERIES)
    grad = decay * w
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * product(grad, grad)
    s = v[0].sqrt()
    twice = torch.where(s > 0, 2 * s, 1)
    bend = v[1] / twice
    # The root of v over eps, one term later: it comes with a factor |W|.
    q = torch.stack([torch.zeros_like(s), s, bend, (v[2] - bend * bend) / twice]) * root / eps
    squared = product(q, q)
    inverse = torch.eye(1, SERIES, dtype=q.dtype, device=q.device)[0]
    inverse = inverse - q + squared - product(squared, q)
    w = w - size / eps * product(m, inverse)
    most = torch.maximum(before[-1:], q[1:2] * (1 + 4 * lr * decay / eps).sqrt())
    unknown = torch.zeros_like(before)
    unknown[-1].fill_(UNKNOWN)
    return torch.where(most <= STEEPEST, torch.cat([w, m, v, most]), unknown)


def adam_leap(steps: Tensor, leaps: Tensor, clock: Tensor, beta1: float, beta2: float) -> None:
    """The line of the sixteen steps with L2 that end with the newest one; where none end there,
    nothing is written. What the columns are is told by :class:`stem_fast.optim.Schedule`.

    Args:
        steps: float64 [N, 17], with the newest step's line.
        leaps: float64 [3 + N // 16, 22]: line ``3 + i // 16`` is written after step ``i + 16``.
        clock: int64 [2], (base, now).
        beta1, beta2: as in ``torch.optim.Adam``.
    """
    momentum, root, slope, lag = _leap_constants(beta1, beta2, steps.device)
    line = clock[1:] - clock[:1]  # not a scalar: an index of those would be waited for
    number = (line - 1) // LEAP
    lines = number * LEAP + torch.arange(1, LEAP + 1, device=line.device)
    size, x, decay = steps[lines.clamp(max=len(steps) - 1), :3].unbind(1)
    total = size.sum()
    share = torch.where(total > 0, size / total, 1 / LEAP)
    x = x * root
    mean_x = (share * x).sum()
    d = x / mean_x - 1
    mean, bend, l2 = total / LEAP, (size * d * d).sum() / LEAP, (share * decay).sum()
    powers = d[:, None] ** torch.arange(4, device=d.device)
    lagged = lag @ decay
    fast, pull = (size * momentum) @ powers, (size * lagged) @ powers
    # What c at its mean makes of them is in the powers of the matrix.
    constant = torch.stack([mean, bend.new_zeros(()), bend, bend.new_zeros(())])
    left = momentum.sum()
    fast, pull = fast - left * constant, pull - l2 * (LEAP - left) * constant
    late = lagged[-1] - l2 * (1 - momentum[-1])
    uneven = LEAP * share
    slopes = slope @ torch.stack([uneven, d], 1)
    ends = torch.stack([l2, late, decay.square().mean(), d.abs().amax()])
    uneven = (uneven - 1).abs().amax(0, keepdim=True)

    def second_order(decay: Tensor) -> Tensor:
        """The terms of second order in c, [4], with weight_decay [16] and c = 1."""
        before = torch.stack([lag @ decay, momentum], 1)  # what w has lost per w, per m
        after = lag @ (decay[:, None] * (before.cumsum(0) - before))
        return torch.stack([after.sum(0), after[-1]], 1).flatten()

    second = second_order(decay) - second_order(l2.expand(LEAP))
    parts = torch.stack([mean_x, mean, bend]), fast, pull, ends, slopes, uneven, second
    found = torch.where(line % LEAP == 0, torch.cat(parts), leaps[POLYNOMIALS + number])
    leaps.index_copy_(0, POLYNOMIALS + number, found)


@functools.cache
def _leap_constants(beta1: float, beta2: float, device: torch.device) -> tuple[Tensor, ...]:
    """For the j-th of 16 steps ``beta1^j``, ``beta2^(j/2)`` and the weights of a slope, [16]; and
    [16, 16], what m has of the gradients of steps before. Kept: they are as costly as the rest."""
    age = torch.arange(1, LEAP + 1, dtype=torch.float64, device=device)
    middle = age - age.mean()
    lag = age[:, None] - age
    lag = torch.where(lag >= 0, (1 - beta1) * beta1 ** lag.clamp(min=0), 0)
    return beta1**age, beta2 ** (age / 2), middle / middle.square().sum(), lag
