"""Multi-table embedding lookup: one contiguous read a row, all spaces and their sums at once; its
gradient for the rows of a batch alone. Every sum has a fixed order: results repeat bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from stem_fast.kernels import require, require_one_device
from torch import Tensor

TILE = 1024  # values of a tile of rows, 8 a thread: addresses take registers too
# Occurrences that one program adds up, all of them on their way from memory at once. A row of
# thousands (a gender, a popular video) is many programs' work.
CHUNK = 16


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


@triton.jit
def _row_of(segments, place, unique, WIDE: tl.constexpr):
    """The last row whose segment begins at or before a place; a few wide looks, not many narrow."""
    low = tl.zeros([], tl.int32)
    left = low + unique
    while left > 1:
        step = (left + WIDE - 1) // WIDE
        ahead = tl.arange(0, WIDE) * step
        starts = tl.load(segments + low + ahead, mask=ahead < left, other=0)
        passed = tl.sum(((ahead < left) & (starts <= place)).to(tl.int32)) - 1
        passed = tl.maximum(passed, 0) * step
        low += passed
        left = tl.minimum(step, left - passed)
    return low


@triton.jit(do_not_specialize=["unique"])  # Triton 3.6 cannot compile it for a single row
def _chunk_sums(
    grad_x,  # [SPACES, B, slots*DIM]
    grad_z,  # [len(SUMS), B, slots*DIM]
    segments,  # [U+1]
    sources,  # [m]
    scales,  # [m]
    out,  # [U, SPACES*DIM]
    partials,  # [chunks, 2, SPACES*DIM], of rows that lie in several chunks
    first_rows,  # [chunks], of their first occurrences
    unique,  # U
    stride,  # B*slots*DIM
    SCALED: tl.constexpr,
    SPACES: tl.constexpr,
    DIM: tl.constexpr,
    DP: tl.constexpr,
    SUMS: tl.constexpr,
    SUM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of the rows whose occurrences lie in one chunk; of the others the chunk's part:
    the first of its partials goes on from the chunk before, the second begins here."""
    chunk, space = tl.program_id(0), tl.program_id(1)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(segments + unique))
    i = begin + tl.arange(0, CHUNK)
    column = tl.program_id(2) * DP + tl.arange(0, DP)
    slot = tl.load(sources + i, mask=i < end, other=0).to(tl.int64)
    row = _row_of(segments, begin, unique, 256)
    tl.store(first_rows + chunk, row)  # the other programs of the chunk store the same
    place = slot[:, None] * DIM + column[None, :]
    stride = tl.cast(stride, tl.int64)
    inside = (i < end)[:, None] & (column < DIM)[None, :]
    grad = tl.load(grad_x + space * stride + place, mask=inside, other=0.0).to(SUM)
    for k in tl.static_range(len(SUMS)):
        named = tl.where(_names(SUMS[k], space), end, begin)
        inside = (i < named)[:, None] & (column < DIM)[None, :]
        grad += tl.load(grad_z + k * stride + place, mask=inside, other=0.0).to(SUM)
    if SCALED:
        grad *= tl.load(scales + i, mask=i < end, other=0.0).to(SUM)[:, None]
    at = space * DIM + column
    first = tl.load(segments + row)
    while first < end:
        last = tl.load(segments + row + 1)
        own = (i >= first) & (i < last)
        total = tl.sum(tl.where(own[:, None], grad, 0.0), axis=0)
        if (first >= begin) & (last <= begin + CHUNK):
            to = out + row.to(tl.int64) * (SPACES * DIM) + at
            tl.store(to, total.to(out.dtype.element_ty), mask=column < DIM)
        else:
            kind = (first >= begin).to(tl.int64)
            part = partials + (chunk.to(tl.int64) * 2 + kind) * (SPACES * DIM) + at
            tl.store(part, total, mask=column < DIM)
        first = last
        row += 1


@triton.jit
def _join_chunks(
    segments,  # [U+1]
    out,  # [U, SPACES*DIM]
    partials,  # [chunks, 2, SPACES*DIM]
    first_rows,  # [chunks]
    SPACES: tl.constexpr,
    DIM: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of the rows that lie in several chunks, by the program of the second of them."""
    chunk = tl.program_id(0) + 1
    begin = chunk * CHUNK
    row = tl.load(first_rows + chunk)
    first, last = tl.load(segments + row), tl.load(segments + row + 1)
    if (first < begin) & (first >= begin - CHUNK) & (last > begin):
        column = tl.program_id(2) * DP + tl.arange(0, DP)
        at = tl.program_id(1) * DIM + column
        before = partials + (chunk.to(tl.int64) * 2 - 1) * (SPACES * DIM)
        total = tl.load(before + at, mask=column < DIM, other=0.0)
        chunks = (last - 1) // CHUNK + 1
        for start in range(chunk, chunks, CHUNK):
            other = start + tl.arange(0, CHUNK)
            part = other.to(tl.int64)[:, None] * (2 * SPACES * DIM) + at[None, :]
            inside = (other < chunks)[:, None] & (column < DIM)[None, :]
            total += tl.sum(tl.load(partials + part, mask=inside, other=0.0), axis=0)
        to = out + row.to(tl.int64) * (SPACES * DIM) + at
        tl.store(to, total.to(out.dtype.element_ty), mask=column < DIM)


@triton.jit
def _check_ids(
    ids,  # [B, F], flat
    sizes,  # [F]
    bad,  # [F]
    out,  # [B, F], flat
    pairs,
    fields,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = pair < pairs
    value = tl.load(ids + pair, mask=real, other=0).to(tl.int64)
    size = tl.load(sizes + pair % fields, mask=real, other=1)
    outside = real & ((value < 0) | (value >= size))
    low = tl.minimum(tl.maximum(value, -(1 << 31)), (1 << 31) - 1) & 0xFFFFFFFF
    tl.atomic_min(bad + pair % fields, (pair // fields) << 32 | low, mask=outside)
    tl.store(out + pair, tl.where(outside, size - 1, value).to(out.dtype.element_ty), mask=real)


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


def _chunk(sizes: dict[str, Any]) -> dict[str, Any]:
    """Of the kernels that add up gradients, one space at a time: a warp where a row is narrow."""
    columns = min(sizes["DP"], 128)
    return {
        "SPACES": sizes["SPACES"],
        "DIM": sizes["DIM"],
        "DP": columns,
        "CHUNK": CHUNK,
        "num_warps": max(1, min(8, CHUNK * columns // 256)),
    }


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


def row_gradients(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: Sequence[int],
    segments: Tensor,
    sources: Tensor,
    scales: Tensor,
    dim: int,
) -> Tensor:
    """Triton version of :func:`stem_fast.reference.row_gradients`."""
    fits = grad_x.dim() == 3 and dim > 0 and grad_x.shape[2] % dim == 0
    fits = fits and grad_z.shape == (len(sums), *grad_x.shape[1:]) and grad_z.dtype == grad_x.dtype
    require(fits, f"row_gradients: gradients must be [G, B, C*D] of one type, D = {dim}")
    fits = segments.dim() == sources.dim() == scales.dim() == 1 and len(segments) > 0
    fits = fits and segments.dtype == sources.dtype == torch.int32 and scales.dtype == torch.float64
    fits = fits and len(scales) in (0, len(sources))
    require(fits, "row_gradients: segments, sources and scales must be a row plan's")
    require_one_device("row_gradients", grad_x, grad_z, segments, sources, scales)
    spaces, unique, m = len(grad_x), len(segments) - 1, len(sources)
    out = grad_x.new_zeros(unique, spaces * dim)
    if not out.numel() or not m:
        return out
    grad_x, grad_z = grad_x.contiguous(), grad_z.contiguous()
    segments, sources, scales = (each.contiguous() for each in (segments, sources, scales))
    sizes = _sizes(grad_x.dtype, spaces, dim, sums)
    tile = _chunk(sizes)
    chunks = triton.cdiv(m, CHUNK)
    dtype = torch.float64 if grad_x.dtype == torch.float64 else torch.float32
    partials = grad_x.new_empty(chunks, 2, spaces * dim, dtype=dtype)
    first_rows = segments.new_empty(chunks, dtype=torch.int32)
    columns = triton.cdiv(dim, tile["DP"])
    with torch.cuda.device_of(grad_x):
        _chunk_sums[(chunks, spaces, columns)](
            grad_x,
            grad_z,
            segments,
            sources,
            scales,
            out,
            partials,
            first_rows,
            unique,
            grad_x[0].numel(),
            SCALED=len(scales) > 0,
            SUMS=sizes["SUMS"],
            SUM=sizes["SUM"],
            **tile,
        )
        if chunks > 1:
            _join_chunks[(chunks - 1, spaces, columns)](segments, out, partials, first_rows, **tile)
    return out


def check_ids(ids: Tensor, sizes: Tensor, bad: Tensor) -> Tensor:
    """Triton version of :func:`stem_fast.reference.check_ids`."""
    fits = ids.dim() == 2 and sizes.shape == bad.shape == ids.shape[1:] and bad.is_contiguous()
    fits = fits and sizes.dtype == bad.dtype == torch.int64
    require(fits, "check_ids: ids must be [B, F], sizes and bad int64 [F], bad contiguous")
    require_one_device("check_ids", ids, sizes, bad)
    ids = ids.contiguous()
    out = torch.empty_like(ids)
    if out.numel():
        block = 256
        with torch.cuda.device_of(ids):
            _check_ids[(triton.cdiv(out.numel(), block),)](
                ids, sizes.contiguous(), bad, out, out.numel(), ids.shape[1], BLOCK=block
            )
    return out
