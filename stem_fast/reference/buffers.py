"""Memory for outputs and tables: what the C++ library does better than torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def empty_kept(like: Tensor, size: Sequence[int]) -> Tensor:
    """An uninitialised contiguous tensor of the type and device of ``like``; on CPU, a large one is
    memory that an earlier tensor gave back (a fresh page costs more than writing to it)."""
    return like.new_empty(size)


def huge_pages(table: Tensor) -> None:
    """Ask for huge pages for memory that nothing was written to; on CPU, by the C++ library."""
