"""Which rows of the arena a batch reads, and the gradients of those rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


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
        row, sample, scale = bag_rows(bags, mean, s)
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


def bag_rows(bags: Sequence[Tensor], mean: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, sample, float64 scale) of every row of the bags of field s that is not padding."""
    rows, bounds = bags[0], bags[1][s]
    batch = bounds.shape[0] - 1
    rows = rows[bounds[0] : bounds[-1]]
    sample = torch.repeat_interleave(
        torch.arange(batch, device=rows.device), bounds.diff(), output_size=rows.shape[0]
    )
    scale = torch.ones_like(rows, dtype=torch.float64)
    if len(bags) > 2:
        scale = bags[2][bounds[0] : bounds[-1]].double()
    real = rows != 0
    rows, sample, scale = rows[real], sample[real], scale[real]
    if mean >> s & 1:
        scale = scale / torch.bincount(sample, minlength=batch).clamp(min=1)[sample]
    return rows, sample, scale
