"""Adagrad's rows: cases, and what is checked of an implementation."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch

from cases import check_rows, to
from stem_fast import reference


class AdagradCase(NamedTuple):
    rows: int
    width: int
    row_wise: bool
    decay: float = 0.0
    named: bool = True  # rows, in no order, with padding between; else all

    def arguments(self, dtype: torch.dtype = torch.float64) -> list[Any]:
        """Of adagrad_rows: rows with and without gradients before this step."""
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64)

        weight = normal(self.rows, self.width)
        sums = normal(self.rows, *(() if self.row_wise else (self.width,))).square()
        sums[::3] = 0
        rows = torch.randperm(self.rows, generator=draw)[: max(self.rows // 2, 1)]
        if self.named:
            rows = torch.cat([rows[rows != 0], rows.new_zeros(3)])
        count = len(rows) if self.named else self.rows
        grad = normal(count, self.width) * 10 ** normal(count, 1)
        options = torch.tensor([0.1, self.decay], dtype=torch.float64)
        state = torch.promote_types(dtype, torch.float32)
        rows = rows if self.named else None
        return [weight.to(dtype), sums.to(state), rows, grad.to(dtype), options, 1e-8]


ADAGRADS = {
    f"{name}, {'a sum a row' if row_wise else 'all sums'}": AdagradCase(
        *sizes, row_wise, decay, named
    )
    for row_wise in (False, True)
    for name, sizes, decay, named in (
        ("one row", (1, 1), 0.0, False),
        ("narrow", (40, 7), 0.0, True),
        ("many", (300, 48), 1e-2, True),
        ("all rows", (33, 5), 0.1, False),
        ("wide", (6, 1300), 1e-3, True),
    )
}


def check_adagrad_rows(run: Any, case: AdagradCase, dtype: torch.dtype, device: str) -> None:
    """An implementation's adagrad_rows against the reference's, in its type and in float64."""
    own = to(device, case.arguments(dtype))
    check_rows(run, reference.adagrad_rows, own, changed=(0, 1), wide=(0, 1, 3))
