"""Adagrad of a batch's rows, with a sum of squares for each weight or for each row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stem_fast import ops
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.optim.base import TableOptimizer
from stem_fast.optim.step_log import step_options


class Adagrad(TableOptimizer):
    """``torch.optim.Adagrad`` of the batch's rows (Duchi et al., 2011).

    Without L2 this is the dense trajectory, because a gradient of zero moves nothing.
    ``weight_decay`` acts on the batch's rows only.

    Args:
        params: see :class:`TableOptimizer`.
        lr, eps, weight_decay: as in ``torch.optim.Adagrad``.

    Raises:
        TypeError: a parameter that is not an :class:`EmbeddingArena`.
        ValueError: a hyperparameter out of range.
    """

    def __init__(
        self,
        params: EmbeddingArena | Iterable[Any],
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        state = self.state[weight]
        if not state:
            shape, dtype = self._state_shape(weight), self._state_dtype(weight, "sum")
            state["sum"] = ops.new_table(weight.new_empty(shape, dtype=dtype)).zero_()
        options = step_options(weight, group["lr"], group["weight_decay"])
        torch.ops.stem_fast.adagrad_rows(weight, state["sum"], rows, values, options, group["eps"])


class RowWiseAdagrad(Adagrad):
    """Adagrad that accumulates one number a row, the mean of its squared gradients (FBGEMM's
    EXACT_ROWWISE_ADAGRAD). Its state is [R] instead of [R, G*D]."""

    def __init__(
        self,
        params: EmbeddingArena | Iterable[Any],
        lr: float | Tensor = 1e-2,
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        super().__init__(params, lr, eps, weight_decay)

    def _state_shape(self, weight: Tensor) -> torch.Size:
        return weight.shape[:1]
