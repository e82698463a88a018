"""Memory: kept between calls, and in huge pages."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_fast.ops.registry import define


@define("empty_kept(Tensor like, SymInt[] size) -> Tensor")
def _empty_kept_fake(like: Tensor, size: list[int]) -> Tensor:
    return like.new_empty(size)


@define("huge_pages(Tensor(a!) table) -> ()")
def _huge_pages_fake(table: Tensor) -> None:
    """Nothing is written."""


def new_table(table: Tensor) -> Tensor:
    """A tensor that nothing was written to, in huge pages where there are such."""
    torch.ops.stem_fast.huge_pages(table)
    return table
