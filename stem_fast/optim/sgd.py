"""SGD with momentum and L2, exact at the cost of a batch's rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stem_fast import ops
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.optim.base import TableOptimizer, row_steps
from stem_fast.optim.step_log import StepLog, first_lines, step_options


class Products(StepLog):
    """Every SGD step since the last flush, as the table that ``sgd_rows`` reads.

    ``steps`` is float64 [N, 7]. Line i describes step ``base + i`` in columns

    0 .. 2  its ``lr``, ``momentum`` and ``weight_decay``
    3 .. 6  the 2x2 matrix on a row's (w, b) that is the product of the steps ``i + 1 .. i + k``
            made so far, where k is the lowest set bit of i (line 0: of all steps since ``base``).

    The matrices form a Fenwick tree. A row whose last step is line i multiplies by the matrix of
    that line, then by that of line ``i + k``, and so on: at most ``log2(N)`` products. A new step
    updates as many lines: the one before it, and those reached by clearing its lowest set bits.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(0, device)
        self.steps = torch.zeros(first_lines(device), 7, dtype=torch.float64, device=device)
        self.has_pending = False  # no step so far moves rows without a gradient
        self._bits = torch.arange(32, device=device)
        self._identity = torch.eye(2, dtype=torch.float64, device=device).flatten()
        self.steps[0, 3:] = self._identity

    def advance(self, lr: float | Tensor, momentum: float, weight_decay: float | Tensor) -> None:
        """Adds a step, and its matrix to the products of the lines before it."""
        options = step_options(self.steps, lr, momentum, weight_decay)
        self.count()
        self.has_pending |= momentum != 0 or isinstance(weight_decay, Tensor) or weight_decay != 0
        if self.done >= len(self.steps):
            self.steps = torch.cat([self.steps, torch.zeros_like(self.steps)])
        self.clock[1] += 1
        # Of shape [1]: the host would wait for an index that is a scalar.
        line = self.clock[1:] - self.clock[:1]
        rate, _, decay = options[:, None]
        keep = 1 - rate * decay
        if momentum:
            step = torch.cat([keep, -momentum * rate, decay, options[1:2]])
        else:  # the momentum buffer stays as it is
            step = torch.cat([keep, torch.zeros_like(keep).expand(2), torch.ones_like(keep)])
        lines = (line - 1) >> self._bits << self._bits  # repeat, with the same product
        products = step.view(2, 2) @ self.steps[lines, 3:].view(-1, 2, 2)
        self.steps[:, 3:].index_copy_(0, lines, products.flatten(1))
        self.steps.index_copy_(0, line, torch.cat([options, self._identity])[None])

    def caught_up(self) -> None:
        super().caught_up()
        self.steps[0, 3:].copy_(self._identity)


class SGD(TableOptimizer):
    """``torch.optim.SGD``'s trajectory (momentum and L2 included) at the cost of a batch's rows.

    A missed step is linear in a row's weight w and momentum b,
    ``(w, b) <- ((1 - lr * wd) w - lr * momentum * b, wd * w + momentum * b)``, so any number of
    them is one 2x2 matrix, the same for all rows that made their last step together.

    Args:
        params: see :class:`TableOptimizer`.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``.

    Raises:
        TypeError: a parameter that is not an :class:`EmbeddingArena`.
        ValueError: a hyperparameter out of range.
    """

    def __init__(
        self,
        params: EmbeddingArena | Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        if weight not in self._logs:
            self._logs[weight] = Products(weight.device)
            self._last[weight] = row_steps(weight, 0)
        if group["momentum"] and self.state[weight].get("momentum_buffer") is None:
            dtype = self._state_dtype(weight, "momentum_buffer")
            buffer = ops.new_table(torch.empty_like(weight, dtype=dtype))
            buffer.zero_()
            self.state[weight]["momentum_buffer"] = buffer
        self._logs[weight].advance(group["lr"], group["momentum"], group["weight_decay"])
        self._run(weight, group, rows, values)

    def _run(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor | None
    ) -> None:
        products = self._logs[weight]
        torch.ops.stem_fast.sgd_rows(
            weight,
            self.state[weight].get("momentum_buffer"),
            self._last[weight],
            rows,
            values,
            products.steps,
            products.clock,
        )
