"""Linear layers with ReLUs of E networks at once: in one kernel, or bias and ReLU in place after a
product of cuBLAS's; and their backward. Every sum has a fixed order: results repeat bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from stem_fast.kernels import mixture, pick
from stem_fast.kernels.mixture import _weights
from torch import Tensor

from stem_fast import reference

TILE = 1024  # values of a tile, 8 a thread of four warps: 16 bytes of bfloat16
GATES = 4  # that expert_mixture_inference has the registers for
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
def _tile_of_program(batch, outputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """The first row and column of a program's tile. Programs that run side by side share rows and
    columns: bands of rows, column by column."""
    down, across = tl.cdiv(batch, ROWS), tl.cdiv(outputs, COLUMNS)
    band = tl.program_id(0) // (BAND * across)
    high = tl.minimum(down - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * across)
    return (band * BAND + place % high).to(tl.int64) * ROWS, place // high * COLUMNS


@triton.jit
def _product(
    x,  # [rows, I]
    weight,  # [columns, I]
    rows,
    columns,
    inputs,
    stride,  # of x's rows
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x @ weight^T in float32 [ROWS, COLUMNS]; beyond rows and columns the last ones again, which
    takes no mask."""
    inner = tl.arange(0, INNER)
    # Of 32 bits, from pointers that move: 64-bit addresses of whole tiles would not fit registers.
    a = tl.minimum(tl.arange(0, ROWS), rows - 1)[:, None] * stride + inner[None, :]
    b = tl.minimum(tl.arange(0, COLUMNS), columns - 1)[None, :] * inputs + inner[:, None]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, inputs, INNER):
        if EVEN:
            left, right = tl.load(x + a), tl.load(weight + b)
        else:
            inside = inner < inputs - start
            left = tl.load(x + a, mask=inside[None, :], other=0.0)
            right = tl.load(weight + b, mask=inside[:, None], other=0.0)
        if INTERPRETED:  # the interpreter takes bfloat16 for integers here
            left, right = left.to(tl.float32), right.to(tl.float32)
        # Not in TF32: Triton would cut numbers off where cuBLAS rounds them.
        total = tl.dot(left, right, total, input_precision="ieee")
        x += INNER
        weight += INNER
    return total


@triton.jit
def _grouped_linear(
    x,  # [N, B, I]
    weight,  # [E, O, I]
    bias,  # [E, O]
    y,  # [n, B, O]
    batch,
    inputs,
    outputs,
    stride_n,
    stride_b,
    READS: tl.constexpr,  # n
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BAND: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    row, column = _tile_of_program(batch, outputs, ROWS, COLUMNS, BAND)
    rows, columns = (batch - row).to(tl.int32), outputs - column  # that are left
    value = _product(
        x + pick(tl.program_id(1), READS).to(tl.int64) * stride_n + row * stride_b,
        weight + (e * outputs + column) * inputs,
        rows,
        columns,
        inputs,
        stride_b,
        ROWS,
        COLUMNS,
        INNER,
        EVEN,
        INTERPRETED,
    )
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    added = tl.load(bias + e * outputs + column + c, mask=c < columns, other=0.0)
    value += added.to(tl.float32)[None, :]
    if RELU:
        value = tl.where(value < 0, 0.0, value)
    at = y + (e * batch + row) * outputs + column + (r[:, None] * outputs + c[None, :])
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _grouped_linear_backward(
    grad,  # [n, B, O]
    weight,  # [E, O, I]
    y,  # [n, B, I]
    d,  # [n, B, I]
    partials,  # [n, rows of tiles, I]
    batch,
    inputs,
    outputs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BAND: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    row, column = _tile_of_program(batch, inputs, ROWS, COLUMNS, BAND)
    rows, columns = (batch - row).to(tl.int32), inputs - column  # that are left
    r, c, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    left_at = grad + (e * batch + row) * outputs
    right_at = weight + e * outputs * inputs + column
    a = tl.minimum(r, rows - 1)[:, None] * outputs + inner[None, :]
    b = inner[:, None] * inputs + c[None, :]
    value = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, outputs, INNER):
        if EVEN:
            left, right = tl.load(left_at + a), tl.load(right_at + b)
        else:
            inside = inner < outputs - start
            left = tl.load(left_at + a, mask=inside[None, :], other=0.0)
            there = inside[:, None] & (c < columns)[None, :]
            right = tl.load(right_at + b, mask=there, other=0.0)
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        value = tl.dot(left, right, value, input_precision="ieee")
        left_at += INNER
        right_at += INNER * inputs
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = (e * batch + row) * inputs + column + (r[:, None] * inputs + c[None, :])
    below = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(below <= 0, 0.0, value)  # what is outside, too
    tl.store(d + at, value.to(d.dtype.element_ty), mask=inside)
    part = partials + (e * tl.cdiv(batch, ROWS) + row // ROWS) * inputs + column + c
    tl.store(part, tl.sum(value, 0), mask=c < columns)


@triton.jit
def _shares(
    logits,  # [K, B, E]
    p,  # [E, K, B]
    reads,  # [E]
    batch,
    experts,
    gates,
    SEE: tl.constexpr,  # K masks
    READS: tl.constexpr,  # E
    KP: tl.constexpr,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weights of the experts, laid out so that those of one expert and gate are read at once; and
    what each expert reads: as constants they would take registers from its products."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    value, _, inside = _weights(logits, rows, batch, experts, gates, SEE, KP, EP, tl.float32)
    gate = tl.arange(0, KP)[:, None, None]
    expert = tl.arange(0, EP)[None, None, :].to(tl.int64)
    tl.store(p + (expert * gates + gate) * batch + rows[None, :, None], value, mask=inside)
    if tl.program_id(0) == 0:
        e = tl.arange(0, EP)
        tl.store(reads + e, pick(e, READS), mask=e < experts)


@triton.jit
def _expert_mixture_inference(
    x,  # [N, B, I]
    reads,  # [E]
    weight,  # [E, O, I]
    bias,  # [E, O]
    p,  # [E, GATES, B]
    out,  # [GATES, B, O]
    batch,
    inputs,
    outputs,
    experts,
    stride_n,
    stride_b,
    GATES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Programs side by side share their rows: x is the larger one, all weights fit the cache.
    across = tl.cdiv(outputs, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS
    column = tl.program_id(0) % across * COLUMNS
    rows, columns = (batch - row).to(tl.int32), outputs - column  # that are left
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x += row * stride_b
    weight += tl.cast(column, tl.int64) * inputs
    bias += column
    p += row
    # A tile for each gate there may be; those of gates that there are not cost nothing.
    sum0 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sum1 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sum2 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sum3 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for _ in range(experts):
        value = _product(
            x + tl.load(reads).to(tl.int64) * stride_n,
            weight,
            rows,
            columns,
            inputs,
            stride_b,
            ROWS,
            COLUMNS,
            INNER,
            EVEN,
            INTERPRETED,
        )
        value += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
        value = tl.where(value < 0, 0.0, value)
        sum0 += tl.load(p + r, mask=r < rows, other=0.0)[:, None] * value
        if GATES > 1:
            sum1 += tl.load(p + batch + r, mask=r < rows, other=0.0)[:, None] * value
        if GATES > 2:
            sum2 += tl.load(p + 2 * batch + r, mask=r < rows, other=0.0)[:, None] * value
        if GATES > 3:
            sum3 += tl.load(p + 3 * batch + r, mask=r < rows, other=0.0)[:, None] * value
        reads += 1
        weight += outputs * inputs
        bias += outputs
        p += GATES * batch
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    place = r[:, None] * outputs + c[None, :]
    out += row * outputs + column
    stride = tl.cast(batch, tl.int64) * outputs
    tl.store(out + place, sum0.to(out.dtype.element_ty), mask=inside)
    if GATES > 1:
        tl.store(out + stride + place, sum1.to(out.dtype.element_ty), mask=inside)
    if GATES > 2:
        tl.store(out + 2 * stride + place, sum2.to(out.dtype.element_ty), mask=inside)
    if GATES > 3:
        tl.store(out + 3 * stride + place, sum3.to(out.dtype.element_ty), mask=inside)


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


def relu_backward(grad: Tensor, y: Tensor, transposed: Tensor | None = None) -> Tensor:
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
    if transposed is not None:
        transposed.copy_(grad.mT)
    sums = partials[:, 0] if blocks == 1 else partials.sum(1)
    return sums[0] if one else sums


def _product_tile(x: Tensor, outputs: int) -> dict[str, Any]:
    """Constants of products x @ weight^T, x [N, B, I] and weight [E, outputs, I]."""
    exact = x.dtype == torch.float32  # without tensor cores every product takes registers
    # Rows that are no multiple of 16 bytes are read number by number.
    inner = 64 if x.dtype.itemsize == 2 and x.shape[2] % 8 == 0 else 32
    columns = max(16, min(triton.next_power_of_2(outputs), 64 if exact else 128))
    return {
        "ROWS": 64 if exact else 128,
        "COLUMNS": columns,
        "INNER": inner,
        "EVEN": x.shape[2] % inner == 0,
        "INTERPRETED": x.is_cpu,
        "num_warps": 8,
        "num_stages": 3,
    }


def _rows_aside(x: Tensor) -> Tensor:
    """x [N, B, I] with the numbers of a row side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def grouped_linear(
    x: Tensor, reads: Sequence[int], weight: Tensor, bias: Tensor, relu: bool
) -> Tensor:
    """Triton version of :func:`stem_fast.reference.grouped_linear` for x [N, B, I]; float64 goes to
    the reference."""
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
                weight.contiguous(),
                bias.contiguous(),
                y,
                batch,
                x.shape[2],
                outputs,
                x.stride(0),
                x.stride(1),
                READS=tuple(reads),
                RELU=relu,
                BAND=8,
                **tile,
            )
    return y


def _backward_tile(grad: Tensor, inputs: int) -> dict[str, Any]:
    """Constants of _grouped_linear_backward: those of a product whose inner dimension is O."""
    tile = _product_tile(grad, inputs)
    if tile["EVEN"] and inputs % tile["COLUMNS"] == 0:
        return tile
    # Masks take registers.
    return tile | {"EVEN": False, "ROWS": 64, "COLUMNS": min(64, tile["COLUMNS"])}


def grouped_linear_backward(grad: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Triton version of :func:`stem_fast.reference.grouped_linear_backward` for 16-bit types, whose
    products run on tensor cores whatever the layout; others go to the reference."""
    if grad.dtype.itemsize != 2 or not y.numel() or not grad.numel():
        return reference.grouped_linear_backward(grad, weight, y)
    (n, batch, outputs), inputs = grad.shape, y.shape[2]
    d = torch.empty_like(y, memory_format=torch.contiguous_format)
    tile = _backward_tile(grad, inputs)
    down = triton.cdiv(batch, tile["ROWS"])
    partials = y.new_empty(n, down, inputs, dtype=torch.float32)
    with torch.cuda.device_of(y):
        _grouped_linear_backward[(down * triton.cdiv(inputs, tile["COLUMNS"]), n)](
            grad.contiguous(),
            weight.contiguous(),
            y.contiguous(),
            d,
            partials,
            batch,
            inputs,
            outputs,
            BAND=8,
            **tile,
        )
    return d, partials[:, 0] if down == 1 else partials.sum(1)


def _share_sizes(logits: Tensor) -> dict[str, int]:
    """Constants of _shares, for logits [K, B, E]."""
    kp, ep = (triton.next_power_of_2(logits.shape[i]) for i in (0, 2))
    return {"KP": kp, "EP": ep, "ROWS": max(1, TILE // (kp * ep))}


def _mixture_tile(x: Tensor, outputs: int, gates: int) -> dict[str, Any]:
    """Constants of _expert_mixture_inference: a product's, and room for the gates' sums."""
    tile = _product_tile(x, outputs)
    columns = min(tile["COLUMNS"], 64)
    return tile | {"GATES": gates, "COLUMNS": columns}


def expert_mixture_inference(
    x: Tensor,
    reads: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    logits: Tensor,
    see: Sequence[int],
) -> Tensor:
    """Triton version of :func:`stem_fast.reference.expert_mixture_inference`, in which outputs of
    experts are never written; with more than 4 gates they are. float64 goes to the reference."""
    if x.dtype == torch.float64 or not x.numel():
        return reference.expert_mixture_inference(x, reads, weight, bias, logits, see)
    gates, batch, experts = logits.shape
    if gates > GATES:
        y = grouped_linear(x, reads, weight, bias, True)
        return mixture.mixture(y, logits, see, see)
    x = _rows_aside(x)
    outputs = weight.shape[1]
    out = x.new_empty(gates, batch, outputs)
    if not out.numel():
        return out
    p = x.new_empty(experts, gates, batch, dtype=torch.float32)
    read = x.new_empty(experts, dtype=torch.int32)
    sizes = _share_sizes(logits)
    tile = _mixture_tile(x, outputs, gates)
    tiles = triton.cdiv(batch, tile["ROWS"]) * triton.cdiv(outputs, tile["COLUMNS"])
    with torch.cuda.device_of(x):
        _shares[(triton.cdiv(batch, sizes["ROWS"]),)](
            *(logits.contiguous(), p, read, batch, experts, gates),
            SEE=tuple(see),
            READS=tuple(reads),
            **sizes,
        )
        _expert_mixture_inference[(tiles,)](
            x,
            read,
            weight.contiguous(),
            bias.contiguous(),
            p,
            out,
            batch,
            x.shape[2],
            outputs,
            experts,
            x.stride(0),
            x.stride(1),
            **tile,
        )
    return out
