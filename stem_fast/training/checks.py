"""What ``fit`` looks for in its training data before it trains: weights that train nothing, labels
of one value, features that give a label away; and the scales of regression labels."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stem_fast.common import DataError
from stem_fast.data.dataset import Dataset

BLOCK = 1 << 20  # rows of labels looked at together
# A feature is judged on at most SAMPLE rows, on fewer where rows times features times tasks would
# pass SAMPLE_CELLS: all of them take well below a second.
SAMPLE, SAMPLE_CELLS = 1 << 16, 1 << 23
PARTS = 128  # runs of neighbouring rows in the sample, which learn and are scored in turns
LEAK = 0.95  # an AUC that no honest feature alone reaches, on any data that we know
FEW = 50  # positives, or negatives, of which an AUC says little
BINS = 256  # of a numeric column, by rank
NAMED = 5  # features in one warning
# What is known only once an item was shown, under the names that public data sets give it.
FEEDBACK = frozenset(
    [
        "add_to_cart",
        "buy",
        "click",
        "clicked",
        "comment",
        "comment_stay_time",
        "conversion",
        "convert",
        "converted",
        "dislike",
        "dwell_time",
        "effective_view",
        "finish",
        "finished",
        "follow",
        "forward",
        "hate",
        "label",
        "like",
        "long_view",
        "play_duration",
        "play_time",
        "play_time_ms",
        "profile_enter",
        "profile_stay_time",
        "purchase",
        "purchased",
        "share",
        "stay_time",
        "target",
        "valid_play",
        "watch_ratio",
        "watch_time",
    ]
)


def check_weights(data: Dataset) -> None:
    """Raises DataError for sample weights that are negative, not finite, or all 0."""
    if data.weight is None:
        return
    weights = data.weight.cpu().numpy()
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"sample weight, row {row}: expected a finite number of at least 0, got {weights[row]}."
        )
    if not weights.any():
        raise DataError(
            "every sample weight of the training data is 0, so nothing would be trained: correct "
            "the --weight column, or leave it out."
        )


def label_scales(data: Dataset, kinds: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """(mean, standard deviation) of each regression's labels, after log1p where that is its kind,
    with rows weighted; (that value, 1) of one value only, and nothing without any.

    Warns of labels, of any kind, that have no or only one value, rows of weight 0 left out. Raises
    DataError for labels of a regression that are infinite or have no log1p, naming the row.
    """
    scales: dict[str, tuple[float, float]] = {}
    for column, (task, kind) in enumerate(kinds.items()):
        total, shifted, first = 0.0, 0.0, None
        low, high = math.inf, -math.inf
        for values, weights in _labels(data, column, task, kind):
            first = values[0] if first is None else first
            low, high = min(low, values.min()), max(high, values.max())
            total += weights.sum()
            shifted += (weights * (values - first)).sum()
        if first is None:
            _warn(f"label {task!r} is missing on every training row: nothing teaches its task")
            continue
        if low == high:
            shown = math.expm1(low) if kind == "regression:log1p" else low
            _warn(
                f"label {task!r} is {shown:g} on every training row that has it: its task learns "
                "nothing else. Leave it out, or train on rows where it differs"
            )
        if kind == "binary":
            continue
        mean = first + shifted / total
        squares = sum(
            (weights * (values - mean) ** 2).sum()
            for values, weights in _labels(data, column, task, kind)
        )
        scales[task] = (float(mean), math.sqrt(squares / total) if low < high else 1.0)
    return scales


def _labels(
    data: Dataset, column: int, task: str, kind: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One task's labels that are there, after log1p, and their weights, which are above 0; in
    blocks, float64."""
    assert data.labels is not None
    for start in range(0, len(data), BLOCK):
        rows = slice(start, start + BLOCK)
        values = data.labels[rows, column].cpu().numpy().astype(np.float64)
        weights = np.ones_like(values)
        if data.weight is not None:
            weights = data.weight[rows].cpu().numpy().astype(np.float64)
        bad = np.isinf(values) if kind != "binary" else np.zeros(len(values), bool)
        if kind == "regression:log1p":
            bad |= values <= -1
        if bad.any():
            row = int(bad.argmax())
            expected = "a finite number" + " above -1" * (kind == "regression:log1p")
            raise DataError(
                f"label {task!r}, row {start + row}: expected {expected}, got {values[row]:g}."
            )
        kept = ~np.isnan(values) & (weights > 0)
        if kept.any():
            values = np.log1p(values[kept]) if kind == "regression:log1p" else values[kept]
            yield values, weights[kept]


def warn_of_leaks(data: Dataset, config: Mapping[str, Any]) -> None:
    """Warns of features that alone tell a label, and of those that are named as feedback is.

    ``config`` is the model's. Of a sample of the rows one half learns the label's rate at each
    value of a feature (at each of ``BINS`` ranks of a number), the other half is scored by it: a
    value that is in one row alone, as an id may be, tells nothing. Of a regression the label is
    whether it is above its median.
    """
    tasks, categorical = list(config["tasks"]), list(config.get("vocab_sizes", ()))
    numeric, sequences = list(config.get("numeric", ())), list(config.get("sequences", ()))
    named = [name for name in categorical + numeric if _is_feedback(name, tasks)]
    if named:
        _warn(
            f"{_listed(map(repr, named))}: named as feedback is. What is known only once an item "
            "was shown is a label, or to be left out: as a feature it gives labels away"
        )
    columns = len(categorical + numeric + sequences) * len(tasks)
    rows, learns = _sample(len(data), min(SAMPLE, SAMPLE_CELLS // max(columns, 1)))
    sample = data.take(rows)
    assert sample.labels is not None
    labels = sample.labels.numpy().astype(np.float64)
    for column in range(labels.shape[1]):
        if config["kinds"][tasks[column]] != "binary" and not np.isnan(labels[:, column]).all():
            median = np.nanmedian(labels[:, column])
            above = (labels[:, column] > median).astype(np.float64)
            labels[:, column] = np.where(np.isnan(labels[:, column]), np.nan, above)
    ids = sample.ids.numpy()
    found: dict[str, tuple[float, str]] = {}
    for name in categorical + numeric + sequences:
        if name in categorical:
            codes = np.unique(ids[:, categorical.index(name)], return_inverse=True)[1]
        elif name in numeric:
            assert sample.numeric is not None
            codes = _ranks(sample.numeric.numpy()[:, numeric.index(name)])
        else:
            codes = np.unique(sample.sequences[name][0].numpy(), return_inverse=True)[1]
        lengths = np.diff(sample.sequences[name][1].numpy()) if name in sequences else None
        for column, task in enumerate(tasks):
            area = _area(codes, lengths, labels[:, column], learns)
            if area > LEAK and area > found.get(name, (0.0, ""))[0]:
                found[name] = (area, task)
    if found:
        said = [f"{name!r} ({task!r}, AUC {area:.3f})" for name, (area, task) in found.items()]
        _warn(
            f"a feature alone tells a label: {_listed(said)}. Leave it out if it is known only "
            "together with the label"
        )


def _area(
    codes: np.ndarray, lengths: np.ndarray | None, labels: np.ndarray, learns: np.ndarray
) -> float:
    """AUC, on the rows that don't learn, of the label's rate at each code among those that do.

    codes: one a row, or ``lengths`` of each, one row's after the other's: such a row is scored by
    their mean; labels: 0, 1 or NaN. 0 where rows are too few to tell.
    """
    known = ~np.isnan(labels)
    taught, scored = known & learns, known & ~learns
    total = labels[scored].sum()
    if min(total, scored.sum() - total) < FEW or not taught.any():
        return 0.0
    base, size = labels[taught].mean(), int(codes.max(initial=-1)) + 1
    owner = (
        np.arange(len(labels)) if lengths is None else np.repeat(np.arange(len(labels)), lengths)
    )
    taught = taught[owner]
    counts = np.bincount(codes[taught], minlength=size)
    rates = np.bincount(codes[taught], labels[owner[taught]], minlength=size)
    rates = (rates + base) / (counts + 1)  # that of a code in no such row is the mean
    rows: np.ndarray = np.ones(int(scored.sum()))
    positives = labels[scored]
    if lengths is None:
        # Few codes stand for many rows: they, not the rows, are put in order.
        rows = np.bincount(codes[scored], rows, minlength=size)
        positives = np.bincount(codes[scored], labels[scored], minlength=size)
    else:
        sums = np.bincount(owner, rates[codes], minlength=len(labels))
        rates = np.where(lengths > 0, sums / np.maximum(lengths, 1), base)[scored]
    places = np.unique(rates, return_inverse=True)[1]
    positives = np.bincount(places, positives)
    negatives = np.bincount(places, rows) - positives
    below = np.cumsum(negatives) - negatives / 2  # of equal scores one half wins
    return float((positives * below).sum() / (positives.sum() * negatives.sum()))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Each value's place among the distinct ones, or among ``BINS`` of equal size."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)))
    distinct = np.unique(values)
    return np.searchsorted(distinct if len(distinct) <= BINS else edges, values)


def _sample(rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``size`` rows, in ``PARTS`` runs over all the data; whether each is in an even one.

    Neighbours stay together, because rows of one session or user, whose labels are alike, often are
    neighbours: an id of theirs is then not told by its own rows.
    """
    if rows <= size:
        return np.arange(rows), np.arange(rows) * PARTS // max(rows, 1) % 2 == 0
    length = max(size // PARTS, 1)
    starts = np.linspace(0, rows - length, PARTS).astype(np.int64)
    chosen = (starts[:, None] + np.arange(length)).ravel()
    return chosen, np.repeat(np.arange(PARTS) % 2 == 0, length)


def _is_feedback(name: str, tasks: list[str]) -> bool:
    """Whether a name is a label's, or usual for one, but for "is_" and the like."""

    def bare(text: str) -> str:
        return re.sub(r"^(is|has|did)_", "", text.lower())

    return bare(name) in FEEDBACK or bare(name) in map(bare, tasks)


def _listed(parts: Any) -> str:
    given = list(parts)
    more = f" and {len(given) - NAMED} more" if len(given) > NAMED else ""
    return ", ".join(given[:NAMED]) + more


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)  # where fit is called
