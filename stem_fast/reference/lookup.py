"""Multi-table embedding lookup with pooled sequences, and its dense gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stem_fast.reference.row_plan import bag_rows, row_gradients, row_plan


def lookup(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    spaces: int,
    sums: Sequence[int] = (),
    bags: Sequence[Tensor] = (),
    mean: int = 0,
) -> tuple[Tensor, Tensor]:
    """Embeddings of all fields in all spaces, and sums of spaces.

    Args:
        weight: [R, G*D], the arena. A row holds the G embeddings of one feature value; the rows of
            field f start at ``offsets[f]``. Arena row 0 is a padding row.
        ids: int32 or int64 [B, F], 0 <= ids[b, f] < rows of field f. 0 is padding: it reads its
            row, which is kept at zero, and never trains it.
        offsets: int64 [F].
        spaces: G.
        sums: K bit masks over the spaces; bit g says whether space g is in the sum.
        bags: sequences of S further fields: none, or (rows, bounds) or (rows, bounds, weights).
            rows: int32 or int64 [n], arena rows; 0 is padding and counts for nothing.
            bounds: int64 [S, B+1]; bag (s, b) is ``rows[bounds[s, b] : bounds[s, b + 1]]``. Bags
                of a field lie after those of the one before: no bound is below the last.
            weights: float [n], a constant factor of each row.
        mean: bit s says whether the bags of field s are divided by their count of rows that are
            not padding (FuxiCTR's MaskedAveragePooling; without: MaskedSumPooling).

    Returns:
        x [G, B, (F+S)*D], field-major; an empty bag is zeros.
        z [K, B, (F+S)*D], ``z[k] = sum of x[g] over the spaces in sums[k]``.
    """
    rows = F.embedding(ids + offsets, weight)  # [B, F, G*D]
    parts = [torch.where((ids == 0)[..., None], rows.detach(), rows)]
    batch = ids.shape[0]
    for s in range(len(bags[1]) if bags else 0):
        row, sample, scale = bag_rows(bags, mean, s)
        pooled = weight.new_zeros(batch, weight.shape[1])
        scaled = F.embedding(row, weight) * scale[:, None].to(weight.dtype)
        parts.append(pooled.index_add(0, sample, scaled)[:, None])
    x = torch.cat(parts, 1).unflatten(2, (spaces, -1)).permute(2, 0, 1, 3).flatten(2)
    return x.contiguous(), space_sums(x, sums)


def lookup_backward(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: Sequence[int],
    ids: Tensor,
    offsets: Tensor,
    bags: Sequence[Tensor],
    mean: int,
    rows: int,
) -> Tensor:
    """Dense gradient of :func:`lookup` with respect to ``weight``.

    Args:
        grad_x, grad_z: [G, B, (F+S)*D] and [K, B, (F+S)*D], gradients of the outputs.
        sums, ids, offsets, bags, mean: as in :func:`lookup`.
        rows: R.

    Returns:
        [R, G*D]; zero for rows that no id names and for padding rows.
    """
    fields = ids.shape[1] + (len(bags[1]) if bags else 0)
    dim = grad_x.shape[2] // fields
    dense = grad_x.new_zeros(rows, len(grad_x) * dim)
    plan = row_plan(ids, offsets, bags, mean)
    dense[plan[0]] = row_gradients(grad_x, grad_z, sums, *plan[1:], dim)
    return dense


def space_sums(x: Tensor, sums: Sequence[int]) -> Tensor:
    """``z[k] = sum of x[n] over the bits n of sums[k]``. [N, B, I] -> [K, B, I]."""
    inputs = x.unbind()
    named = [[inputs[n] for n in range(len(inputs)) if mask >> n & 1] for mask in sums]
    return torch.stack([torch.stack(each).sum(0) for each in named]) if named else x[:0].clone()
