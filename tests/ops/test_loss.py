"""The loss of several tasks against the float64 reference, and that against autograd."""

from __future__ import annotations

import pytest
import torch
from cases import LOSSES, LossCase, check_task_losses, devices, dtypes, to
from torch.nn import functional as F

from stem_fast import ops, reference

losses = pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES.keys())


@devices
@losses
@dtypes
def test_task_losses(case: LossCase, dtype: torch.dtype, device: str) -> None:
    library = torch.ops.stem_fast
    check_task_losses(library.task_losses, library.task_losses_backward, case, dtype, device)


@losses
def test_the_gradient_is_that_of_the_mean(case: LossCase) -> None:
    logits, *rest = case.arguments()
    grads = []
    for run in (ops.task_losses, lambda *all: reference.task_losses(*all)[0]):
        x = logits.detach().requires_grad_()
        run(x, *rest).mul(torch.arange(1.0, len(rest[1]) + 1)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@devices
def test_what_a_label_adds(device: str) -> None:
    """By torch's own losses, task by task."""
    logits, labels, regression, mask, weights, _ = to(
        device, LOSSES["kinds, all there is"].arguments()
    )
    means = ops.task_losses(logits, labels, regression, mask, weights)
    for task, mean in enumerate(means):
        rows = (mask & ~labels.isnan())[:, task]
        x, y, weight = logits[rows, task], labels[rows, task].double(), weights[rows]
        if regression[task]:
            expected = (weight * F.mse_loss(x, y, reduction="none")).sum() / rows.sum()
        else:
            cross = F.binary_cross_entropy_with_logits(x, y, weight, reduction="sum")
            expected = cross / rows.sum()
        torch.testing.assert_close(mean, expected)


@devices
def test_a_lost_model_is_seen(device: str) -> None:
    logits, labels, *rest = to(device, LOSSES["binary"].arguments())
    labels[3] = 1.0
    logits[3, 1] = torch.nan
    assert ops.task_losses(logits, labels, *rest).isnan().tolist() == [False, True]


def test_weights_of_samples_have_a_gradient_too() -> None:
    logits, labels, regression, mask, weights, _ = LOSSES["kinds, all there is"].arguments()
    few = slice(0, 5)

    def means(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ops.task_losses(x, labels[few], regression, mask[few], w)

    leaves = logits[few].clone().requires_grad_(), weights[few].clone().requires_grad_()
    assert torch.autograd.gradcheck(means, leaves)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
def test_compiles_to_one_graph() -> None:
    logits, *rest = LOSSES["kinds, all there is"].arguments()
    run = torch.compile(ops.task_losses, fullgraph=True, backend="aot_eager")
    grads = []
    for losses in (run, ops.task_losses):
        x = logits.detach().requires_grad_()
        losses(x, *rest).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
