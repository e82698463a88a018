"""Linear layers of several networks at once, bias and ReLU in one pass with them."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_fast.ops.registry import define, refuse_gradient


@define("bias_relu(Tensor(a!) y, Tensor bias, bool relu) -> ()")
def _bias_relu_fake(y: Tensor, bias: Tensor, relu: bool) -> None:
    """y is changed in place."""


@define("relu_backward(Tensor(a!) grad, Tensor y, Tensor(b!)? transposed=None) -> Tensor")
def _relu_backward_fake(grad: Tensor, y: Tensor, transposed: Tensor | None = None) -> Tensor:
    size = [*y.shape[:-2], y.shape[-1]]
    return y.new_empty(size, dtype=torch.promote_types(y.dtype, torch.float32))


@define("grouped_linear(Tensor x, int[] reads, Tensor weight, Tensor bias, bool relu) -> Tensor")
def _grouped_linear_fake(
    x: Tensor, reads: list[int], weight: Tensor, bias: Tensor, relu: bool
) -> Tensor:
    return x.new_empty(len(reads), x.shape[1], weight.shape[1])


@define(
    "grouped_linear_backward(Tensor grad, Tensor weight, Tensor y) -> (Tensor, Tensor)",
    second_derivative=False,
)
def _grouped_linear_backward_fake(grad: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(y.shape), y.new_empty(y.shape[0], y.shape[2], dtype=wide)


refuse_gradient("grouped_linear", "it is for inference")
