"""Embeddings of all fields in all spaces, and sums of spaces, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stem_fast import reference
from stem_fast.ops.registry import define, transformed
from stem_fast.ops.row_plan import RowPlan, narrow


@define(
    "lookup(Tensor weight, Tensor ids, Tensor offsets, int spaces, int[] sums, Tensor[] "
    "bags, int mean) -> (Tensor, Tensor)"
)
def _lookup_fake(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    spaces: int,
    sums: list[int],
    bags: list[Tensor],
    mean: int,
) -> tuple[Tensor, Tensor]:
    batch, fields = ids.shape
    width = (fields + (len(bags[1]) if bags else 0)) * (weight.shape[1] // spaces)
    return weight.new_empty(spaces, batch, width), weight.new_empty(len(sums), batch, width)


@define(
    "lookup_backward(Tensor grad_x, Tensor grad_z, int[] sums, Tensor ids, Tensor "
    "offsets, Tensor[] bags, int mean, int rows) -> Tensor",
    second_derivative=False,
)
def _lookup_backward_fake(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: list[int],
    ids: Tensor,
    offsets: Tensor,
    bags: list[Tensor],
    mean: int,
    rows: int,
) -> Tensor:
    fields = ids.shape[1] + (len(bags[1]) if bags else 0)
    return grad_x.new_empty(rows, len(grad_x) * (grad_x.shape[2] // fields))


def lookup(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    spaces: int,
    sums: Sequence[int] = (),
    bags: Sequence[Tensor] = (),
    mean: int = 0,
    plan: RowPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings of all fields in all spaces, and sums of spaces, in one pass.

    Arguments and results as in :func:`reference.lookup`. ``weight`` gets a dense gradient; with
    the batch's ``plan`` a sparse COO one (not under ``torch.compile``): its indices are the plan's
    rows, on CPU ascending and each once, its values :func:`reference.row_gradients`.

    Raises:
        ValueError: weights of bags that require a gradient (they are constants here).
        RuntimeError: sizes or types that don't fit; on CPU, a row outside the arena.
    """
    if any(part.requires_grad for part in bags):
        raise ValueError("the weights of bags get no gradient: detach them")
    arguments = (weight, ids, offsets, spaces, list(sums), list(bags), mean)
    if transformed():
        return reference.lookup(*arguments)
    if torch.compiler.is_exporting():  # AOTInductor makes None of an empty list
        none = [ids.new_empty(0), offsets.new_empty(0, ids.shape[0] + 1)]
        x, z = torch.ops.stem_fast.lookup(
            weight, ids, offsets, spaces, list(sums) or [1], list(bags) or none, mean
        )
        return x, z if sums else z[:0]
    if plan is None:
        return torch.ops.stem_fast.lookup(*arguments)
    return _SparseLookup.apply(plan, *arguments)


def _lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, ids, offsets, _, ctx.sums, bags, ctx.mean = inputs
    ctx.save_for_backward(ids, offsets, *bags)
    ctx.rows = weight.shape[0]


def _lookup_grad(ctx: Any, grad_x: Tensor, grad_z: Tensor) -> tuple[Any, ...]:
    ids, offsets, *bags = ctx.saved_tensors
    dense = torch.ops.stem_fast.lookup_backward(
        grad_x, grad_z, ctx.sums, ids, offsets, bags, ctx.mean, ctx.rows
    )
    # To torch.library every empty list is a list of tensors, and wants a list of gradients.
    return dense, None, None, None, None if ctx.sums else [], [None] * len(bags), None


torch.library.register_autograd("stem_fast::lookup", _lookup_grad, setup_context=_lookup_setup)


class _SparseLookup(torch.autograd.Function):
    """:func:`lookup` with a gradient of the plan's rows alone."""

    @staticmethod
    def forward(ctx: Any, plan: RowPlan, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*plan)
        ctx.shape, ctx.spaces, ctx.sums = weight.shape, rest[2], rest[3]
        return torch.ops.stem_fast.lookup(weight, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_z: Tensor) -> tuple[Any, ...]:
        rows, *plan = ctx.saved_tensors
        values = torch.ops.stem_fast.row_gradients(
            grad_x, grad_z, ctx.sums, *plan, ctx.shape[1] // ctx.spaces
        )
        return None, sparse_gradient(rows, values, ctx.shape), *(None,) * 6


def sparse_gradient(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a table as a sparse tensor, of the rows of a plan and their values."""
    # A CUDA plan repeats row 0, with zeros.
    once = not values.is_cuda
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=once, check_invariants=False
    )


def lookup_backward(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: list[int],
    ids: Tensor,
    offsets: Tensor,
    bags: list[Tensor],
    mean: int,
    rows: int,
) -> Tensor:
    """:func:`reference.lookup_backward` by the device's own plan and row gradients."""
    fields = ids.shape[1] + (len(bags[1]) if bags else 0)
    named, *plan = torch.ops.stem_fast.row_plan(ids, narrow(offsets, rows), bags, mean)
    values = torch.ops.stem_fast.row_gradients(
        grad_x, grad_z, sums, *plan, grad_x.shape[2] // fields
    )
    return grad_x.new_zeros(rows, values.shape[1]).index_copy_(0, named, values)
