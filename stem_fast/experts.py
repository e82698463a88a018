"""A layer of experts and the mixture of their outputs as one step of autograd, in little memory.

Plain autograd keeps a second copy of every layer's outputs where they are stacked, and makes
gradients as large as the outputs of all experts, twice. Here only each layer's output is kept, and
backward goes expert by expert, so that gradients of all experts never exist at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stem_fast import ops, reference
from stem_fast.layers import GroupedLinear, GroupedMLP


def expert_mixture(
    experts: GroupedMLP,
    inputs: Sequence[Tensor],
    reads: Sequence[int],
    logits: Tensor,
    see: Sequence[int],
    learn: Sequence[int],
) -> tuple[Tensor, ...]:
    """``mixture(experts(inputs, reads), logits, see, learn)``: N inputs [B, I] -> K of [B, H].

    Experts that are linear layers and ReLUs (the official defaults) run fused; dropout, batch norm
    and other activations, autocast and ``torch.compile`` take the steps one by one.
    """
    fused = all(isinstance(block, GroupedLinear | nn.ReLU) for block in experts.blocks)
    device = logits.device.type
    if not fused or torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return ops.mixture(experts(inputs, reads), logits, see, learn).unbind()
    linear = [block for block in experts.blocks if isinstance(block, GroupedLinear)]
    parameters = [p for block in linear for p in (block.weight, block.bias)]
    masks = ops.signed(see), ops.signed(learn)
    mixed: tuple[Tensor, ...] = _ExpertMixture.apply(
        tuple(reads), *masks, logits, len(inputs), *inputs, *parameters
    )
    return mixed


class _ExpertMixture(torch.autograd.Function):
    """Inputs: reads, see, learn, logits, N, N inputs, then weight and bias of every layer."""

    @staticmethod
    def forward(
        ctx: Any,
        reads: tuple[int, ...],
        see: list[int],
        learn: list[int],
        logits: Tensor,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs, parameters = tensors[:count], tensors[count:]
        x = [inputs[n] for n in reads]
        outputs: list[Tensor] = []
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            size = [len(weight), len(x[0]), weight.shape[1]]
            y = torch.ops.stem_fast.empty_kept(x[0], size)
            for e, read in enumerate(x):
                torch.addmm(bias[e], read, weight[e].T, out=y[e])
            x = list(y.relu_())
            outputs = [*outputs, y] if any(ctx.needs_input_grad) else [y]
        ctx.reads, ctx.masks, ctx.count = reads, (see, learn), count
        ctx.save_for_backward(logits, *inputs, *parameters, *outputs)
        return torch.ops.stem_fast.mixture(y, logits, see, learn).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        inputs, saved = saved[: ctx.count], saved[ctx.count :]
        layers = len(saved) // 3
        weights, outputs = saved[: 2 * layers : 2], saved[2 * layers :]
        # needs_input_grad: of reads, see, learn, logits, N, then of each tensor.
        wanted = ctx.needs_input_grad[5 : 5 + ctx.count]
        dinputs = [
            torch.zeros_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)
        ]
        dweights = [torch.empty_like(weight) for weight in weights]
        dbiases = [weight.new_empty(weight.shape[:2]) for weight in weights]
        see, learn = ctx.masks
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        p = reference.gate_weights(logits.to(wide), see)
        dp = torch.empty_like(p)
        for e, n in enumerate(ctx.reads):
            d, dp[:, :, e] = torch.ops.stem_fast.mixture_expert_backward(
                grads, outputs[-1][e], p, learn, e
            )
            for layer in reversed(range(layers)):
                y, x = outputs[layer][e], outputs[layer - 1][e] if layer else inputs[n]
                torch.ops.aten.threshold_backward.grad_input(d, y, 0, grad_input=d)
                torch.sum(d, 0, out=dbiases[layer][e])
                torch.mm(d.T, x, out=dweights[layer][e])
                if layer:
                    d = torch.mm(d, weights[layer][e])
            if (dinput := dinputs[n]) is not None:
                dinput.addmm_(d, weights[0][e])
        dlogits = reference.softmax_backward(p, dp).to(logits.dtype)
        parameters = [g for pair in zip(dweights, dbiases, strict=True) for g in pair]
        return None, None, None, dlogits, None, *dinputs, *parameters
