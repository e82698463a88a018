"""Multi-table embedding lookup: one contiguous read an id, all spaces at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _lookup(
    weight,  # [R, SPACES*DIM]
    ids,  # [B, F], flat
    offsets,  # [F]
    out,  # [SPACES, B, F*DIM]
    pairs,  # B*F
    fields,
    rows,
    SPACES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two >= SPACES*DIM
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = pair < pairs
    row = tl.load(ids + pair, mask=real, other=0).to(tl.int64)
    row += tl.load(offsets + pair % fields, mask=real, other=0)
    # The model has checked the ids; this keeps a wrong one from reading foreign memory.
    row = tl.minimum(tl.maximum(row, 0), rows - 1)
    column = tl.arange(0, WIDTH)
    inside = real[:, None] & (column < SPACES * DIM)[None, :]
    value = tl.load(weight + row[:, None] * (SPACES * DIM) + column[None, :], mask=inside)
    place = (column // DIM).to(tl.int64) * pairs * DIM + column % DIM
    tl.store(out + place[None, :] + pair[:, None] * DIM, value, mask=inside)


def lookup(weight: Tensor, ids: Tensor, offsets: Tensor, spaces: int) -> Tensor:
    """Triton version of :func:`stem_fast.reference.lookup` (same arguments and result)."""
    batch, fields = ids.shape
    dim = weight.shape[1] // spaces
    out = weight.new_empty(spaces, batch, fields * dim)
    if out.numel():
        width = triton.next_power_of_2(spaces * dim)
        block = max(1, 2048 // width)
        with torch.cuda.device_of(weight):
            _lookup[(triton.cdiv(batch * fields, block),)](
                weight.contiguous(),
                ids.contiguous(),
                offsets.contiguous(),
                out,
                batch * fields,
                fields,
                weight.shape[0],
                SPACES=spaces,
                DIM=dim,
                WIDTH=width,
                BLOCK=block,
            )
    return out
