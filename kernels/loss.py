"""The loss of several tasks in two small kernels, and its gradient in one, where torch takes two
dozen. Every sum has a fixed order: results repeat bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from stem_fast.kernels import pick
from torch import Tensor

WARPS, LABELS = 4, 256  # of a program; at a time, of a warp
PROGRAMS = 128  # at most, that add up losses: as many sums are left to add


@triton.jit
def _read(
    logits, labels, mask, row, task, batch, tasks, logit_row, logit_task, label_row, label_task,
    mask_row, mask_task, MASKED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Logits, labels (0 for those that do not count) and which of them count, [rows, tasks]."""
    row, task = row.to(tl.int64)[:, None], task.to(tl.int64)[None, :]
    inside = (row < batch) & (task < tasks)
    x = tl.load(logits + row * logit_row + task * logit_task, mask=inside, other=0.0).to(SUM)
    y = tl.load(labels + row * label_row + task * label_task, mask=inside, other=0.0).to(SUM)
    present = inside & (y == y)
    if MASKED:
        present &= tl.load(mask + row * mask_row + task * mask_task, mask=inside, other=0) != 0
    return x, tl.where(present, y, 0.0), present


@triton.jit
def _sums(
    logits,  # [B, T]
    labels,  # [B, T]
    mask,  # [B, T]
    weights,  # [B]
    totals,  # [programs, T]
    found,  # [programs, T]
    batch, tasks, logit_row, logit_task, label_row, label_task, mask_row, mask_task,
    REGRESSION: tl.constexpr,  # T, 1 for a regression
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    TASKS: tl.constexpr,
):  # fmt: skip
    """A program's part of the losses, and its count of labels."""
    program, task = tl.program_id(0), tl.arange(0, TASKS)
    regression = (pick(task, REGRESSION) != 0)[None, :]
    total = tl.zeros([ROWS, TASKS], SUM)
    count = tl.zeros([ROWS, TASKS], tl.int32)
    for start in range(program * ROWS, batch, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        x, y, present = _read(
            logits, labels, mask, row, task, batch, tasks, logit_row, logit_task, label_row,
            label_task, mask_row, mask_task, MASKED, SUM,
        )  # fmt: skip
        # log(1 + e) to its last digit, however small e is.
        e = tl.exp(-tl.abs(x))
        u = 1 + e
        log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
        loss = tl.where(regression, (x - y) * (x - y), tl.maximum(x, 0.0) - x * y + log1p)
        if WEIGHTED:
            loss *= tl.load(weights + row, mask=row < batch, other=0.0).to(SUM)[:, None]
        total += tl.where(present, loss, 0.0)
        count += present.to(tl.int32)
    at = program * tasks + task
    tl.store(totals + at, tl.sum(total, 0), mask=task < tasks)
    tl.store(found + at, tl.sum(count, 0).to(tl.int64), mask=task < tasks)


@triton.jit
def _means(
    totals,  # [programs, T]
    found,  # [programs, T]
    counts,  # [T]
    means,  # [T]
    divisors,  # [T]
    programs,
    tasks,
    COUNTED: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """By a program a task."""
    task, program = tl.program_id(0), tl.arange(0, PROGRAMS)
    at = program * tasks + task
    if COUNTED:
        divisor = tl.load(counts + task)
    else:
        divisor = tl.sum(tl.load(found + at, mask=program < programs, other=0))
    divisor = tl.maximum(divisor, 1)
    total = tl.sum(tl.load(totals + at, mask=program < programs, other=0.0))
    tl.store(means + task, total / divisor.to(total.dtype))
    tl.store(divisors + task, divisor)


@triton.jit
def _task_losses_backward(
    logits,  # [B, T]
    labels,  # [B, T]
    mask,  # [B, T]
    weights,  # [B]
    grad,  # [T]
    divisors,  # [T]
    out,  # [B, T]
    batch, tasks, logit_row, logit_task, label_row, label_task, mask_row, mask_task, grad_task,
    out_row, out_task,
    REGRESSION: tl.constexpr,  # T, 1 for a regression
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    TASKS: tl.constexpr,
):  # fmt: skip
    task = tl.arange(0, TASKS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    regression = (pick(task, REGRESSION) != 0)[None, :]
    scale = tl.load(grad + task * grad_task, mask=task < tasks, other=0.0).to(SUM)
    scale /= tl.load(divisors + task, mask=task < tasks, other=1).to(SUM)
    x, y, present = _read(
        logits, labels, mask, row, task, batch, tasks, logit_row, logit_task, label_row,
        label_task, mask_row, mask_task, MASKED, SUM,
    )  # fmt: skip
    e = tl.exp(-tl.abs(x))
    slope = tl.where(regression, 2 * (x - y), tl.where(x >= 0, 1.0, e) / (1 + e) - y)
    slope *= scale[None, :]
    if WEIGHTED:
        slope *= tl.load(weights + row, mask=row < batch, other=0.0).to(SUM)[:, None]
    at = row.to(tl.int64)[:, None] * out_row + task.to(tl.int64)[None, :] * out_task
    inside = (row < batch)[:, None] & (task < tasks)[None, :]
    tl.store(out + at, tl.where(present, slope, 0.0).to(out.dtype.element_ty), mask=inside)


def _sum_type(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _arguments(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    sample_weights: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """Tensors, sizes and compile-time constants that the kernels share."""
    batch, tasks = logits.shape
    given = mask if mask is not None else labels
    weights = labels if sample_weights is None else sample_weights.contiguous()
    sizes = batch, tasks, *logits.stride(), *labels.stride(), *given.stride()
    columns = triton.next_power_of_2(tasks)
    constants = {
        "MASKED": mask is not None,
        "WEIGHTED": sample_weights is not None,
        "SUM": tl.float64 if _sum_type(logits) == torch.float64 else tl.float32,
        "ROWS": max(1, WARPS * LABELS // columns),
        "TASKS": columns,
        "num_warps": WARPS,
    }
    return (logits, labels, given, weights), sizes, constants


def task_losses(
    logits: Tensor,
    labels: Tensor,
    regression: Sequence[int],
    mask: Tensor | None,
    sample_weights: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Triton version of :func:`stem_fast.reference.task_losses`."""
    tasks = logits.shape[1]
    means = logits.new_empty(tasks, dtype=_sum_type(logits))
    divisors = logits.new_empty(tasks, dtype=torch.int64)
    if not tasks:
        return means, divisors
    tensors, sizes, constants = _arguments(logits, labels, mask, sample_weights)
    programs = max(1, min(PROGRAMS, triton.cdiv(len(logits), constants["ROWS"])))
    totals = means.new_empty(programs, tasks)
    found = divisors.new_empty(programs, tasks)
    with torch.cuda.device_of(logits):
        kinds = tuple(regression)
        _sums[(programs,)](*tensors, totals, found, *sizes, REGRESSION=kinds, **constants)
        _means[(tasks,)](
            totals,
            found,
            found if counts is None else counts.contiguous(),
            means,
            divisors,
            programs,
            tasks,
            COUNTED=counts is not None,
            PROGRAMS=PROGRAMS,
        )
    return means, divisors


def task_losses_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    regression: Sequence[int],
    mask: Tensor | None,
    sample_weights: Tensor | None,
    divisors: Tensor,
) -> Tensor:
    """Triton version of :func:`stem_fast.reference.task_losses_backward`."""
    out = torch.empty_like(logits)
    if not out.numel():
        return out
    tensors, sizes, constants = _arguments(logits, labels, mask, sample_weights)
    with torch.cuda.device_of(logits):
        _task_losses_backward[(triton.cdiv(len(logits), constants["ROWS"]),)](
            *tensors,
            grad,
            divisors,
            out,
            *sizes,
            grad.stride(0),
            *out.stride(),
            REGRESSION=tuple(regression),
            **constants,
        )
    return out
