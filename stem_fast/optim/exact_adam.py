"""Optimizers of embedding tables that pay for the rows of a batch alone.

Dense Adam moves every row at every step: where no sample reads a row, its gradient is zero and its
momentum still carries it on. :class:`ExactAdam` makes those steps later, when the row is next
needed, and so keeps to ``torch.optim.Adam``'s trajectory at the cost of the rows of a batch.

A row with m, v after step ``s`` that misses steps ``s + 1 .. now`` (no L2): at the j-th of them
its momentum is ``beta1^j m`` and its ``sqrt(v)`` is ``q^j sqrt(v)``, with ``q = sqrt(beta2)``. So
it moves altogether by ``-m * sum_j a_j / (sqrt(v) x_j + eps)``, where

    a_j = lr_{s+j} / (1 - beta1^{s+j}) * beta1^j        x_j = q^j / sqrt(1 - beta2^{s+j})

are the same for every row of that age. ``f(x) = 1 / (sqrt(v) x + eps)`` hardly bends over the few
steps in which a_j is not yet nothing, so its sum is the series of f around the mean x, whose
coefficients are the central moments of x_j under the weights a_j: seven numbers for each ``s``,
kept by :class:`Schedule`. Where the series is not exact to rounding (the first 200 steps of a
training) the sum is made term by term.

With L2 a row that misses steps has the gradient ``weight_decay * w`` at each of them. In float32 a
weight that no gradient has touched makes them all at once: it is its first value times a number
that depends on that value's size, whose series :func:`stem_fast.reference.new_rows` keeps. Any
other makes them one by one, in registers, until nothing moves any more. Several at once would have
to know how ``weight_decay`` changes, which clipping does at every step: where ``sqrt(v)`` is not
far above eps a weight moves by a tenth of itself in one, so these changes matter to first order.

Error, row by row: single steps round as torch's do. The series is cut after eight terms. Its growth
g is the least number with ``|a_k| <= a_0 g^k / k!`` for the terms that are kept, and it is used
where ``g |W| <= 0.5``; terms that follow the same law leave out ``0.5^8 / 8! = 1e-7`` of the row,
and with weight decays that jump, swing or are clipped 3e-7 was the most that was measured. Below
1e-24 a weight's L2 gradient leaves float32's range, and nothing is promised.
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
from stem_fast.optim.step_table import Schedule, decay_factor


class ExactAdam(TableOptimizer):
    """``torch.optim.Adam``'s trajectory of embedding tables, at the cost of a batch's rows.

    Args:
        params: as :class:`TableOptimizer`'s.
        lr, betas, eps, weight_decay: as ``torch.optim.Adam``'s.
        decoupled: ``torch.optim.AdamW``'s weight decay.
        state_dtype: of m; torch.bfloat16 saves half its memory. (float64 tables: float64.) v stays
            float32: bfloat16 has too few digits to shrink by a thousandth.

    ``betas`` and ``eps`` may change too, but each change makes the steps of all rows: of schedulers
    that cycle momentum by default (``OneCycleLR``, ``CyclicLR``) ask for ``cycle_momentum=False``.
    Decoupled decay is known where ``lr`` and ``weight_decay`` are no tensors on a GPU; with those,
    flush before what it leaves of a weight is below 1e-150.

    ``step`` may be left out, as a gradient scaler does when gradients overflow. What a table lacks
    is made up whenever it is read: by the arena in a forward pass (with autograd the batch's rows,
    without the whole table), in the ``state_dict`` of model and optimizer, in a copy, before it is
    cast or moved, and before anybody walks over the parameters or modules of what holds the arena
    (``parameters``, ``torch.export``, ``torch.func``, ``torch.optim.swa_utils.AveragedModel``,
    ``DistributedDataParallel``). Who reads ``arena.weight`` itself (``get_parameter`` does), or a
    tensor kept from before, calls ``arena.flush()`` first; an exported program, which shares the
    model's tensors, is such a reader once training goes on. A walk at every step costs what
    dense Adam's step does: ``zero_grad`` of the optimizers and of :class:`stem_fast.STEMNet` and
    :func:`stem_fast.training.step.clip_grad_norm_` take none, ``zero_grad`` of a module around them
    does.

    ``state_dict`` has the form of ``torch.optim.Adam``'s for the dense table, and each loads the
    other's.
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
        schedule = self._schedule(weight, group)
        schedule.decays(group["lr"], group["weight_decay"])
        if schedule.fading:
            self.catch_up(weight, None)
        schedule.advance(group["lr"], group["weight_decay"])
        self._run(weight, group, rows, values)

    def _run(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor | None
    ) -> None:
        state, schedule = self.state[weight], self._histories[weight]
        torch.ops.stem_fast.adam_rows(
            weight,
            state["exp_avg"],
            state["exp_avg_sq"],
            self._last[weight],
            rows,
            values,
            schedule.steps,
            schedule.clock,
            *schedule.betas,
            schedule.eps,
            schedule.decoupled,
            schedule.l2,
        )

    def _schedule(self, weight: Tensor, group: dict[str, Any]) -> Schedule:
        """The table's schedule; with its state, made at its first step. One has the same betas and
        eps in all steps: where they change, every row makes the steps that it owes."""
        options = {
            "betas": tuple(group["betas"]),
            "eps": group["eps"],
            "decoupled": group["decoupled_weight_decay"],
        }
        old = self._histories.get(weight)
        if old is not None and any(getattr(old, k) != value for k, value in options.items()):
            if old.made == 1:
                warnings.warn(
                    "betas or eps change after a single step: each change makes the steps of all "
                    "rows, as dense Adam does. Give OneCycleLR or CyclicLR cycle_momentum=False.",
                    stacklevel=2,
                )
            self.catch_up(weight, None)
            self.state[weight]["step"] = old.clock[1].cpu().float()
            del self._histories[weight]
        if weight not in self._histories:
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq"):
                    dtype = self._state_dtype(weight, name)
                    state[name] = ops.new_table(torch.empty_like(weight, dtype=dtype)).zero_()
            step = int(state["step"])
            self._histories[weight] = Schedule(step, weight.device, **options)
            self._last[weight] = row_steps(weight, step)
        schedule: Schedule = self._histories[weight]
        return schedule

    def _state_dtype(self, weight: Tensor, name: str) -> torch.dtype:
        wide = super()._state_dtype(weight, name)
        return self.state_dtype if name == "exp_avg" and wide == torch.float32 else wide

    def state_dict(self) -> dict[str, Any]:
        """State of the form of ``torch.optim.Adam``'s, after :meth:`flush`."""
        for weight, schedule in self._histories.items():
            self.state[weight]["step"] = schedule.clock[1].cpu().float()
        return super().state_dict()
