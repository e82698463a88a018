"""Layers of several networks: cases, and what is checked of an implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import assert_within
from stem_fast import reference

# Networks, batch and outputs.
GROUPS = [(1, 1, 1), (2, 0, 3), (3, 5, 20), (2, 131, 37), (1, 300, 512), (2, 2100, 1), (4, 33, 300)]


def check_relu_backward(run: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """An implementation's relu_backward against the reference's."""
    torch.manual_seed(4)
    y = torch.randn(shape, dtype=torch.float64, device=device).clamp(min=0).to(dtype)
    grad = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
    actual, again, own, exact = grad.clone(), grad.clone(), grad.clone(), grad.double()
    sums = (
        run(actual, y),
        reference.relu_backward(own, y),
        reference.relu_backward(exact, y.double()),
    )
    assert torch.equal(actual, own)
    columns = torch.empty_like(grad.mT, memory_format=torch.contiguous_format)
    assert torch.equal(run(again, y, columns), sums[0]), "other bits on a second run"
    assert torch.equal(again, own)
    assert torch.equal(columns, own.mT)
    assert_within(*sums)
    x = torch.where(y > 0, y, -1).double().requires_grad_()
    (right,) = torch.autograd.grad(x.relu(), x, grad.double())
    assert torch.equal(exact, right)


def check_bias_relu(run: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """An implementation's bias_relu against the reference's."""
    torch.manual_seed(4)
    y = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
    bias = torch.randn(shape[2], shape[0], dtype=torch.float64, device=device).to(dtype).T
    for relu in (False, True):
        actual, own, exact = y.clone(), y.clone(), y.double()
        run(actual, bias, relu)
        reference.bias_relu(own, bias, relu)
        reference.bias_relu(exact, bias.double(), relu)
        assert_within(actual, own, exact)


# Batch, inputs and outputs of five networks, and which of two inputs they read.
LINEARS = [
    ((0, 3, 2), [0]),
    ((1, 1, 1), [1, 0]),
    ((3, 5, 0), [0]),
    ((2, 0, 3), [1]),
    pytest.param((7, 77, 19), [1, 1, 0, 1], id="odd"),
]


def check_grouped_linear(
    run: Any,
    sizes: tuple[int, int, int],
    reads: list[int],
    relu: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    """An implementation's grouped_linear against the reference's, of what is not contiguous."""
    torch.manual_seed(5)
    batch, inputs, outputs = sizes
    shapes = (2, batch, inputs), (5, outputs, inputs), (5, outputs)
    x, weight, bias = (torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes)
    own = reference.grouped_linear(x, reads, weight, bias, relu)
    exact = reference.grouped_linear(x.double(), reads, weight.double(), bias.double(), relu)
    strided = x.mT.contiguous().mT, weight.mT.contiguous().mT, bias.T.contiguous().T
    assert_within(run(strided[0], reads, *strided[1:], relu), own, exact)
    rows = x.transpose(0, 1).contiguous().transpose(0, 1)  # as the parts of a wider tensor
    assert_within(run(rows, reads, weight, bias, relu), own, exact)


def check_grouped_linear_backward(
    run: Any, sizes: tuple[int, int, int], networks: int, dtype: torch.dtype, device: str
) -> None:
    """An implementation's grouped_linear_backward against the reference's."""
    torch.manual_seed(6)
    batch, inputs, outputs = sizes
    shapes = (networks, batch, outputs), (networks + 1, outputs, inputs), (networks, batch, inputs)
    grad, weight, y = (torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes)
    y.relu_()
    results = [
        run(grad.mT.contiguous().mT, weight.mT.contiguous().mT, y.mT.contiguous().mT),
        reference.grouped_linear_backward(grad, weight, y),
        reference.grouped_linear_backward(grad.double(), weight.double(), y.double()),
    ]
    assert not results[0][0][y <= 0].any()
    for actual, own, exact in zip(*results, strict=True):
        assert_within(actual, own, exact)


# Batch, inputs, outputs and gates of as many experts as there are reads.
EXPERT_MIXTURES = [
    ((0, 3, 2, 1), [0]),
    ((1, 1, 1, 1), [1]),
    ((3, 0, 2, 2), [0, 1]),
    ((3, 2, 0, 2), [0, 1]),
    ((7, 77, 19, 2), [1, 1, 0, 1]),
    ((130, 64, 70, 3), [0, 1, 1]),
    ((9, 128, 33, 4), [1] * 64),
    ((33, 20, 8, 5), [0, 0, 1]),
]


def check_expert_mixture_inference(
    run: Any,
    sizes: tuple[int, int, int, int],
    reads: list[int],
    dtype: torch.dtype,
    device: str,
) -> None:
    """An implementation's expert_mixture_inference against the reference's, of gates that see all
    or some experts, with logits in either type, and of what is not contiguous."""
    torch.manual_seed(5)
    batch, inputs, outputs, gates = sizes
    experts = len(reads)
    shapes = (2, batch, inputs), (experts, outputs, inputs), (experts, outputs)
    x, weight, bias = (torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes)
    logits = torch.randn(gates, batch, experts, dtype=torch.float64).to(device, dtype)
    everything = (1 << experts) - 1
    see = [everything, *(1 << k % experts | everything >> 1 for k in range(1, gates))]
    see = [mask - (mask >> 63 << 64) for mask in see]
    strided = x.mT.contiguous().mT, reads, weight.mT.contiguous().mT, bias.T.contiguous().T
    exact = reference.expert_mixture_inference(
        x.double(), reads, weight.double(), bias.double(), logits.double(), see
    )
    for gate in (logits, logits.to(torch.promote_types(dtype, torch.float32))):
        own = reference.expert_mixture_inference(x, reads, weight, bias, gate, see)
        turned = gate.mT.contiguous().mT
        actual = run(*strided, turned, see)
        assert_within(actual, own, exact)
        assert torch.equal(run(*strided, turned, see), actual), "other bits on a second run"
