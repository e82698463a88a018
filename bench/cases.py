"""What is measured: an op in a setting, who computes it, what is right, what it must move.

A :class:`Case` holds one op's inputs and its contenders: ours; the official formulation
(LiangcaiSu/STEM, ``models/STEM.py`` and FuxiCTR's embedding layers) in eager PyTorch and under
torch.compile; PyTorch's and FBGEMM's embedding ops; and a ceiling, which moves as many bytes in the
same pattern and computes nothing. All of them read the same inputs and get the same upstream
gradients. Peers are given views, lists and index layouts as they like them, outside the time.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stem_fast import ops, reference
from stem_fast.inference import FEW
from stem_fast.model import STEMNet

OURS = "stem_fast"


class Setting(NamedTuple):
    """Sizes of a model and its batch; ``rows`` is the whole table's, one field has rows/fields."""

    batch: int
    rows: int
    specific: int  # experts of each task
    shared: int
    width: int  # H
    fields: int = 8
    dim: int = 16
    tasks: int = 2
    layers: int = 1  # of whole models (bench/contenders.py); an op is of one layer

    @property
    def spaces(self) -> int:
        return self.tasks + 1

    @property
    def experts(self) -> int:
        return self.tasks * self.specific + self.shared


SETTINGS = {
    "tiktok": Setting(batch=4096, rows=600_000, specific=1, shared=8, width=512),
    "tall": Setting(batch=4096, rows=10_000_000, specific=1, shared=8, width=512),
    "large": Setting(batch=16384, rows=10_000_000, specific=1, shared=22, width=256),
    "tiny": Setting(batch=64, rows=800, specific=1, shared=2, width=24),  # for tests of the bench
}
DEFAULT_SETTINGS = ("tiktok", "large")


class NotInstalledError(Exception):
    """A contender whose library or compiler is not on this machine."""


class Contender(NamedTuple):
    """``run`` is timed, once a round, on what ``prepare`` (not timed) returns."""

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple


@dataclass
class Case:
    """One op in one setting."""

    moved: int  # bytes: every input read once, every output written once
    ceilings: tuple[str, ...]  # the contenders that say how fast bytes move at best
    ceiling_moved: int  # bytes that one run of them moves
    contenders: dict[str, Callable[[], Contender]]  # built when they are first needed
    check: Callable[[Any], None]  # raises AssertionError unless it is given the right result


def zipf(rows: int, shape: tuple[int, int], exponent: float, draw: torch.Generator) -> Tensor:
    """Ids 1 .. rows-1 with P(id) ~ id ** -exponent, as vocabularies sorted by count give them."""
    odds = torch.arange(1, rows, dtype=torch.float64) ** -exponent
    uniform = torch.rand(shape, generator=draw, dtype=torch.float64) * odds.sum()
    return torch.searchsorted(odds.cumsum(0), uniform).clamp(max=rows - 2) + 1


def size(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``function`` under torch.compile, which forgets what it compiled before."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise NotInstalledError("triton")
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
        raise NotInstalledError("a C++ compiler")
    torch.compiler.reset()  # else the settings before count against its limit of recompilations
    return torch.compile(function, dynamic=False)


def copy_ceiling(moved: int, device: str) -> Contender:
    """A copy that moves ``moved`` bytes, half of them read and half written."""
    source = torch.ones(moved // 8, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source))


GATHERS = ("gather, index_select", "gather, stem_fast")


def gather_ceilings(
    table: Tensor, ids: Tensor, offsets: Tensor
) -> dict[str, Callable[[], Contender]]:
    """Whole rows of a table in the order of the ids: PyTorch's way, into a buffer that is there
    already, and our kernel's, of one space and without sums, where it is the faster one."""
    index = (ids + offsets).flatten()
    target = table.new_empty(len(index), table.shape[1])
    gathers = (
        lambda: Contender(lambda: torch.index_select(table, 0, index, out=target)),
        lambda: Contender(lambda: ops.lookup(table, ids, offsets, 1)),
    )
    return dict(zip(GATHERS, gathers, strict=True))


# Lookup


class LookupInputs(NamedTuple):
    setting: Setting
    weight: Tensor  # [R, G*D]
    ids: Tensor  # int64 [B, F]
    offsets: Tensor  # [F]
    grad_x: Tensor  # [G, B, F*D]
    grad_z: Tensor  # [T, B, F*D]

    @property
    def sums(self) -> list[int]:
        """What the gates of the tasks read: x[t] + x[T]."""
        return [1 << t | 1 << self.setting.tasks for t in range(self.setting.tasks)]

    @property
    def gradients(self) -> list[Tensor]:
        return [*self.grad_x.unbind(), *self.grad_z.unbind()]

    @property
    def rows(self) -> Tensor:
        """Arena rows in the order of ids.flatten()."""
        return (self.ids + self.offsets).flatten()

    def tables(self) -> list[Tensor]:
        """One [V_f, G*D] a field: the same memory as the arena, so the same place in caches."""
        return list(self.weight.split(self.setting.rows // self.setting.fields))


@functools.lru_cache(maxsize=1)  # the large arena is 1.9 GB
def lookup_inputs(setting: Setting, device: str) -> LookupInputs:
    draw = torch.Generator().manual_seed(1)
    s = setting
    vocab = s.rows // s.fields
    weight = torch.empty(s.rows, s.spaces * s.dim).uniform_(-1, 1, generator=draw)
    weight[::vocab] = 0  # padding rows
    ids = zipf(vocab, (s.batch, s.fields), 1.1, draw)
    grad_x = torch.randn(s.spaces, s.batch, s.fields * s.dim, generator=draw)
    grad_z = torch.randn(s.tasks, s.batch, s.fields * s.dim, generator=draw)
    parts = weight, ids, torch.arange(s.fields) * vocab, grad_x, grad_z
    return LookupInputs(s, *(part.to(device) for part in parts))


def official_lookup(
    tables: Sequence[Tensor], ids: Tensor, dim: int, sparse: bool = False
) -> list[Tensor]:
    """FuxiCTR's FeatureEmbedding, then STEM.forward's split and its gates' inputs."""
    rows = [F.embedding(ids[:, f], t, padding_idx=0, sparse=sparse) for f, t in enumerate(tables)]
    x = [space.flatten(1) for space in torch.stack(rows, 1).split(dim, 2)]
    return [*x, *(own + x[-1] for own in x[:-1])]


def spaces_of(rows: Tensor, setting: Setting) -> list[Tensor]:
    """[B, F, G*D] to what :func:`official_lookup` returns: the reshaping a table's op needs."""
    x = rows.unflatten(2, (setting.spaces, setting.dim)).permute(2, 0, 1, 3).flatten(2)
    return [*x.unbind(), *(x[:-1] + x[-1]).unbind()]


def bag_lookup(weight: Tensor, rows: Tensor, starts: Tensor, setting: Setting) -> list[Tensor]:
    """nn.EmbeddingBag over one table, a bag for each id."""
    found = F.embedding_bag(rows, weight, starts, mode="sum")
    return spaces_of(found.view(setting.batch, setting.fields, -1), setting)


def fbgemm(device: str) -> tuple[Any, Any]:
    """FBGEMM's modules (common, training) of table-batched embeddings (TBE), on CPU."""
    if importlib.util.find_spec("fbgemm_gpu") is None:
        raise NotInstalledError("fbgemm-gpu-cpu (1.8.0 works with torch 2.13)")
    if device != "cpu":
        raise NotInstalledError("fbgemm-gpu for CUDA")
    module = "fbgemm_gpu.split_table_batched_embeddings_ops"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that its CPU build does not have
        common, training = (
            importlib.import_module(f"{module}_{part}") for part in ("common", "training")
        )
    return common, training


def fbgemm_lookup(inputs: LookupInputs) -> Callable[[], list[Tensor]]:
    """FBGEMM's TBE and the reshaping it needs.

    Without pooling, which is its faster mode here, without its check of bounds, and with ids
    already in its layout, field by field.
    """
    common, training = fbgemm(inputs.ids.device.type)
    s = inputs.setting
    place = common.EmbeddingLocation.HOST, training.ComputeDevice.CPU
    width = s.spaces * s.dim
    table = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(s.rows // s.fields, width, *place)] * s.fields,
        pooling_mode=common.PoolingMode.NONE,
        bounds_check_mode=common.BoundsCheckMode.NONE,
    )
    table.weights_host = torch.nn.Parameter(inputs.weight.flatten(), requires_grad=False)
    ids = inputs.ids.T.flatten()
    starts = torch.arange(len(ids) + 1)

    def run() -> list[Tensor]:
        rows = table(ids, starts).view(s.fields, s.batch, width)
        return spaces_of(rows.transpose(0, 1), s)

    return run


def lookup_forward(setting: Setting, device: str) -> Case:
    inputs = lookup_inputs(setting, device)
    s, weight, ids, offsets, grad_x, grad_z = inputs
    tables, sums = inputs.tables(), inputs.sums
    x, z = reference.lookup(weight, ids, offsets, s.spaces, sums)
    expected = [*x.unbind(), *z.unbind()]

    def check(actual: Any) -> None:
        if len(actual) == 2:  # ours: [G, B, F*D] and [T, B, F*D]
            actual = [*actual[0].unbind(), *actual[1].unbind()]
        # Copies, and sums of two terms: there is one right result.
        for name, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert torch.equal(a, b), f"output {name} differs from the reference"

    def bag() -> Contender:
        rows = inputs.rows
        starts = torch.arange(len(rows), device=device)
        return Contender(lambda: bag_lookup(weight, rows, starts, s))

    def compiled_official() -> Contender:
        function = compiled(official_lookup, device)
        return Contender(lambda: function(tables, ids, s.dim))

    # A gather reads and writes what x has, and reads its index.
    gathered = 2 * size(grad_x) + size(ids)
    return Case(
        moved=gathered + size(grad_z),
        ceilings=GATHERS,
        ceiling_moved=gathered,
        contenders={
            OURS: lambda: Contender(lambda: ops.lookup(weight, ids, offsets, s.spaces, sums)),
            "official": lambda: Contender(lambda: official_lookup(tables, ids, s.dim)),
            "official, compiled": compiled_official,
            "FBGEMM TBE": lambda: Contender(torch.no_grad()(fbgemm_lookup(inputs))),
            "nn.EmbeddingBag": bag,
            **gather_ceilings(weight, ids, offsets),
        },
        check=check,
    )


def lookup_gradient(inputs: LookupInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [U], right values, allowed error) [U, G*D] of the table's gradient, in float64.

    A float32 sum in any order ends about eps * sum(|terms|) away; 8 of them is the bound.
    """
    rows, *plan = reference.row_plan(inputs.ids, inputs.offsets)

    def reduce(x: Tensor, z: Tensor) -> Tensor:
        segments, sources, scales = plan
        dim = inputs.setting.dim
        return reference.row_gradients(x, z, inputs.sums, segments, sources, scales, dim)

    x, z = inputs.grad_x.double(), inputs.grad_z.double()
    return rows, reduce(x, z), 8 * torch.finfo(torch.float32).eps * reduce(x.abs(), z.abs())


def check_rows(inputs: LookupInputs, actual: Tensor) -> None:
    """``actual``: float32 gradient of the rows that the ids name."""
    _, expected, allowed = lookup_gradient(inputs)
    worst = ((actual.double() - expected).abs() - allowed).max().item()
    assert worst <= 0, f"a row's gradient is {worst:.1e} beyond its rounding error"


def lookup_backward(setting: Setting, device: str) -> Case:
    """The dense gradient of the table, from gradients of the lookup's outputs."""
    inputs = lookup_inputs(setting, device)
    s, _, ids, offsets, grad_x, grad_z = inputs

    def backward(forward: Callable[[list[Tensor]], Sequence[Tensor]], one: bool) -> Contender:
        """``forward`` of one table or of one a field; only the backward is in the time."""

        def prepare() -> tuple[Any, ...]:
            leaves = [inputs.weight] if one else inputs.tables()
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            outputs = forward(leaves)
            return outputs, leaves, grads if len(outputs) == 2 else inputs.gradients

        return Contender(torch.autograd.grad, prepare)

    grads = [grad_x, grad_z]

    def check(actual: Any) -> None:
        dense = torch.cat(actual) if len(actual) > 1 else actual[0]
        named = dense[lookup_gradient(inputs)[0]]
        check_rows(inputs, named)
        elsewhere = dense.count_nonzero() - named.count_nonzero()
        assert elsewhere == 0, f"{elsewhere} gradients of rows that no id names are not zero"

    def official() -> Contender:
        return backward(lambda tables: official_lookup(tables, ids, s.dim), one=False)

    def compiled_official() -> Contender:
        function = compiled(official_lookup, device)
        return backward(lambda tables: function(tables, ids, s.dim), one=False)

    def bag() -> Contender:
        rows = inputs.rows
        starts = torch.arange(len(rows), device=device)
        return backward(lambda tables: bag_lookup(tables[0], rows, starts, s), one=True)

    def ours() -> Contender:
        return backward(
            lambda tables: ops.lookup(tables[0], ids, offsets, s.spaces, inputs.sums), one=True
        )

    moved = size(grad_x, grad_z, ids, inputs.weight)
    return Case(
        moved=moved,
        ceilings=("copy",),
        ceiling_moved=moved,
        contenders={
            OURS: ours,
            "official": official,
            "official, compiled": compiled_official,
            "nn.EmbeddingBag": bag,
            "copy": lambda: copy_ceiling(moved, device),
        },
        check=check,
    )


def lookup_backward_rows(setting: Setting, device: str) -> Case:
    """The gradient of the batch's rows alone, each row once: for ours the row plan is in the time,
    for peers ``coalesce``."""
    inputs = lookup_inputs(setting, device)
    s, weight, ids, offsets, grad_x, grad_z = inputs
    plan = reference.row_plan(ids, offsets)
    slots = grad_x.unflatten(2, (s.fields, s.dim)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)

    def check(actual: Any) -> None:
        rows, values = actual
        real = rows != 0  # on CUDA a plan ends with empty segments of row 0
        assert torch.equal(rows[real], plan[0]), "not the batch's rows"
        check_rows(inputs, values[real])

    def ours() -> tuple[Tensor, Tensor]:
        rows, *rest = ops.row_plan(ids, offsets, rows=len(weight))
        return rows, torch.ops.stem_fast.row_gradients(grad_x, grad_z, inputs.sums, *rest, s.dim)

    def coalesced(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        found = [g.coalesce() for g in torch.autograd.grad(outputs, leaves, inputs.gradients)]
        if len(found) == 1:
            return found[0].indices()[0], found[0].values()
        rows = [g.indices()[0] + first for g, first in zip(found, starts, strict=True)]
        return torch.cat(rows), torch.cat([g.values() for g in found])

    starts = offsets.tolist()

    def official() -> tuple[Any, ...]:
        leaves = [table.detach().requires_grad_() for table in inputs.tables()]
        return official_lookup(leaves, ids, s.dim, sparse=True), leaves

    def one_table() -> tuple[Any, ...]:
        leaf = weight.detach().requires_grad_()
        return spaces_of(F.embedding(ids + offsets, leaf, sparse=True), s), [leaf]

    written = len(plan[0]) * (weight.shape[1] * 4 + 8)
    return Case(
        moved=size(grad_x, grad_z, ids) + written,
        ceilings=GATHERS,
        ceiling_moved=2 * size(slots) + size(plan[2]),
        contenders={
            OURS: lambda: Contender(ours),
            "official, sparse": lambda: Contender(coalesced, official),
            "nn.Embedding, sparse": lambda: Contender(coalesced, one_table),
            **gather_ceilings(slots, plan[2][:, None], torch.zeros_like(offsets[:1])),
        },
        check=check,
    )


# Mixture


class MixtureInputs(NamedTuple):
    y: Tensor  # [E, B, H]
    logits: Tensor  # [K, B, E]
    grad: Tensor  # [K, B, H]
    see: list[int]
    learn: list[int]


@functools.lru_cache(maxsize=1)
def mixture_inputs(setting: Setting, device: str) -> MixtureInputs:
    """Of a last layer: the gates of the tasks, without the shared one that nobody reads."""
    draw = torch.Generator().manual_seed(2)
    s = setting
    wiring = STEMNet.wire(s.tasks, s.specific, s.shared)
    y = torch.randn(s.experts, s.batch, s.width, generator=draw)
    logits = torch.randn(s.tasks, s.batch, s.experts, generator=draw)
    grad = torch.randn(s.tasks, s.batch, s.width, generator=draw)
    y, logits, grad = (part.to(device) for part in (y, logits, grad))
    return MixtureInputs(
        y, logits, grad, list(wiring.see[: s.tasks]), list(wiring.learn[: s.tasks])
    )


def official_mixture(
    y: Sequence[Tensor], logits: Sequence[Tensor], learn: Sequence[int]
) -> list[Tensor]:
    """STEM_Layer.forward from the experts' outputs on."""
    outputs = []
    for gate, mask in zip(logits, learn, strict=True):
        experts = [expert if mask >> e & 1 else expert.detach() for e, expert in enumerate(y)]
        outputs.append(torch.sum(gate.softmax(-1).unsqueeze(-1) * torch.stack(experts, 1), 1))
    return outputs


def check_mixture(inputs: MixtureInputs, out: Tensor, *gradients: Tensor) -> None:
    """Against float64, in parts of the batch that fit in memory.

    A sum of E (forward) or H (dlogits) rounded products: 64 ulp cover it with room.
    """
    bound = 64 * torch.finfo(torch.float32).eps
    for part in torch.arange(inputs.y.shape[1]).split(1024):
        here = slice(int(part[0]), int(part[-1]) + 1)
        y, logits, grad = (t[:, here].double() for t in (inputs.y, inputs.logits, inputs.grad))
        expected = [reference.mixture(y, logits, inputs.see, inputs.learn)]
        if gradients:
            expected += reference.mixture_backward(grad, y, logits, inputs.see, inputs.learn)
        for a, b in zip((out, *gradients), expected, strict=True):
            torch.testing.assert_close(a[:, here].double(), b, rtol=bound, atol=8 * bound)


def mixture_forward(setting: Setting, device: str) -> Case:
    inputs = mixture_inputs(setting, device)
    y, logits, grad, see, learn = inputs
    experts, gates = y.unbind(), logits.unbind()

    def check(actual: Any) -> None:
        check_mixture(inputs, actual if isinstance(actual, Tensor) else torch.stack(actual))

    def compiled_official() -> Contender:
        function = compiled(official_mixture, device)
        return Contender(lambda: function(experts, gates, learn))

    moved = size(y, logits, grad)  # the output is as large as its gradient
    return Case(
        moved=moved,
        ceilings=("copy",),
        ceiling_moved=moved,
        contenders={
            OURS: lambda: Contender(lambda: ops.mixture(y, logits, see, learn)),
            "official": lambda: Contender(lambda: official_mixture(experts, gates, learn)),
            "official, compiled": compiled_official,
            "copy": lambda: copy_ceiling(moved, device),
        },
        check=check,
    )


def mixture_forward_backward(setting: Setting, device: str) -> Case:
    inputs = mixture_inputs(setting, device)
    y, logits, grad, see, learn = inputs

    def ours() -> Contender:
        leaves = y.detach().requires_grad_(), logits.detach().requires_grad_()

        def run() -> tuple[Any, ...]:
            out = ops.mixture(*leaves, see, learn)
            return out, *torch.autograd.grad(out, leaves, grad)

        return Contender(run)

    def official(function: Callable[..., list[Tensor]]) -> Contender:
        experts = [each.detach().requires_grad_() for each in y]
        gates = [each.detach().requires_grad_() for each in logits]

        def run() -> tuple[Any, ...]:
            out = function(experts, gates, learn)
            return out, *torch.autograd.grad(out, [*experts, *gates], grad.unbind())

        return Contender(run)

    def check(actual: Any) -> None:
        out, *gradients = actual
        if isinstance(out, list):
            parts = out, gradients[: len(y)], gradients[len(y) :]
            out, *gradients = (torch.stack(part) for part in parts)
        check_mixture(inputs, out, *gradients)

    # Forward: y and logits read, the output written. Backward: both and its gradient read, theirs
    # written.
    moved = 3 * size(y, logits) + 2 * size(grad)
    return Case(
        moved=moved,
        ceilings=("copy",),
        ceiling_moved=moved,
        contenders={
            OURS: ours,
            "official": lambda: official(official_mixture),
            "official, compiled": lambda: official(compiled(official_mixture, device)),
            "copy": lambda: copy_ceiling(moved, device),
        },
        check=check,
    )


# Networks


def grouped_linear(setting: Setting, device: str) -> Case:
    """A hidden layer of all experts for a small request, which is the reading of their weights: on
    CPU in float32, on CUDA in bfloat16."""
    s, few = setting, min(setting.batch, FEW)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(s.experts, few, s.width, generator=draw)
    weight = torch.randn(s.experts, s.width, s.width, generator=draw) / s.width**0.5
    bias = torch.randn(s.experts, s.width, generator=draw)
    x, weight, bias = (part.to(device, dtype) for part in (x, weight, bias))
    reads = list(range(s.experts))
    networks = list(zip(x.unbind(), weight.unbind(), bias.unbind(), strict=True))

    def official(networks: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        return [F.linear(*each).relu() for each in networks]

    def compiled_official() -> Contender:
        function = compiled(official, device)
        return Contender(lambda: function(networks))

    def check(actual: Any) -> None:
        found = actual if isinstance(actual, Tensor) else torch.stack(actual)
        exact = reference.grouped_linear(x.double(), reads, weight.double(), bias.double(), True)
        bound = (64 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=bound, atol=bound)

    moved = size(weight, bias) + 2 * size(x)  # the output is as large as the input
    op = torch.ops.stem_fast.grouped_linear
    return Case(
        moved=moved,
        ceilings=("copy",),
        ceiling_moved=moved,
        contenders={
            OURS: lambda: Contender(lambda: op(x, reads, weight, bias, True)),
            "official": lambda: Contender(lambda: official(networks)),
            "official, compiled": compiled_official,
            "copy": lambda: copy_ceiling(moved, device),
        },
        check=check,
    )


def grouped_linear_backward(setting: Setting, device: str) -> Case:
    """The gradient of a training batch in bfloat16 through a hidden layer of all experts, the ReLU
    below it and to that one's bias. Its ceiling is the product alone."""
    s, dtype = setting, torch.bfloat16

    @functools.cache  # made for a contender that runs: 0.8 GB in the setting "large"
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(7)
        grad = torch.randn(s.experts, s.batch, s.width, generator=draw)
        weight = torch.randn(s.experts, s.width, s.width, generator=draw) / s.width**0.5
        y = torch.randn(s.experts, s.batch, s.width, generator=draw).relu()
        return grad.to(device, dtype), weight.to(device, dtype), y.to(device, dtype)

    def torchs(grad: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        d = torch.where(y > 0, torch.bmm(grad, weight), 0)
        return d, d.sum(1, dtype=torch.float32)

    def contender(run: Callable[[Tensor, Tensor, Tensor], Any]) -> Contender:
        if device != "cuda":
            raise NotInstalledError("a CUDA device (on CPU experts train one by one)")
        given = inputs()
        return Contender(lambda: run(*given))

    def check(actual: Any) -> None:
        if not isinstance(actual, tuple):  # the product alone
            return
        exact = reference.grouped_linear_backward(*(t.float() for t in inputs()))
        for found, right, scale in zip(actual, exact, (1, s.batch**0.5), strict=True):
            torch.testing.assert_close(found.float(), right, rtol=0.02, atol=0.02 * scale)

    # The gradient, the weights and y are read, the new gradient is written.
    moved = dtype.itemsize * s.experts * s.width * (3 * s.batch + s.width)
    op = torch.ops.stem_fast.grouped_linear_backward
    return Case(
        moved=moved,
        ceilings=("product alone",),
        ceiling_moved=moved,
        contenders={
            OURS: lambda: contender(op),
            "torch": lambda: contender(torchs),
            "torch, compiled": lambda: contender(compiled(torchs, device)),
            "product alone": lambda: contender(lambda grad, weight, y: torch.bmm(grad, weight)),
        },
        check=check,
    )


def task_losses(setting: Setting, device: str) -> Case:
    """Forward and backward pass of the loss of binary tasks that all have their labels."""
    draw = torch.Generator().manual_seed(6)
    logits = torch.randn(setting.tasks, setting.batch, generator=draw).to(device)
    labels = torch.rand(setting.batch, setting.tasks, generator=draw).round().to(device)
    regression = [0] * setting.tasks

    def contender(loss: Callable[[Tensor], Tensor]) -> Contender:
        leaf = logits.detach().requires_grad_()

        def run() -> tuple[Tensor, Tensor]:
            out = loss(leaf)
            return out, torch.autograd.grad(out, leaf)[0]

        return Contender(run)

    def official(x: Tensor) -> Tensor:
        """MultiTaskModel.compute_loss, with the sigmoids that it is given."""
        pairs = zip(x.sigmoid().unbind(), labels.unbind(1), strict=True)
        return torch.stack([F.binary_cross_entropy(p, y) for p, y in pairs]).sum()

    def check(actual: Any) -> None:
        x = logits.double()
        total = F.binary_cross_entropy_with_logits(x, labels.T.double(), reduction="sum")
        slope = x.sigmoid() - labels.T
        for found, exact in zip(actual, (total, slope), strict=True):
            bound = 64 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(
                found.double(), exact / setting.batch, rtol=bound, atol=bound / setting.batch
            )

    moved = 2 * size(logits, labels) + size(logits)
    return Case(
        moved=moved,
        ceilings=("copy",),
        ceiling_moved=moved,
        contenders={
            OURS: lambda: contender(lambda x: ops.task_losses(x.T, labels, regression).sum()),
            "official": lambda: contender(official),
            "official, compiled": lambda: contender(compiled(official, device)),
            "copy": lambda: copy_ceiling(moved, device),
        },
        check=check,
    )


OPS = {
    "lookup_forward": lookup_forward,
    "lookup_backward": lookup_backward,
    "lookup_backward_rows": lookup_backward_rows,
    "mixture_forward": mixture_forward,
    "mixture_forward_backward": mixture_forward_backward,
    "grouped_linear": grouped_linear,
    "grouped_linear_backward": grouped_linear_backward,
    "task_losses": task_losses,
}
