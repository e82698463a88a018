"""The loss of several tasks against the float64 reference, and that against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import devices, dtypes, to
from cases.loss import LOSSES, LossCase, check_losses_near_zero, check_task_losses
from torch.nn import functional as F

from stem_fast import ops, reference

losses = pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES.keys())


@devices
@losses
@dtypes
def test_task_losses(case: LossCase, dtype: torch.dtype, device: str) -> None:
    library = torch.ops.stem_fast
    check_task_losses(library.task_losses, library.task_losses_backward, case, dtype, device)


@devices
@pytest.mark.parametrize("library", [torch.ops.stem_fast, reference], ids=["op", "reference"])
@dtypes
def test_losses_near_zero(library: Any, dtype: torch.dtype, device: str) -> None:
    check_losses_near_zero(library.task_losses, library.task_losses_backward, dtype, device)


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
    logits, labels, regression, mask, weights, _ = to(device, LOSSES["odd"].arguments())
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


def test_labels_and_weights_of_samples_have_a_gradient_too() -> None:
    logits, labels, regression, mask, weights, _ = LOSSES["odd"].arguments()
    few = slice(0, 5)

    def means(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ops.task_losses(x, y, regression, mask[few], w)

    soft = labels[few].nan_to_num(0.3).double()
    leaves = [t.clone().requires_grad_() for t in (logits[few], soft, weights[few])]
    assert torch.autograd.gradcheck(means, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {1: torch.zeros(71, 2)},
            r"labels: expected numbers of shape \[71, 3\], got torch\.float32 \[71, 2\]",
        ),
        ({2: [0, 1]}, "regression: expected 3 tasks as in the logits, got 2"),
        (
            {3: torch.ones(71, 1) > 0},
            r"mask: expected torch\.bool \[71, 3\], got torch\.bool \[71, 1\]",
        ),
        (
            {3: torch.ones(71, 3)},
            r"mask: expected torch\.bool \[71, 3\], got torch\.float32 \[71, 3\]",
        ),
        (
            {4: torch.ones(70)},
            r"sample_weights: expected numbers of shape \[71\], got torch\.float32 \[70\]",
        ),
        ({5: torch.ones(3)}, r"counts: expected torch\.int64 \[3\], got torch\.float32 \[3\]"),
    ],
)
def test_other_shapes_and_types_are_refused(change: dict[int, Any], message: str) -> None:
    arguments = dict(enumerate(LOSSES["odd"].arguments())) | change
    with pytest.raises(ValueError, match=message):
        ops.task_losses(*arguments.values())


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
def test_compiles_to_one_graph() -> None:
    logits, *rest = LOSSES["odd"].arguments()
    run = torch.compile(ops.task_losses, fullgraph=True, backend="aot_eager")
    grads = []
    for losses in (run, ops.task_losses):
        x = logits.detach().requires_grad_()
        losses(x, *rest).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
