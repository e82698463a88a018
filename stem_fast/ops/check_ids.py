"""Ids held against the sizes of their vocabularies."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_fast.ops.registry import define


@define("outside(Tensor ids, Tensor sizes) -> Tensor")
def _outside_fake(ids: Tensor, sizes: Tensor) -> Tensor:
    return ids.new_empty((), dtype=torch.int64)


@define("check_ids(Tensor ids, Tensor sizes, Tensor(a!) bad) -> Tensor")
def _check_ids_fake(ids: Tensor, sizes: Tensor, bad: Tensor) -> Tensor:
    return ids.new_empty(ids.shape)


@define("checked(Tensor ids, Tensor sizes, str[] names, Tensor? offsets=None) -> Tensor")
def _checked_fake(
    ids: Tensor, sizes: Tensor, names: list[str], offsets: Tensor | None = None
) -> Tensor:
    return ids.new_empty(ids.shape)


def check_ids(ids: Tensor, sizes: Tensor, bad: Tensor) -> Tensor:
    """Ids within their vocabularies, without waiting; see :func:`reference.check_ids`."""
    return torch.ops.stem_fast.check_ids(ids, sizes, bad)
