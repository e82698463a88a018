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
training) the sum is made term by term. With L2 the row's gradient is ``weight_decay * w`` and the
missed steps are made one by one, in registers, until nothing moves any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from stem_fast.layers import EmbeddingArena

MOMENTS = 7  # of x_j, the zeroth included
COLUMNS = 4 + MOMENTS
SPENT = 2.0**-60  # momentum of which so little is left moves nothing


class Schedule:
    """What every step since the last flush did, as the table that ``adam_rows`` reads.

    ``steps`` is float64 [N, 11]. Line i, of step ``t = base + i``, holds in columns

    0  ``lr / (1 - beta1^t)``
    1  ``1 / sqrt(1 - beta2^t)``
    2  ``weight_decay``; decoupled: ``1 - lr * weight_decay``
    3  decoupled: the product of column 2 since ``base``; else 1
    4  and on: for rows that made step t and none since, the sums over j of
       ``a_j * (x_j - x_1)^p``, p = 0 .. 6, decoupled: of ``a_j`` over the product up to there.

    ``clock`` is int64 [2], (base, now). Both are on the table's device and no line waits for it.
    """

    def __init__(self, betas: tuple[float, float], step: int, device: torch.device) -> None:
        self.betas = betas
        self.steps = torch.zeros(1024, COLUMNS, dtype=torch.float64, device=device)
        self.steps[0, 3] = 1
        self.clock = torch.tensor([step, step], device=device)
        self.made = 0  # steps since the flush, as far as the host knows
        self.l2 = False  # whether coupled weight decay was above 0 in one of them
        longest = math.log(SPENT) / math.log(betas[0]) if betas[0] else 1
        age = torch.arange(1, int(longest) + 2, dtype=torch.float64, device=device)
        self._age, self._momentum = age.long(), betas[0] ** age
        self._root = betas[1] ** (age / 2)
        self._powers = torch.arange(MOMENTS, device=device)

    def advance(self, lr: float | Tensor, weight_decay: float | Tensor, *, decoupled: bool) -> None:
        """Adds a step."""
        self.l2 |= not decoupled and (isinstance(weight_decay, Tensor) or weight_decay != 0)
        self.made += 1
        if self.made >= len(self.steps):
            self.steps = torch.cat([self.steps, torch.zeros_like(self.steps)])
        steps, clock = self.steps, self.clock
        beta1, beta2 = self.betas
        clock[1] += 1
        line = clock[1:] - clock[:1]  # not a scalar: an index of those would be waited for
        t = clock[1:].double()
        lr = torch.zeros_like(t) + lr
        decay = torch.zeros_like(t) + weight_decay
        if decoupled:
            decay = 1 - lr * decay
        left = steps[line - 1, 3] * decay if decoupled else torch.ones_like(t)
        size, root = lr / (1 - beta1**t), (1 - beta2**t).rsqrt()
        blank = torch.zeros(MOMENTS, dtype=torch.float64, device=clock.device)
        steps.index_copy_(0, line, torch.cat([size, root, decay, left, blank])[None])
        # The lines of rows that made their last step not too long ago gain a term.
        start = (line - self._age).clamp(min=0)
        weight = torch.where(self._age <= line, size * self._momentum / left, 0) * steps[start, 3]
        distance = self._root * root - self._root[0] * steps[start + 1, 1]
        terms = weight[:, None] * distance[:, None] ** self._powers
        steps[:, 4:].index_add_(0, start, terms)

    def flushed(self) -> None:
        """Every row has made every step: the table begins anew."""
        self.clock[0].copy_(self.clock[1])
        self.steps[0] = 0
        self.steps[0, 3] = 1
        self.made, self.l2 = 0, False


class TableOptimizer(torch.optim.Optimizer):
    """What the optimizers of embedding arenas share.

    Args:
        params: an :class:`EmbeddingArena`, several, or parameter groups whose ``"params"`` are
            arenas. Of each its ``weight`` is trained, and nothing else; its gradient is sparse from
            now on (``arena.sparse``).
        defaults: options of the groups.

    Gradients may be added up over several backward passes. ``lr`` and ``weight_decay`` may change
    at every step, and may be tensors of one value.

    Raises:
        TypeError: parameters that are no arena.
        ValueError: a hyperparameter out of range.
    """

    def __init__(self, params: EmbeddingArena | Iterable[Any], defaults: dict[str, Any]) -> None:
        self._arenas: dict[Tensor, EmbeddingArena] = {}
        groups: list[Any] = [params] if isinstance(params, EmbeddingArena) else list(params)
        super().__init__(groups, defaults)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Adds arenas with options of their own: ``{"params": arena or arenas, "lr": ...}``."""
        given = group["params"]
        arenas = [given] if isinstance(given, EmbeddingArena) else list(given)
        for arena in arenas:
            if not isinstance(arena, EmbeddingArena):
                raise TypeError(
                    f"{type(self).__name__} trains embedding arenas (model.embedding), not "
                    f"{type(arena).__name__}; give other parameters to an optimizer of torch"
                )
        _check(self.defaults | group)
        super().add_param_group(group | {"params": [arena.weight for arena in arenas]})
        for arena in arenas:
            self._arenas[arena.weight] = arena
            arena.sparse, arena.optimizer = True, self

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients of the batch's rows, or of all where a gradient is dense.

        A table without a gradient makes no step, as in torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group, *self._arenas[weight].row_gradients())
        return loss

    @torch.no_grad()
    def catch_up(self, weight: Tensor, rows: Tensor | None) -> None:
        """Make the steps that rows [U] of a table (None: all rows) have missed."""

    def flush(self) -> None:
        """Make all steps that rows have missed: every table is then what it would be without."""
        for weight in self._arenas:
            self.catch_up(weight, None)

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        """A step of rows [U], each once (None: all), with their gradients [U, W]."""
        raise NotImplementedError

    def _group(self, weight: Tensor) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is weight for p in g["params"]))

    def state_dict(self) -> dict[str, Any]:
        """The state after :meth:`flush`."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict``.

        Raises:
            ValueError: groups of other sizes, or state of another shape.
        """
        self.flush()  # steps owed under the old state
        super().load_state_dict(state_dict)
        saved = [
            state_dict["state"].get(i) for g in state_dict["param_groups"] for i in g["params"]
        ]
        for weight, given in zip(self._arenas, saved, strict=True):
            for name, value in (given or {}).items():
                if not isinstance(value, Tensor) or not value.dim():
                    continue
                width = value.shape[1:]
                if len(value) != len(weight) or width not in ((), weight.shape[1:]):
                    raise ValueError(
                        f"{name} is {list(value.shape)}, the table {list(weight.shape)}"
                    )
                # torch casts it to the weight's type.
                dtype = self._state_dtype(weight)
                self.state[weight][name] = value.to(weight.device, dtype, copy=True).contiguous()

    def _state_dtype(self, weight: Tensor) -> torch.dtype:
        return torch.promote_types(weight.dtype, torch.float32)


class ExactAdam(TableOptimizer):
    """``torch.optim.Adam``'s trajectory of embedding tables, at the cost of a batch's rows.

    Args:
        params: as :class:`TableOptimizer`'s.
        lr, betas, eps, weight_decay: as ``torch.optim.Adam``'s.
        decoupled: ``torch.optim.AdamW``'s weight decay.
        state_dtype: of m and v; torch.bfloat16 saves half their memory. (float64 tables: float64.)

    ``step`` may be left out, as a gradient scaler does when gradients overflow. What a table lacks
    is made up whenever it is read: by the arena in a forward pass (with autograd the batch's rows,
    without the whole table), in the ``state_dict`` of model and optimizer, in a copy. Who reads
    ``arena.weight`` directly calls ``arena.flush()`` before.

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
        self._schedules: dict[Tensor, Schedule] = {}
        self._last: dict[Tensor, Tensor] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled,
        }
        super().__init__(params, defaults)

    def catch_up(self, weight: Tensor, rows: Tensor | None) -> None:
        schedule = self._schedules.get(weight)
        # The steps of a CUDA graph are not counted by the host.
        if schedule is not None and (schedule.made or weight.is_cuda):
            self._run(weight, self._group(weight), rows, None)
            if rows is None:
                schedule.flushed()

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        decoupled = group["decoupled_weight_decay"]
        schedule = self._schedule(weight, group)
        schedule.advance(group["lr"], group["weight_decay"], decoupled=decoupled)
        self._run(weight, group, rows, values)

    @torch.no_grad()
    def _run(
        self, weight: Tensor, group: Mapping[str, Any], rows: Tensor | None, values: Tensor | None
    ) -> None:
        state, schedule = self.state[weight], self._schedules[weight]
        torch.ops.stem_fast.adam_rows(
            weight,
            state["exp_avg"],
            state["exp_avg_sq"],
            self._last[weight],
            rows,
            values,
            schedule.steps,
            schedule.clock,
            *group["betas"],
            group["eps"],
            group["decoupled_weight_decay"],
            schedule.l2,
        )

    def _schedule(self, weight: Tensor, group: Mapping[str, Any]) -> Schedule:
        """The table's schedule; with its state, made at its first step."""
        if weight not in self._schedules:
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq"):
                    dtype = self._state_dtype(weight)
                    state[name] = torch.zeros_like(weight, dtype=dtype)
            step = int(state["step"])
            self._schedules[weight] = Schedule(group["betas"], step, weight.device)
            self._last[weight] = torch.full_like(weight[:, 0], step, dtype=torch.int32)
        return self._schedules[weight]

    def _state_dtype(self, weight: Tensor) -> torch.dtype:
        return torch.float64 if weight.dtype == torch.float64 else self.state_dtype

    def state_dict(self) -> dict[str, Any]:
        """State of the form of ``torch.optim.Adam``'s, after :meth:`flush`."""
        for weight, schedule in self._schedules.items():
            self.state[weight]["step"] = schedule.clock[1].cpu().float()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict`` of this class or of torch's Adam or AdamW.

        Raises:
            ValueError: groups of other sizes, state of another shape, or ``amsgrad`` or
                ``maximize``, which have no exact sparse form here.
        """
        for number, group in enumerate(state_dict["param_groups"]):
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"parameter group {number} has {option}=True: not supported")
        super().load_state_dict(state_dict)
        self._schedules.clear()
        self._last.clear()


class LazyAdam(ExactAdam):
    """Adam that leaves out the steps which a row misses, as ``torch.optim.SparseAdam`` does.

    Not Adam's trajectory: a row's momentum stands still while no batch reads it, and L2 pulls it
    only then. :class:`ExactAdam` costs hardly more.
    """

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        super()._update(weight, group, rows, values)
        self._schedules[weight].flushed()  # nothing is owed


class SGD(TableOptimizer):
    """``torch.optim.SGD``'s trajectory (momentum and L2 included) at the cost of a batch's rows.

    A missed step is linear in a row's weight w and momentum b,
    ``(w, b) <- ((1 - lr * wd) w - lr * momentum * b, wd * w + momentum * b)``, so any number of
    them is one 2x2 matrix, the same for all rows that made their last step together.

    Args:
        params: as :class:`TableOptimizer`'s.
        lr, momentum, weight_decay: as ``torch.optim.SGD``'s.
    """

    def __init__(
        self,
        params: EmbeddingArena | Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        self._owed: dict[Tensor, Tensor] = {}  # [N, 2, 2] float64: line i, since N - i steps
        self._last: dict[Tensor, Tensor] = {}  # int64 [R], line of each row
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def catch_up(self, weight: Tensor, rows: Tensor | None) -> None:
        owed = self._owed.get(weight)
        if owed is None or len(owed) == 1:
            return
        group, last, whole = self._group(weight), self._last[weight], rows is None
        rows = _named(weight, rows)
        with torch.no_grad():
            missed = owed[last[rows]]
            w = weight[rows].to(self._state_dtype(weight))
            made = missed[:, :1, 0].to(w.dtype) * w
            if group["momentum"]:
                buffer = self.state[weight]["momentum_buffer"]
                b, missed = buffer[rows], missed.to(w.dtype)
                made = made + missed[:, 0, 1:] * b
                buffer[rows] = missed[:, 1, :1] * w + missed[:, 1, 1:] * b
            weight[rows] = made.to(weight.dtype)
        if whole:
            self._begin(weight)
        else:
            last[rows] = len(owed) - 1

    def _begin(self, weight: Tensor) -> None:
        self._owed[weight] = torch.eye(2, dtype=torch.float64, device=weight.device)[None]
        self._last[weight] = torch.zeros_like(weight[:, 0], dtype=torch.int64)

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        if weight not in self._owed:
            self._begin(weight)
        self.catch_up(weight, rows)
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        rows = _named(weight, rows)
        dtype = self._state_dtype(weight)
        w = weight[rows].to(dtype)
        b = values.to(dtype) + w * decay
        if momentum:
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight, dtype=dtype)
            b += momentum * state["momentum_buffer"][rows]
            state["momentum_buffer"][rows] = b
        weight[rows] = (w - lr * b).to(weight.dtype)
        one = torch.zeros(2, 2, dtype=torch.float64, device=weight.device)
        one[0, 0], one[0, 1], one[1, 0], one[1, 1] = 1 - lr * decay, -lr * momentum, decay, momentum
        self._owed[weight] = torch.cat([one @ self._owed[weight], torch.eye(2).to(one)[None]])
        self._last[weight][rows] = len(self._owed[weight]) - 1


class Adagrad(TableOptimizer):
    """``torch.optim.Adagrad`` of the batch's rows (Duchi et al., 2011).

    Without L2 this is the dense trajectory, for a gradient of zero moves nothing; ``weight_decay``
    acts on the batch's rows only.

    Args:
        params: as :class:`TableOptimizer`'s.
        lr, eps, weight_decay: as ``torch.optim.Adagrad``'s.
    """

    def __init__(
        self,
        params: EmbeddingArena | Iterable[Any],
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def _squares(self, grad: Tensor) -> Tensor:
        return grad.square()

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        rows = _named(weight, rows)
        state, dtype = self.state[weight], self._state_dtype(weight)
        w = weight[rows].to(dtype)
        grad = values.to(dtype) + w * group["weight_decay"]
        squares = self._squares(grad)
        if not state:
            state["sum"] = weight.new_zeros(len(weight), *squares.shape[1:], dtype=dtype)
        total = state["sum"][rows] + squares
        state["sum"][rows] = total
        root = total.sqrt().view(len(total), -1) + group["eps"]
        weight[rows] = (w - group["lr"] * grad / root).to(weight.dtype)


class RowWiseAdagrad(Adagrad):
    """Adagrad with one sum for each row of the table, of the mean of its squared gradients
    (FBGEMM's EXACT_ROWWISE_ADAGRAD): as good as no state to keep."""

    def __init__(
        self,
        params: EmbeddingArena | Iterable[Any],
        lr: float | Tensor = 1e-2,
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        super().__init__(params, lr, eps, weight_decay)

    def _squares(self, grad: Tensor) -> Tensor:
        return grad.square().mean(1)


OPTIMIZERS: dict[str, Callable[..., TableOptimizer]] = {
    "adam": ExactAdam,
    "lazy_adam": LazyAdam,
    "sgd": SGD,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
}


def _named(weight: Tensor, rows: Tensor | None) -> Tensor:
    """The rows, all of the table's where none are named."""
    return torch.arange(len(weight), device=weight.device) if rows is None else rows


def _check(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a hyperparameter out of range, as torch's optimizers do."""
    for name in ("lr", "eps", "weight_decay", "momentum"):
        value = options.get(name, 0.0)
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} is {value}, must be at least 0")
    for number, beta in enumerate(options.get("betas", ())):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{number}] is {beta}, must be from 0 to below 1")
