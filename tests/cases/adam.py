"""Adam's rows and schedule: cases, and what is checked of an implementation."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch

from cases import assert_within, to
from stem_fast import reference
from stem_fast.optim import Schedule


class AdamCase(NamedTuple):
    rows: int
    width: int
    steps: int  # that the schedule has
    base: int = 0  # steps made before it
    decay: float = 0.0
    decoupled: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    named: bool = True  # rows, in no order, with padding between; else all
    rates: int = 7  # learning rates in turn
    scale: float = 1.0  # of the weights
    new: bool = False  # whether no row was ever trained
    caught_up: int = 0  # rows, the first, that have missed no step before the newest, some not that

    def arguments(self, dtype: torch.dtype = torch.float64, grads: bool = False) -> list[Any]:
        """Of adam_rows: rows of every age, with m and v of many sizes, some of them zero."""
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64)

        schedule = Schedule(self.base, torch.device("cpu"), self.betas, decoupled=self.decoupled)
        for step in range(self.steps):
            lr = 1e-3 * (1 + step % self.rates)
            schedule.advance(lr, self.decay * (1 + step % 2))
        size = 10 ** (normal(self.rows, 1) - 5)
        never = slice(None, None, 1 if self.new else 5)  # trained
        size[never] = 0
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
        last = (self.base + age).int()
        rows = torch.randperm(self.rows, generator=draw)[: max(self.rows // 2, 1)]
        if self.named:
            rows = torch.cat([rows[rows != 0], rows.new_zeros(3)])
        count = len(rows) if self.named else self.rows
        grad = normal(count, self.width) * 1e-4 if grads else None
        return [
            *(weight.to(dtype), m.to(dtype), v.to(torch.promote_types(dtype, torch.float32))),
            *(last, rows if self.named else None, None if grad is None else grad.to(dtype)),
            *(schedule.steps, schedule.leaps, schedule.clock, *self.betas, 1e-8, self.decoupled),
            self.decay > 0 and not self.decoupled,
        ]


ADAMS = {
    "one row": AdamCase(1, 1, 3, named=False),
    "early": AdamCase(40, 7, 60),
    "late": AdamCase(30, 48, 450, base=5000),
    "all rows": AdamCase(33, 5, 30, base=300, named=False),
    "of more ages than CPU remembers": AdamCase(40, 6, 1200, base=100, named=False),
    "l2": AdamCase(40, 9, 70, base=10, decay=1e-4),
    "l2 in leaps": AdamCase(14, 11, 400, base=1000, decay=1e-6, rates=1, scale=1e-2),
    "new rows": AdamCase(12, 50, 90, base=300, decay=1e-6, scale=3e-5, new=True),
    "new rows, as large as may be": AdamCase(
        12, 20, 150, decay=1e-6, scale=1e-4, rates=1, new=True
    ),
    "new rows, strong l2": AdamCase(
        12, 20, 150, base=300, decay=3e-5, scale=5e-7, rates=1, new=True
    ),
    "strong l2 for long": AdamCase(9, 7, 200, base=700, decay=1e-3),
    "decoupled": AdamCase(30, 33, 200, base=900, decay=0.1, decoupled=True),
    "no momentum": AdamCase(20, 4, 20, betas=(0.0, 0.9)),
    "wide": AdamCase(6, 600, 5, base=400),
    "caught up": AdamCase(45, 48, 9, base=400, caught_up=45),
    "some caught up": AdamCase(30, 33, 20, base=50, named=False, caught_up=18),
    "caught up, l2": AdamCase(21, 17, 9, decay=1e-4, caught_up=21),
}


def check_adam_rows(run: Any, case: AdamCase, dtype: torch.dtype, grads: bool, device: str) -> None:
    """An implementation's adam_rows against the reference's, in its type and in float64; and that
    it leaps, or makes a new row's steps at once, where the case is for that."""
    own = to(device, case.arguments(dtype, grads))
    actual, exact = ([a.clone() if isinstance(a, torch.Tensor) else a for a in own] for _ in "ab")
    for i in (0, 1, 2, *([5] if grads else [])):
        exact[i] = exact[i].double()
    run(*actual)
    reference.adam_rows(*own)
    reference.adam_rows(*exact)
    assert torch.equal(actual[3], exact[3])
    if (case is ADAMS["l2 in leaps"] or case.new) and dtype != torch.float64:
        steps = to(device, case.arguments(dtype, grads))
        largest = [table.abs().amax() for table in steps[:3]]
        # The m of a new row has been as large as its first gradients.
        largest[1] = torch.maximum(largest[1], case.decay * largest[0])
        steps[6][:, 16] = 2.0**100  # as if the series of new rows were not known
        steps[7][3:, 14] = 1e9  # as uneven as no leap may be
        run(*steps)
        if dtype == torch.float32 and not (case.new and grads):
            leapt = (steps[0] != actual[0]).any(1).sum() >= 2
            assert leapt or torch.equal(actual[0], own[0]), "neither at once nor the reference"
        # Element by element, steps are made at once up to errors of 1e-5 of the largest there is.
        for most, after, mine, right in zip(largest, actual[:3], own[:3], exact[:3], strict=True):
            most = torch.maximum(most, right.abs().amax())
            rounding = torch.finfo(dtype).eps * right.abs().amax()
            error, theirs = ((each.double() - right).abs().amax() for each in (after, mine))
            assert error <= 1e-5 * most + 2 * theirs + rounding
        return
    for values in zip(actual[:3], own[:3], exact[:3], strict=True):
        # v and m are small beside the 1 that bounds set as the least scale.
        scale = values[2].abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        if dtype == torch.float64:  # the series is cut where its terms are as small as this
            assert (values[0] - values[2]).abs().amax() <= 1e-12 * scale
        else:
            assert_within(*((value.double() / scale).to(value.dtype) for value in values))


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
        steps = torch.zeros(100, 17, dtype=torch.float64, device=device)
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
    torch.testing.assert_close(actual[:, 16], expected[:, 16], rtol=1e-11, atol=0)


LEAPS = {
    "plain": ScheduleCase(40, decay=1e-6),
    "late": ScheduleCase(35, 3000, decay=1e-2),
    "no momentum": ScheduleCase(33, 5, (0.0, 0.9), decay=1e-3),
    "momentum lives long": ScheduleCase(50, 20, (0.99, 0.9), decay=1e-3),
    "no rate": ScheduleCase(16, 20, decay=1e-3, rate=0.0),
    "too short": ScheduleCase(15, decay=1e-3),
}


def check_adam_leap(run: Any, case: ScheduleCase, device: str) -> None:
    """An implementation's adam_leap against the reference's: called after every step, it writes the
    lines of whole leaps alone."""
    steps = torch.zeros(64, 17, dtype=torch.float64, device=device)
    clock = torch.tensor([case.base, case.base], device=device)
    tables = [torch.full((3 + 64 // 16, 22), 7.0, dtype=torch.float64, device=device) for _ in "ab"]
    for step in range(case.steps):
        rate, decay = case.rate * (1 + step % 3), case.decay * (1 + step % 5)
        options = torch.tensor([rate, decay], dtype=torch.float64, device=device)
        reference.adam_schedule(steps, clock, options, *case.betas, case.eps, False, True)
        for make, leaps in zip((run, reference.adam_leap), tables, strict=True):
            make(steps, leaps, clock, *case.betas)
    actual, expected = (leaps.cpu() for leaps in tables)
    whole = torch.arange(len(expected)) - 3
    whole = (whole >= 0) & (whole < case.steps // 16)
    assert (expected[whole] != 7).all()
    for leaps in (actual, expected):
        assert (leaps[~whole] == 7).all()
    # Differences are as exact as what they are made of.
    mean, l2 = 16 * expected[whole, 1], 16 * expected[whole, 11]
    scale = expected[whole].abs()
    scale[:, 2:7] += mean[:, None]
    scale[:, 7:11] += (mean * l2)[:, None]
    scale[:, 12] += l2
    scale[:, 14:18] += 1
    scale[:, 18:20] += (l2 * l2)[:, None]
    scale[:, 20:] += l2[:, None]
    assert ((actual - expected)[whole].abs() <= 1e-13 * scale).all()
