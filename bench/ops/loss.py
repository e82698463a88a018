"""What is measured of the loss of all tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import (
    OURS,
    Case,
    Contender,
    Setting,
    compiled,
    copy_ceiling,
    size,
)
from stem_fast import ops


def task_losses(setting: Setting, device: str) -> Case:
    """Forward and backward pass of the loss of binary tasks that all have their labels."""
    draw = torch.Generator().manual_seed(6)
    logits = torch.randn(setting.tasks, setting.batch, generator=draw).to(device)
    labels = torch.rand(setting.batch, setting.tasks, generator=draw).round().to(device)
    regression = [0] * setting.tasks

    def contender(loss: Callable[[Tensor], Tensor]) -> Contender:
        leaf = logits.detach().requires_grad_()

        def run() -> tuple[Tensor, Tensor]:
            out = loss(leaf)
            return out, torch.autograd.grad(out, leaf)[0]

        return Contender(run)

    def official(x: Tensor) -> Tensor:
        """MultiTaskModel.compute_loss, with the sigmoids that it is given."""
        pairs = zip(x.sigmoid().unbind(), labels.unbind(1), strict=True)
        return torch.stack([F.binary_cross_entropy(p, y) for p, y in pairs]).sum()

    def check(actual: Any) -> None:
        x = logits.double()
        total = F.binary_cross_entropy_with_logits(x, labels.T.double(), reduction="sum")
        slope = x.sigmoid() - labels.T
        for found, exact in zip(actual, (total, slope), strict=True):
            bound = 64 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(
                found.double(), exact / setting.batch, rtol=bound, atol=bound / setting.batch
            )

    moved = 2 * size(logits, labels) + size(logits)
    return Case(
        moved=moved,
        ceilings=("copy",),
        ceiling_moved=moved,
        contenders={
            OURS: lambda: contender(lambda x: ops.task_losses(x.T, labels, regression).sum()),
            "official": lambda: contender(official),
            "official, compiled": lambda: contender(compiled(official, device)),
            "copy": lambda: copy_ceiling(moved, device),
        },
        check=check,
    )


OPS = {
    "task_losses": task_losses,
}
