"""The loss of all tasks: cases, and what is checked of an implementation."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch

from cases import assert_within, to
from stem_fast import reference


class LossCase(NamedTuple):
    batch: int
    regression: tuple[int, ...]
    masked: bool = False
    weighted: bool = False
    counted: bool = False
    scale: float = 3.0  # of the logits
    missing: float = 0.2  # part of the labels
    turned: bool = True  # logits as the towers leave them, task by task
    sliced: bool = False  # everything a part of something larger

    def arguments(self, dtype: torch.dtype = torch.float64) -> Any:
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        tasks = len(self.regression)
        logits = torch.randn(tasks, self.batch, generator=draw, dtype=torch.float64) * self.scale
        logits = logits.to(dtype).T if self.turned else logits.T.contiguous().to(dtype)
        chance = torch.rand(4, self.batch, tasks, generator=draw)
        labels = torch.where(
            torch.tensor(self.regression) != 0, 4 * chance[0], (chance[0] > 0.5) * 1.0
        )
        labels[chance[1] < self.missing] = torch.nan
        mask = chance[2] > 0.3 if self.masked else None
        weights = chance[3, :, 0].to(dtype) if self.weighted else None
        counts = torch.arange(tasks) * 7 if self.counted else None
        labels = labels.to(torch.float32)
        if self.sliced:
            logits = torch.cat([logits.T, logits.T], 1).T[: self.batch]  # as of a larger batch
            labels = torch.stack([labels, labels], 2)[:, :, 0]
            mask = None if mask is None else torch.cat([mask, mask], 1)[:, :tasks]
            weights = None if weights is None else torch.stack([weights, weights], 1)[:, 0]
            counts = None if counts is None else torch.stack([counts, counts + 1], 1)[:, 0]
        return logits, labels, list(self.regression), mask, weights, counts


LOSSES = {
    "binary": LossCase(33, (0, 0)),
    "one": LossCase(1, (0,), missing=0.0),
    "empty batch": LossCase(0, (0, 1)),
    "all labels missing": LossCase(5, (0, 1, 0), missing=1.1),
    "odd": LossCase(71, (0, 1, 0), True, True, True, turned=False),
    "odd parts": LossCase(71, (0, 1, 0), True, True, True, sliced=True),
    "many rows": LossCase(5000, (1, 0, 1, 0, 0), weighted=True),
    "extreme logits": LossCase(40, (0, 0, 0), scale=300.0),
}


def check_task_losses(
    forward: Any, backward: Any, case: LossCase, dtype: torch.dtype, device: str
) -> None:
    logits, labels, regression, *rest = to(device, case.arguments(dtype))
    tasks = len(regression)
    grad = torch.arange(1.0, tasks + 1, dtype=torch.float64, device=device)
    results = []
    for run, back, kind in (
        (forward, backward, dtype),
        (reference.task_losses, reference.task_losses_backward, dtype),
        (reference.task_losses, reference.task_losses_backward, torch.float64),
    ):
        mask, weights, counts = rest
        weights = None if weights is None else weights.to(kind)
        x = logits.to(kind)
        means, divisors = run(x, labels, regression, mask, weights, counts)
        slope = back(grad.to(means), x, labels, regression, mask, weights, divisors)
        assert slope.stride() == torch.empty_like(x).stride() or min(x.shape) < 2
        results.append((means, slope, divisors))
    for actual, own, exact in zip(*results, strict=True):
        if actual.dtype == torch.int64:
            assert torch.equal(actual, exact)
        else:
            assert_within(actual, own, exact)


def check_losses_near_zero(forward: Any, backward: Any, dtype: torch.dtype, device: str) -> None:
    """Of logits far on either side of either label, each a task of its own: a mean of several would
    hide what is lost of a small one."""
    x = torch.tensor([0.0, 1, 5, 10, 15, 20, 30, 40, 60, 80], dtype=torch.float64, device=device)
    x = torch.cat([x, -x]).repeat(2)
    y = torch.arange(2, device=device).repeat_interleave(len(x) // 2)
    right = torch.log1p(torch.exp(-x.abs())) + torch.where(y == 1, -x, x).clamp(min=0)
    logits, labels = x.to(dtype)[None], y.float()[None]
    means, divisors = forward(logits, labels, [0] * len(x), None, None, None)
    # The exponent of a GPU's exp is rounded before: by eps of the logit.
    eps = torch.finfo(means.dtype).eps * (4 + x.abs())
    assert ((means.double() - right).abs() <= eps * right).all()
    (slope,) = backward(
        torch.ones_like(means), logits, labels, [0] * len(x), None, None, divisors
    ).double()
    exact = torch.where(y == 1, -torch.sigmoid(-x), torch.sigmoid(x))
    # Near 1 the label is subtracted from a rounded sigmoid, as in torch.
    bound = eps * torch.where(y == 1, 1, exact) + torch.finfo(dtype).eps * exact.abs()
    bound += 2**-24 if dtype == torch.float16 else 0  # half of its least number
    assert ((slope - exact).abs() <= bound).all()
