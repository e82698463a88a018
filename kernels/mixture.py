"""AFTB gated mixture: softmax and all K mixtures in one read of y; backward in one more read of y
and one write of dy. Every sample belongs to one program, so results repeat bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from stem_fast.kernels import pick, require, require_one_device
from torch import Tensor

# Values of a [KP, ROWS, COLUMNS] tile, 16 registers a thread of four warps: with 32 the backward
# spills to local memory.
TILE = 2048


@triton.jit
def _weights(
    logits, rows, batch, experts, gates, SEE, KP: tl.constexpr, EP: tl.constexpr, SUM: tl.constexpr
):
    """Softmax over what each gate sees: (p, pointers' offsets, mask), all [KP, ROWS, EP]."""
    gate = tl.arange(0, KP)[:, None, None].to(tl.int64)
    expert = tl.arange(0, EP)[None, None, :]
    row = rows[None, :, None]
    inside = (gate < gates) & (row < batch) & (expert < experts)
    place = (gate * batch + row) * experts + expert
    seen = inside & ((pick(gate, SEE) >> expert) & 1 != 0)
    logit = tl.load(logits + place, mask=seen, other=-float("inf")).to(SUM)
    top = tl.max(logit, axis=2)[:, :, None]
    p = tl.where(seen, tl.exp(logit - tl.where(seen, top, 0.0)), 0.0)
    total = tl.sum(p, axis=2)[:, :, None]
    return p / tl.where(total == 0, 1.0, total), place, inside  # NaN stays NaN


@triton.jit
def _column(tile, e, EP: tl.constexpr):
    """tile[:, :, e] of a [KP, ROWS, EP] tile."""
    return tl.sum(tl.where(tl.arange(0, EP)[None, None, :] == e, tile, 0.0), axis=2)


@triton.jit
def _mixture(
    y,  # [E, B, H]
    logits,  # [K, B, E]
    out,  # [K, B, H]
    batch,
    width,
    stride,  # B*H
    experts,
    gates,
    SEE: tl.constexpr,  # K masks
    KP: tl.constexpr,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    p, _, _ = _weights(logits, rows, batch, experts, gates, SEE, KP, EP, SUM)
    inside = (rows < batch)[:, None] & (columns < width)[None, :]
    place = rows[:, None] * width + columns[None, :]
    sums = tl.zeros([KP, ROWS, COLUMNS], dtype=SUM)
    at = place  # of expert e; added up in int64, because e * stride can pass 2^31
    for e in range(experts):
        value = tl.load(y + at, mask=inside, other=0.0).to(SUM)
        sums += _column(p, e, EP)[:, :, None] * value[None, :, :]
        at += stride
    gate = tl.arange(0, KP)[:, None, None].to(tl.int64)
    tl.store(
        out + gate * stride + place[None, :, :],
        sums.to(out.dtype.element_ty),
        mask=(gate < gates) & inside[None, :, :],
    )


@triton.jit
def _mixture_backward(
    grad,  # [K, B, H]
    y,  # [E, B, H]
    logits,  # [K, B, E]
    dy,  # [E, B, H]
    dlogits,  # [K, B, E]
    batch,
    width,
    stride,  # B*H
    experts,
    gates,
    SEE: tl.constexpr,  # K masks
    LEARN: tl.constexpr,
    KP: tl.constexpr,
    EP: tl.constexpr,
    RELU: tl.constexpr,  # whether dy is zero where y <= 0
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    p, place, real = _weights(logits, rows, batch, experts, gates, SEE, KP, EP, SUM)
    gate = tl.arange(0, KP)[:, None, None].to(tl.int64)
    expert = tl.arange(0, EP)[None, None, :]
    taught = tl.where((pick(gate, LEARN) >> expert) & 1 != 0, p, 0.0)
    dp = tl.zeros([KP, ROWS, EP], dtype=SUM)
    first = rows * width  # of each row in grad[0], and in y[e] and dy[e]
    start_e = first
    for e in range(experts):
        share = _column(taught, e, EP)[:, :, None]
        dot = tl.zeros([KP, ROWS], dtype=SUM)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = (rows < batch)[:, None] & (columns < width)[None, :]
            at = start_e[:, None] + columns[None, :]
            value = tl.load(y + at, mask=inside, other=0.0).to(SUM)
            # K*H gradients a sample, read again for each expert: they stay in the cache.
            g = tl.load(
                grad + gate * stride + (first[:, None] + columns[None, :])[None, :, :],
                mask=(gate < gates) & inside[None, :, :],
                other=0.0,
            ).to(SUM)
            taught_value = tl.sum(g * share, axis=0)
            if RELU:
                taught_value = tl.where(value <= 0, 0.0, taught_value)
            tl.store(dy + at, taught_value.to(dy.dtype.element_ty), mask=inside)
            dot += tl.sum(g * value[None, :, :], axis=2)
        start_e += stride
        dp = tl.where(expert == e, dot[:, :, None], dp)
    mean = tl.sum(p * dp, axis=2)[:, :, None]
    tl.store(dlogits + place, (p * (dp - mean)).to(dlogits.dtype.element_ty), mask=real)


def _sizes(
    y: Tensor, logits: Tensor, see: Sequence[int], learn: Sequence[int]
) -> dict[str, object]:
    """Sizes and compile-time constants that both kernels take."""
    fits = y.dim() == logits.dim() == 3 and logits.shape[1:] == (y.shape[1], y.shape[0])
    require(fits, "mixture: y must be [E, B, H] and logits [K, B, E]")
    require_one_device("mixture", y, logits)
    experts, batch, width = y.shape
    gates = logits.shape[0]
    fits = len(see) == len(learn) == gates
    require(fits, f"mixture: see and learn need a mask for each of {gates} gates")
    kp, ep = triton.next_power_of_2(gates), triton.next_power_of_2(experts)
    columns = min(triton.next_power_of_2(width), max(32, min(512, TILE // kp)))
    return {
        "batch": batch,
        "width": width,
        "stride": batch * width,
        "experts": experts,
        "gates": gates,
        "KP": kp,
        "EP": ep,
        "ROWS": max(1, min(TILE // (kp * columns), TILE // (kp * ep), 16)),
        "COLUMNS": columns,
        "SUM": tl.float64 if y.dtype == torch.float64 else tl.float32,
        "num_warps": 8 if kp * ep >= 128 else 4,
    }


def mixture(y: Tensor, logits: Tensor, see: Sequence[int], learn: Sequence[int]) -> Tensor:
    """Triton version of :func:`stem_fast.reference.mixture` (same arguments and result)."""
    sizes = _sizes(y, logits, see, learn)
    out = y.new_empty(len(logits), *y.shape[1:])
    if out.numel():
        blocks = triton.cdiv(y.shape[1], sizes["ROWS"]), triton.cdiv(y.shape[2], sizes["COLUMNS"])
        with torch.cuda.device_of(y):
            _mixture[blocks](y.contiguous(), logits.contiguous(), out, SEE=tuple(see), **sizes)
    return out


def mixture_backward(
    grad: Tensor,
    y: Tensor,
    logits: Tensor,
    see: Sequence[int],
    learn: Sequence[int],
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Triton version of :func:`stem_fast.reference.mixture_backward`."""
    sizes = _sizes(y, logits, see, learn)
    fits = grad.shape == (len(logits), *y.shape[1:]) and grad.dtype == y.dtype
    require(fits, "mixture: the gradient must be [K, B, H] of y's type")
    require_one_device("mixture", y, grad)
    y, logits = y.contiguous(), logits.contiguous()
    dy, dlogits = torch.empty_like(y), torch.empty_like(logits)
    if dy.numel():
        with torch.cuda.device_of(y):
            _mixture_backward[(triton.cdiv(y.shape[1], sizes["ROWS"]),)](
                grad.contiguous(),
                y,
                logits,
                dy,
                dlogits,
                SEE=tuple(see),
                LEARN=tuple(learn),
                RELU=relu,
                **sizes,
            )
    return dy, dlogits
