"""The AFTB gated mixture of experts with its asymmetric backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stem_fast import reference
from stem_fast.ops.registry import define, refuse_gradient, transformed

MAX_EXPERTS, MAX_GATES = 64, 16  # what every backend of the mixture takes


@define("mixture(Tensor y, Tensor logits, int[] see, int[] learn) -> Tensor")
def _mixture_fake(y: Tensor, logits: Tensor, see: list[int], learn: list[int]) -> Tensor:
    return y.new_empty(logits.shape[0], *y.shape[1:])


@define(
    "mixture_backward(Tensor grad, Tensor y, Tensor logits, int[] see, int[] learn, bool "
    "relu=False) -> (Tensor, Tensor)",
    second_derivative=False,
)
def _mixture_backward_fake(
    grad: Tensor,
    y: Tensor,
    logits: Tensor,
    see: list[int],
    learn: list[int],
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), logits.new_empty(logits.shape)


@define(
    "mixture_expert_backward(Tensor[] grads, Tensor y, Tensor p, int[] learn, int e) -> "
    "(Tensor, Tensor)",
    second_derivative=False,
)
def _mixture_expert_backward_fake(
    grads: list[Tensor], y: Tensor, p: Tensor, learn: list[int], e: int
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), p.new_empty(p.shape[:2])


@define(
    "expert_mixture_inference(Tensor x, int[] reads, Tensor weight, Tensor bias, Tensor "
    "logits, int[] see) -> Tensor"
)
def _expert_mixture_inference_fake(
    x: Tensor, reads: list[int], weight: Tensor, bias: Tensor, logits: Tensor, see: list[int]
) -> Tensor:
    return x.new_empty(len(see), x.shape[1], weight.shape[1])


def mixture(
    y: Tensor,
    logits: Tensor,
    see: Sequence[int | Sequence[int]],
    learn: Sequence[int | Sequence[int]],
    *,
    relu: bool = False,
) -> Tensor:
    """The AFTB gated mixture with its asymmetric backward; see :func:`reference.mixture`.

    A mask may be a list of a 0 or 1 for each expert, too.

    At most 64 experts and 16 gates. The logits are taken in y's type; softmax and sums are in
    float32 (float64 for float64). With ``relu``, y is what ReLUs have left, and its gradient is
    that before them: zero where they are off.

    Raises:
        ValueError: shapes or masks that don't fit; no expert, gate or output, or too many.
        RuntimeError: a mask too many or too few.
    """
    if y.dim() != 3 or logits.dim() != 3 or logits.shape[1:] != (y.shape[1], y.shape[0]):
        raise ValueError(
            "mixture: expected y [E, B, H] and logits [K, B, E], got y "
            f"{list(y.shape)} and logits {list(logits.shape)}"
        )
    if not (0 < len(y) <= MAX_EXPERTS and 0 < len(logits) <= MAX_GATES and y.shape[2]):
        raise ValueError(
            f"mixture: y [E, B, H] is {list(y.shape)} and logits [K, B, E] {list(logits.shape)}, "
            f"expected 1 to {MAX_EXPERTS} experts, 1 to {MAX_GATES} gates and a width above 0"
        )
    # Autocast can leave gates and experts in different types.
    arguments = y, logits.to(y.dtype), signed(see, len(y)), signed(learn, len(y))
    if transformed():
        assert not relu  # nobody runs step by step and asks for it
        return reference.mixture(*arguments)
    mixed: Tensor = (_ReLUMixture.apply if relu else torch.ops.stem_fast.mixture)(*arguments)
    return mixed


def _mixture_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, logits, ctx.see, ctx.learn = inputs
    ctx.save_for_backward(y, logits)


def _mixture_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dy, dlogits = torch.ops.stem_fast.mixture_backward(grad, *ctx.saved_tensors, ctx.see, ctx.learn)
    return dy, dlogits, None, None


torch.library.register_autograd("stem_fast::mixture", _mixture_grad, setup_context=_mixture_setup)
refuse_gradient("expert_mixture_inference", "it is for inference")


class _ReLUMixture(torch.autograd.Function):
    """:func:`mixture` with the gradient of what comes before the ReLUs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, logits: Tensor, see: list[int], learn: list[int]) -> Tensor:
        ctx.save_for_backward(y, logits)
        ctx.masks = see, learn
        return torch.ops.stem_fast.mixture(y, logits, see, learn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = torch.ops.stem_fast.mixture_backward
        return *back(grad, *ctx.saved_tensors, *ctx.masks, True), None, None


def signed(masks: Sequence[int | Sequence[int]], experts: int = MAX_EXPERTS) -> list[int]:
    """Masks, or lists of a 0 or 1 for each expert, as the int64 of the same bits: expert 63 is the
    sign. Raises ValueError for a list of another length or with other numbers."""
    found = []
    for k, mask in enumerate(masks):
        if not isinstance(mask, int):
            if len(mask) != experts or not all(bit in (0, 1) for bit in mask):
                raise ValueError(
                    f"the mask of gate {k} is {mask}, expected a 0 or 1 for each of {experts} "
                    "experts, or an int of such bits"
                )
            mask = sum(1 << e for e, bit in enumerate(mask) if bit)
        found.append(mask - (mask >> 63 << 64))
    return found
