"""A synthetic feedback log with a known truth, for the demo and for tests.

One stream of impressions (user u is shown item i at hour h on device d) is drawn and cut in time:
the first rows train, the last rows validate. Three binary tasks give feedback on the same
impression. Their true logits are sums of five components c, each with latent tastes of its own:

    z_t = bias_t + sum_c STRENGTH[t][c] * s_c
    s_c = EFFECT * (a_c[u] + b_c[i]) + CONTEXT * (e_c[h] + g_c[d]) + <x_c[u], y_c[i]> / sqrt(K)
          standardised over the stream
    p_t = sigmoid(z_t),    label_t ~ Bernoulli(p_t)

    component   click  like  follow
    appeal        +     +      +      tastes that every kind of feedback shares
    bait          +     -      0      lures into a click and is punished after it: a conflict
    click         +     0      0      what matters for one task only; so for like and follow

All latents are standard normal: an item's is a mix of its category's, its author's and its own
(and b_c has a slope in log duration), a user's of the city's and an own one, so side fields help
where an id is rare. ``bias_t`` puts the mean of p_t at the task's base rate. Popularity of items
and activity of users are Zipf, the r-th has a share proportional to r**-exponent, and ids are
shuffled. ``watch_seq`` is what the user clicked last before the impression, oldest first.

The generator does not know who reads it. What makes it a multi-task problem: the sparse tasks
alone see too little of appeal, and one embedding shared by all tasks has to hold tastes that are
foreign or opposite to each other.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stem_fast import metrics
from stem_fast.common import DataError
from stem_fast.data.schema import LARGEST

BASE_RATES = {"click": 0.4, "like": 0.2, "follow": 0.1}
COMPONENTS = ("appeal", "bait", "click", "like", "follow")
STRENGTH = {  # a component's share of the logit's standard deviation
    "click": (0.6, 0.9, 0.9, 0.0, 0.0),
    "like": (0.6, -0.9, 0.0, 0.9, 0.0),
    "follow": (0.6, 0.0, 0.0, 0.0, 1.2),
}
DIMENSIONS = 2  # K
EFFECT, CONTEXT = 0.6, 0.2
USER_PARTS = {"city": 0.2, "own": 0.8}  # variances of a latent's parts
ITEM_PARTS = {"category": 0.3, "author": 0.3, "own": 0.4}
DURATION_SLOPE = 0.3
USER_EXPONENT, ITEM_EXPONENT = 0.6, 0.8
CATEGORIES, CITIES, DEVICES, ITEMS_PER_AUTHOR = 20, 40, 4, 8
DAYS = 14
HISTORY = 20  # values in watch_seq

FILES = ("train.parquet", "valid.parquet", "valid_truth.parquet", "truth.npz", "truth.json")


class _World(NamedTuple):
    """Who and what exists; latents are the names of the module's formula."""

    user_city: np.ndarray  # [users]
    item_category: np.ndarray  # [items]
    item_author: np.ndarray  # [items]
    item_log_duration: np.ndarray  # [items], standardised
    a: np.ndarray  # [users, C]
    x: np.ndarray  # [users, C, K]
    b: np.ndarray  # [items, C]
    y: np.ndarray  # [items, C, K]
    e: np.ndarray  # [24, C]
    g: np.ndarray  # [devices, C]


def generate(
    out: str | os.PathLike[str],
    *,
    rows: int = 120_000,
    valid_rows: int = 20_000,
    users: int = 600,
    items: int = 500,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a data set and its truth into the new folder ``out``; the same seed, the same bytes.

    train.parquet        [rows] impressions in time order: timestamp (seconds from the start),
                         user_id, item_id, author_id, category, hour, device, user_city (int32),
                         duration_s (float32, seconds), watch_seq (list of int32), and the labels
                         click, like, follow (int8)
    valid.parquet        [valid_rows], the same columns, later in time
    valid_truth.parquet  [valid_rows] the true probability of each label (float64)
    truth.npz            the latents, and what turns them into probabilities: component_mean,
                         component_std, strength, bias
    truth.json           seed, sizes, base rates, and the metrics of the true probabilities on
                         valid.parquet, which no model can be expected to beat

    The folder appears complete or not at all. Raises DataError for a size below 1 or a negative
    seed, and if ``out`` holds anything, unless ``overwrite`` is set and it is a folder of this
    function's files.
    """
    sizes = {"rows": rows, "valid_rows": valid_rows, "users": users, "items": items}
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"{name}: expected at least 1, got {size}.")
        if size > LARGEST:
            raise DataError(f"{name}: expected at most {LARGEST}, got {size}.")
    if seed < 0:
        raise DataError(f"seed: expected at least 0, got {seed}.")
    folder = Path(os.path.realpath(out))
    _refuse_occupied(folder, overwrite)

    random = np.random.default_rng(seed)
    world = _draw_world(random, users, items)
    columns = _draw_stream(random, world, rows + valid_rows)
    probabilities, truth = _probabilities(world, columns)
    labels = (random.random(probabilities.shape) < probabilities).astype(np.int8)  # [N, T]
    table = pa.table(
        {
            **columns,
            "watch_seq": _watched(columns["user_id"], columns["item_id"], labels[:, 0] == 1),
            **dict(zip(BASE_RATES, labels.T, strict=True)),
        }
    )
    ceiling = metrics.evaluate(
        labels[rows:],
        probabilities[rows:],
        dict.fromkeys(BASE_RATES, "binary"),
        columns["user_id"][rows:],
    )
    description = {"seed": seed, **sizes, "base_rates": BASE_RATES, "valid_truth": ceiling}

    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    temporary = work / "new"
    try:
        temporary.mkdir()
        pq.write_table(table.slice(0, rows), temporary / "train.parquet")
        pq.write_table(table.slice(rows), temporary / "valid.parquet")
        valid_truth = pa.table(dict(zip(BASE_RATES, probabilities[rows:].T, strict=True)))
        pq.write_table(valid_truth, temporary / "valid_truth.parquet")
        arrays: dict[str, Any] = {**world._asdict(), **truth}
        np.savez(temporary / "truth.npz", **arrays)
        text = json.dumps(description, indent=2, allow_nan=False)
        (temporary / "truth.json").write_text(text + "\n", encoding="utf-8")
        _publish(temporary, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _draw_world(random: np.random.Generator, users: int, items: int) -> _World:
    def latents(count: int) -> np.ndarray:  # the last one is the main effect
        return random.standard_normal((count, len(COMPONENTS), DIMENSIONS + 1))

    authors = math.ceil(items / ITEMS_PER_AUTHOR)
    user_city = _zipf(random, CITIES, users, 1.0)
    item_author = random.integers(0, authors, items)
    item_category = _zipf(random, CATEGORIES, authors, 1.0)[item_author]
    log_duration = random.standard_normal(items)

    user = math.sqrt(USER_PARTS["city"]) * latents(CITIES)[user_city]
    user += math.sqrt(USER_PARTS["own"]) * latents(users)
    item = math.sqrt(ITEM_PARTS["category"]) * latents(CATEGORIES)[item_category]
    item += math.sqrt(ITEM_PARTS["author"]) * latents(authors)[item_author]
    item += math.sqrt(ITEM_PARTS["own"]) * latents(items)
    slope = DURATION_SLOPE * random.choice((-1, 1), len(COMPONENTS))
    return _World(
        user_city,
        item_category,
        item_author,
        log_duration,
        a=user[..., -1],
        x=user[..., :-1],
        b=item[..., -1] + slope * log_duration[:, None],
        y=item[..., :-1],
        e=random.standard_normal((24, len(COMPONENTS))),
        g=random.standard_normal((DEVICES, len(COMPONENTS))),
    )


def _draw_stream(random: np.random.Generator, world: _World, rows: int) -> dict[str, np.ndarray]:
    user = _zipf(random, len(world.a), rows, USER_EXPONENT)
    item = _zipf(random, len(world.b), rows, ITEM_EXPONENT)
    traffic = 1.2 + np.sin((np.arange(24) - 13) / 24 * 2 * np.pi)  # busiest at 19 h
    hour = random.choice(24, rows, p=traffic / traffic.sum())
    seconds = random.integers(0, DAYS, rows) * 86_400 + hour * 3600 + random.integers(0, 3600, rows)
    timestamp = np.sort(seconds)
    ids = {
        "timestamp": timestamp,
        "user_id": user,
        "item_id": item,
        "author_id": world.item_author[item],
        "category": world.item_category[item],
        "hour": timestamp // 3600 % 24,
        "device": _zipf(random, DEVICES, rows, 1.0),
        "user_city": world.user_city[user],
    }
    columns = {name: values.astype(np.int32) for name, values in ids.items()}
    seconds_of_item = np.exp(3.2 + 0.7 * world.item_log_duration)  # median 25 s
    return {**columns, "duration_s": seconds_of_item[item].astype(np.float32)}


def _probabilities(
    world: _World, columns: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """p [N, T] by the module's formula, and the constants that the stream decides."""
    user, item = columns["user_id"], columns["item_id"]
    s = EFFECT * (world.a[user] + world.b[item])  # [N, C]
    s += CONTEXT * (world.e[columns["hour"]] + world.g[columns["device"]])
    for c in range(len(COMPONENTS)):  # one at a time: [N, C, K] would be large
        s[:, c] += (world.x[user, c] * world.y[item, c]).sum(-1) / math.sqrt(DIMENSIONS)
    mean, std = s.mean(0), s.std(0)
    std[std == 0] = 1  # a stream of one row
    strength = np.array([STRENGTH[task] for task in BASE_RATES])  # [T, C]
    z = (s - mean) / std @ strength.T
    # The mean of sigmoid(z + bias) rises with the bias: bisect all tasks at once.
    low, high = np.full(len(BASE_RATES), -50.0), np.full(len(BASE_RATES), 50.0)
    for _ in range(60):
        bias = (low + high) / 2
        above = _sigmoid(z + bias).mean(0) > list(BASE_RATES.values())
        low, high = np.where(above, low, bias), np.where(above, bias, high)
    truth = {"component_mean": mean, "component_std": std, "strength": strength, "bias": bias}
    return _sigmoid(z + bias), truth


def _watched(user: np.ndarray, item: np.ndarray, clicked: np.ndarray) -> pa.ListArray:
    """For each row, the last items that its user clicked in earlier rows, oldest first."""
    order = np.argsort(user, kind="stable")  # by user, then by time
    user, clicked = user[order], clicked[order]
    clicks = item[order][clicked]
    end = np.cumsum(clicked) - clicked  # clicks in earlier rows, of any user before
    first = np.append(True, user[1:] != user[:-1])
    start = np.maximum(np.maximum.accumulate(np.where(first, end, 0)), end - HISTORY)
    back = np.argsort(order)
    start, length = start[back], (end - start)[back]
    offsets = np.append(0, np.cumsum(length))
    values = clicks[np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], length)]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))


def _zipf(random: np.random.Generator, count: int, rows: int, exponent: float) -> np.ndarray:
    """``rows`` ids below ``count``, the r-th most likely with a weight of r**-exponent."""
    weight = np.arange(1, count + 1.0) ** -exponent
    return random.permutation(count)[random.choice(count, rows, p=weight / weight.sum())]


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def _refuse_occupied(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: choose a new folder.")
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = sorted(set(held) - set(FILES))
    if foreign:
        raise DataError(
            f"{folder} holds {foreign[0]}, which is not a data set's: choose another folder."
        )
    if held and not overwrite:
        raise DataError(
            f"{folder} holds a data set already: choose another folder, or give --overwrite."
        )


def _publish(temporary: Path, folder: Path) -> None:
    """Rename the complete folder into place; an old data set is moved aside first, then removed."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = temporary.with_name("old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
