"""``torch.optim.Adam`` of embedding tables, at the cost of a batch's rows.

Dense Adam moves every row at every step, because a row that no sample reads still has momentum,
and with L2 a gradient. :class:`ExactAdam` postpones these steps until the row is next needed: in
closed form without L2, one by one with it, or by a power series for rows that no gradient has
touched. docs/exact-adam.md derives the formulas and their error bounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stem_fast import ops
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.optim.base import TableOptimizer, row_steps
from stem_fast.optim.step_table import AdamStepTable, decay_factor


class ExactAdam(TableOptimizer):
    """``torch.optim.Adam``'s trajectory of embedding tables, at the cost of a batch's rows.

    Args:
        params: see :class:`TableOptimizer`.
        lr, betas, eps, weight_decay: as in ``torch.optim.Adam``.
        decoupled: whether the weight decay is ``torch.optim.AdamW``'s instead of L2.
        state_dtype: dtype of m; torch.bfloat16 halves its memory. (float64 tables: float64.) v
            stays float32: bfloat16 has too few digits to shrink by a thousandth.

    Raises:
        TypeError: a parameter that is not an :class:`EmbeddingArena`.
        ValueError: a hyperparameter out of range.

    ``lr`` and ``weight_decay`` may change at every step. ``betas`` and ``eps`` may change too, but
    each change makes all rows catch up: give schedulers that cycle momentum by default
    (``OneCycleLR``, ``CyclicLR``) ``cycle_momentum=False``. With decoupled decay whose ``lr`` or
    ``weight_decay`` is a tensor on a GPU, flush before the product of the decays falls below
    1e-150.

    Rows catch up before they are read: in a forward pass (with autograd the batch's rows, without
    it the whole table), in the ``state_dict`` of model and optimizer, in a copy, before a cast or
    move, and when code iterates over the parameters or modules of a model that holds the arena
    (``parameters``, ``torch.export``, ``torch.func``, ``torch.optim.swa_utils.AveragedModel``,
    ``DistributedDataParallel``). Call ``arena.flush()`` before you read ``arena.weight`` directly
    (``get_parameter`` does so) or a tensor kept from before, such as an exported program's, which
    are the model's own. Catching up the whole table costs as much as a step of dense Adam:
    ``zero_grad`` of the optimizers and of :class:`stem_fast.STEMNet`, and
    :func:`stem_fast.training.step.clip_grad_norm_`, avoid it; ``zero_grad`` of a module around
    them does not.

    ``step`` may be left out, as a gradient scaler does when gradients overflow. ``state_dict`` has
    the form of ``torch.optim.Adam``'s for the dense table, and each loads the other's.
    """

    def __init__(
        self,
        params: EmbeddingArena | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        *,
        decoupled: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.state_dtype = state_dtype
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled,
        }
        super().__init__(params, defaults)

    def _refuse(self, group: dict[str, Any]) -> None:
        if group["decoupled_weight_decay"]:
            decay_factor(group["lr"], group["weight_decay"])

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        step_table = self._step_table(weight, group)
        step_table.set_next_decay(group["lr"], group["weight_decay"])
        if step_table.needs_flush:
            self.catch_up(weight, None)
        step_table.advance(group["lr"], group["weight_decay"])
        self._run(weight, group, rows, values)

    def _run(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor | None
    ) -> None:
        state, step_table = self.state[weight], self._logs[weight]
        torch.ops.stem_fast.adam_rows(
            weight,
            state["exp_avg"],
            state["exp_avg_sq"],
            self._last[weight],
            rows,
            values,
            step_table.steps,
            step_table.clock,
            *step_table.betas,
            step_table.eps,
            step_table.decoupled,
            step_table.l2,
        )

    def _step_table(self, weight: Tensor, group: dict[str, Any]) -> AdamStepTable:
        """The step table of an embedding table, created with its state at the first step.

        All steps in it share betas and eps: when they change, all rows catch up and it restarts.
        """
        options = {
            "betas": tuple(group["betas"]),
            "eps": group["eps"],
            "decoupled": group["decoupled_weight_decay"],
        }
        old = self._logs.get(weight)
        if old is not None and any(getattr(old, k) != value for k, value in options.items()):
            if old.done == 1:
                warnings.warn(
                    "betas or eps changed after a single step: each change makes all rows catch "
                    "up, which costs as much as dense Adam. Give OneCycleLR or CyclicLR "
                    "cycle_momentum=False.",
                    stacklevel=2,
                )
            self.catch_up(weight, None)
            self.state[weight]["step"] = old.clock[1].cpu().float()
            del self._logs[weight]
        if weight not in self._logs:
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq"):
                    dtype = self._state_dtype(weight, name)
                    state[name] = ops.new_table(torch.empty_like(weight, dtype=dtype)).zero_()
            step = int(state["step"])
            self._logs[weight] = AdamStepTable(step, weight.device, **options)
            self._last[weight] = row_steps(weight, step)
        step_table: AdamStepTable = self._logs[weight]
        return step_table

    def _state_dtype(self, weight: Tensor, name: str) -> torch.dtype:
        wide = super()._state_dtype(weight, name)
        return self.state_dtype if name == "exp_avg" and wide == torch.float32 else wide

    def state_dict(self) -> dict[str, Any]:
        """State of the form of ``torch.optim.Adam``'s, after :meth:`flush`."""
        for weight, step_table in self._logs.items():
            self.state[weight]["step"] = step_table.clock[1].cpu().float()
        return super().state_dict()
