"""Ids held against the sizes of their vocabularies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from stem_fast.kernels import require, require_one_device
from torch import Tensor


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
