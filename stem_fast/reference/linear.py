"""Linear layers of networks side by side, and the parts of them that have ops of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_linear(
    x: Tensor | Sequence[Tensor],
    reads: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    relu: bool = False,
) -> Tensor:
    """One linear layer of E networks that run side by side (experts, gates or towers).

    Args:
        x: [N, B, I], or N of [B, I]: the inputs there are.
        reads: indices into them: network e reads ``x[reads[e]]``; with fewer than E of them, only
            the first networks run.
        weight: [E, O, I].
        bias: [E, O].
        relu: whether a ReLU follows.

    Returns:
        [E, B, O].
    """
    # unbind and not indexing: the backward of x[n] fills a whole x with zeros each time.
    inputs = x.unbind() if isinstance(x, Tensor) else x
    networks = zip(reads, weight.unbind(), bias.unbind(), strict=False)
    outputs = [F.linear(inputs[n], w, b) for n, w, b in networks]
    if not outputs:
        return weight.new_empty(0, len(inputs[0]), weight.shape[1])
    y = torch.stack(outputs)
    return y.relu() if relu else y


def relu_backward(grad: Tensor, y: Tensor, transposed: Tensor | None = None) -> Tensor:
    """The backward pass of ``y = relu(x + bias)``.

    Args:
        grad: [B, H] of y; becomes that of x, in place. Or of E networks, [E, B, H] (the C++ version
            takes one network).
        y: as grad, of the same type.
        transposed: [H, B] or [E, H, B], of the same type; becomes the new grad too.

    Returns:
        [H] or [E, H], the gradient of the bias: float32, for float64 float64.
    """
    grad.masked_fill_(y <= 0, 0)
    if transposed is not None:
        transposed.copy_(grad.mT)
    return grad.sum(-2, dtype=torch.promote_types(y.dtype, torch.float32))


def grouped_linear_backward(grad: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a layer's input, through the ReLU below it.

    Args:
        grad: [n, B, O] of the layer's output, of its first n networks.
        weight: [E, O, I].
        y: [n, B, I], the input: what the ReLU below has left.

    Returns:
        d [n, B, I], of the input less the bias of the layer below: zero where the ReLU is off.
        [n, I], the gradient of that bias: float32, for float64 float64.
    """
    d = torch.bmm(grad, weight[: len(grad)])
    return d, relu_backward(d, y)


def bias_relu(y: Tensor, bias: Tensor, relu: bool) -> None:
    """``y + bias``, with a ReLU or without, in place.

    Args:
        y: [E, B, O].
        bias: [E, O], of the same type.
        relu: whether a ReLU follows.
    """
    y += bias[:, None]
    if relu:
        y.relu_()
