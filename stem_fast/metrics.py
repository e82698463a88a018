"""Ranking, calibration and regression metrics: exact, float64, vectorised.

Every function takes NumPy arrays or torch tensors (any device, any float or integer type) of one
value a row. NaN or infinite predictions, labels that are not 0/1 where a binary metric needs them,
and lengths that differ raise ``DataError`` with the row (0-based) and the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from stem_fast.common import KINDS, DataError

Values = npt.ArrayLike | torch.Tensor


def auc(y: Values, p: Values) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half.

    y: [N] labels in {0, 1}; p: [N] scores. NaN when one class is absent (or N is 0).
    The rank form of Mann and Whitney (1947) in integers, so it is exact up to one division.
    """
    y, p = _binary(y, p)
    return _weighted_auc(y, p, np.zeros(len(y), np.int8))


def gauc(y: Values, p: Values, group: Values) -> float:
    """AUC inside each group, averaged with the group sizes as weights (DIN, Zhou et al., KDD 2018).

    y: [N] labels in {0, 1}; p: [N] scores; group: [N] integer codes, negative = missing.
    Groups with one class only have no AUC and rows without a group belong nowhere: both are left
    out of the numerator and the denominator. NaN when nothing is left.
    """
    y, p = _binary(y, p)
    codes = _codes(group, len(y))
    known = codes >= 0
    return _weighted_auc(y[known], p[known], codes[known])


def logloss(y: Values, p: Values) -> float:
    """Mean binary cross-entropy in nats; NaN when N is 0.

    y: [N] labels in {0, 1}; p: [N] probabilities, clipped to [eps, 1 - eps] with float64's
    eps = 2.2e-16 as scikit-learn's ``log_loss`` clips float64 input. A prediction outside [0, 1]
    is a logit, not a probability, and raises.
    """
    y, p = _binary(y, p)
    _refuse_not_probability(p, "prediction")
    eps = np.finfo(np.float64).eps
    return -_mean(np.log(np.clip(np.where(y == 1, p, 1 - p), eps, 1 - eps)))


def pcoc(y: Values, p: Values) -> float:
    """Predicted over observed positives, sum(p) / sum(y): 1 is calibrated, above 1 too optimistic.

    y: [N] labels in {0, 1}; p: [N] probabilities. NaN when there is no positive.
    """
    y, p = _binary(y, p)
    positives = y.sum()
    return float(p.sum() / positives) if positives else math.nan


def rmse(y: Values, p: Values) -> float:
    """Root of the mean squared error, in the label's unit; y, p: [N] finite. NaN when N is 0."""
    y, p = _pair(y, p)
    return math.sqrt(_mean((y - p) ** 2))


def mae(y: Values, p: Values) -> float:
    """Mean absolute error, in the label's unit; y, p: [N] finite. NaN when N is 0."""
    y, p = _pair(y, p)
    return _mean(np.abs(y - p))


def evaluate(
    labels: Values, probabilities: Values, kinds: Mapping[str, str], group: Values | None = None
) -> dict:
    """All metrics of all tasks, in the form of a run's ``metrics.json``.

    labels: [N, T], NaN = missing: that row scores the other tasks only; probabilities: [N, T],
    the predicted value itself for a regression task; kinds: task -> one of ``schema.KINDS`` in
    column order; group: [N] integer codes, negative = missing.
    Returns {"rows": N, "tasks": {task: {"auc", "gauc", "logloss", "pcoc"} or {"rmse", "mae"}}}.
    What is undefined is None, so that the result is valid JSON: "gauc" without a group column,
    "auc" with one class, everything when all labels of a task are missing.
    """
    y, p = _float64(labels), _float64(probabilities)
    if y.ndim != 2 or y.shape != p.shape or y.shape[1] != len(kinds):
        raise DataError(
            f"labels and predictions: expected shape [rows, {len(kinds)}], a column for each of "
            f"{', '.join(kinds)}, got {list(y.shape)} and {list(p.shape)}."
        )
    codes = None if group is None else _codes(group, len(y))
    tasks: dict[str, dict[str, float | None]] = {}
    for column, (task, kind) in enumerate(kinds.items()):
        scores, targets = p[:, column], y[:, column]
        # Checked before rows are dropped, so that an error names the row of the data.
        _refuse_infinite(scores, f"prediction of task '{task}'")
        present = ~np.isnan(targets)
        if kind == "binary":
            _refuse_not_binary(targets, present, f"label of task '{task}'")
            _refuse_not_probability(scores, f"prediction of task '{task}'")
            targets, scores = targets[present], scores[present]
            values = {
                "auc": auc(targets, scores),
                "gauc": math.nan if codes is None else gauc(targets, scores, codes[present]),
                "logloss": logloss(targets, scores),
                "pcoc": pcoc(targets, scores),
            }
        elif kind in KINDS:
            _refuse(np.isinf(targets), targets, f"label of task '{task}'", "a finite number")
            targets, scores = targets[present], scores[present]
            values = {"rmse": rmse(targets, scores), "mae": mae(targets, scores)}
        else:
            raise DataError(f"task '{task}': expected a kind of {', '.join(KINDS)}, got '{kind}'.")
        tasks[task] = {name: v if math.isfinite(v) else None for name, v in values.items()}
    return {"rows": len(y), "tasks": tasks}


def _weighted_auc(y: np.ndarray, p: np.ndarray, group: np.ndarray) -> float:
    """sum_g n_g * auc_g / sum_g n_g over the groups with both classes, from one sort."""
    if len(y) == 0:
        return math.nan
    order = np.lexsort((p, group))
    y, p, group = y[order].astype(np.int64), p[order], group[order]
    new_group = np.append(True, group[1:] != group[:-1])
    new_run = new_group | np.append(True, p[1:] != p[:-1])  # a run is one score in one group
    group_start = np.flatnonzero(new_group)
    size = np.diff(group_start, append=len(y))
    run_start = np.flatnonzero(new_run)
    run_size = np.diff(run_start, append=len(y))
    # Twice the 1-based mid-rank of each row within its group: tied rows share a rank, and doubled
    # ranks are integers, so no sum rounds.
    twice_rank = np.repeat(2 * run_start + run_size + 1, run_size) - np.repeat(
        2 * group_start, size
    )
    positives = np.add.reduceat(y, group_start)
    negatives = size - positives
    twice_wins = np.add.reduceat(y * twice_rank, group_start) - positives * (positives + 1)
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return math.nan
    areas = twice_wins[both] / (2 * positives[both] * negatives[both])
    return float((size[both] * areas).sum() / size[both].sum())


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _pair(y: Values, p: Values) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions as float64 [N], both finite and of one length."""
    labels, predictions = _float64(y), _float64(p)
    for name, values in ("labels", labels), ("predictions", predictions):
        if values.ndim != 1:
            raise DataError(f"{name}: expected shape [rows], got {list(values.shape)}.")
    _refuse_lengths(len(labels), len(predictions), "predictions")
    _refuse_infinite(labels, "label")
    _refuse_infinite(predictions, "prediction")
    return labels, predictions


def _binary(y: Values, p: Values) -> tuple[np.ndarray, np.ndarray]:
    labels, predictions = _pair(y, p)
    _refuse_not_binary(labels, np.ones(len(labels), bool), "label")
    return labels, predictions


def _codes(group: Values, rows: int) -> np.ndarray:
    """Group codes as integers [N], in their own integer type: hashes may need all 64 bits."""
    codes = _array(group)
    if codes.ndim != 1:
        raise DataError(f"groups: expected shape [rows], got {list(codes.shape)}.")
    _refuse_lengths(rows, len(codes), "groups")
    if codes.dtype.kind == "f":
        _refuse(codes != np.floor(codes), codes, "group", "an integer code")
        _refuse_infinite(codes, "group")
    elif codes.dtype.kind not in "biu" and len(codes):
        raise DataError(f"groups: expected integers, got {codes.dtype}: encode them first.")
    return codes


def _array(values: Values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _float64(values: Values) -> np.ndarray:
    return _array(values).astype(np.float64, copy=False)


def _refuse(bad: np.ndarray, values: np.ndarray, name: str, expected: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{name}, row {row}: expected {expected}, got {float(values[row])!r}.")


def _refuse_infinite(values: np.ndarray, name: str) -> None:
    _refuse(~np.isfinite(values), values, name, "a finite number")


def _refuse_not_binary(labels: np.ndarray, present: np.ndarray, name: str) -> None:
    _refuse(present & (labels != 0) & (labels != 1), labels, name, "0 or 1")


def _refuse_not_probability(p: np.ndarray, name: str) -> None:
    _refuse((p < 0) | (p > 1), p, name, "a probability, not a logit")


def _refuse_lengths(labels: int, others: int, name: str) -> None:
    if labels != others:
        raise DataError(f"{name}: expected {labels}, as many as labels, got {others}.")
