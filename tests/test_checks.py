"""What fit finds in its training data: scales of labels, labels of one value, leaks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from stem_fast.common import DataError
from stem_fast.data.dataset import Dataset
from stem_fast.training import checks

ROWS = 6000
RANDOM = np.random.default_rng(0)
LABEL = (RANDOM.random(ROWS) < 0.3).astype(np.float32)
OTHER = (RANDOM.random(ROWS) < 0.5).astype(np.float32)


def labelled(*labels: Any, weight: Any = None) -> Dataset:
    stacked = torch.tensor(np.stack(labels, 1), dtype=torch.float32)
    weight = None if weight is None else torch.tensor(weight, dtype=torch.float32)
    return Dataset(torch.ones(len(stacked), 1, dtype=torch.int32), labels=stacked, weight=weight)


# ---- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_mean_and_deviation(
    monkeypatch: pytest.MonkeyPatch, block: int, weighted: bool
) -> None:
    monkeypatch.setattr(checks, "BLOCK", block)
    draw = np.random.default_rng(1)
    values = draw.normal(1e6, 3.0, 50).astype(np.float32).astype(float)
    values[::5] = np.nan
    weight = draw.integers(0, 3, 50) if weighted else np.ones(50)
    logs = np.expm1(draw.random(50)).astype(np.float32).astype(float)
    data = labelled(LABEL[:50], values, logs, weight=weight if weighted else None)
    kinds = {"click": "binary", "time": "regression", "paid": "regression:log1p"}
    found = checks.label_scales(data, kinds)
    assert list(found) == ["time", "paid"]
    for task, wanted in (("time", values), ("paid", np.log1p(logs))):
        known = ~np.isnan(wanted)
        mean = np.average(wanted[known], weights=weight[known])
        std = math.sqrt(np.average((wanted[known] - mean) ** 2, weights=weight[known]))
        assert found[task] == pytest.approx((mean, std), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([0, 0, math.nan, 0], "binary", "label 'y' is 0 on every training row that has it"),
        ([1, 1, 1, math.nan], "binary", "label 'y' is 1 on every training row"),
        ([0, 0, 0, 1], "binary", "label 'y' is 0 on every training row"),  # the last weighs nothing
        ([2.5, 2.5, 2.5, 9], "regression", "label 'y' is 2.5 on every training row"),
        ([3, 3, 3, 9], "regression:log1p", "label 'y' is 3 on every training row"),
        ([math.nan] * 3 + [1], "binary", "label 'y' is missing on every training row"),
    ],
)
def test_a_label_of_one_value_is_named(values: list[float], kind: str, message: str) -> None:
    data = labelled([0, 1, 0, 1], values, weight=[1, 2, 1, 0])
    with pytest.warns(UserWarning, match=message) as said:
        scales = checks.label_scales(data, {"x": "binary", "y": kind})
    assert len(said) == 1
    if kind != "binary":
        first = np.log1p(values[0]) if kind == "regression:log1p" else values[0]
        assert scales["y"] == pytest.approx((first, 1.0))


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (
            -1.0,
            "regression:log1p",
            r"label 'y', row 2: expected a finite number above -1, got -1\.",
        ),
        (
            -7.5,
            "regression:log1p",
            r"label 'y', row 2: expected a finite number above -1, got -7\.5\.",
        ),
        (
            math.inf,
            "regression:log1p",
            r"label 'y', row 2: expected a finite number above -1, got inf\.",
        ),
        (-math.inf, "regression", r"label 'y', row 2: expected a finite number, got -inf\."),
    ],
)
@pytest.mark.parametrize("block", [2, 100])
def test_labels_without_a_scale_are_refused(
    monkeypatch: pytest.MonkeyPatch, value: float, kind: str, message: str, block: int
) -> None:
    monkeypatch.setattr(checks, "BLOCK", block)
    data = labelled([0, 1, 0, 1], [1.0, 2.0, value, 3.0])
    with pytest.raises(DataError, match=message):
        checks.label_scales(data, {"x": "binary", "y": kind})


# ---- leaks -----------------------------------------------------------------------------------


def said_of(
    *, labels: Any = None, kinds: dict[str, str] | None = None, **features: Any
) -> list[str]:
    """The warnings about features: whole numbers are ids, real ones numbers, lists sequences."""
    kinds = kinds or {"y": "binary", "z": "binary"}
    ids = {n: v for n, v in features.items() if getattr(v, "dtype", None) == np.int64}
    numeric = {n: v for n, v in features.items() if getattr(v, "dtype", None) == np.float64}
    lists = {n: v for n, v in features.items() if isinstance(v, list)}
    data = Dataset(
        torch.tensor(np.stack([np.zeros(ROWS, int), *ids.values()], 1), dtype=torch.int32),
        torch.tensor(np.stack(list(numeric.values()), 1)).float() if numeric else None,
        {
            name: (
                torch.tensor([value for row in rows for value in row], dtype=torch.int32),
                torch.tensor(np.cumsum([0, *map(len, rows)])),
            )
            for name, rows in lists.items()
        },
        torch.tensor(np.stack([LABEL, OTHER] if labels is None else labels, 1)).float(),
    )
    model = {
        "tasks": list(kinds),
        "kinds": kinds,
        "vocab_sizes": dict.fromkeys(["nothing", *ids], 10**6),
        "numeric": list(numeric),
        "sequences": dict.fromkeys(lists, 10**6),
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        checks.warn_of_leaks(data, model)
    return [str(each.message) for each in said]


FLAG = np.where(RANDOM.random(ROWS) < 0.01, 1 - LABEL, LABEL).astype(np.int64)
LEAKS = {
    "flag": 1 + FLAG,
    "many_values": 1 + RANDOM.integers(0, 40, ROWS) * 2 + FLAG,  # each of them tells it
    "seconds": RANDOM.exponential(size=ROWS) * (1 + 100 * FLAG),
    "less": -RANDOM.exponential(size=ROWS) * (1 + 100 * FLAG),
    "both_ends": RANDOM.normal(size=ROWS) + np.where(FLAG, 9.0, 0) * RANDOM.choice([-1, 1], ROWS),
    "missing": np.where(FLAG, 0.0, RANDOM.normal(size=ROWS)),  # a missing number is the mean, 0
    "list": [[7, 8] if each else [8] * (i % 3) for i, each in enumerate(FLAG)],
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_feature_that_alone_tells_a_label_is_named(name: str) -> None:
    (said,) = said_of(**{name: LEAKS[name]})
    assert said.startswith(f"a feature alone tells a label: '{name}' ('y', AUC 0.9")


def test_honest_features_are_not() -> None:
    users = RANDOM.integers(0, 500, ROWS)
    rate = RANDOM.beta(0.5, 1.0, 500)[users]  # most of what can be known of a label
    label = (RANDOM.random(ROWS) < rate).astype(np.float32)
    honest: dict[str, Any] = {
        "impression": 1 + RANDOM.permutation(ROWS).astype(np.int64),  # one of its own in each row
        "session": np.arange(ROWS) // 10,  # of neighbouring rows
        "user": users,
        "rate": rate + RANDOM.normal(size=ROWS) / 10,
        "noise": RANDOM.normal(size=ROWS),
        "constant": np.ones(ROWS),
        "history": [list(RANDOM.integers(1, 50, i % 4)) for i in range(ROWS)],
        "impressions": [[i, i + 1] for i in range(ROWS)],
        "none": [[]] * ROWS,
    }
    assert said_of(labels=[label, OTHER], **honest) == []


def test_few_positives_tell_nothing() -> None:
    """Nor do few rows; and labels that are missing are no negatives."""
    rare = np.where(np.arange(ROWS) % 100 == 0, LABEL, 0)
    assert said_of(labels=[rare, OTHER], flag=1 + rare.astype(np.int64)) == []
    half = np.where(np.arange(ROWS) < ROWS // 2, LABEL, np.nan)
    (said,) = said_of(labels=[OTHER, half], flag=LEAKS["flag"])
    assert "'flag' ('z', AUC 0.9" in said


def test_a_regression_is_told_by_whether_it_is_high() -> None:
    time = np.exp(RANDOM.normal(size=ROWS))
    kinds = {"y": "binary", "z": "regression"}
    (said,) = said_of(
        labels=[LABEL, time], kinds=kinds, ratio=1 / time, age=RANDOM.normal(size=ROWS)
    )
    assert said.startswith("a feature alone tells a label: 'ratio' ('z', AUC 1.000)")


def test_the_largest_data_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, learns = checks._sample(10**9, 1 << 16)
    assert len(rows) == len(learns) == 1 << 16
    assert rows[0] == 0
    assert rows[-1] == 10**9 - 1
    assert (np.diff(rows) > 0).all()
    assert learns.sum() == 1 << 15
    assert len(np.unique(np.diff(rows))) <= 3  # neighbours, and steps between the parts
    monkeypatch.setattr(checks, "SAMPLE", 3000)
    (said,) = said_of(flag=LEAKS["flag"])
    assert "'flag'" in said


@pytest.mark.parametrize("name", ["is_like", "long_view", "Play_Time_ms", "z", "is_y", "has_z"])
def test_a_name_of_feedback_is_named(name: str) -> None:
    noise = RANDOM.integers(1, 5, ROWS)
    (said,) = said_of(**{name: noise})
    assert said.startswith(f"{name!r}: named as feedback is.")
    assert said_of(user_id=noise, is_video_author=noise, like_count=noise, liked=[[1]] * ROWS) == []


def test_many_names_are_a_few_and_a_number() -> None:
    noise = {name: RANDOM.integers(1, 5, ROWS) for name in ("a", *sorted(checks.FEEDBACK)[:7])}
    (said,) = said_of(**noise)
    assert "'add_to_cart', 'buy', 'click', 'clicked', 'comment' and 2 more: named as" in said
