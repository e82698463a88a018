"""The row plan on CUDA, for the Triton and the C++ kernels: sorting is torch's, and one kernel
before it and two after it do the rest. Counts and places are integers: results repeat.

Then the gradients of the plan's rows, whose sums have a fixed order: they repeat bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from stem_fast.kernels import require, require_one_device
from stem_fast.kernels.lookup import _names, _sizes
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024
# Occurrences that one program adds up, all of them on their way from memory at once. A row of
# thousands (a gender, a popular video) is many programs' work.
CHUNK = 16


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
