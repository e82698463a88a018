"""Linear layers of networks, their ReLU and bias, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEVICES, cpp, devices, dtypes
from cases.linear import (
    GROUPS,
    LINEARS,
    check_bias_relu,
    check_grouped_linear,
    check_grouped_linear_backward,
    check_relu_backward,
)


@devices
@dtypes
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 20), (131, 37), (276, 30), (300, 512)])
def test_relu_backward(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_relu_backward(torch.ops.stem_fast.relu_backward, shape, dtype, device)


@pytest.mark.parametrize("device", DEVICES[1:])
@dtypes
@pytest.mark.parametrize("shape", GROUPS)
def test_relu_backward_of_groups(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check_relu_backward(torch.ops.stem_fast.relu_backward, shape, dtype, device)


@devices
@dtypes
@pytest.mark.parametrize("shape", GROUPS)
def test_bias_relu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check_bias_relu(torch.ops.stem_fast.bias_relu, shape, dtype, device)


@cpp
def test_relu_backward_is_the_same_with_one_thread() -> None:
    y, grad = torch.randn(3000, 40), torch.randn(3000, 40)
    threads = torch.get_num_threads()
    results = []
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        results.append(torch.ops.stem_fast.relu_backward(grad.clone(), y))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@cpp
@pytest.mark.parametrize(
    ("grad", "transposed", "message"),
    [
        (torch.zeros(3, 2), None, "must be .B, H. of one type"),
        (torch.zeros(2, 3).double(), None, "must be .B, H. of one type"),
        (torch.zeros(3, 2).T, None, "must be contiguous"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "transposed must be contiguous, .H, B."),
        (torch.zeros(2, 3), torch.zeros(2, 3).T, "transposed must be contiguous, .H, B."),
        (torch.zeros(2, 3), torch.zeros(3, 2).double(), "of the gradient's type"),
    ],
)
def test_relu_backward_refuses_other_shapes_and_types(
    grad: torch.Tensor, transposed: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.relu_backward(grad, torch.zeros(2, 3), transposed)


@devices
@dtypes
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("sizes", "reads"), LINEARS)
def test_grouped_linear(
    sizes: tuple[int, int, int], reads: list[int], relu: bool, dtype: torch.dtype, device: str
) -> None:
    check_grouped_linear(torch.ops.stem_fast.grouped_linear, sizes, reads, relu, dtype, device)


@devices
@dtypes
@pytest.mark.parametrize(("sizes", "reads"), LINEARS)
def test_grouped_linear_backward(
    sizes: tuple[int, int, int], reads: list[int], dtype: torch.dtype, device: str
) -> None:
    run = torch.ops.stem_fast.grouped_linear_backward
    check_grouped_linear_backward(run, sizes, len(reads), dtype, device)


@cpp
def test_grouped_linear_is_the_same_with_one_thread() -> None:
    x, weight, bias = torch.randn(1, 9, 300), torch.randn(3, 200, 300), torch.randn(3, 200)
    threads = torch.get_num_threads()
    results = []
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        results.append(torch.ops.stem_fast.grouped_linear(x, [0, 0, 0], weight, bias, True))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 4, 5)}, r"x must be \[N, B, I\], weight"),
        ({1: [0] * 4}, "at most E reads"),
        ({1: [2]}, "must name one of the 2 inputs; one is 2"),
        ({1: [-1]}, "must name one of the 2 inputs; one is -1"),
        ({3: torch.zeros(3, 2)}, r"weight \[E, O, I\] and bias \[E, O\]"),
        ({2: torch.zeros(3, 7, 6).double()}, "must have one type"),
    ],
)
def test_grouped_linear_refuses_other_shapes_and_types(
    change: dict[int, Any], message: str
) -> None:
    arguments = [torch.zeros(2, 4, 6), [0, 1], torch.zeros(3, 7, 6), torch.zeros(3, 7), True]
    torch.ops.stem_fast.grouped_linear(*arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.grouped_linear(*(dict(enumerate(arguments)) | change).values())
