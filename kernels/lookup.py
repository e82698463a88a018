"""Multi-table embedding lookup: one contiguous read a row, all spaces and their sums at once.
Every sum has a fixed order: results repeat bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from stem_fast.kernels import require, require_one_device
from torch import Tensor

TILE = 1024  # values of a tile of rows, 8 a thread: addresses take registers too


@triton.jit
def _names(MASK: tl.constexpr, space):
    """Whether a mask names spaces."""
    return (tl.full([], MASK, tl.int64) >> space) & 1 != 0


@triton.jit
def _write(value, slot, real, x, z, stride, SPACES, DIM, SP, DP, SUMS: tl.constexpr):
    """Writes slots [N] of x and z from rows [N, SP, DP]."""
    stride = tl.cast(stride, tl.int64)
    space, column = tl.arange(0, SP), tl.arange(0, DP)
    inside = real[:, None, None] & (space < SPACES)[None, :, None] & (column < DIM)[None, None, :]
    place = slot[:, None] * DIM + column[None, :]  # [N, DP]
    at = space.to(tl.int64)[None, :, None] * stride + place[:, None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)
    value = tl.where(inside, value, 0.0)
    flat = real[:, None] & (column < DIM)[None, :]
    for k in tl.static_range(len(SUMS)):
        named = _names(SUMS[k], space)
        added = tl.sum(tl.where(named[None, :, None], value, 0.0), axis=1)
        tl.store(z + k * stride + place, added.to(z.dtype.element_ty), mask=flat)


@triton.jit
def _read(weight, row, real, SPACES, DIM, SP, DP, SUM):
    """Rows [N] of the arena as [N, SP, DP], zero where there is nothing."""
    space, column = tl.arange(0, SP), tl.arange(0, DP)
    inside = real[:, None, None] & (space < SPACES)[None, :, None] & (column < DIM)[None, None, :]
    at = row[:, None, None] * (SPACES * DIM) + space[None, :, None] * DIM + column[None, None, :]
    return tl.load(weight + at, mask=inside, other=0.0).to(SUM)


@triton.jit
def _lookup(
    weight,  # [R, SPACES*DIM]
    ids,  # [B, F], flat
    offsets,  # [F]
    x,  # [SPACES, B, slots*DIM]
    z,  # [len(SUMS), B, slots*DIM]
    pairs,  # B*F
    fields,
    slots,  # of a sample: F + S
    rows,
    stride,  # B*slots*DIM
    SPACES: tl.constexpr,
    DIM: tl.constexpr,
    SP: tl.constexpr,  # powers of two
    DP: tl.constexpr,
    SUMS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = pair < pairs
    row = tl.load(ids + pair, mask=real, other=0).to(tl.int64)
    row += tl.load(offsets + pair % fields, mask=real, other=0)
    # check_ids has seen the ids; this keeps a wrong one from reading foreign memory.
    row = tl.minimum(tl.maximum(row, 0), rows - 1)
    value = _read(weight, row, real, SPACES, DIM, SP, DP, SUM)
    slot = pair // fields * slots + pair % fields
    _write(value, slot, real, x, z, stride, SPACES, DIM, SP, DP, SUMS)


@triton.jit
def _pool(
    weight,  # [R, SPACES*DIM]
    bag_rows,  # [n]
    bounds,  # [S, B+1]
    weights,  # [n]
    x,  # [SPACES, B, slots*DIM]
    z,  # [len(SUMS), B, slots*DIM]
    batch,
    fields,
    slots,
    rows,
    values,  # n
    stride,
    mean,
    WEIGHTED: tl.constexpr,
    SPACES: tl.constexpr,
    DIM: tl.constexpr,
    SP: tl.constexpr,
    DP: tl.constexpr,
    SUMS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, field = tl.program_id(0).to(tl.int64), tl.program_id(1)
    bound = bounds + field.to(tl.int64) * (batch + 1) + sample
    begin = tl.minimum(tl.maximum(tl.load(bound), 0), values)
    end = tl.minimum(tl.maximum(tl.load(bound + 1), begin), values)
    total = tl.zeros([SP, DP], dtype=SUM)
    count = tl.zeros([], dtype=tl.int64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = tl.load(bag_rows + at, mask=at < end, other=0).to(tl.int64)
        real = row != 0
        row = tl.minimum(tl.maximum(row, 0), rows - 1)
        value = _read(weight, row, real, SPACES, DIM, SP, DP, SUM)
        if WEIGHTED:
            factor = tl.load(weights + at, mask=at < end, other=0.0).to(SUM)
            factor = tl.where(real, factor, 0.0)  # padding's may be NaN
            value *= factor[:, None, None]
        total += tl.sum(value, axis=0)
        count += tl.sum(real.to(tl.int64), axis=0)
    if (tl.cast(mean, tl.int64) >> field) & 1 != 0:
        total /= tl.maximum(count, 1).to(SUM)
    slot = sample * slots + fields + field + tl.zeros([1], dtype=tl.int64)
    _write(total[None, :, :], slot, slot >= 0, x, z, stride, SPACES, DIM, SP, DP, SUMS)


def _sizes(dtype: torch.dtype, spaces: int, dim: int, sums: Sequence[int]) -> dict[str, Any]:
    """Compile-time constants that the kernels share."""
    sp, dp = triton.next_power_of_2(spaces), triton.next_power_of_2(dim)
    return {
        "SPACES": spaces,
        "DIM": dim,
        "SP": sp,
        "DP": dp,
        "SUMS": tuple(sums),
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def _block(sizes: dict[str, Any]) -> dict[str, int]:
    """Of the kernel that gathers. Four warps spill where a row is wide, on sm_80."""
    width = sizes["SP"] * sizes["DP"]
    return {"BLOCK": max(1, TILE // width), "num_warps": 8 if width > 512 else 4}


def lookup(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    spaces: int,
    sums: Sequence[int],
    bags: Sequence[Tensor],
    mean: int,
) -> tuple[Tensor, Tensor]:
    """Triton version of :func:`stem_fast.reference.lookup` (same arguments and result)."""
    fits = weight.dim() == 2 and spaces > 0 and weight.shape[1] % spaces == 0
    require(fits, f"lookup: weight must be [R, G*D] with G = {spaces}")
    require(
        ids.dim() == 2 and offsets.shape == ids.shape[1:],
        "lookup: ids must be [B, F] and offsets [F]",
    )
    require(offsets.dtype == torch.int64, "lookup: offsets must be int64")
    for mask in sums:
        fits = 0 < mask < 1 << spaces
        require(fits, f"lookup: a sum must name some of the {spaces} spaces; it is {mask}")
    batch, fields = ids.shape
    if bags:
        rows, bounds, *weights = bags
        fits = rows.dim() == 1 and bounds.dim() == 2 and bounds.shape[1] == batch + 1
        fits = fits and bounds.dtype == torch.int64 and len(weights) <= 1
        form = "rows [n], int64 bounds [S, B+1] and perhaps weights [n]"
        require(fits, f"lookup: bags must be {form}")
        for each in weights:
            fits = each.shape == rows.shape
            require(fits, f"lookup: the weights of bags must be [n], n = {len(rows)}")
    require_one_device("lookup", weight, ids, offsets, *bags)
    sequences = len(bags[1]) if bags else 0
    dim = weight.shape[1] // spaces
    require(len(weight) > 0 or not batch * (fields + sequences), "lookup: the arena has no rows")
    width = (fields + sequences) * dim
    x, z = weight.new_empty(spaces, batch, width), weight.new_empty(len(sums), batch, width)
    weight = weight.contiguous()
    sizes = _sizes(weight.dtype, spaces, dim, sums)
    shape = {
        "fields": fields,
        "slots": fields + sequences,
        "rows": len(weight),
        "stride": batch * width,
    }
    block = _block(sizes)
    with torch.cuda.device_of(weight):
        if batch * fields:
            _lookup[(triton.cdiv(batch * fields, block["BLOCK"]),)](
                weight,
                ids.contiguous(),
                offsets.contiguous(),
                x,
                z,
                pairs=batch * fields,
                **shape,
                **sizes,
                **block,
            )
        if batch * sequences:
            rows, bounds, *weights = (part.contiguous() for part in bags)
            _pool[(batch, sequences)](
                weight,
                rows,
                bounds,
                weights[0] if weights else rows,
                x,
                z,
                batch=batch,
                values=len(rows),
                mean=mean,
                **shape,
                WEIGHTED=bool(weights),
                **sizes,
                BLOCK=min(block["BLOCK"], 16),
            )
    return x, z
