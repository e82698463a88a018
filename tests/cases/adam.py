"""Adam's rows and step table: cases, and what is checked of an implementation."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from cases import assert_within, to
from stem_fast import reference
from stem_fast.optim.step_table import AdamStepTable


class AdamCase(NamedTuple):
    rows: int
    width: int
    steps: int  # that the step table has
    base: int = 0  # steps made before it
    decay: float = 0.0
    decoupled: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    named: bool = True  # rows, in no order, with padding between; else all
    rates: int = 7  # learning rates in turn
    scale: float = 1.0  # of the weights
    new: bool = False  # whether no row was ever trained
    caught_up: int = 0  # rows, the first, that have missed no step before the newest, some not that
    flushed: int = (
        0  # rows, the last, with momentum that have missed all steps; some are older still
    )

    def arguments(self, dtype: torch.dtype = torch.float64, grads: bool = False) -> list[Any]:
        """Of adam_rows: rows of every age, with m and v of many sizes, some of them zero."""
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64)

        step_table = AdamStepTable(
            self.base, torch.device("cpu"), self.betas, decoupled=self.decoupled
        )
        for step in range(self.steps):
            lr = 1e-3 * (1 + step % self.rates)
            step_table.advance(lr, self.decay * (1 + step % 2))
        size = 10 ** (normal(self.rows, 1) - 5)
        never = slice(None, None, 1 if self.new else 5)  # trained
        size[never] = 0
        if self.flushed:
            size[-self.flushed :] = 1e-10
        weight = normal(self.rows, self.width) * self.scale
        m = normal(self.rows, self.width) * size
        v = normal(self.rows, self.width).square() * size.square()
        v = torch.maximum(v, m.square() / 10)  # as large as Adam's is
        if self.new:
            weight[:, 0], v[:, 0] = 0, 1e-12  # stays, whatever v is
        age = torch.randint(0, self.steps + 1, (self.rows,), generator=draw)
        if self.decay > 0 and not self.decoupled:
            age[never] = 0  # L2 would have moved them
        age[: self.caught_up] = self.steps - 1
        age[: self.caught_up : 3] = self.steps
        if self.flushed:
            age[-self.flushed :] = 0
            age[-self.flushed :: 2] = -3  # as LazyAdam leaves them
        last = (self.base + age).int()
        rows = torch.randperm(self.rows, generator=draw)[: max(self.rows // 2, 1)]
        if self.named:
            rows = torch.cat([rows[rows != 0], rows.new_zeros(3)])
        count = len(rows) if self.named else self.rows
        grad = normal(count, self.width) * 1e-4 if grads else None
        return [
            *(weight.to(dtype), m.to(dtype), v.to(torch.promote_types(dtype, torch.float32))),
            *(last, rows if self.named else None, None if grad is None else grad.to(dtype)),
            *(step_table.steps, step_table.clock, *self.betas, 1e-8, self.decoupled),
            self.decay > 0 and not self.decoupled,
        ]


ADAMS = {
    "one row": AdamCase(1, 1, 3, named=False),
    "early": AdamCase(40, 7, 60),
    "late": AdamCase(30, 48, 450, base=5000),
    "all rows": AdamCase(33, 5, 30, base=300, named=False),
    "l2": AdamCase(40, 9, 70, base=10, decay=1e-4),
    "l2 for long": AdamCase(14, 11, 400, base=1000, decay=1e-6, rates=1, scale=1e-2),
    "new rows": AdamCase(12, 50, 90, base=300, decay=1e-6, scale=3e-5, new=True),
    "new rows, as large as may be": AdamCase(
        12, 20, 150, decay=1e-6, scale=1e-4, rates=1, new=True
    ),
    "new rows, strong l2": AdamCase(
        12, 20, 150, base=300, decay=3e-5, scale=5e-7, rates=1, new=True
    ),
    "flushed, as small as new rows": AdamCase(
        12, 9, 60, base=300, decay=1e-6, scale=3e-5, named=False, flushed=9
    ),
    "flushed": AdamCase(12, 9, 60, base=300, named=False, flushed=9),
    "strong l2 for long": AdamCase(9, 7, 200, base=700, decay=1e-3),
    "decoupled": AdamCase(30, 33, 200, base=900, decay=0.1, decoupled=True),
    "no momentum": AdamCase(20, 4, 20, betas=(0.0, 0.9)),
    "wide": AdamCase(6, 600, 5, base=400),
    "caught up": AdamCase(45, 48, 9, base=400, caught_up=45),
    "some caught up": AdamCase(30, 33, 20, base=50, named=False, caught_up=18),
    "caught up, l2": AdamCase(21, 17, 9, decay=1e-4, caught_up=21),
}
# Others remember nothing of an age, and take long to make as many steps.
ADAMS_ON_CPU = ADAMS | {
    "of more ages than CPU remembers": AdamCase(40, 6, 1200, base=100, named=False)
}


def check_adam_rows(run: Any, case: AdamCase, dtype: torch.dtype, grads: bool, device: str) -> None:
    """An implementation's adam_rows against the reference's, in its type and in float64; and that
    it makes the steps of new rows at once, where the case is for that."""
    own = to(device, case.arguments(dtype, grads))
    actual, exact = ([a.clone() if isinstance(a, torch.Tensor) else a for a in own] for _ in "ab")
    for i in (0, 1, 2, *([5] if grads else [])):
        exact[i] = exact[i].double()
    run(*actual)
    reference.adam_rows(*own)
    reference.adam_rows(*exact)
    assert torch.equal(actual[3], exact[3])
    if case.new and dtype != torch.float64:
        steps = to(device, case.arguments(dtype, grads))
        steps[6][:, -1] = 2.0**100  # as if the series of new rows were not known
        run(*steps)
        if dtype == torch.float32 and not grads:
            at_once = (steps[0] != actual[0]).any(1).sum() >= 2
            assert at_once or torch.equal(actual[0], own[0]), "neither at once nor the reference"
    for number, values in enumerate(zip(actual[:3], own[:3], exact[:3], strict=True)):
        # v and m are small beside the 1 that bounds set as the least scale.
        scale = values[2].abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        if number == 1 and case.new:  # m swings through 0, and was as large as the first gradients
            scale = torch.maximum(scale, case.decay * own[0].abs().amax())
        if dtype == torch.float64:  # the series is cut where its terms are as small as this
            assert (values[0] - values[2]).abs().amax() <= 1e-12 * scale
        else:
            assert_within(*((value.double() / scale).to(value.dtype) for value in values))


# How weight decay changes from step to step, as a part of the case's: by clipping among others.
DECAYS: dict[str, Callable[[int, torch.Generator], float]] = {
    "constant": lambda step, draw: 1.0,
    "clipped a little": lambda step, draw: 0.9 + 0.1 * torch.rand((), generator=draw).item(),
    "clipped": lambda step, draw: torch.rand((), generator=draw).item(),
    "ramp": lambda step, draw: step / 200,
    "jump": lambda step, draw: 0.01 if step // 37 % 2 else 1.0,
    "oscillating": lambda step, draw: 1 + 0.9 * math.sin(step / 3),
    "late": lambda step, draw: float(step > 90),
}


class DriftCase(NamedTuple):
    """Rows with a gradient in one step, or none, that then miss ``missed`` steps with L2."""

    decay: float = 1e-6
    base: int = 0
    missed: int = 200
    gradients: tuple[float, ...] = (0.0, *(10.0**-p for p in range(3, 12)))  # their scales
    weights: tuple[float, ...] = tuple(10.0**-p for p in range(1, 9))
    rate: Callable[[int], float] = lambda step: 1e-3


DRIFTS = {
    "from the first step": DriftCase(),
    "later": DriftCase(base=1000, missed=300),
    "strong l2": DriftCase(decay=1e-4, base=300),
    "weak l2": DriftCase(decay=1e-8, base=300),
    "learning rate warming up": DriftCase(base=100, rate=lambda step: 1e-5 * (step + 1)),
}


def check_drift(run: Any, case: DriftCase, how: str, device: str) -> None:
    """Row by row, an implementation's adam_rows in float32 is off float64 by at most 10 times what
    torch's Adam in float32 is, or what float32 rounds: in weights and in v.

    Values whose L2 float32 cannot tell from 0 are left out.
    """
    draw = torch.Generator().manual_seed(0)
    scales = torch.tensor(list(itertools.product(case.gradients, case.weights)))
    scales = torch.cat([torch.zeros(1, 2), scales])  # padding
    count = len(scales)
    grad, start = (torch.randn(count, 8, generator=draw) * s[:, None] for s in scales.unbind(1))
    rows = grad.any(1).nonzero()[:, 0]
    step_table = AdamStepTable(case.base, torch.device("cpu"))
    # By torch's plain and its fused Adam, which round differently.
    kinds = (
        (torch.float64, {}),
        (torch.float32, {"foreach": False}),
        (torch.float32, {"fused": True}),
    )
    dense = [torch.nn.Parameter(start.to(dtype)) for dtype, _ in kinds]
    torchs = [
        torch.optim.Adam([each], **options) for each, (_, options) in zip(dense, kinds, strict=True)
    ]
    for each, optimizer in zip(dense, torchs, strict=True):
        optimizer.state[each] = {
            "step": torch.tensor(float(case.base)),
            "exp_avg": torch.zeros_like(each),
            "exp_avg_sq": torch.zeros_like(each),
        }
    tables = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
    tables.append(torch.full((count,), case.base, dtype=torch.int32))
    tables = to(device, tables)

    def ours(rows: torch.Tensor | None, values: torch.Tensor | None) -> None:
        arguments = to(device, [rows, values, step_table.steps, step_table.clock])
        run(*tables, *arguments, 0.9, 0.999, 1e-8, False, True)

    for step in range(1 + case.missed):
        rate, decay = case.rate(step), case.decay * DECAYS[how](step, draw)
        step_table.advance(rate, decay)
        for each, optimizer in zip(dense, torchs, strict=True):
            optimizer.param_groups[0].update(lr=rate, weight_decay=decay)
            each.grad = (grad if step == 0 else torch.zeros_like(grad)).to(each.dtype)
            optimizer.step()
        if step == 0 and len(rows):
            ours(rows, grad[rows])
    ours(None, None)
    for name, ours_, least in (("weight", tables[0], 1e-24), ("exp_avg_sq", tables[2], 1e-28)):
        exact, *theirs = (
            (each if name == "weight" else optimizer.state[each][name]).detach().double()[1:]
            for each, optimizer in zip(dense, torchs, strict=True)
        )
        size = exact.norm(dim=1)
        assert (size > least).sum() > count // 4, "rows that tell something"
        error, *others = (
            (each - exact).norm(dim=1) for each in (ours_.cpu().double()[1:], *theirs)
        )
        bound = 10 * torch.maximum(torch.stack(others).amax(0), 1.2e-7 * size)
        worst = ((error / bound) * (size > least)).argmax()
        assert not ((error > bound) & (size > least)).any(), (
            f"{name}: gradient and weight {scales[1 + worst].tolist()}: "
            f"{error[worst] / size[worst]:.1e} off, torch {others[0][worst] / size[worst]:.1e}"
        )


class ScheduleCase(NamedTuple):
    steps: int
    base: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.0
    decoupled: bool = False
    l2_from: int = 0  # the first step that has L2, where decay is above 0
    eps: float = 1e-8
    rate: float = 1e-3


SCHEDULES = {
    "plain": ScheduleCase(30),
    "longer than momentum lives": ScheduleCase(90, 500, (0.5, 0.99)),
    "no momentum": ScheduleCase(6, 0, (0.0, 0.9)),
    "decoupled": ScheduleCase(40, 20, decay=0.1, decoupled=True),
    "l2": ScheduleCase(40, decay=1e-6),
    "strong l2": ScheduleCase(40, 700, decay=1e-2),
    "l2 begins late": ScheduleCase(12, decay=1e-6, l2_from=5),
    "tiny epsilon": ScheduleCase(5, decay=1e-6, eps=1e-30),
    "no epsilon": ScheduleCase(5, decay=1e-6, eps=0.0),
}


def check_adam_schedule(run: Any, case: ScheduleCase, device: str) -> None:
    """An implementation's adam_schedule against the reference's: the table after all steps, made
    twice with a flush between."""
    tables = []
    for make in (run, reference.adam_schedule):
        steps = torch.zeros(100, 29, dtype=torch.float64, device=device)
        clock = torch.tensor([case.base, case.base], device=device)
        for step in [*range(case.steps), *range(case.steps)]:
            if step == 0:
                clock[0], steps[0], steps[0, 3] = clock[1], 0, 1
            l2 = case.decay > 0 and not case.decoupled and step >= case.l2_from
            decay = case.decay * (1 + step % 2) if l2 or case.decoupled else 0.0
            options = torch.tensor([case.rate * (1 + step % 3), decay], dtype=torch.float64)
            with np.errstate(all="ignore"):  # Triton's interpreter has numpy divide by 0
                make(steps, clock, options.to(device), *case.betas, case.eps, case.decoupled, l2)
        assert clock.tolist() == [case.base + case.steps, case.base + 2 * case.steps]
        tables.append(steps.cpu())
    actual, expected = tables
    scale = expected.abs().amax(0).clamp(min=1e-200)
    assert ((actual - expected) / scale).abs().max() <= 1e-11
    torch.testing.assert_close(actual[:, 28], expected[:, 28], rtol=1e-9, atol=0)
