"""Linear layers with ReLUs of E networks at once: in one kernel, or bias and ReLU in place after a
product of cuBLAS's; and their backward. Every sum has a fixed order: results repeat bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from stem_fast.kernels import bit_masks
from torch import Tensor

from stem_fast import reference

TILE = 1024  # values of a tile, 8 a thread of four warps: 16 bytes of bfloat16
TILES = 16  # that one program of relu_backward adds up


@triton.jit
def _bias_relu(
    y,  # [E, B, O], changed in place
    bias,  # [E, O]
    batch,
    width,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
):
    e = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < batch - first)[:, None] & (columns < width)[None, :]
    at = y + (e * batch + first) * width + (rows[:, None] * width + columns[None, :])
    added = tl.load(bias + e * width + columns, mask=columns < width, other=0.0).to(SUM)
    value = tl.load(at, mask=inside, other=0.0).to(SUM) + added[None, :]
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays NaN
    tl.store(at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _relu_backward(
    grad,  # [E, B, H], changed in place
    y,  # [E, B, H]
    partials,  # [E, blocks, H]
    batch,
    width,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    SUM: tl.constexpr,
):
    block, e = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = block * (ROWS * TILES)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = (e * batch + first) * width
    left = batch - first
    at = rows[:, None] * width + columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=SUM)
    for _ in range(TILES):
        inside = (rows < left)[:, None] & (columns < width)[None, :]
        value = tl.load(y + place + at, mask=inside, other=0.0).to(SUM)
        g = tl.load(grad + place + at, mask=inside, other=0.0)
        g = tl.where(value <= 0, 0.0, g.to(SUM))
        tl.store(grad + place + at, g.to(grad.dtype.element_ty), mask=inside)
        total += g
        place += ROWS * width
        left -= ROWS
    at = partials + (e * blocks + block) * width + columns
    tl.store(at, tl.sum(total, axis=0), mask=columns < width)


@triton.jit
def _product(
    x,  # [B, I]
    weight,  # [O, I]
    rows,
    columns,
    inputs,
    stride,  # of x's rows
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x @ weight^T of rows and columns that are there, in float32 [ROWS, COLUMNS]."""
    inner = tl.arange(0, INNER)
    a = x + rows[:, None] * stride + inner[None, :]
    b = weight + columns[None, :] * inputs + inner[:, None]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, inputs, INNER):
        if EVEN:
            left, right = tl.load(a), tl.load(b)
        else:
            inside = inner < inputs - start
            left = tl.load(a, mask=inside[None, :], other=0.0)
            right = tl.load(b, mask=inside[:, None], other=0.0)
        if INTERPRETED:  # the interpreter takes bfloat16 for integers here
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a += INNER
        b += INNER
    return total


@triton.jit
def _grouped_linear(
    x,  # [N, B, I]
    reads,  # [n]
    weight,  # [E, O, I]
    bias,  # [E, O]
    y,  # [n, B, O]
    batch,
    inputs,
    outputs,
    stride_n,
    stride_b,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BAND: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    # Programs that run side by side share rows and columns: bands of rows, column by column.
    down, across = tl.cdiv(batch, ROWS), tl.cdiv(outputs, COLUMNS)
    band = tl.program_id(0) // (BAND * across)
    high = tl.minimum(down - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * across)
    rows = (band * BAND + place % high).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = place // high * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < batch)[:, None] & (columns < outputs)[None, :]
    # Beyond the edge the last row and column are read again, which needs no mask.
    value = _product(
        x + tl.load(reads + e) * stride_n,
        weight + e * outputs * inputs,
        tl.minimum(rows, batch - 1),
        tl.minimum(columns, outputs - 1),
        inputs,
        stride_b,
        ROWS,
        COLUMNS,
        INNER,
        EVEN,
        PRECISION,
        INTERPRETED,
    )
    added = tl.load(bias + e * outputs + columns, mask=columns < outputs, other=0.0)
    value += added.to(tl.float32)[None, :]
    if RELU:
        value = tl.where(value < 0, 0.0, value)
    at = (e * batch + rows)[:, None] * outputs + columns[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def _tile(y: Tensor) -> dict[str, Any]:
    """Constants of both kernels, for y [E, B, H]."""
    columns = min(triton.next_power_of_2(y.shape[2]), 128)
    return {
        "ROWS": TILE // columns,
        "COLUMNS": columns,
        "SUM": tl.float64 if y.dtype == torch.float64 else tl.float32,
    }


def _require_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise RuntimeError(f"{name} is changed in place and must be contiguous")


def bias_relu(y: Tensor, bias: Tensor, relu: bool) -> None:
    """Triton version of :func:`stem_fast.reference.bias_relu` (same arguments)."""
    _require_contiguous("y", y)
    if not y.numel():
        return
    experts, batch, width = y.shape
    tile = _tile(y)
    grid = triton.cdiv(batch, tile["ROWS"]), triton.cdiv(width, tile["COLUMNS"]), experts
    with torch.cuda.device_of(y):
        _bias_relu[grid](y, bias.contiguous(), batch, width, RELU=relu, **tile)


def relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    """Triton version of :func:`stem_fast.reference.relu_backward` (same arguments and result)."""
    _require_contiguous("grad", grad)
    one = grad.dim() == 2
    y = (y[None] if one else y).contiguous()
    experts, batch, width = y.shape
    tile = _tile(y)
    blocks = triton.cdiv(batch, tile["ROWS"] * TILES)
    wide = torch.promote_types(y.dtype, torch.float32)
    partials = y.new_empty(experts, blocks, width, dtype=wide)
    if y.numel():
        grid = blocks, triton.cdiv(width, tile["COLUMNS"]), experts
        with torch.cuda.device_of(y):
            _relu_backward[grid](grad, y, partials, batch, width, blocks, TILES=TILES, **tile)
    sums = partials[:, 0] if blocks == 1 else partials.sum(1)
    return sums[0] if one else sums


def _product_tile(x: Tensor, outputs: int) -> dict[str, Any]:
    """Constants of products x @ weight^T, x [N, B, I] and weight [E, outputs, I]."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    exact = x.dtype == torch.float32 and not tf32  # no tensor cores: every product takes registers
    # Rows that are no multiple of 16 bytes are read number by number.
    inner = 64 if x.dtype.itemsize == 2 and x.shape[2] % 8 == 0 else 32
    columns = max(16, min(triton.next_power_of_2(outputs), 64 if exact else 128))
    return {
        "ROWS": 64 if exact else 128,
        "COLUMNS": columns,
        "INNER": inner,
        "EVEN": x.shape[2] % inner == 0,
        "PRECISION": "ieee" if exact else "tf32",
        "INTERPRETED": x.is_cpu,
        "num_warps": 8 if columns > 32 else 4,
        "num_stages": 3,
    }


def _rows_aside(x: Tensor) -> Tensor:
    """x [N, B, I] with the numbers of a row side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def grouped_linear(
    x: Tensor, reads: Sequence[int], weight: Tensor, bias: Tensor, relu: bool
) -> Tensor:
    """Triton version of :func:`stem_fast.reference.grouped_linear` for x [N, B, I], in TF32 where
    torch's products are; float64 goes to the reference."""
    if x.dtype == torch.float64 or not x.numel():
        return reference.grouped_linear(x, reads, weight, bias, relu)
    x = _rows_aside(x)
    batch, outputs = x.shape[1], weight.shape[1]
    y = x.new_empty(len(reads), batch, outputs)
    if y.numel():
        tile = _product_tile(x, outputs)
        tiles = triton.cdiv(batch, tile["ROWS"]) * triton.cdiv(outputs, tile["COLUMNS"])
        with torch.cuda.device_of(x):
            _grouped_linear[(tiles, len(reads))](
                x,
                bit_masks(x.device, *reads),
                weight.contiguous(),
                bias.contiguous(),
                y,
                batch,
                x.shape[2],
                outputs,
                x.stride(0),
                x.stride(1),
                RELU=relu,
                BAND=8,
                **tile,
            )
    return y
