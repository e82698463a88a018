"""The row plan on CUDA: torch's operators alone, so it serves the Triton and the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def row_plan(
    ids: Tensor, offsets: Tensor, bags: Sequence[Tensor], mean: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`stem_fast.reference.row_plan` without waiting for the device: sizes depend on shapes
    alone, and rows past the last are row 0 with empty segments. Sorting is torch's."""
    batch, fields = ids.shape
    slots = fields + (len(bags[1]) if bags else 0)
    padding = torch.iinfo(torch.int64).max  # sorts after every row
    first = torch.arange(batch, device=ids.device) * slots
    row = torch.where(ids == 0, padding, ids + offsets).flatten()
    slot = (first[:, None] + torch.arange(fields, device=ids.device)).flatten()
    scale = None
    if bags:
        scale = torch.ones_like(row, dtype=torch.float64)
        rows, bounds = bags[0], bags[1].contiguous().clamp(0, len(bags[0]))
        place = torch.arange(len(rows), device=ids.device)
        owner = torch.full_like(place, -1)
        factor = torch.zeros_like(place, dtype=torch.float64)
        before = F.pad((rows != 0).cumsum(0), (1, 0))  # rows that are not padding, before each
        for s, bound in enumerate(bounds if batch else []):
            sample = torch.searchsorted(bound, place, right=True) - 1
            here = (sample >= 0) & (sample < batch)
            sample = sample.clamp(0, batch - 1)
            owner = torch.where(here, sample * slots + fields + s, owner)
            count = before[bound].diff().clamp(min=1)
            share = 1 / count[sample].double() if mean >> s & 1 else 1.0
            factor = torch.where(here, share, factor)
        if len(bags) > 2:
            factor = factor * bags[2]
        row = torch.cat([row, torch.where((rows == 0) | (owner < 0), padding, rows.long())])
        slot, scale = torch.cat([slot, owner]), torch.cat([scale, factor])
    row, order = torch.sort(row, stable=True)
    real = row != padding
    new = real & F.pad(row[1:] != row[:-1], (1, 0), value=True) if len(row) else real
    # Occurrences that begin no row go to a place past the end, which is cut off.
    unique = torch.where(new, new.cumsum(0) - 1, len(row))
    rows = torch.zeros(len(row) + 1, dtype=torch.int64, device=ids.device)
    rows.scatter_(0, unique, row)
    segments = real.sum().int().repeat(len(row) + 2)
    begin = torch.arange(len(row), device=ids.device, dtype=torch.int32)
    segments.scatter_(0, torch.where(new, unique, len(row) + 1), begin)
    scales = torch.empty(0, dtype=torch.float64, device=ids.device)
    if scale is not None:
        scales = scale[order]
    return rows[:-1], segments[:-1], slot[order].int(), scales
