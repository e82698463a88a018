"""The mathematics of STEM-Net in plain PyTorch, one loop for one sum.

Every faster version of an op is tested against the function of the same name here, so these stay
simple enough to be checked by eye against the paper (Su et al., AAAI 2024, section 4) and the
official code (LiangcaiSu/STEM, ``models/STEM.py``). Autograd of these functions *is* the
definition of the gradients, the asymmetric backward included.

Symbols: B batch, F categorical fields, G embedding spaces, D embedding dimension, E experts,
K gates, I and O the widths of a layer's input and output, H the width of an expert's output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MOMENTS = 7  # of the steps that a row has missed, see adam_schedule; the zeroth included
SERIES = 4  # of the series of weights that were never trained, see new_rows
STEEPEST, UNKNOWN = (
    1e6,
    2.0**100,
)  # the most of these series, and its place where they are not known
SPENT = 2.0**-60  # momentum of which so little is left moves nothing
LEAP = 16  # steps with L2 alone that are made at once, see adam_leap
POLYNOMIALS = 3  # the first lines of the table of leaps


def lookup(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    spaces: int,
    sums: Sequence[int] = (),
    bags: Sequence[Tensor] = (),
    mean: int = 0,
) -> tuple[Tensor, Tensor]:
    """Embeddings of all fields in all spaces, and sums of spaces.

    Args:
        weight: [R, G*D], the arena. A row holds the G embeddings of one feature value; the rows of
            field f start at ``offsets[f]``. Arena row 0 is a padding row.
        ids: int32 or int64 [B, F], 0 <= ids[b, f] < rows of field f. 0 is padding: it reads its
            row, which is kept at zero, and never trains it.
        offsets: int64 [F].
        spaces: G.
        sums: K bit masks over the spaces; bit g says whether space g is in the sum.
        bags: sequences of S further fields: none, or (rows, bounds) or (rows, bounds, weights).
            rows: int32 or int64 [n], arena rows; 0 is padding and counts for nothing.
            bounds: int64 [S, B+1]; bag (s, b) is ``rows[bounds[s, b] : bounds[s, b + 1]]``.
            weights: float [n], a constant factor of each row.
        mean: bit s says whether the bags of field s are divided by their count of rows that are
            not padding (FuxiCTR's MaskedAveragePooling; without: MaskedSumPooling).

    Returns:
        x [G, B, (F+S)*D], field-major; an empty bag is zeros.
        z [K, B, (F+S)*D], ``z[k] = sum of x[g] over the spaces in sums[k]``.
    """
    rows = F.embedding(ids + offsets, weight)  # [B, F, G*D]
    parts = [torch.where((ids == 0)[..., None], rows.detach(), rows)]
    batch = len(ids)
    for s in range(len(bags[1]) if bags else 0):
        row, sample, scale = _bag_rows(bags, mean, s)
        pooled = weight.new_zeros(batch, weight.shape[1])
        scaled = F.embedding(row, weight) * scale[:, None].to(weight.dtype)
        parts.append(pooled.index_add(0, sample, scaled)[:, None])
    x = torch.cat(parts, 1).unflatten(2, (spaces, -1)).permute(2, 0, 1, 3).flatten(2)
    return x.contiguous(), space_sums(x, sums)


def lookup_backward(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: Sequence[int],
    ids: Tensor,
    offsets: Tensor,
    bags: Sequence[Tensor],
    mean: int,
    rows: int,
) -> Tensor:
    """Dense gradient of :func:`lookup` with respect to ``weight``.

    Args:
        grad_x, grad_z: [G, B, (F+S)*D] and [K, B, (F+S)*D], gradients of the outputs.
        sums, ids, offsets, bags, mean: as in :func:`lookup`.
        rows: R.

    Returns:
        [R, G*D]; zero for rows that no id names and for padding rows.
    """
    fields = ids.shape[1] + (len(bags[1]) if bags else 0)
    dim = grad_x.shape[2] // fields
    dense = grad_x.new_zeros(rows, len(grad_x) * dim)
    plan = row_plan(ids, offsets, bags, mean)
    dense[plan[0]] = row_gradients(grad_x, grad_z, sums, *plan[1:], dim)
    return dense


def row_plan(
    ids: Tensor, offsets: Tensor, bags: Sequence[Tensor] = (), mean: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which arena rows a batch reads, and where; made once a batch.

    A slot is one place of the lookup's output: slot ``b * (F+S) + f`` is field f of sample b.

    Args:
        ids, offsets, bags, mean: as in :func:`lookup`; on CUDA offsets may be int32, where every
            row is below 2^31 - 1.

    Returns:
        rows: int64 [U], the arena rows that the batch trains, ascending. No padding rows, except
            that backends which can't wait for U (CUDA) append row 0 with an empty segment each.
        segments: int32 [U+1]; row u is read at ``sources[segments[u] : segments[u + 1]]``.
        sources: int32 [m], slots; within a row categorical fields first, then bags in their order.
        scales: float64 [m], the factor of each: 1 for a categorical field, for a bag its weight
            and the mean's divisor. Empty ([0]) without bags: every factor is 1.
    """
    batch, categorical = ids.shape
    fields = categorical + (len(bags[1]) if bags else 0)
    first = torch.arange(batch, device=ids.device) * fields
    row = torch.where(ids == 0, 0, ids + offsets).long().flatten()
    slot = (first[:, None] + torch.arange(categorical, device=ids.device)).flatten()
    occurrences = [(row, slot, torch.ones_like(row, dtype=torch.float64))]
    for s in range(fields - categorical):
        row, sample, scale = _bag_rows(bags, mean, s)
        occurrences.append((row.long(), first[sample] + categorical + s, scale))
    row, slot, scale = (torch.cat(parts) for parts in zip(*occurrences, strict=True))
    order = torch.argsort(row, stable=True)
    order = order[row[order] != 0]
    rows, counts = row[order].unique_consecutive(return_counts=True)
    segments = F.pad(counts.cumsum(0), (1, 0)).int()
    return rows, segments, slot[order].int(), scale[order] if bags else scale[:0]


def row_gradients(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: Sequence[int],
    segments: Tensor,
    sources: Tensor,
    scales: Tensor,
    dim: int,
) -> Tensor:
    """Gradient of :func:`lookup` for the rows of a :func:`row_plan` alone.

    Args:
        grad_x, grad_z, sums: as in :func:`lookup_backward`.
        segments, sources, scales: of the plan.
        dim: D.

    Returns:
        [U, G*D], in the order of the plan's rows; zero for an empty segment.
    """
    grad = grad_x
    for mask, part in zip(sums, grad_z.unbind(), strict=True):
        named = [bool(mask >> g & 1) for g in range(len(grad))]
        grad = grad + part * torch.tensor(named, device=part.device)[:, None, None]
    slots = grad.unflatten(2, (-1, dim)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    terms = slots[sources]  # [m, G*D]
    if len(scales):
        terms = terms * scales[:, None].to(terms.dtype)
    row = torch.repeat_interleave(
        torch.arange(len(segments) - 1, device=segments.device),
        segments.diff(),
        output_size=len(sources),
    )
    return terms.new_zeros(len(segments) - 1, terms.shape[1]).index_add(0, row, terms)


def outside(ids: Tensor, sizes: Tensor) -> Tensor:
    """Where the first id is that is outside its vocabulary.

    Args:
        ids: int32 or int64 [B, F].
        sizes: int64 [F], rows of each field.

    Returns:
        int64 [], its place in the flat ids, or -1.
    """
    wrong = ((ids < 0) | (ids >= sizes)).flatten().nonzero()
    return wrong[0, 0] if len(wrong) else wrong.new_full((), -1)


def check_ids(ids: Tensor, sizes: Tensor, bad: Tensor) -> Tensor:
    """Ids with those outside their vocabulary replaced by its last one, the unknown value.

    Args:
        ids: int32 or int64 [B, F].
        sizes: int64 [F], rows of each field.
        bad: int64 [F], changed in place: the least of itself and, over the field's ids that are
            outside, ``b << 32 | id`` (the id clamped to 32 bits, signed). Nothing waits for it; see
            :meth:`stem_fast.layers.EmbeddingArena.raise_bad_ids`.

    Returns:
        [B, F], of the type of ``ids``.
    """
    outside = (ids < 0) | (ids >= sizes)
    value = ids.long().clamp(-(1 << 31), (1 << 31) - 1) & 0xFFFFFFFF
    place = torch.arange(len(ids), device=ids.device)[:, None] << 32 | value
    never = torch.iinfo(torch.int64).max
    seen = torch.cat([torch.where(outside, place, never), bad[None]])
    bad.copy_(seen.amin(0))
    return torch.where(outside, sizes - 1, ids).to(ids.dtype)


def empty_kept(like: Tensor, size: Sequence[int]) -> Tensor:
    """An uninitialised contiguous tensor of the type and device of ``like``; on CPU, a large one is
    memory that an earlier tensor gave back (a fresh page costs more than writing to it)."""
    return like.new_empty(size)


def huge_pages(table: Tensor) -> None:
    """Ask for huge pages for memory that nothing was written to; on CPU, by the C++ library."""


def _bag_rows(bags: Sequence[Tensor], mean: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, sample, float64 scale) of every row of the bags of field s that is not padding."""
    rows, bounds = bags[0], bags[1][s]
    batch = len(bounds) - 1
    rows = rows[bounds[0] : bounds[-1]]
    sample = torch.repeat_interleave(
        torch.arange(batch, device=rows.device), bounds.diff(), output_size=len(rows)
    )
    scale = torch.ones_like(rows, dtype=torch.float64)
    if len(bags) > 2:
        scale = bags[2][bounds[0] : bounds[-1]].double()
    real = rows != 0
    rows, sample, scale = rows[real], sample[real], scale[real]
    if mean >> s & 1:
        scale = scale / torch.bincount(sample, minlength=batch).clamp(min=1)[sample]
    return rows, sample, scale


def grouped_linear(
    x: Tensor | Sequence[Tensor],
    reads: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    relu: bool = False,
) -> Tensor:
    """One linear layer of E networks that run side by side (experts, gates or towers).

    Args:
        x: [N, B, I], or N of [B, I]: the inputs there are.
        reads: indices into them: network e reads ``x[reads[e]]``; with fewer than E of them, only
            the first networks run.
        weight: [E, O, I].
        bias: [E, O].
        relu: whether a ReLU follows.

    Returns:
        [E, B, O].
    """
    # unbind and not indexing: the backward of x[n] fills a whole x with zeros each time.
    inputs = x.unbind() if isinstance(x, Tensor) else x
    networks = zip(reads, weight.unbind(), bias.unbind(), strict=False)
    outputs = [F.linear(inputs[n], w, b) for n, w, b in networks]
    if not outputs:
        return weight.new_empty(0, len(inputs[0]), weight.shape[1])
    y = torch.stack(outputs)
    return y.relu() if relu else y


def space_sums(x: Tensor, sums: Sequence[int]) -> Tensor:
    """``z[k] = sum of x[n] over the bits n of sums[k]``. [N, B, I] -> [K, B, I]."""
    inputs = x.unbind()
    named = [[inputs[n] for n in range(len(inputs)) if mask >> n & 1] for mask in sums]
    return torch.stack([torch.stack(each).sum(0) for each in named]) if named else x[:0].clone()


def gate_weights(logits: Tensor, see: Sequence[int]) -> Tensor:
    """Softmax over the experts that each gate sees.

    Args:
        logits: [K, B, E].
        see: K bit masks, none of them 0; bit e of ``see[k]`` says whether gate k sees expert e.

    Returns:
        [K, B, E]; exactly 0 where the bit is 0.
    """
    return logits.masked_fill(~mask_matrix(see, logits)[:, None, :], float("-inf")).softmax(-1)


def mixture(y: Tensor, logits: Tensor, see: Sequence[int], learn: Sequence[int]) -> Tensor:
    """All Forward, Task-specific Backward (AFTB): K gated sums of the same E experts.

    ``out[k] = sum_e p[k, e] * y[e]`` with ``p = gate_weights(logits, see)``. Expert e learns from
    output k only where bit e of ``learn[k]`` is set; the gates always learn.

    Args:
        y: [E, B, H], expert outputs.
        logits: [K, B, E].
        see, learn: K bit masks over the experts, learn within see.

    Returns:
        [K, B, H].
    """
    p = gate_weights(logits, see)
    outputs = []
    for k, mask in enumerate(learn):
        experts = [y[e] if mask >> e & 1 else y[e].detach() for e in range(len(y))]
        outputs.append(torch.stack([p[k, :, e, None] * experts[e] for e in range(len(y))]).sum(0))
    return torch.stack(outputs)


def expert_mixture_inference(
    x: Tensor,
    reads: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    logits: Tensor,
    see: Sequence[int],
) -> Tensor:
    """The last layer of the experts, with its ReLU, and their mixture; it has no gradient.

    Args:
        x: [N, B, I].
        reads: expert e reads ``x[reads[e]]``.
        weight: [E, O, I], of x's type, as bias.
        bias: [E, O].
        logits: [K, B, E], of x's type or float32.
        see: as in :func:`mixture`.

    Returns:
        [K, B, O], of x's type.
    """
    y = grouped_linear(x, reads, weight, bias, relu=True)
    return mixture(y, logits, see, see).to(x.dtype)


def mixture_backward(
    grad: Tensor, y: Tensor, logits: Tensor, see: Sequence[int], learn: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`mixture` written out, with nothing saved but its inputs.

    ``dy[e] = sum_k learn[k, e] * p[k, e] * grad[k]``; ``dp[k, e] = <grad[k], y[e]>`` for every e,
    then the backward of softmax.

    Args:
        grad: [K, B, H], gradient of the output. The rest as in :func:`mixture`.

    Returns:
        dy [E, B, H] and dlogits [K, B, E].
    """
    p = gate_weights(logits, see)
    dy = torch.einsum("kbe,kbh->ebh", p * mask_matrix(learn, p)[:, None, :], grad)
    dp = torch.einsum("kbh,ebh->kbe", grad, y)
    return dy.contiguous(), softmax_backward(p, dp).contiguous()


def mixture_expert_backward(
    grads: Sequence[Tensor], y: Tensor, p: Tensor, learn: Sequence[int], e: int
) -> tuple[Tensor, Tensor]:
    """The part of :func:`mixture_backward` that expert e has.

    Args:
        grads: K of [B, H].
        y: [B, H], the expert's output.
        p: [K, B, E], the gates' weights in float32 (float64 for float64 y).
        learn: as in :func:`mixture`.
        e: the expert.

    Returns:
        dy [B, H] of y's type and dp [K, B] of p's.
    """
    grad = torch.stack(list(grads)).to(p.dtype)
    taught = (p * mask_matrix(learn, p)[:, None, :])[:, :, e, None]
    return (taught * grad).sum(0).to(y.dtype), (grad * y.to(p.dtype)).sum(-1)


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """Gradient of the logits from that of the weights p, both [K, B, E]."""
    return p * (dp - (p * dp).sum(-1, keepdim=True))


def mask_matrix(masks: Sequence[int], like: Tensor) -> Tensor:
    """Bit masks as a bool matrix [K, E], for logits or weights ``like`` [K, B, E]."""
    experts = range(like.shape[-1])
    return torch.tensor([[bool(m >> e & 1) for e in experts] for m in masks], device=like.device)


def relu_backward(grad: Tensor, y: Tensor, transposed: Tensor | None = None) -> Tensor:
    """The backward pass of ``y = relu(x + bias)``.

    Args:
        grad: [B, H] of y; becomes that of x, in place. Or of E networks, [E, B, H] (the C++ version
            takes one network).
        y: as grad, of the same type.
        transposed: [H, B] or [E, H, B], of the same type; becomes the new grad too.

    Returns:
        [H] or [E, H], the gradient of the bias: float32, for float64 float64.
    """
    grad.masked_fill_(y <= 0, 0)
    if transposed is not None:
        transposed.copy_(grad.mT)
    return grad.sum(-2, dtype=torch.promote_types(y.dtype, torch.float32))


def bias_relu(y: Tensor, bias: Tensor, relu: bool) -> None:
    """``y + bias``, with a ReLU or without, in place.

    Args:
        y: [E, B, O].
        bias: [E, O], of the same type.
        relu: whether a ReLU follows.
    """
    y += bias[:, None]
    if relu:
        y.relu_()


def _real_rows(weight: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows without padding, all of the table's where none are named; and where they stood."""
    if rows is None:
        every = torch.arange(len(weight), device=weight.device)
        return every, every
    (real,) = (rows != 0).nonzero(as_tuple=True)
    return rows[real], real


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
        exp_avg, exp_avg_sq: [R, W], Adam's m and v.
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
    rows, real = _real_rows(weight, rows)
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
        last, rows, grad, clock: as :func:`adam_rows`'s.
        steps: float64 [N, 7]; line i tells of step ``base + i``. Here: columns 0 .. 2 are the
            step's ``lr``, ``momentum`` and ``weight_decay``. The others are products that save the
            loop, see :class:`stem_fast.optim.Products`.
    """
    base, now = clock.tolist()
    rows, real = _real_rows(weight, rows)
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


def adagrad_rows(
    weight: Tensor, sum: Tensor, rows: Tensor | None, grad: Tensor, options: Tensor, eps: float
) -> None:
    """A step of Adagrad of some rows of a table, in place.

    Args:
        weight: [R, W].
        sum: of the squared gradients of all steps, float32 (float64 for float64): [R, W], or [R] of
            their mean over a row (FBGEMM's EXACT_ROWWISE_ADAGRAD).
        rows, grad: as :func:`adam_rows`'s.
        options: float64 [2], the step's ``lr`` and ``weight_decay``.
        eps: as in ``torch.optim.Adagrad``.
    """
    lr, decay = options.tolist()
    rows, real = _real_rows(weight, rows)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = weight[rows].to(dtype)
    g = grad[real].to(dtype) + decay * w
    total = sum[rows].to(dtype) + (g.square().mean(1) if sum.dim() == 1 else g.square())
    sum[rows] = total.to(sum.dtype)
    weight[rows] = (w - lr * g / (total.sqrt().view(len(total), -1) + eps)).to(weight.dtype)
