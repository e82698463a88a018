"""A model made ready to serve: lookup, experts, mixture and towers with nothing of training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stem_fast import ops
from stem_fast.nn import batched
from stem_fast.nn import precision as precisions
from stem_fast.nn.grouped import GroupedLinear, GroupedMLP

if TYPE_CHECKING:
    from stem_fast.models.network import Sequences, STEMNet

# Rows that go through the network together: on CPU the outputs of all experts stay in the cache, on
# CUDA they fit the memory.
CHUNK, CUDA_CHUNK = 1024, 65536
# Up to as many rows, on CPU, the weights of a group are read as they are, once; beyond, networks
# are products, one after the other, of weights in oneDNN's layout. On CUDA they all run at once.
FEW = 16
# Kinds of requests, by the shapes of their tensors, whose CUDA graphs are kept: the newest ones.
GRAPHS = 32


class Inference:
    """``STEMNet.predict`` with everything prepared that does not depend on the batch.

    Networks of linear layers and ReLUs run ``CHUNK`` rows at a time, with copies of the weights
    cast once: make a new one after training on. The table is the model's own. Models with batch
    norm or other activations run as in ``predict``, with the model's own weights. fp64 runs a copy
    of the whole model.

    On CUDA a request may lie on the CPU, and is a CUDA graph: captured at the first request of its
    shapes, launched at once afterwards. Threads may share one Inference.

    Args:
        model: on the device to predict on.
        precision: fp32, bf16, tf32 or fp64 (:mod:`stem_fast.nn.precision`).

    Raises DataError for a precision that the device cannot do.
    """

    def __init__(self, model: STEMNet, precision: str = "fp32") -> None:
        device = model.embedding.weight.device
        precisions.check(precision, device)
        model.embedding.flush()
        if precision == "fp64" and model.embedding.weight.dtype != torch.float64:
            model = copy.deepcopy(model).double()
        self.model, self.precision, self.device = model, precision, device
        self.graphs: dict[tuple[Any, ...], _Graph] = {}
        self.lock = threading.RLock()
        self.parts: tuple[Any, Any, Any] | None = None
        groups = [*model.experts, *model.gate_mlps, model.towers]
        if all(_is_plain(group) for group in groups):
            dtype = torch.bfloat16 if precision == "bf16" else model.embedding.weight.dtype
            layers = len(model.experts)
            kinds = [_Experts if i < layers else _PlainMLP for i in range(len(groups))]
            at_once = device.type != "cpu"
            plain = [kind(group, dtype, at_once) for kind, group in zip(kinds, groups, strict=True)]
            self.parts = plain[:layers], plain[layers:-1], plain[-1]

    def __call__(
        self, ids: Tensor, numeric: Tensor | None = None, sequences: Sequences | None = None
    ) -> Tensor:
        """Probabilities (for regression tasks: values) [B, T], of the model's type (fp64: float64);
        arguments and errors as for the model's call."""
        if self.device.type != "cuda":
            return self._now(ids, numeric, sequences)
        tensors, names = [ids] if numeric is None else [ids, numeric], []
        for name, given in (sequences or {}).items():
            names.append((name, isinstance(given, Tensor)))
            tensors += [given] if isinstance(given, Tensor) else _with_room(*given)
        if not ops.capturable():
            return self._now(*self._given(tensors, numeric is None, names))
        kind = (
            self.model.embedding.weight.data_ptr(),  # elsewhere if the model was moved
            numeric is None,
            *names,
            *((tensor.shape, tensor.dtype) for tensor in tensors),
        )
        with self.lock, torch.cuda.device(self.device):
            self.model.embedding.flush()
            graph = self.graphs.pop(kind, None) or self._capture(tensors, numeric is None, names)
            self.graphs[kind] = graph  # as the newest
            if len(self.graphs) > GRAPHS:
                oldest = self.graphs.pop(next(iter(self.graphs)))
                oldest.done.synchronize()  # its memory is in use until then
            return graph(tensors)

    def _capture(
        self, tensors: Sequence[Tensor], no_numeric: bool, names: Sequence[tuple[str, bool]]
    ) -> _Graph:
        own = [tensor.to(self.device, copy=True) for tensor in tensors]
        given = self._given(own, no_numeric, names)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is wrong is raised here, and kernels are compiled
            self._run(*given)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = self._run(*given)
        torch.cuda.current_stream().wait_stream(stream)
        return _Graph(graph, own, out, torch.cuda.Event())

    def _given(
        self, tensors: Sequence[Tensor], no_numeric: bool, names: Sequence[tuple[str, bool]]
    ) -> tuple[Tensor, Tensor | None, Sequences]:
        """A request's tensors, on the device, as the model takes them."""
        parts = (tensor.to(self.device) for tensor in tensors)
        ids, numeric = next(parts), None if no_numeric else next(parts)
        return (
            ids,
            numeric,
            {n: next(parts) if padded else (next(parts), next(parts)) for n, padded in names},
        )

    def _now(self, ids: Tensor, numeric: Tensor | None, sequences: Sequences | None) -> Tensor:
        """A request without a graph."""
        self.model.embedding.flush()
        return self._run(ids, numeric, sequences)

    def _autocast(self, enabled: bool) -> torch.autocast:
        """What autocast there is around a call has no part in it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def _run(self, ids: Tensor, numeric: Tensor | None, sequences: Sequences | None) -> Tensor:
        model = self.model
        with precisions.tf32(self.precision):
            if self.parts is None:
                with self._autocast(self.precision == "bf16"):
                    return model.predict(ids, numeric, sequences)
            with self._autocast(False):  # the weights are cast already
                found = model.lookup(ids, numeric, sequences)
                size = CHUNK if self.device.type == "cpu" else CUDA_CHUNK
                outputs = [
                    model._network(x, z, *self.parts)[0]
                    for x, z in zip(*(each.split(size, 1) for each in found), strict=True)
                ]
        return model._probabilities(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    out: Tensor
    done: torch.cuda.Event  # of the newest request, perhaps of another stream

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        stream = torch.cuda.current_stream()
        stream.wait_event(self.done)
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        out = self.out.clone()
        self.done.record(stream)
        return out


def _with_room(values: Tensor, offsets: Tensor) -> list[Tensor]:
    """A jagged sequence with its values padded to a power of two, so that few lengths differ."""
    room = 1 << max(len(values) - 1, 0).bit_length()
    return [F.pad(values, (0, room - len(values))), offsets]


def _is_plain(group: nn.Module) -> bool:
    assert isinstance(group, GroupedMLP)
    return all(isinstance(b, GroupedLinear | nn.ReLU | nn.Dropout) for b in group.blocks)


class _PlainMLP:
    """A GroupedMLP of linear layers and ReLUs in evaluation, called alike; its output layer is in
    the type of the model."""

    def __init__(self, group: GroupedMLP, dtype: torch.dtype, at_once: bool) -> None:
        blocks = [block for block in group.blocks if not isinstance(block, nn.Dropout)]
        self.at_once = at_once  # as on CUDA
        self.layers: list[batched.Layer] = []
        for i, block in enumerate(blocks):
            if isinstance(block, GroupedLinear):
                relu = i + 1 < len(blocks)  # an output layer has none, and is the last
                kind = dtype if relu else block.weight.dtype
                weight, bias = (p.detach().to(kind, copy=True) for p in (block.weight, block.bias))
                self.layers.append(batched.Layer(weight, bias, relu))
        self.packed = [] if at_once else [batched.packed(layer.weight) for layer in self.layers]

    def __call__(self, x: Sequence[Tensor], reads: Sequence[int]) -> Tensor:
        """N inputs [B, I] -> [n, B, O], as GroupedMLP."""
        if self.at_once:
            y, reads = self._at_once(x, reads, self.layers)
            return y
        x = [each.to(self.layers[0].weight.dtype) for each in x]
        if len(x[0]) > FEW:
            size = [len(reads), len(x[0]), self.layers[-1].weight.shape[1]]
            y = torch.ops.stem_fast.empty_kept(self.layers[-1].weight, size)
            for e, (n, out) in enumerate(zip(reads, y.unbind(), strict=True)):
                self._one(e, x[n], out)
            return y
        y = torch.stack([x[n] for n in reads])
        for weight, bias, relu in self.layers:
            y = y.to(weight.dtype)
            y = torch.ops.stem_fast.grouped_linear(y, list(range(len(y))), weight, bias, relu)
        return y

    def _at_once(
        self, x: Sequence[Tensor], reads: Sequence[int], layers: Sequence[batched.Layer]
    ) -> tuple[Tensor, Sequence[int]]:
        """N inputs [B, I] through some layers: [n, B, O], or with none [N, B, I]; and what the
        networks read of it."""
        y = batched.stacked(x)
        for weight, bias, relu in layers:
            y = batched.linear(y.to(weight.dtype), reads, weight, bias, relu)
            reads = range(len(y))
        return y, reads

    def _one(self, e: int, x: Tensor, out: Tensor) -> None:
        """Network e of [B, I], into [B, O]."""
        *hidden, (weights, last) = zip(self.packed, self.layers, strict=True)
        for packed, layer in hidden:
            x = batched.one_linear(x.to(layer.weight.dtype), packed[e], layer.bias[e]).relu_()
        x = batched.one_linear(x.to(last.weight.dtype), weights[e], last.bias[e])
        batched.write(x, last.relu, out)


class _Experts(_PlainMLP):
    """Experts, whose last layer goes into their mixture where tensor cores are."""

    def mixture(
        self, inputs: Sequence[Tensor], reads: Sequence[int], logits: Tensor, see: Sequence[int]
    ) -> Tensor:
        """As :func:`stem_fast.nn.experts.expert_mixture`, [K, B, H]."""
        *layers, (weight, bias, _) = self.layers
        if not (self.at_once and batched.fused(weight.dtype)):
            return ops.mixture(self(inputs, reads), logits, see, see)
        y, reads = self._at_once(inputs, reads, layers)
        return torch.ops.stem_fast.expert_mixture_inference(
            y.to(weight.dtype), list(reads), weight, bias, logits, ops.signed(see)
        )
