"""Which rows of the arena a batch reads, and the gradients of those rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stem_fast.ops.registry import define


class RowPlan(NamedTuple):
    """Which arena rows a batch reads, and where; see :func:`reference.row_plan`."""

    rows: Tensor  # int64 [U]
    segments: Tensor  # int32 [U+1]
    sources: Tensor  # int32 [m]
    scales: Tensor  # float64 [m] or [0]


@define(
    "row_plan(Tensor ids, Tensor offsets, Tensor[] bags, int mean) -> (Tensor, Tensor, "
    "Tensor, Tensor)"
)
def _row_plan_fake(
    ids: Tensor, offsets: Tensor, bags: list[Tensor], mean: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    rows, read = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        ids.new_empty(rows, dtype=torch.int64),
        ids.new_empty(rows + 1, dtype=torch.int32),
        ids.new_empty(read, dtype=torch.int32),
        ids.new_empty(read if bags else 0, dtype=torch.float64),
    )


@define(
    "row_gradients(Tensor grad_x, Tensor grad_z, int[] sums, Tensor segments, Tensor "
    "sources, Tensor scales, int dim) -> Tensor",
    second_derivative=False,
)
def _row_gradients_fake(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: list[int],
    segments: Tensor,
    sources: Tensor,
    scales: Tensor,
    dim: int,
) -> Tensor:
    return grad_x.new_empty(segments.shape[0] - 1, len(grad_x) * dim)


def row_plan(
    ids: Tensor, offsets: Tensor, bags: Sequence[Tensor] = (), mean: int = 0, rows: int = 2**63
) -> RowPlan:
    """Which arena rows a batch reads, and where; see :func:`reference.row_plan`.

    ``rows`` are the arena's; where it has fewer than 2^31, CUDA sorts half as many bits.
    """
    if ids.is_cuda:
        offsets = narrow(offsets, rows)
    return RowPlan(*torch.ops.stem_fast.row_plan(ids, offsets, list(bags), mean))


def narrow(offsets: Tensor, rows: int) -> Tensor:
    """Offsets as int32, if that holds every row and one number more."""
    return offsets.int() if rows < 2**31 else offsets


def merge_rows(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n] that may repeat, with values [n, W], as each once with the sum of its values.

    The plan of a batch whose ids are the rows: on CUDA fixed in size, padded with row 0.
    """
    offsets = rows.new_zeros(1)
    plan = row_plan(rows[:, None], offsets)
    none = values.new_empty(0, *values.shape)
    sums = torch.ops.stem_fast.row_gradients(values[None], none, [], *plan[1:], values.shape[1])
    return plan.rows, sums
