"""Ids held against the sizes of their vocabularies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
