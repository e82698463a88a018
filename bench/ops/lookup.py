"""What is measured of the lookup and its two gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import (
    GATHERS,
    OURS,
    Case,
    Contender,
    Setting,
    compiled,
    copy_ceiling,
    fbgemm,
    gather_ceilings,
    size,
    zipf,
)
from stem_fast import ops, reference


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


OPS = {
    "lookup_forward": lookup_forward,
    "lookup_backward": lookup_backward,
    "lookup_backward_rows": lookup_backward_rows,
}
