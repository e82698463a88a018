"""The AFTB gated mixture of experts with its asymmetric backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stem_fast.reference.linear import grouped_linear


def gate_weights(logits: Tensor, see: Sequence[int]) -> Tensor:
    """Softmax over the experts that each gate sees.

    Args:
        logits: [K, B, E].
        see: K bit masks, none of them 0; bit e of ``see[k]`` says whether gate k sees expert e.

    Returns:
        [K, B, E]; exactly 0 where the bit is 0.
    """
    return logits.masked_fill(~mask_matrix(see, logits)[:, None, :], float("-inf")).softmax(-1)


def mixture(y: Tensor, logits: Tensor, see: Sequence[int], learn: Sequence[int]) -> Tensor:
    """All Forward, Task-specific Backward (AFTB): K gated sums of the same E experts.

    ``out[k] = sum_e p[k, e] * y[e]`` with ``p = gate_weights(logits, see)``. Expert e learns from
    output k only where bit e of ``learn[k]`` is set; the gates always learn.

    Args:
        y: [E, B, H], expert outputs.
        logits: [K, B, E].
        see, learn: K bit masks over the experts, learn within see.

    Returns:
        [K, B, H].
    """
    p = gate_weights(logits, see)
    outputs = []
    for k, mask in enumerate(learn):
        experts = [y[e] if mask >> e & 1 else y[e].detach() for e in range(len(y))]
        outputs.append(torch.stack([p[k, :, e, None] * experts[e] for e in range(len(y))]).sum(0))
    return torch.stack(outputs)


def expert_mixture_inference(
    x: Tensor,
    reads: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    logits: Tensor,
    see: Sequence[int],
) -> Tensor:
    """The last layer of the experts, with its ReLU, and their mixture; it has no gradient.

    Args:
        x: [N, B, I].
        reads: expert e reads ``x[reads[e]]``.
        weight: [E, O, I], of x's type, as bias.
        bias: [E, O].
        logits: [K, B, E], of x's type or float32.
        see: as in :func:`mixture`.

    Returns:
        [K, B, O], of x's type.
    """
    y = grouped_linear(x, reads, weight, bias, relu=True)
    return mixture(y, logits, see, see).to(x.dtype)


def mixture_backward(
    grad: Tensor,
    y: Tensor,
    logits: Tensor,
    see: Sequence[int],
    learn: Sequence[int],
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`mixture` written out, with nothing saved but its inputs.

    ``dy[e] = sum_k learn[k, e] * p[k, e] * grad[k]``; ``dp[k, e] = <grad[k], y[e]>`` for every e,
    then the backward of softmax.

    Args:
        grad: [K, B, H], gradient of the output.
        y, logits, see, learn: as in :func:`mixture`.
        relu: whether y is what ReLUs have left, and dy is wanted before them.

    Returns:
        dy [E, B, H], with ``relu`` zero where ``y <= 0``, and dlogits [K, B, E].
    """
    p = gate_weights(logits, see)
    dy = torch.einsum("kbe,kbh->ebh", p * mask_matrix(learn, p)[:, None, :], grad)
    dp = torch.einsum("kbh,ebh->kbe", grad, y)
    if relu:
        dy = dy.masked_fill(y <= 0, 0)
    return dy.contiguous(), softmax_backward(p, dp).contiguous()


def mixture_expert_backward(
    grads: Sequence[Tensor], y: Tensor, p: Tensor, learn: Sequence[int], e: int
) -> tuple[Tensor, Tensor]:
    """The part of :func:`mixture_backward` that expert e has.

    Args:
        grads: K of [B, H].
        y: [B, H], the expert's output.
        p: [K, B, E], the gates' weights in float32 (float64 for float64 y).
        learn: as in :func:`mixture`.
        e: the expert.

    Returns:
        dy [B, H] of y's type and dp [K, B] of p's.
    """
    grad = torch.stack(list(grads)).to(p.dtype)
    taught = (p * mask_matrix(learn, p)[:, None, :])[:, :, e, None]
    return (taught * grad).sum(0).to(y.dtype), (grad * y.to(p.dtype)).sum(-1)


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """Gradient of the logits from that of the weights p, both [K, B, E]."""
    return p * (dp - (p * dp).sum(-1, keepdim=True))


def mask_matrix(masks: Sequence[int], like: Tensor) -> Tensor:
    """Bit masks as a bool matrix [K, E], for logits or weights ``like`` [K, B, E]."""
    experts = range(like.shape[-1])
    return torch.tensor([[bool(m >> e & 1) for e in experts] for m in masks], device=like.device)
