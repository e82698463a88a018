"""What the optimizers of embedding arenas share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from stem_fast import ops
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.optim.step_log import is_captured

# Options of torch's optimizers that have no sparse form here.
TORCHS_ALONE = ("amsgrad", "maximize", "nesterov", "dampening", "lr_decay")


class TableOptimizer(torch.optim.Optimizer):
    """What the optimizers of embedding arenas share.

    Args:
        params: an :class:`EmbeddingArena`, several, or parameter groups whose ``"params"`` are
            arenas. Only their ``weight`` is trained; its gradient is sparse from now on
            (``arena.sparse``).
        defaults: options of the groups.

    Gradients may be accumulated over several backward passes. ``lr`` and ``weight_decay`` may
    change at every step, and may be tensors of one value.

    Raises:
        TypeError: a parameter that is not an :class:`EmbeddingArena`.
        ValueError: a hyperparameter out of range.
    """

    def __init__(self, params: EmbeddingArena | Iterable[Any], defaults: dict[str, Any]) -> None:
        self._arenas: dict[Tensor, EmbeddingArena] = {}
        self._logs: dict[Tensor, Any] = {}  # the StepLog of each table whose rows may miss steps
        self._last: dict[Tensor, Tensor] = {}  # the last step of each of their rows, int32 [R]
        # Threads that predict make rows catch up, and no step may be made twice.
        self._lock = threading.RLock()
        groups: list[Any] = list(params) if isinstance(params, Iterable) else [params]
        super().__init__(groups, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: a copy would train the original's table."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: create one for the copied "
            "arena and load this one's state_dict()"
        )

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Adds arenas with options of their own: ``{"params": arena or arenas, "lr": ...}``."""
        params = group["params"]
        arenas = list(params) if isinstance(params, Iterable) else [params]
        for arena in arenas:
            if not isinstance(arena, EmbeddingArena):
                raise TypeError(
                    f"{type(self).__name__}: expected an EmbeddingArena, got "
                    f"{type(arena).__name__}: give it model.embedding of a STEMNet, or "
                    "EmbeddingArena({'id': rows}, (), {}, {}, 1, dim) in place of an nn.Embedding, "
                    "and give all other parameters to an optimizer of torch"
                )
        _check(self.defaults | group)
        super().add_param_group(group | {"params": [arena.weight for arena in arenas]})
        for arena in arenas:
            self._arenas[arena.weight] = arena
            arena.flush()  # the steps pending under another optimizer
            arena.sparse, arena.optimizer = True, self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, or zeroes them as torch does where ``set_to_none`` is False."""
        if set_to_none:
            for weight in self._arenas:  # torch's own takes a twentieth of a whole step
                weight.grad = None
        else:
            super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients of the batch's rows, or of all rows where it is dense.

        A table without a gradient makes no step, as in torch. After an error no table has made one.

        Raises:
            RuntimeError: another optimizer has taken over a table.
            ValueError: decoupled decay would set every weight to 0.
        """
        for arena in self._arenas.values():
            if arena.optimizer not in (self, None):
                raise RuntimeError(
                    f"expected to be the table's only optimizer, got another "
                    f"{type(arena.optimizer).__name__} that has taken it over from this "
                    f"{type(self).__name__}: create a single optimizer for the arena"
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
        """Makes the steps that rows int64 [U] of a table (None: all rows) have missed."""
        # dynamo cannot trace a lock; it runs one thread at a time.
        if torch.compiler.is_compiling():
            self._catch_up(weight, rows)
        else:
            with self._lock:
                self._catch_up(weight, rows)

    def _catch_up(self, weight: Tensor, rows: Tensor | None) -> None:
        log = self._logs.get(weight)
        if log is None:
            return
        # While capturing, record the catch-up even if nothing is missing now: replays need it.
        if log.done or log.hidden or (rows is not None and is_captured(weight)):
            if log.has_pending:
                self._run(weight, self._group(weight), rows, None)
            if rows is None:
                log.caught_up()

    @property
    def pending_steps(self) -> int:
        """Steps that rows may have missed since the last flush, as far as the host knows."""
        return max((log.done for log in self._logs.values()), default=0)

    @property
    def needs_flush(self) -> bool:
        """Whether a table must be flushed before another step like the last; see
        :class:`stem_fast.optim.step_table.AdamStepTable`."""
        return any(log.needs_flush for log in self._logs.values())

    def replayed(self) -> None:
        """Counts a step of every table that the replay of a CUDA graph made.

        Without this call after each replay, a table with a captured step is flushed every time it
        is read, because the host cannot know whether rows have missed steps.
        """
        for log in self._logs.values():
            log.replayed()

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that a step reads or writes, except tables and gradients. A captured CUDA
        graph is valid only as long as they stay where they are."""
        for state in self.state.values():
            yield from (t for t in state.values() if isinstance(t, Tensor) and t.dim())
        yield from self._last.values()
        for log in self._logs.values():
            yield from (t for t in vars(log).values() if isinstance(t, Tensor))

    def flush(self) -> None:
        """Makes all missed steps, so that every table equals the dense optimizer's."""
        for weight in self._arenas:
            self.catch_up(weight, None)

    def _refuse(self, group: dict[str, Any]) -> None:
        """Raises ValueError for options with which the group cannot make a step."""

    def _update(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor
    ) -> None:
        """One step of distinct rows [U] (None: all) with their gradients [U, W]."""
        raise NotImplementedError

    def _run(
        self, weight: Tensor, group: dict[str, Any], rows: Tensor | None, values: Tensor | None
    ) -> None:
        """Makes the steps that rows have missed and, with gradients [U, W], the newest step."""
        raise NotImplementedError

    def _group(self, weight: Tensor) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is weight for p in g["params"]))

    def state_dict(self) -> dict[str, Any]:
        """Flushes, and returns the state in the form of torch's optimizer of the dense table."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a ``state_dict`` of this class, or of torch's for the dense table.

        Raises:
            ValueError: groups of other sizes, state of another shape, or an option of torch's that
                has no sparse form here. Nothing is loaded then.
        """
        for number, group in enumerate(state_dict["param_groups"]):
            _check(self.defaults | group)
            for option in TORCHS_ALONE:
                if group.get(option):
                    raise ValueError(
                        f"parameter group {number}: expected no {option}, got "
                        f"{option}={group[option]}, which has no sparse form: train without it"
                    )
        saved = [
            state_dict["state"].get(i) for g in state_dict["param_groups"] for i in g["params"]
        ]
        large: list[tuple[Tensor, str, Tensor]] = []
        for weight, state in zip(self._arenas, saved, strict=False):
            for name, value in (state or {}).items():
                if not isinstance(value, Tensor) or not value.dim():
                    continue
                expected = self._state_shape(weight)
                if value.shape != expected:
                    raise ValueError(
                        f"{name}: expected shape {list(expected)} for a table of shape "
                        f"{list(weight.shape)}, got {list(value.shape)}: load the state of a model "
                        "with the same vocabularies and sizes"
                    )
                large.append((weight, name, value))
        with self._lock:
            self.flush()  # the steps pending under the old state
            super().load_state_dict(state_dict)
            for group in self.param_groups:  # torch before 2.7 has no decoupled_weight_decay
                for option, value in self.defaults.items():
                    group.setdefault(option, value)
            for weight, name, value in large:
                # torch has cast it to the weight's type.
                dtype = self._state_dtype(weight, name)
                self.state[weight][name] = value.to(weight.device, dtype, copy=True).contiguous()
            self._logs.clear()
            self._last.clear()

    def _state_dtype(self, weight: Tensor, name: str) -> torch.dtype:
        return torch.promote_types(weight.dtype, torch.float32)

    def _state_shape(self, weight: Tensor) -> torch.Size:
        return weight.shape


def row_steps(weight: Tensor, step: int) -> Tensor:
    """A tensor int32 [R] with that step for every row."""
    return ops.new_table(weight.new_empty(len(weight), dtype=torch.int32)).fill_(step)


def _check(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a hyperparameter out of range."""
    for name in ("lr", "eps", "weight_decay", "momentum"):
        value = options.get(name, 0.0)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    betas = options.get("betas", (0.9, 0.999))
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas: expected two numbers, got {betas!r}")
    for number, beta in enumerate(betas):
        if not isinstance(beta, Real | Tensor) or not 0 <= float(beta) < 1:
            raise ValueError(f"betas[{number}]: expected a number from 0 to below 1, got {beta!r}")
