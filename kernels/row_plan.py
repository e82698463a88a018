"""The row plan on CUDA, for the Triton and the C++ kernels: sorting is torch's, and one kernel
before it and two after it do the rest. Counts and places are integers: results repeat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024


@triton.jit
def _row_keys(
    ids,  # [B, fields]
    offsets,  # [fields]
    keys,  # [B * fields]
    count,  # B * fields
    fields,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    i = tl.load(ids + at, mask=inside, other=0).to(tl.int64)
    row = i + tl.load(offsets + at % fields, mask=inside, other=0)
    key = tl.where(i == 0, PADDING, row)
    tl.store(keys + at, key.to(keys.dtype.element_ty), mask=inside)


@triton.jit
def _first_of_row(keys, at, count, PADDING):
    """The sorted keys at some places, and whether each is the first of its row."""
    key = tl.load(keys + at, mask=at < count, other=PADDING)
    before = tl.load(keys + at - 1, mask=(at > 0) & (at < count), other=PADDING)
    return key, (key != PADDING) & (key != before)


@triton.jit
def _count_rows(
    keys,  # [count], sorted
    counts,  # [2, blocks], of each block's rows that begin in it and of its slots
    count,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key, new = _first_of_row(keys, at, count, PADDING)
    tl.store(counts + block, tl.sum(new.to(tl.int32)))
    tl.store(counts + tl.num_programs(0) + block, tl.sum((key != PADDING).to(tl.int32)))


@triton.jit
def _write_plan(
    keys,  # [count], sorted
    order,  # [count], what sorted them
    slots,  # [count], before sorting; without bags their places
    counts,  # [2, blocks]
    rows,  # [count]
    segments,  # [count + 1]
    sources,  # [count]
    count,
    PADDING: tl.constexpr,
    BAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    earlier = tl.zeros([BLOCK], tl.int32)
    begun, read = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, blocks, BLOCK):
        other = start + lane
        begins = tl.load(counts + other, mask=other < blocks, other=0)
        begun += begins
        earlier += tl.where(other < block, begins, 0)
        read += tl.load(counts + blocks + other, mask=other < blocks, other=0)
    at = block.to(tl.int64) * BLOCK + lane
    inside = at < count
    key, new = _first_of_row(keys, at, count, PADDING)
    place = tl.sum(earlier) + tl.cumsum(new.to(tl.int32), 0) - 1
    tl.store(rows + place, key.to(tl.int64), mask=new)
    tl.store(segments + place, at.to(tl.int32), mask=new)
    past = at >= tl.sum(begun)
    tl.store(rows + at, tl.zeros([BLOCK], tl.int64), mask=past & inside)
    tl.store(segments + at, tl.sum(read) + tl.zeros([BLOCK], tl.int32), mask=past & (at <= count))
    slot = tl.load(order + at, mask=inside, other=0)
    if BAGS:
        slot = tl.load(slots + slot, mask=inside, other=0)
    tl.store(sources + at, slot.to(tl.int32), mask=inside)


def row_plan(
    ids: Tensor, offsets: Tensor, bags: Sequence[Tensor], mean: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`stem_fast.reference.row_plan` without waiting for the device: sizes depend on shapes
    alone, and rows past the last are row 0 with empty segments."""
    batch, fields = ids.shape
    keys = ids.new_empty(batch * fields, dtype=offsets.dtype)
    constants = {"PADDING": _padding(keys), "BLOCK": BLOCK}
    slot = keys  # without bags not read
    with torch.cuda.device_of(ids):
        if len(keys):
            _row_keys[(triton.cdiv(len(keys), BLOCK),)](
                ids.contiguous(), offsets.contiguous(), keys, len(keys), fields, **constants
            )
        scale = None
        if bags:
            keys, slot, scale = _with_bags(keys, batch, fields, bags, mean)
        count = len(keys)
        keys, order = torch.sort(keys, stable=True)
        rows, sources = torch.empty_like(order), torch.empty_like(order, dtype=torch.int32)
        segments = sources.new_empty(count + 1)
        blocks = triton.cdiv(count + 1, BLOCK)
        counts = sources.new_empty(2, blocks)
        _count_rows[(blocks,)](keys, counts, count, **constants)
        _write_plan[(blocks,)](
            keys, order, slot, counts, rows, segments, sources, count, BAGS=bool(bags), **constants
        )
    scales = ids.new_empty(0, dtype=torch.float64) if scale is None else scale[order]
    return rows, segments, sources, scales


def _padding(keys: Tensor) -> int:
    """What sorts after every row."""
    return torch.iinfo(keys.dtype).max


def _with_bags(
    keys: Tensor, batch: int, fields: int, bags: Sequence[Tensor], mean: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, slots and scales of all occurrences, from the keys [B * F] of categorical fields."""
    slots = fields + len(bags[1])
    first = torch.arange(batch, device=keys.device) * slots
    slot = (first[:, None] + torch.arange(fields, device=keys.device)).flatten()
    rows, bounds = bags[0], bags[1].contiguous().clamp(0, len(bags[0]))
    place = torch.arange(len(rows), device=keys.device)
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
    bag_keys = torch.where((rows == 0) | (owner < 0), _padding(keys), rows.to(keys.dtype))
    scale = torch.cat([torch.ones_like(keys, dtype=torch.float64), factor])
    return torch.cat([keys, bag_keys]), torch.cat([slot, owner]), scale
