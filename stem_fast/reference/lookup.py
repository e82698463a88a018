"""Multi-table embedding lookup, its row plan, its gradients, and the check of ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


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
        row, sample, scale = _bag_rows(bags, mean, s)
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


def row_plan(
    ids: Tensor, offsets: Tensor, bags: Sequence[Tensor] = (), mean: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which arena rows a batch reads, and where; made once a batch.

    A slot is one place of the lookup's output: slot ``b * (F+S) + f`` is field f of sample b.

    Args:
        ids, offsets, bags, mean: as in :func:`lookup`; on CUDA offsets may be int32, where every
            row is below 2^31 - 1.

    Returns:
        rows: int64 [U], the arena rows that the batch trains, ascending. No padding rows, except
            that backends which can't wait for U (CUDA) append row 0 with an empty segment each.
        segments: int32 [U+1]; row u is read at ``sources[segments[u] : segments[u + 1]]``.
        sources: int32 [m], slots; within a row categorical fields first, then bags in their order.
        scales: float64 [m], the factor of each: 1 for a categorical field, for a bag its weight
            and the mean's divisor. Empty ([0]) without bags: every factor is 1.
    """
    batch, categorical = ids.shape
    fields = categorical + (len(bags[1]) if bags else 0)
    first = torch.arange(batch, device=ids.device) * fields
    row = torch.where(ids == 0, 0, ids + offsets).long().flatten()
    slot = (first[:, None] + torch.arange(categorical, device=ids.device)).flatten()
    occurrences = [(row, slot, torch.ones_like(row, dtype=torch.float64))]
    for s in range(fields - categorical):
        row, sample, scale = _bag_rows(bags, mean, s)
        occurrences.append((row.long(), first[sample] + categorical + s, scale))
    row, slot, scale = (torch.cat(parts) for parts in zip(*occurrences, strict=True))
    order = torch.argsort(row, stable=True)
    order = order[row[order] != 0]
    rows, counts = row[order].unique_consecutive(return_counts=True)
    segments = F.pad(counts.cumsum(0), (1, 0)).int()
    return rows, segments, slot[order].int(), scale[order] if bags else scale[:0]


def row_gradients(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: Sequence[int],
    segments: Tensor,
    sources: Tensor,
    scales: Tensor,
    dim: int,
) -> Tensor:
    """Gradient of :func:`lookup` for the rows of a :func:`row_plan` alone.

    Args:
        grad_x, grad_z, sums: as in :func:`lookup_backward`.
        segments, sources, scales: of the plan.
        dim: D.

    Returns:
        [U, G*D], in the order of the plan's rows; zero for an empty segment.
    """
    grad = grad_x
    for mask, part in zip(sums, grad_z.unbind(), strict=True):
        named = [bool(mask >> g & 1) for g in range(len(grad))]
        grad = grad + part * torch.tensor(named, device=part.device)[:, None, None]
    slots = grad.unflatten(2, (-1, dim)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    terms = slots[sources]  # [m, G*D]
    if len(scales):
        terms = terms * scales[:, None].to(terms.dtype)
    row = torch.repeat_interleave(
        torch.arange(len(segments) - 1, device=segments.device),
        segments.diff(),
        output_size=len(sources),
    )
    return terms.new_zeros(len(segments) - 1, terms.shape[1]).index_add(0, row, terms)


def outside(ids: Tensor, sizes: Tensor) -> Tensor:
    """Where the first id is that is outside its vocabulary.

    Args:
        ids: int32 or int64 [B, F].
        sizes: int64 [F], rows of each field.

    Returns:
        int64 [], its place in the flat ids, or -1.
    """
    wrong = ((ids < 0) | (ids >= sizes)).flatten().nonzero()
    return wrong[0, 0] if len(wrong) else wrong.new_full((), -1)


def outside_error(
    place: int, ids: Tensor, sizes: Tensor, names: Sequence[str], offsets: Tensor | None = None
) -> IndexError:
    """What to raise for the id at a place of :func:`outside`; arguments as :func:`checked`'s."""
    row, field = divmod(place, ids.shape[1])
    value, size = int(ids[row, field]), int(sizes[field])
    if offsets is not None:
        row = int(torch.searchsorted(offsets, row, right=True)) - 1
    return outside_named(names[field], size, value, row)


def outside_named(name: str, size: int, value: int, place: int, at: str = "row") -> IndexError:
    """What to raise for an id that is outside its vocabulary."""
    return IndexError(
        f"field {name!r}: id {value} at {at} {place} is outside its vocabulary of {size} "
        f"(0 is padding, {size - 1} is unknown)"
    )


def check_bounds(name: str, offsets: Tensor, values: int) -> None:
    """Raises ValueError for offsets that are not those of a jagged sequence of so many values."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != values:
        raise ValueError(f"sequence {name!r}: offsets must be from 0 to {values}")
    if (offsets.diff() < 0).any():
        raise ValueError(f"sequence {name!r}: offsets decrease")


def checked(
    ids: Tensor, sizes: Tensor, names: Sequence[str], offsets: Tensor | None = None
) -> Tensor:
    """A copy of ids that are all within their vocabularies: the check of what is compiled or
    exported, where nothing else can depend on values.

    Args:
        ids: int32 or int64 [B, F].
        sizes: int64 [F], rows of each field.
        names: F, of the fields.
        offsets: of a jagged sequence, [B+1]; its values are ids [n, 1].

    Raises:
        IndexError: an id outside its vocabulary.
        ValueError: offsets that are not those of the values.
    """
    if offsets is not None:
        check_bounds(names[0], offsets, len(ids))
    place = int(outside(ids, sizes))
    if place >= 0:
        raise outside_error(place, ids, sizes, names, offsets)
    return ids.clone()


def check_ids(ids: Tensor, sizes: Tensor, bad: Tensor) -> Tensor:
    """Ids with those outside their vocabulary replaced by its last one, the unknown value.

    Args:
        ids: int32 or int64 [B, F].
        sizes: int64 [F], rows of each field.
        bad: int64 [F], changed in place: the least of itself and, over the field's ids that are
            outside, ``b << 32 | id`` (the id clamped to 32 bits, signed). Nothing waits for it; see
            :meth:`stem_fast.nn.arena.EmbeddingArena.raise_bad_ids`.

    Returns:
        [B, F], of the type of ``ids``.
    """
    outside = (ids < 0) | (ids >= sizes)
    value = ids.long().clamp(-(1 << 31), (1 << 31) - 1) & 0xFFFFFFFF
    place = torch.arange(len(ids), device=ids.device)[:, None] << 32 | value
    never = torch.iinfo(torch.int64).max
    seen = torch.cat([torch.where(outside, place, never), bad[None]])
    bad.copy_(seen.amin(0))
    return torch.where(outside, sizes - 1, ids).to(ids.dtype)


def _bag_rows(bags: Sequence[Tensor], mean: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, sample, float64 scale) of every row of the bags of field s that is not padding."""
    rows, bounds = bags[0], bags[1][s]
    batch = bounds.shape[0] - 1
    rows = rows[bounds[0] : bounds[-1]]
    sample = torch.repeat_interleave(
        torch.arange(batch, device=rows.device), bounds.diff(), output_size=rows.shape[0]
    )
    scale = torch.ones_like(rows, dtype=torch.float64)
    if len(bags) > 2:
        scale = bags[2][bounds[0] : bounds[-1]].double()
    real = rows != 0
    rows, sample, scale = rows[real], sample[real], scale[real]
    if mean >> s & 1:
        scale = scale / torch.bincount(sample, minlength=batch).clamp(min=1)[sample]
    return rows, sample, scale


def space_sums(x: Tensor, sums: Sequence[int]) -> Tensor:
    """``z[k] = sum of x[n] over the bits n of sums[k]``. [N, B, I] -> [K, B, I]."""
    inputs = x.unbind()
    named = [[inputs[n] for n in range(len(inputs)) if mask >> n & 1] for mask in sums]
    return torch.stack([torch.stack(each).sum(0) for each in named]) if named else x[:0].clone()
