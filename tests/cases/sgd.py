"""SGD's rows: cases, and what is checked of an implementation."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch

from cases import check_rows, to
from stem_fast import reference
from stem_fast.optim.sgd import Products


class SgdCase(NamedTuple):
    rows: int
    width: int
    steps: int
    base: int = 0  # steps made before the flush
    momentum: tuple[float, ...] = (0.9,)  # of the steps in turn
    decay: float = 0.0
    rate: float = 0.1
    named: bool = True  # rows, in no order, with padding between; else all

    def arguments(self, dtype: torch.dtype = torch.float64, grads: bool = False) -> list[Any]:
        """Of sgd_rows: rows of every age, with options that change at every step."""
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64)

        products = Products(torch.device("cpu"))
        for step in range(self.base + self.steps):
            if step == self.base:
                products.caught_up()
            momentum = self.momentum[step % len(self.momentum)]
            lr, decay = self.rate * (1 + step % 7), self.decay * (1 + step % 2)
            products.advance(lr, momentum, torch.tensor(decay))
        weight = normal(self.rows, self.width)
        state = torch.promote_types(dtype, torch.float32)
        buffer = normal(self.rows, self.width).to(state) if any(self.momentum) else None
        last = torch.randint(0, self.base + self.steps + 1, (self.rows,), generator=draw).int()
        rows = torch.randperm(self.rows, generator=draw)[: max(self.rows // 2, 1)]
        if self.named:
            rows = torch.cat([rows[rows != 0], rows.new_zeros(3)])
        count = len(rows) if self.named else self.rows
        grad = normal(count, self.width).to(dtype) if grads else None
        rows = rows if self.named else None
        return [weight.to(dtype), buffer, last, rows, grad, products.steps, products.clock]


SGDS = {
    "one row": SgdCase(1, 1, 3, named=False),
    "momentum and l2": SgdCase(60, 7, 70, base=30, decay=1e-2),
    "many steps": SgdCase(50, 48, 1300, base=10, decay=1e-3),
    "all rows": SgdCase(33, 5, 30, named=False),
    "l2 alone": SgdCase(40, 9, 70, momentum=(0.0,), decay=1e-2),
    "momentum comes and goes": SgdCase(40, 9, 40, momentum=(0.0, 0.5, 0.9), decay=1e-2),
    "steps to zero": SgdCase(40, 4, 20, momentum=(0.0,), decay=1.0, rate=0.5),
    "wide": SgdCase(6, 600, 5, base=3, decay=1e-4),
}


def check_sgd_rows(run: Any, case: SgdCase, dtype: torch.dtype, grads: bool, device: str) -> None:
    """An implementation's sgd_rows against the reference's, in its type and in float64."""
    own = to(device, case.arguments(dtype, grads))
    check_rows(run, reference.sgd_rows, own, changed=(0, 1, 2), wide=(0, 1, 4))
