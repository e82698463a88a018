"""Groups of networks of linear layers and ReLUs as one step of autograd: gates and towers, on CUDA
experts too.

On CUDA a layer of E networks is one batched product, not E small ones that leave the device half
idle, with its bias and ReLU. Nothing there waits for the device, so that a step can be captured in
a CUDA graph (after one that was not: tables of what reads what are copied to the device once). On
CPU networks go one after the other, without the copies that stacking and unstacking their outputs
would take.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stem_fast import ops


class Layer(NamedTuple):
    """A linear layer of E networks, with or without a ReLU after it."""

    weight: Tensor  # [E, O, I]
    bias: Tensor  # [E, O]
    relu: bool


def networks(
    inputs: Sequence[Tensor],
    reads: Sequence[int],
    layers: Sequence[Layer],
    *,
    masked: bool = False,
    together: bool | None = None,
) -> Tensor:
    """The first n networks of ``layers``, network e on ``inputs[reads[e]]``, as one autograd step.

    Under autocast layers with a ReLU run in its type, one without in its own: weights are cast once
    a step, and every gradient is rounded once to the type of its layer.

    Args:
        inputs: N of [B, I].
        reads: n indices into them.
        layers: all but the last with a ReLU.
        masked: whether the gradient of the result comes with zeros where its ReLU is off.
        together: whether the networks of a layer are one product; None: on CUDA.

    Returns:
        [n, B, O].
    """
    device, own = layers[0].weight.device.type, layers[0].weight.dtype
    dtype = product_type(layers[0].weight)
    relus = tuple(layer.relu for layer in layers)
    types = tuple(dtype if relu else own for relu in relus)
    parameters = [layer.weight for layer in layers] + [layer.bias for layer in layers]
    with torch.autocast(device, enabled=False):
        return _Networks.apply(
            tuple(reads),
            relus,
            types,
            masked,
            device == "cuda" if together is None else together,
            len(inputs),
            *inputs,
            *parameters,
        )


def product_type(weight: Tensor) -> torch.dtype:
    """What products with a weight run in: its own type, or autocast's in place of float32."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def stacked(inputs: Sequence[Tensor]) -> Tensor:
    """N of [B, I] as [N, B, I]: a view where they lie side by side, as one tensor's parts do."""
    first = inputs[0]
    if len(inputs) == 1:
        return first[None]
    start = first.storage_offset()
    step = inputs[1].storage_offset() - start
    memory = first.untyped_storage().data_ptr()
    if step < 0 or any(
        x.untyped_storage().data_ptr() != memory
        or x.storage_offset() != start + n * step
        or x.shape != first.shape
        or x.stride() != first.stride()
        or x.dtype != first.dtype
        for n, x in enumerate(inputs)
    ):
        return torch.stack(list(inputs))
    size = len(inputs), *first.shape
    return first.as_strided(size, (step, *first.stride()), start)


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # A second derivative goes through a copy: a view is connected to one part alone.
        return torch.stack(grads) if torch.is_grad_enabled() else stacked(grads)


def unbind(x: Tensor) -> tuple[Tensor, ...]:
    """``x.unbind()`` whose gradient is not copied where the parts of it lie side by side, as the
    networks here make them."""
    parts: tuple[Tensor, ...] = x.unbind() if ops.step_by_step() else _Unbind.apply(x)
    return parts


def fused(dtype: torch.dtype) -> bool:
    """Whether our products in a type add the bias to what is in registers; in float32, TF32 and
    float64 cuBLAS's are faster or rounded better."""
    return dtype.itemsize == 2


def linear(x: Tensor, reads: Sequence[int], weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """:func:`stem_fast.reference.grouped_linear` the faster way for its type, for x [N, B, I]."""
    if fused(x.dtype):
        return torch.ops.stem_fast.grouped_linear(x, list(reads), weight, bias, relu)
    y = x.new_empty(len(reads), x.shape[1], weight.shape[1])
    for run, part in _runs(x, reads):
        torch.bmm(part, weight[run].mT, out=y[run])
    torch.ops.stem_fast.bias_relu(y, bias[: len(reads)], relu)
    return y


def one_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of one network, [B, I] -> [B, O], on CPU by oneDNN, a tenth faster than MKL.

    Its ReLU in the same pass would turn NaN into 0, and hide from everybody that a model is lost.
    """
    if onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return F.linear(x, weight, bias)


def onednn(x: Tensor) -> bool:
    """Whether oneDNN has the products of such a tensor, and has them faster."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bf16 = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32 or bool(bf16)


def packed(weight: Tensor) -> list[Tensor]:
    """Weights [E, O, I] of E networks as :func:`one_linear` takes them soonest: where oneDNN has
    their products, in its own layout, which it otherwise makes at every call."""
    if not onednn(weight):
        return list(weight.unbind())
    return [torch.ops.mkldnn._reorder_linear_weight(each) for each in weight.unbind()]


def _one_by_one(
    x: Tensor, reads: Sequence[int], weight: Tensor, bias: Tensor, relu: bool
) -> Tensor:
    """:func:`linear`, network by network."""
    # Not kept: these are small, and while they lay idle the experts would need as much beside them.
    y = x.new_empty(len(reads), x.shape[1], weight.shape[1])
    inputs, parts = x.unbind(), (y.unbind(), weight.unbind(), bias.unbind())
    for n, out, w, b in zip(reads, *parts, strict=False):
        write(one_linear(inputs[n], w, b), relu, out)
    return y


def write(product: Tensor, relu: bool, out: Tensor) -> Tensor:
    """A product, with its ReLU, into memory where others of its layer are."""
    return torch.clamp_min(product, 0, out=out) if relu else out.copy_(product)


def _products(a: Tensor, b: Tensor, out: Tensor, together: bool) -> Tensor:
    """``out[e] = a[e] @ b[e]``."""
    if together:
        return torch.bmm(a, b, out=out)
    for one, other, product in zip(a.unbind(), b.unbind(), out.unbind(), strict=True):
        torch.mm(one, other, out=product)
    return out


def _runs(x: Tensor, reads: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Networks one after the other that read the same of inputs [N, B, I], or one input each in
    their order; and what they read, [n, B, I], without a copy."""
    start = 0
    while start < len(reads):
        first, end = reads[start], start + 1
        step = reads[end] - first if end < len(reads) else 0
        while step in (0, 1) and end < len(reads) and reads[end] - reads[end - 1] == step:
            end += 1
        n = end - start
        yield slice(start, end), x[first : first + n] if step == 1 else x[first].expand(n, -1, -1)
        start = end


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copies the second of each pair into the first, by a kernel for each type there is."""
    kinds: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for into, value in pairs:
        kinds.setdefault((into.dtype, value.dtype), []).append((into, value))
    for same in kinds.values():
        torch._foreach_copy_([into for into, _ in same], [value for _, value in same])


def _cast(tensors: Sequence[Tensor], types: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors in other types."""
    cast = [
        t if t.dtype == dtype else torch.empty_like(t, dtype=dtype)
        for t, dtype in zip(tensors, types, strict=True)
    ]
    _copy([(new, old) for new, old in zip(cast, tensors, strict=True) if new is not old])
    return cast


def _bias_gradient(d: Tensor, y: Tensor, relu: bool) -> Tensor:
    """The gradient [n, O] of a layer's bias, from that of its output [n, B, O], which is masked in
    place where the layer's ReLU is off."""
    if not relu:
        return d.sum(1, dtype=torch.promote_types(d.dtype, torch.float32))
    op = torch.ops.stem_fast.relu_backward
    if d.is_cpu:  # the C++ version takes one network
        return torch.stack([op(*each) for each in zip(d, y, strict=True)])
    return op(d, y)


def _zero_gradients(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """Zeros for the gradients of weights and of biases, by one kernel."""
    shapes = [w.shape for w in weights] + [w.shape[:2] for w in weights]
    sizes = [shape.numel() for shape in shapes]
    flat = weights[0].new_zeros(sum(sizes), dtype=dtype)
    parts = [part.view(s) for part, s in zip(flat.split(sizes), shapes, strict=True)]
    return parts[: len(weights)], parts[len(weights) :]


def _input_gradients(
    dx: Tensor, reads: Sequence[int], types: Sequence[torch.dtype]
) -> list[Tensor]:
    """Sums of dx [n, B, I] over the networks that read the same input, each rounded once to the
    input's type; side by side, where :func:`unbind` finds them."""
    kind = functools.reduce(torch.promote_types, types)
    if list(reads) == list(range(len(types))):
        found = dx.to(kind)
    else:
        found = dx.new_empty(len(types), *dx.shape[1:], dtype=kind)
        wide = torch.promote_types(dx.dtype, kind)  # torch adds bfloat16 up in float32
        single = []
        for i, out in enumerate(found.unbind()):
            readers = [n for n, read in enumerate(reads) if read == i]
            if not readers:
                out.zero_()
            elif len(readers) == 1:
                single.append((out, dx[readers[0]]))
            else:
                first, end = readers[0], readers[-1] + 1
                apart = end - first != len(readers)
                part = torch.stack([dx[n] for n in readers]) if apart else dx[first:end]
                if kind == wide:
                    torch.sum(part, 0, dtype=wide, out=out)
                else:
                    single.append((out, part.sum(0, dtype=wide)))
        _copy(single)
    return [each.to(own) for each, own in zip(found.unbind(), types, strict=True)]


class _Networks(torch.autograd.Function):
    """Inputs: reads, relus, types, masked, together, N, N inputs, every layer's weight, every
    layer's bias."""

    @staticmethod
    def forward(
        ctx: Any,
        reads: tuple[int, ...],
        relus: tuple[bool, ...],
        types: tuple[torch.dtype, ...],
        masked: bool,
        together: bool,
        count: int,
        *tensors: Tensor,
    ) -> Tensor:
        inputs, parameters = tensors[:count], tensors[count:]
        ctx.kinds = [x.dtype for x in inputs]
        cast = _cast(parameters, types * 2)
        weights, biases = cast[: len(relus)], cast[len(relus) :]
        x = stacked(inputs).to(types[0])
        outputs: list[Tensor] = []
        for layer, relu in enumerate(relus):
            # After the first layer every network reads its own.
            y, those = (outputs[-1], range(len(reads))) if outputs else (x, reads)
            run = linear if together else _one_by_one
            outputs.append(run(y.to(types[layer]), those, weights[layer], biases[layer], relu))
        ctx.reads, ctx.types, ctx.together = reads, types, together
        # Of what a gradient is yet to be masked by.
        ctx.relus = (*relus[:-1], relus[-1] and not masked)
        ctx.save_for_backward(x, *weights, *outputs)
        ctx.own = parameters[0].dtype
        return outputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        n, layers, count = len(ctx.reads), len(ctx.relus), len(ctx.kinds)
        weights, outputs = saved[:layers], saved[layers:]
        wanted = any(ctx.needs_input_grad[6 : 6 + count])
        if n == len(weights[0]):
            dweights = [torch.empty_like(weight, dtype=ctx.own) for weight in weights]
            dbiases: list[Tensor] = []
        else:  # some networks did not run
            dweights, dbiases = _zero_gradients(weights, ctx.own)
        made: list[Tensor] = []  # gradients of biases, the last layer's first
        late: list[tuple[Tensor, Tensor]] = []  # gradients made elsewhere or in another type
        d = grad
        if ctx.relus[-1]:
            d = d.clone(memory_format=torch.contiguous_format)  # which is changed
        dbias: Tensor | None = None  # of the layer, where the one above has made it
        for layer in reversed(range(layers)):
            d = d.to(ctx.types[layer])
            if dbias is None:
                dbias = _bias_gradient(d, outputs[layer], ctx.relus[layer])
            made.append(dbias)
            dbias = None
            dweight = dweights[layer][:n]
            if dweight.dtype != d.dtype:
                late.append((dweight, torch.empty_like(dweight, dtype=d.dtype)))
                dweight = late[-1][1]
            if layer:
                _products(d.mT, outputs[layer - 1].to(d.dtype), dweight, ctx.together)
            else:
                for run, part in _runs(x, ctx.reads):
                    _products(d[run].mT, part, dweight[run], ctx.together)
            half = d.dtype.itemsize == 2 and outputs[layer - 1].dtype == d.dtype
            if layer and half and ctx.together and ctx.relus[layer - 1]:
                through = torch.ops.stem_fast.grouped_linear_backward
                d, dbias = through(d, weights[layer], outputs[layer - 1])
            elif layer or wanted:
                dx = d.new_empty(n, d.shape[1], weights[layer].shape[2])
                d = _products(d, weights[layer][:n], dx, ctx.together)
        if dbiases:
            late += [(all[:n], own) for all, own in zip(dbiases, reversed(made), strict=True)]
        else:
            dbiases = [each.to(ctx.own) for each in reversed(made)]
        _copy(late)
        dinputs = _input_gradients(d, ctx.reads, ctx.kinds) if wanted else [None] * count
        return None, None, None, None, None, None, *dinputs, *dweights, *dbiases
