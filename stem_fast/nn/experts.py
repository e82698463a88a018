"""A layer of experts and the mixture of their outputs as one step of autograd, in little memory.

Plain autograd keeps a second copy of every layer's outputs where they are stacked, and makes
gradients as large as the outputs of all experts, twice. Here only each layer's output is kept. On
CPU backward goes expert by expert, so that gradients of all experts never exist at once; on CUDA
all experts go together, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stem_fast import ops, reference
from stem_fast.nn import batched
from stem_fast.nn.grouped import GroupedMLP


class Mixing(Protocol):
    """Experts that mix their outputs themselves, for inference."""

    def mixture(
        self, inputs: Sequence[Tensor], reads: Sequence[int], logits: Tensor, see: Sequence[int]
    ) -> Tensor:
        """As :func:`expert_mixture`, [K, B, H]."""


def expert_mixture(
    experts: GroupedMLP | Mixing,
    inputs: Sequence[Tensor],
    reads: Sequence[int],
    logits: Tensor,
    see: Sequence[int],
    learn: Sequence[int],
    *,
    together: bool | None = None,
) -> tuple[Tensor, ...]:
    """``mixture(experts(inputs, reads), logits, see, learn)``: N inputs [B, I] -> K of [B, H].

    Experts that are linear layers and ReLUs (the official defaults) run fused, under autocast in
    its type: the weights are cast once a step, and every gradient of theirs and of the inputs is
    rounded once to that type. Dropout, batch norm and other activations, ``torch.compile`` and
    ``torch.func`` take the steps one by one.

    ``together`` is whether the experts run by few and large kernels, or one by one in little
    memory; None: on CUDA.
    """
    if not isinstance(experts, GroupedMLP):
        return experts.mixture(inputs, reads, logits, see).unbind()
    layers = experts.plain()
    if ops.step_by_step() or not layers:
        return batched.unbind(ops.mixture(experts(inputs, reads), logits, see, learn))
    if logits.is_cuda if together is None else together:
        # The mixture alone reads y: its gradient may be that before the last ReLU.
        y = batched.networks(inputs, reads, layers, masked=True, together=True)
        return batched.unbind(ops.mixture(y, logits, see, learn, relu=True))
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    masks = ops.signed(see), ops.signed(learn)
    dtype = batched.product_type(layers[0].weight)
    trained = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (logits, *inputs, *parameters)
    )
    with torch.autocast(logits.device.type, enabled=False):
        mixed: tuple[Tensor, ...] = _ExpertMixture.apply(
            tuple(reads),
            *masks,
            dtype,
            trained,
            logits,
            len(inputs),
            *inputs,
            *parameters,
        )
    return mixed


def _times(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y``; in bfloat16 oneDNN would reorder a transposed y."""
    if x.dtype == torch.float32 and batched.onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, y.T, None, "none", [], None)
    out = torch.ops.stem_fast.empty_kept(x, [len(x), y.shape[1]])
    return torch.mm(x, y, out=out)


class _ExpertMixture(torch.autograd.Function):
    """Inputs: reads, see, learn, dtype, trained, logits, N, N inputs, weight and bias of every
    layer."""

    @staticmethod
    def forward(
        ctx: Any,
        reads: tuple[int, ...],
        see: list[int],
        learn: list[int],
        dtype: torch.dtype,
        trained: bool,
        logits: Tensor,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.types = [tensor.dtype for tensor in (logits, *tensors)]
        logits, *cast = (tensor.to(dtype) for tensor in (logits, *tensors))
        inputs, weights, biases = cast[:count], cast[count::2], cast[count + 1 :: 2]
        batch, last = len(inputs[0]), len(weights) - 1
        # Without a backward pass the outputs of hidden layers are not kept.
        outputs = [
            torch.ops.stem_fast.empty_kept(inputs[0], [len(weight), batch, weight.shape[1]])
            for weight in (weights if trained else weights[-1:])
        ]
        parts = [tensor.unbind() for tensor in outputs]
        layers = [(w.unbind(), b.unbind()) for w, b in zip(weights, biases, strict=True)]
        for e, n in enumerate(reads):
            x = inputs[n]
            for layer, (weight, bias) in enumerate(layers):
                x = batched.one_linear(x, weight[e], bias[e])
                if trained or layer == last:
                    x = batched.write(x, True, parts[layer if trained else 0][e])
                else:
                    x.relu_()
        ctx.reads, ctx.masks, ctx.count = reads, (see, learn), count
        ctx.save_for_backward(logits, *inputs, *weights, *outputs)
        return torch.ops.stem_fast.mixture(outputs[-1], logits, see, learn).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        inputs, saved = saved[: ctx.count], saved[ctx.count :]
        layers = len(saved) // 2
        weights, outputs = saved[:layers], saved[layers:]
        logits_type, *types = ctx.types
        wide = torch.promote_types(logits.dtype, torch.float32)
        # needs_input_grad: of reads, see, learn, dtype, trained, logits, N, then of each tensor.
        wanted = ctx.needs_input_grad[7 : 7 + ctx.count]
        kinds, types = types[: ctx.count], types[ctx.count :: 2]
        dweights = [torch.empty_like(w, dtype=t) for w, t in zip(weights, types, strict=True)]
        dbiases = [weight.new_empty(weight.shape[:2]) for weight in dweights]
        # Side by side, where batched.unbind finds them.
        dinputs = inputs[0].new_empty(ctx.count, *inputs[0].shape, dtype=wide)
        seen = set[int]()
        see, learn = ctx.masks
        p = reference.gate_weights(logits.to(wide), see)
        # In float32 oneDNN has the gradient of a weight a tenth faster, if d lies column by column;
        # but not of an empty batch.
        by_columns = logits.dtype == torch.float32 and batched.onednn(logits) and len(grads[0]) > 0
        dp = torch.empty_like(p)
        dps = dp.unbind(2)
        # An expert's parts, layer by layer: cheaper than an index for each.
        ws, ys, dws = ([t.unbind() for t in each] for each in (weights, outputs, dweights))
        for e, n in enumerate(ctx.reads):
            d, own = torch.ops.stem_fast.mixture_expert_backward(grads, ys[-1][e], p, learn, e)
            dps[e].copy_(own)
            for layer in reversed(range(layers)):
                x = ys[layer - 1][e] if layer else inputs[n]
                columns = d.new_empty(d.shape[1], len(d)) if by_columns else None
                dbiases[layer][e] = torch.ops.stem_fast.relu_backward(d, ys[layer][e], columns)
                dweight = dws[layer][e]
                if columns is not None:
                    dweight.copy_(_times(columns, x))
                    del columns  # before the next ones are made
                elif dweight.dtype == d.dtype:
                    torch.mm(d.T, x, out=dweight)
                else:
                    dweight.copy_(torch.mm(d.T, x))
                if layer:
                    d = _times(d, ws[layer][e])
            if wanted[n]:
                join = dinputs[n].add_ if n in seen else dinputs[n].copy_
                join(_times(d, ws[0][e]))
                seen.add(n)
        dlogits = reference.softmax_backward(p, dp).to(logits_type)
        for n, want in enumerate(wanted):
            if want and n not in seen:  # no expert reads it
                dinputs[n].zero_()
        found = [
            d.to(kind) if want else None
            for d, want, kind in zip(dinputs.unbind(), wanted, kinds, strict=True)
        ]
        parameters = [g for pair in zip(dweights, dbiases, strict=True) for g in pair]
        return None, None, None, None, None, dlogits, None, *found, *parameters
