"""What the kind of a task makes of its labels and of the network's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def predictions(
    output: Tensor,
    tasks: Sequence[str],
    kinds: Mapping[str, str],
    scales: Mapping[str, Sequence[float]],
) -> Tensor:
    """Outputs [B, T] as probabilities, and for regression tasks as values in the labels' units."""
    if all(kinds[task] == "binary" for task in tasks):
        return output.sigmoid()
    columns = []
    for task, column in zip(tasks, output.unbind(1), strict=True):
        kind = kinds[task]
        if kind == "binary":
            column = column.sigmoid()
        elif task in scales:
            mean, std = scales[task]
            column = column * std + mean
        columns.append(column.expm1() if kind == "regression:log1p" else column)
    return torch.stack(columns, 1)


def standardised(
    labels: Tensor,
    tasks: Sequence[str],
    kinds: Mapping[str, str],
    scales: Mapping[str, Sequence[float]],
) -> Tensor:
    """Labels [B, T] as the loss compares them to the network's outputs: those of regression tasks
    after log1p where that is their kind, and standardised by ``scales``."""
    changed = [
        task
        for task in tasks
        if kinds[task] == "regression:log1p" or (kinds[task] != "binary" and task in scales)
    ]
    if not changed:
        return labels
    columns = []
    for task, column in zip(tasks, labels.unbind(1), strict=True):
        if task in changed:
            # In float64, where no difference of two labels is infinite.
            value = column.double()
            value = value.log1p() if kinds[task] == "regression:log1p" else value
            mean, std = scales.get(task, (0.0, 1.0))
            column = ((value - mean) / std).to(labels.dtype)
        columns.append(column)
    return torch.stack(columns, 1)
