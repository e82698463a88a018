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

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from stem_fast import ops
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.reference.adam import COLUMNS

TORCHS_ALONE = ("amsgrad", "maximize", "nesterov", "dampening", "lr_decay")  # options


class History:
    """The steps of a table since its last flush, on its device: no line waits for it.

    ``clock`` is int64 [2], (base, now).
    """

    owing = True  # whether a row that has missed steps differs from what it would be
    fading = False  # whether a flush is due before another step like the last

    def __init__(self, step: int, device: torch.device) -> None:
        self.clock = torch.tensor([step, step], device=device)
        self.made = 0  # steps, as far as the host knows
        self.hidden = False  # whether a CUDA graph makes steps that the host does not count

    def count(self) -> None:
        """Counts a step."""
        self.hidden |= _captured(self.clock)
        self.made += 1

    def replayed(self) -> None:
        """Counts a step that a CUDA graph has made."""
        self.made, self.hidden = self.made + 1, False

    def flushed(self) -> None:
        """Every row has made every step: the history begins anew."""
        self.clock[0].copy_(self.clock[1])
        self.made = 0


class Schedule(History):
    """What every step since the last flush did, as the table that ``adam_rows`` reads.

    ``steps`` is float64 [N, 29]. Line i, of step ``t = base + i``, holds in columns

    0  ``lr / (1 - beta1^t)``
    1  ``1 / sqrt(1 - beta2^t)``
    2  ``weight_decay``; decoupled: ``1 - lr * weight_decay``
    3  decoupled: the product of column 2 since ``base``; else 1. On CUDA that of line 0 is 0 after
       a step for which there is no line
    4 .. 10  for rows that made step t and none since, the sums over j of ``a_j * (x_j - x_1)^p``,
       p = 0 .. 6, decoupled: of ``a_j`` over the product up to there
    4 .. 28  with L2, in their place: what :func:`stem_fast.reference.new_rows` makes of rows that
       were not trained by step t
    """

    def __init__(
        self,
        step: int,
        device: torch.device,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        decoupled: bool = False,
    ) -> None:
        super().__init__(step, device)
        self.betas, self.eps, self.decoupled = betas, eps, decoupled
        # What decoupled decay leaves of a weight, since base and in the last step, as far as the
        # host knows.
        self.left, self.factor = 1.0, 1.0
        self.steps = torch.zeros(_lines(device), COLUMNS, dtype=torch.float64, device=device)
        self.steps[0, 3] = 1
        self.l2 = False  # whether coupled weight decay was above 0 in one of them

    def advance(self, lr: float | Tensor, weight_decay: float | Tensor) -> None:
        """Adds a step."""
        options = _options(self.steps, lr, weight_decay)
        self.count()
        self.left *= self.factor
        self.l2 |= not self.decoupled and (isinstance(weight_decay, Tensor) or weight_decay != 0)
        if self.made >= len(self.steps):
            self.steps = torch.cat([self.steps, torch.zeros_like(self.steps)])
        torch.ops.stem_fast.adam_schedule(
            self.steps, self.clock, options, *self.betas, self.eps, self.decoupled, self.l2
        )
        if self.clock.is_cuda:  # a CUDA graph does not count its steps
            torch._assert_async(self.steps[0, 3], "flush the table: its schedule is full")

    def replayed(self) -> None:
        super().replayed()
        self.left *= self.factor

    @property
    def fading(self) -> bool:  # type: ignore[override]
        """Whether column 3 would come so near to 0 that no quotient of two lines is known, or so
        much faster than momentum that sums over it are large."""
        near = abs(self.left * self.factor) < 1e-150
        return self.made > 0 and (near or abs(self.factor) < self.betas[0] ** 2)

    def decays(self, lr: float | Tensor, weight_decay: float | Tensor) -> None:
        """Sets the factor of the next step."""
        self.factor = _kept(lr, weight_decay) if self.decoupled else 1.0

    def flushed(self) -> None:
        super().flushed()
        self.left = 1.0
        self.steps[0].zero_()
        self.steps[0, 3].fill_(1)
        # The steps of a CUDA graph are L2's if that of its capture was.
        self.l2 = self.l2 and self.clock.is_cuda


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
        self._histories: dict[Tensor, Any] = {}  # History of each table whose rows may miss steps
        self._last: dict[Tensor, Tensor] = {}  # the newest step of each of their rows, int32 [R]
        # Threads that predict have missed steps made, and none may be made twice.
        self._lock = threading.RLock()
        groups: list[Any] = list(params) if isinstance(params, Iterable) else [params]
        super().__init__(groups, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would train the table of the original."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: make one for the copied arena, "
            "and load this one's state_dict()"
        )

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Adds arenas with options of their own: ``{"params": arena or arenas, "lr": ...}``."""
        given = group["params"]
        arenas = list(given) if isinstance(given, Iterable) else [given]
        for arena in arenas:
            if not isinstance(arena, EmbeddingArena):
                raise TypeError(
                    f"{type(self).__name__} trains embedding arenas, got {type(arena).__name__}: "
                    "give it model.embedding of a STEMNet, or EmbeddingArena({'id': rows}, (), {}, "
                    "{}, 1, dim) in place of an nn.Embedding; and to an optimizer of torch all else"
                )
        _check(self.defaults | group)
        super().add_param_group(group | {"params": [arena.weight for arena in arenas]})
        for arena in arenas:
            self._arenas[arena.weight] = arena
            arena.flush()  # of steps under an optimizer before
            arena.sparse, arena.optimizer = True, self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients; with ``set_to_none`` False as torch does."""
        if set_to_none:
            for weight in self._arenas:  # torch's way costs a twentieth of a step of ours
                weight.grad = None
        else:
            super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients of the batch's rows, or of all where a gradient is dense.

        A table without a gradient makes no step, as in torch.

        Raises RuntimeError where another optimizer has taken a table over, ValueError where
        decoupled decay would leave nothing of a weight; no table makes its step then.
        """
        for arena in self._arenas.values():
            if arena.optimizer not in (self, None):
                raise RuntimeError(
                    f"another {type(arena.optimizer).__name__} trains the table now, which would "
                    f"not know of this {type(self).__name__}'s steps: keep to one"
                )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(weight.grad is not None for weight in group["params"]):
                self._refuse(group)
        with self._lock:
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._update(weight, group, *self._arenas[weight].row_gradients())
        return loss

    @torch.no_grad()
    def catch_up(self, weight: Tensor, rows: Tensor | None) -> None:
        """Make the steps that rows [U] of a table (None: all rows) have missed."""
        if torch.compiler.is_compiling():  # dynamo traces no lock, in one thread at a time
            self._catch_up(weight, rows)
        else:
            with self._lock:
                self._catch_up(weight, rows)

    def _catch_up(self, weight: Tensor, rows: Tensor | None) -> None:
        history = self._histories.get(weight)
        if history is None:
            return
        # A batch's catch-up is part of every step that a CUDA graph is to make.
        if history.made or history.hidden or (rows is not None and _captured(weight)):
            if history.owing:
                self._run(weight, self._group(weight), rows, None)
            if rows is None:
                history.flushed()

    @property
    def made(self) -> int:
        """Steps that a table has made since its last flush, as far as the host knows."""
        return max((history.made for history in self._histories.values()), default=0)

    @property
    def fading(self) -> bool:
        """Whether a flush is due before another step like the last: see :class:`Schedule`."""
        return any(history.fading for history in self._histories.values())

    def replayed(self) -> None:
        """Counts a step of every table, which the replay of a CUDA graph made.

        Who calls it after each replay spares the flush that otherwise comes before every reading of
        a table of which a step was captured.
        """
        for history in self._histories.values():
            history.replayed()

    def tensors(self) -> Iterator[Tensor]:
        """What a step works on, tables and gradients aside: a CUDA graph needs them where they
        are."""
        for state in self.state.values():
            yield from (t for t in state.values() if isinstance(t, Tensor) and t.dim())
        yield from self._last.values()
        for history in self._histories.values():
            yield from (t for t in vars(history).values() if isinstance(t, Tensor))

    def flush(self) -> None:
        """Make all steps that rows have missed: every table is then what it would be without."""
        for weight in self._arenas:
            self.catch_up(weight, None)

    def _refuse(self, group: dict[str, Any]) -> None:
        """Raise ValueError for options with which the group can make no step."""

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        """A step of rows [U], each once (None: all), with their gradients [U, W]."""
        raise NotImplementedError

    def _run(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor | None
    ) -> None:
        """The steps that rows have missed, and with values [U, W] the newest."""
        raise NotImplementedError

    def _group(self, weight: Tensor) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is weight for p in g["params"]))

    def state_dict(self) -> dict[str, Any]:
        """The state after :meth:`flush`."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict`` of this class, or of torch's of the dense table.

        Raises:
            ValueError: groups of other sizes, state of another shape, or an option of torch's that
                has no sparse form here; nothing is loaded then.
        """
        for number, group in enumerate(state_dict["param_groups"]):
            _check(self.defaults | group)
            for option in TORCHS_ALONE:
                if group.get(option):
                    raise ValueError(
                        f"parameter group {number} has {option}={group[option]}: not supported"
                    )
        saved = [
            state_dict["state"].get(i) for g in state_dict["param_groups"] for i in g["params"]
        ]
        large: list[tuple[Tensor, str, Tensor]] = []
        for weight, given in zip(self._arenas, saved, strict=False):
            for name, value in (given or {}).items():
                if not isinstance(value, Tensor) or not value.dim():
                    continue
                due = self._state_shape(weight)
                if value.shape != due:
                    raise ValueError(
                        f"{name} is {list(value.shape)}, the table {list(weight.shape)}: "
                        f"{list(due)} is due"
                    )
                large.append((weight, name, value))
        with self._lock:
            self.flush()  # steps owed under the old state
            super().load_state_dict(state_dict)
            for group in self.param_groups:  # torch before 2.7 has no decoupled_weight_decay
                for option, value in self.defaults.items():
                    group.setdefault(option, value)
            for weight, name, value in large:
                # torch has cast it to the weight's type.
                dtype = self._state_dtype(weight, name)
                self.state[weight][name] = value.to(weight.device, dtype, copy=True).contiguous()
            self._histories.clear()
            self._last.clear()

    def _state_dtype(self, weight: Tensor, name: str) -> torch.dtype:
        return torch.promote_types(weight.dtype, torch.float32)

    def _state_shape(self, weight: Tensor) -> torch.Size:
        return weight.shape


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
    :func:`stem_fast.step.clip_grad_norm_` take none, ``zero_grad`` of a module around them does.

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
            _kept(group["lr"], group["weight_decay"])

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
            self._last[weight] = _of_rows(weight, step)
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


class LazyAdam(ExactAdam):
    """Adam that leaves out the steps which a row misses, as ``torch.optim.SparseAdam`` does.

    Not Adam's trajectory: a row's momentum stands still while no batch reads it, and L2 pulls it
    only then. :class:`ExactAdam` costs hardly more.
    """

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        super()._update(weight, group, rows, values)
        self._histories[weight].flushed()
        self._histories[weight].owing = False


class Products(History):
    """What every step of SGD since the last flush did, as the table that ``sgd_rows`` reads.

    ``steps`` is float64 [N, 7]. Line i, of step ``base + i``, holds in columns

    0 .. 2  its ``lr``, ``momentum`` and ``weight_decay``
    3 .. 6  the product of the steps ``i + 1 .. i + b``, of those that were made, b the lowest bit
            of i (line 0: of all steps since ``base``), as a matrix on a row's (w, b).

    A row of line i makes the steps of that line, then those of line ``i + b``, and so on: at most
    ``log2(N)`` products. A new step belongs to as many lines: to that before it and to those whose
    number is that one's with its lowest bits cleared, as in a Fenwick tree.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(0, device)
        self.steps = torch.zeros(_lines(device), 7, dtype=torch.float64, device=device)
        self.owing = False  # no step yet moves rows that have no gradient
        self._bits = torch.arange(32, device=device)
        self._identity = torch.eye(2, dtype=torch.float64, device=device).flatten()
        self.steps[0, 3:] = self._identity

    def advance(self, lr: float | Tensor, momentum: float, weight_decay: float | Tensor) -> None:
        """Adds a step."""
        options = _options(self.steps, lr, momentum, weight_decay)
        self.count()
        self.owing |= momentum != 0 or isinstance(weight_decay, Tensor) or weight_decay != 0
        if self.made >= len(self.steps):
            self.steps = torch.cat([self.steps, torch.zeros_like(self.steps)])
        self.clock[1] += 1
        line = (
            self.clock[1:] - self.clock[:1]
        )  # not a scalar: an index of those would be waited for
        rate, _, decay = options[:, None]
        keep = 1 - rate * decay
        if momentum:
            step = torch.cat([keep, -momentum * rate, decay, options[1:2]])
        else:  # the momentum of steps before stands still
            step = torch.cat([keep, torch.zeros_like(keep).expand(2), torch.ones_like(keep)])
        lines = (line - 1) >> self._bits << self._bits  # repeat, with the same product
        products = step.view(2, 2) @ self.steps[lines, 3:].view(-1, 2, 2)
        self.steps[:, 3:].index_copy_(0, lines, products.flatten(1))
        self.steps.index_copy_(0, line, torch.cat([options, self._identity])[None])

    def flushed(self) -> None:
        super().flushed()
        self.steps[0, 3:].copy_(self._identity)


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
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        if weight not in self._histories:
            self._histories[weight] = Products(weight.device)
            self._last[weight] = _of_rows(weight, 0)
        if group["momentum"] and self.state[weight].get("momentum_buffer") is None:
            dtype = self._state_dtype(weight, "momentum_buffer")
            buffer = ops.new_table(torch.empty_like(weight, dtype=dtype))
            buffer.zero_()
            self.state[weight]["momentum_buffer"] = buffer
        self._histories[weight].advance(group["lr"], group["momentum"], group["weight_decay"])
        self._run(weight, group, rows, values)

    def _run(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor | None
    ) -> None:
        products = self._histories[weight]
        torch.ops.stem_fast.sgd_rows(
            weight,
            self.state[weight].get("momentum_buffer"),
            self._last[weight],
            rows,
            values,
            products.steps,
            products.clock,
        )


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

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        state = self.state[weight]
        if not state:
            shape, dtype = self._state_shape(weight), self._state_dtype(weight, "sum")
            state["sum"] = ops.new_table(weight.new_empty(shape, dtype=dtype)).zero_()
        options = _options(weight, group["lr"], group["weight_decay"])
        torch.ops.stem_fast.adagrad_rows(weight, state["sum"], rows, values, options, group["eps"])


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

    def _state_shape(self, weight: Tensor) -> torch.Size:
        return weight.shape[:1]


OPTIMIZERS: dict[str, Callable[..., TableOptimizer]] = {
    "adam": ExactAdam,
    "lazy_adam": LazyAdam,
    "sgd": SGD,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
}


def _of_rows(weight: Tensor, step: int) -> Tensor:
    """That step for every row, int32 [R]."""
    return ops.new_table(weight.new_empty(len(weight), dtype=torch.int32)).fill_(step)


def _lines(device: torch.device) -> int:
    """Of a new schedule. It grows where the host sees it fill up: not in a CUDA graph, which needs
    room for all steps between two flushes, and those of a large table take long."""
    return 16384 if device.type == "cuda" else 1024


def _captured(tensor: Tensor) -> bool:
    """Whether what is done to it is captured in a CUDA graph, and not done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _options(like: Tensor, *options: float | Tensor) -> Tensor:
    """Options of a step as float64 on the device of ``like``, which nothing waits for."""
    if like.is_cpu and not any(isinstance(option, Tensor) for option in options):
        return torch.tensor(options, dtype=torch.float64)
    found = like.new_empty(len(options), dtype=torch.float64)
    for place, option in zip(found, options, strict=True):
        place.fill_(option.reshape(()) if isinstance(option, Tensor) else option)
    return found


def _kept(lr: float | Tensor, weight_decay: float | Tensor) -> float:
    """What a step of decoupled decay leaves of a weight; 1 where they are on a GPU, for the host
    does not know it then.

    Raises ValueError where that is nothing.
    """
    if any(isinstance(option, Tensor) and option.is_cuda for option in (lr, weight_decay)):
        return 1.0
    decay = float(lr) * float(weight_decay)
    if abs(1 - decay) < 1e-6:
        raise ValueError(
            f"lr * weight_decay is {decay:g}: decoupled decay would leave nothing of a weight"
        )
    return 1 - decay


def _check(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a hyperparameter out of range."""
    for name in ("lr", "eps", "weight_decay", "momentum"):
        value = options.get(name, 0.0)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise ValueError(f"{name} is {value!r}, expected a finite number of at least 0")
    betas = options.get("betas", (0.9, 0.999))
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}, expected two numbers")
    for number, beta in enumerate(betas):
        if not isinstance(beta, Real | Tensor) or not 0 <= float(beta) < 1:
            raise ValueError(f"betas[{number}] is {beta!r}, expected a number from 0 to below 1")
