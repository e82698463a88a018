"""What the references of the optimizers' rows share."""

from __future__ import annotations

import torch
from torch import Tensor


def real_rows(weight: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows without padding, all of the table's where none are named; and where they stood."""
    if rows is None:
        every = torch.arange(len(weight), device=weight.device)
        return every, every
    (real,) = (rows != 0).nonzero(as_tuple=True)
    return rows[real], real
