"""Metrics against scikit-learn and against loops that are too simple to be wrong."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sklearn_metrics

from stem_fast.common import DataError
from stem_fast.metrics import auc, evaluate, gauc, logloss, mae, pcoc, rmse

BINARY = (auc, logloss, pcoc)


def close(value: float, expected: float) -> bool:
    return value == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities with many ties or none, and groups with missing codes and odd sizes."""
    rows = draw(st.integers(1, 60))
    labels = draw(hnp.arrays(np.int64, rows, elements=st.integers(0, 1)))
    few = st.sampled_from([0.0, 5e-324, 1e-20, 0.25, 0.5, 1 - 2**-53, 1.0])
    scores = draw(hnp.arrays(np.float64, rows, elements=few | st.floats(0, 1)))
    groups = draw(hnp.arrays(np.int32, rows, elements=st.integers(-1, 6)))
    return labels, scores, groups


def auc_of_pairs(y: np.ndarray, p: np.ndarray) -> float:
    wins = np.sign(p[y == 1][:, None] - p[y == 0][None, :]) / 2 + 0.5
    return float(wins.mean()) if wins.size else math.nan


def gauc_of_loop(y: np.ndarray, p: np.ndarray, group: np.ndarray) -> float:
    total = rows = 0.0
    for code in set(group[group >= 0].tolist()):
        mine = group == code
        if len(set(y[mine].tolist())) == 2:
            total += mine.sum() * sklearn_metrics.roc_auc_score(y[mine], p[mine])
            rows += mine.sum()
    return total / rows if rows else math.nan


@given(scored())
def test_auc_counts_pairs(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, p, _ = data
    assert close(auc(y, p), auc_of_pairs(y, p))
    if len(set(y.tolist())) == 2:
        assert close(auc(y, p), sklearn_metrics.roc_auc_score(y, p))


@given(scored())
def test_gauc_is_a_weighted_loop_over_groups(
    data: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    assert close(gauc(*data), gauc_of_loop(*data))


@given(scored())
def test_logloss_pcoc_rmse_mae(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, p, _ = data
    assert close(logloss(y, p), sklearn_metrics.log_loss(y, p, labels=[0, 1]))
    assert close(pcoc(y, p), math.fsum(p) / y.sum() if y.any() else math.nan)
    assert close(rmse(y, p), sklearn_metrics.root_mean_squared_error(y, p))
    assert close(mae(y, p), sklearn_metrics.mean_absolute_error(y, p))


def test_many_rows_agree_with_sklearn() -> None:
    random = np.random.default_rng(0)
    rows = 30_000
    p = random.integers(0, 1000, rows) / 999  # heavy ties
    y = (random.random(rows) < p).astype(np.int8)
    group = random.zipf(1.3, rows).clip(max=300) - 2  # group -1 is the largest
    assert close(auc(y, p), sklearn_metrics.roc_auc_score(y, p))
    assert close(gauc(y, p, group), gauc_of_loop(y, p, group))
    assert close(logloss(y, p), sklearn_metrics.log_loss(y, p))


def test_by_hand() -> None:
    assert auc([0, 1, 0, 1], [0.1, 0.9, 0.4, 0.4]) == (1 + 1 + 1 + 0.5) / 4
    # Group 0: AUC 1 over 2 rows; group 5: AUC 0 over 3 rows; group 7 has one class; -1 is missing.
    group = [0, 0, 5, 5, 5, 7, -1, -1]
    y = [0, 1, 1, 0, 0, 1, 1, 0]
    p = [0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.0, 1.0]
    assert gauc(y, p, group) == pytest.approx(2 / 5, rel=1e-15)
    assert logloss([1, 0], [0.5, 0.75]) == pytest.approx(-math.log(0.125) / 2, rel=1e-15)
    assert pcoc([1, 0, 1], [0.5, 0.5, 0.5]) == 0.75
    assert rmse([1.0, -2.0], [4.0, 2.0]) == math.sqrt(12.5)
    assert mae([1.0, -2.0], [4.0, 2.0]) == 3.5


def test_groups_belong_to_the_rows_that_have_the_label() -> None:
    """A label is missing in row 0: the codes of the rows behind it must not move up."""
    labels = [[math.nan, 1], [0, 0], [1, 1], [0, math.nan], [1, 0]]
    p = [[0.9, 0.3], [0.2, 0.6], [0.4, 0.5], [0.5, 0.9], [0.3, 0.7]]
    group = [0, 1, 1, 2, 2]
    found = evaluate(labels, p, {"a": "binary", "b": "binary"}, group)["tasks"]
    # Task a: groups 1 and 2 with AUC 1 and 0. Task b: group 1 with AUC 0, the others of one class.
    assert found["a"]["gauc"] == 0.5
    assert found["b"]["gauc"] == 0.0
    del labels[0], p[0], group[0]
    assert evaluate(labels, p, {"a": "binary", "b": "binary"}, group)["tasks"]["a"]["gauc"] == 0.5


def test_auc_depends_on_the_order_of_scores_only() -> None:
    random = np.random.default_rng(1)
    y = random.integers(0, 2, 500)
    logits = random.normal(size=500) * 3
    assert auc(y, logits) == auc(y, 1 / (1 + np.exp(-logits)))
    assert auc(y, -0.0 * logits) == 0.5  # 0.0 and -0.0 are one score


def test_extreme_probabilities() -> None:
    eps = np.finfo(np.float64).eps
    assert logloss([1, 0], [1.0, 0.0]) == pytest.approx(eps, rel=1e-6)
    assert logloss([1, 0], [0.0, 1.0]) == pytest.approx(-math.log(eps), rel=1e-12)
    assert logloss([1], [5e-324]) == pytest.approx(-math.log(eps), rel=1e-12)
    # Denormal scores are still different scores.
    assert auc([0, 1], [5e-324, 1e-323]) == 1.0


def test_one_class_has_no_auc() -> None:
    for y in ([0, 0, 0], [1, 1, 1], [1]):
        p = np.linspace(0.2, 0.7, len(y))
        assert math.isnan(auc(y, p))
        assert math.isnan(gauc(y, p, np.zeros(len(y), int)))
    assert math.isnan(pcoc([0, 0], [0.1, 0.2]))


def test_groups_of_one_class_or_missing_leave_no_gauc() -> None:
    assert math.isnan(gauc([0, 1, 0], [0.1, 0.2, 0.3], [0, 1, 2]))
    assert math.isnan(gauc([0, 1, 0], [0.1, 0.2, 0.3], [-1, -1, -1]))


def test_empty() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in (*BINARY, rmse, mae):
            assert math.isnan(metric([], []))
        assert math.isnan(gauc([], [], []))
        result = evaluate(np.empty((0, 1)), np.empty((0, 1)), {"click": "binary"}, [])
    assert result["rows"] == 0
    assert set(result["tasks"]["click"].values()) == {None}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("label", [torch.int32, torch.uint8, torch.bool, torch.float32])
def test_tensors_of_any_type_count_as_their_float64_values(
    dtype: torch.dtype, label: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(200, generator=generator).to(dtype).requires_grad_()
    y = torch.randint(0, 2, (200,), generator=generator).to(label)
    group = torch.randint(-1, 9, (200,), generator=generator)
    exact = p.detach().double().numpy()
    numbers = y.double().numpy()
    for metric in BINARY:
        assert metric(y, p) == metric(numbers, exact)
    assert gauc(y, p, group) == gauc(numbers, exact, group.numpy())
    assert gauc(y, p, group.float()) == gauc(numbers, exact, group.numpy())


def test_group_codes_keep_64_bits() -> None:
    group = np.array([2**63 + 1, 2**63 + 1, 2**63, 2**63], np.uint64)
    assert gauc([0, 1, 0, 1], [0.1, 0.2, 0.9, 0.8], group) == 0.5
    assert (
        gauc([0, 1, 0, 1], [0.1, 0.2, 0.9, 0.8], torch.tensor([2**60 + 1] * 2 + [2**60] * 2)) == 0.5
    )


def test_inputs_are_not_modified() -> None:
    y, p, group = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([1, 1])
    evaluate(y[:, None], p[:, None], {"click": "binary"}, group)
    assert (y.tolist(), p.tolist(), group.tolist()) == ([1, 0], [0, 1], [1, 1])


@pytest.mark.parametrize("metric", [*BINARY, lambda y, p: gauc(y, p, [0, 0, 0])])
def test_refusals_name_row_and_value(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=r"prediction, row 1: expected a finite number, got nan\."):
        metric([0, 1, 0], [0.1, math.nan, math.nan])
    with pytest.raises(DataError, match=r"prediction, row 2: expected a finite number, got inf\."):
        metric([0, 1, 0], [0.1, 0.2, math.inf])
    with pytest.raises(DataError, match=r"label, row 2: expected 0 or 1, got 2\.0\."):
        metric([0, 1, 2], [0.1, 0.2, 0.3])
    with pytest.raises(DataError, match=r"label, row 0: expected 0 or 1, got 0\.5\."):
        metric([0.5, 1, 2], [0.1, 0.2, 0.3])
    with pytest.raises(DataError, match=r"label, row 0: expected a finite number, got nan\."):
        metric([math.nan, 1, 0], [0.1, 0.2, 0.3])
    with pytest.raises(DataError, match=r"predictions: expected 3, as many as labels, got 2\."):
        metric([0, 1, 0], [0.1, 0.2])
    with pytest.raises(DataError, match=r"predictions: expected shape \[rows\], got \[3, 1\]\."):
        metric([0, 1, 0], [[0.1], [0.2], [0.3]])


def test_other_refusals() -> None:
    with pytest.raises(
        DataError, match=r"prediction, row 1: expected a probability, not a logit, got -0\.5\."
    ):
        logloss([0, 1], [0.1, -0.5])
    with pytest.raises(
        DataError, match=r"prediction, row 0: expected a probability, not a logit, got 1\.5\."
    ):
        logloss([0, 1], [1.5, 0.5])
    with pytest.raises(DataError, match=r"label, row 1: expected a finite number, got inf\."):
        rmse([0.0, math.inf], [0.0, 0.0])
    with pytest.raises(DataError, match=r"groups: expected 2, as many as labels, got 3\."):
        gauc([0, 1], [0.1, 0.2], [0, 0, 0])
    with pytest.raises(DataError, match=r"group, row 1: expected an integer code, got 0\.5\."):
        gauc([0, 1], [0.1, 0.2], [0, 0.5])
    with pytest.raises(DataError, match=r"group, row 0: expected an integer code, got nan\."):
        gauc([0, 1], [0.1, 0.2], [math.nan, 1.0])
    with pytest.raises(DataError, match=r"group, row 0: expected a finite number, got inf\."):
        gauc([0, 1], [0.1, 0.2], [math.inf, 1.0])
    with pytest.raises(DataError, match=r"groups: expected integers, got <U1: encode them first\."):
        gauc([0, 1], [0.1, 0.2], np.array(["a", "b"]))
    with pytest.raises(DataError, match=r"groups: expected shape \[rows\], got \[2, 1\]\."):
        gauc([0, 1], [0.1, 0.2], [[0], [0]])


KINDS = {"click": "binary", "watch": "regression", "like": "binary"}
LABELS = np.array([[1, 3.0, math.nan], [0, math.nan, 1], [math.nan, 5.0, 1], [1, 1.0, 1]])
PREDICTIONS = np.array([[0.9, 2.0, 0.3], [0.2, 9.0, 0.4], [0.5, 5.5, 0.2], [0.2, 1.0, 1.0]])
GROUP = np.array([0, 0, 1, -1], np.int32)


def test_evaluate_scores_present_labels_only() -> None:
    result = evaluate(LABELS, PREDICTIONS, KINDS, GROUP)
    assert result["rows"] == 4
    assert list(result["tasks"]) == list(KINDS)
    assert result["tasks"]["click"] == {
        "auc": 0.75,  # rows 0, 1, 3, of which 1 and 3 tie
        "gauc": 1.0,  # rows 0 and 1
        "logloss": logloss([1, 0, 1], [0.9, 0.2, 0.2]),
        "pcoc": pytest.approx(1.3 / 2, rel=1e-15),
    }
    assert result["tasks"]["watch"] == {
        "rmse": pytest.approx(math.sqrt(1.25 / 3), rel=1e-15),
        "mae": pytest.approx(0.5, rel=1e-15),
    }
    assert result["tasks"]["like"] == {
        "auc": None,
        "gauc": None,
        "logloss": logloss([1, 1, 1], [0.4, 0.2, 1.0]),
        "pcoc": pytest.approx(1.6 / 3, rel=1e-15),
    }
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    same = evaluate(torch.tensor(LABELS), torch.tensor(PREDICTIONS), KINDS, torch.tensor(GROUP))
    assert same == result


def test_evaluate_without_groups() -> None:
    result = evaluate(LABELS, PREDICTIONS, KINDS)
    assert result["tasks"]["click"]["gauc"] is None
    assert result["tasks"]["click"]["auc"] == 0.75


def test_evaluate_of_a_task_without_labels() -> None:
    labels = LABELS.copy()
    labels[:, :2] = math.nan
    result = evaluate(labels, PREDICTIONS, KINDS, GROUP)
    assert set(result["tasks"]["click"].values()) == {None}
    assert set(result["tasks"]["watch"].values()) == {None}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def changed(values: np.ndarray, row: int, column: int, value: float) -> np.ndarray:
    values = values.copy()
    values[row, column] = value
    return values


def test_evaluate_refusals_name_the_task_and_the_row_of_the_data() -> None:
    # Row 3 stays row 3 although the label before it is missing.
    with pytest.raises(
        DataError, match=r"prediction of task 'click', row 3: expected a finite number, got nan\."
    ):
        evaluate(LABELS, changed(PREDICTIONS, 3, 0, math.nan), KINDS)
    with pytest.raises(
        DataError, match="prediction of task 'click', row 3: expected a probability, not a logit,"
    ):
        evaluate(LABELS, changed(PREDICTIONS, 3, 0, 1.25), KINDS)
    with pytest.raises(
        DataError, match=r"label of task 'click', row 3: expected 0 or 1, got 3\.0\."
    ):
        evaluate(changed(LABELS, 3, 0, 3), PREDICTIONS, KINDS)
    with pytest.raises(
        DataError, match=r"label of task 'watch', row 2: expected a finite number, got -inf\."
    ):
        evaluate(changed(LABELS, 2, 1, -math.inf), PREDICTIONS, KINDS)
    with pytest.raises(
        DataError, match="task 'like': expected a kind of binary, regression, regression:log1p,"
    ):
        evaluate(LABELS, PREDICTIONS, {**KINDS, "like": "ordinal"})
    with pytest.raises(DataError, match=r"groups: expected 4, as many as labels, got 3\."):
        evaluate(LABELS, PREDICTIONS, KINDS, GROUP[:3])
    with pytest.raises(
        DataError, match=r"labels and predictions: expected shape \[rows, 3\], a column for each of"
    ):
        evaluate(LABELS, PREDICTIONS[:3], KINDS)
    with pytest.raises(
        DataError, match=r"labels and predictions: expected shape \[rows, 1\], a column for each of"
    ):
        evaluate(LABELS, PREDICTIONS, {"click": "binary"})
