"""The generator against the truth that it saves, and against its own formula."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stem_fast.common import DataError
from stem_fast.data import synth
from stem_fast.data.synth import BASE_RATES, FILES, HISTORY, generate
from stem_fast.metrics import auc

ROWS, VALID_ROWS = 30_000, 10_000
SMALL = {"rows": 400, "valid_rows": 100, "users": 20, "items": 30}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "data"
    generate(folder, rows=ROWS, valid_rows=VALID_ROWS, seed=5)
    return folder


def read(folder: Path, name: str) -> pa.Table:
    return pq.read_table(folder / f"{name}.parquet")


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def labels(table: pa.Table) -> np.ndarray:
    return np.stack([column(table, task) for task in BASE_RATES], 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_columns_and_sizes(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == sorted(FILES)
    train, valid = read(made, "train"), read(made, "valid")
    assert (train.num_rows, valid.num_rows) == (ROWS, VALID_ROWS)
    ids = (
        "timestamp",
        "user_id",
        "item_id",
        "author_id",
        "category",
        "hour",
        "device",
        "user_city",
    )
    expected = pa.schema(
        [(name, pa.int32()) for name in ids]
        + [("duration_s", pa.float32()), ("watch_seq", pa.list_(pa.int32()))]
        + [(task, pa.int8()) for task in BASE_RATES]
    )
    assert train.schema.equals(expected)
    assert valid.schema.equals(expected)
    assert all(train[name].null_count == 0 for name in train.column_names)
    truth = json.loads((made / "truth.json").read_text())
    assert (truth["seed"], truth["rows"], truth["valid_rows"]) == (5, ROWS, VALID_ROWS)
    assert [path.name for path in made.parent.iterdir()] == [made.name]  # nothing left behind


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in ("a", 3), ("b", 3), ("c", 4):
        generate(tmp_path / name, seed=seed, **SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    same = {
        name for name in FILES if contents(tmp_path / "a")[name] == contents(tmp_path / "c")[name]
    }
    assert not same


def test_popularity_and_activity_are_zipf(made: Path) -> None:
    for name, exponent in ("item_id", synth.ITEM_EXPONENT), ("user_id", synth.USER_EXPONENT):
        ids = np.concatenate([column(read(made, part), name) for part in ("train", "valid")])
        counts = np.sort(np.bincount(ids))[::-1].astype(float)
        # Slope of log count over log rank, away from the head (few ids) and the tail (few rows).
        rank = np.arange(1, len(counts) + 1)
        middle = slice(4, len(counts) * 3 // 4)
        slope = np.polyfit(np.log(rank[middle]), np.log(counts[middle]), 1)[0]
        assert slope == pytest.approx(-exponent, abs=0.07)
        # Ids are shuffled: a small id is not a popular one.
        popular = np.argsort(np.bincount(ids))[::-1][:20]
        assert popular.mean() > len(counts) / 4


def test_rates_are_the_planted_ones(made: Path) -> None:
    y = np.concatenate([labels(read(made, part)) for part in ("train", "valid")])
    rates = np.array(list(BASE_RATES.values()))
    error = np.sqrt(rates * (1 - rates) / len(y))  # of a Bernoulli mean
    assert (np.abs(y.mean(0) - rates) < 4.5 * error).all()


def test_labels_follow_the_true_probabilities(made: Path) -> None:
    valid, truth = read(made, "valid"), read(made, "valid_truth")
    assert truth.column_names == list(BASE_RATES)
    for task in BASE_RATES:
        y, p = column(valid, task), column(truth, task)
        assert ((p > 0) & (p < 1)).all()
        assert auc(y, p) > 0.75
        for decile in np.array_split(np.argsort(p), 10):
            expected, variance = p[decile].sum(), (p[decile] * (1 - p[decile])).sum()
            assert abs(y[decile].sum() - expected) < 4.5 * np.sqrt(variance) + 1
    described = json.loads((made / "truth.json").read_text())["valid_truth"]
    assert described["rows"] == VALID_ROWS
    assert described["tasks"]["like"]["auc"] == auc(column(valid, "like"), column(truth, "like"))


def test_saved_latents_give_the_true_probabilities(made: Path) -> None:
    """The docstring's formula, row by row, from truth.npz and the columns alone."""
    valid, truth = read(made, "valid").slice(0, 200), read(made, "valid_truth").slice(0, 200)
    with np.load(made / "truth.npz", allow_pickle=False) as latents:
        world = dict(latents)
    for row, fields in enumerate(valid.to_pylist()):
        u, i, h, d = (fields[name] for name in ("user_id", "item_id", "hour", "device"))
        assert world["user_city"][u] == fields["user_city"]
        assert world["item_category"][i] == fields["category"]
        assert world["item_author"][i] == fields["author_id"]
        s = [
            synth.EFFECT * (world["a"][u, c] + world["b"][i, c])
            + synth.CONTEXT * (world["e"][h, c] + world["g"][d, c])
            + world["x"][u, c] @ world["y"][i, c] / synth.DIMENSIONS**0.5
            for c in range(len(synth.COMPONENTS))
        ]
        s = (np.array(s) - world["component_mean"]) / world["component_std"]
        for task, name in enumerate(BASE_RATES):
            z = world["bias"][task] + np.dot(synth.STRENGTH[name], s)
            assert truth[name][row].as_py() == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-10)


def test_bait_sets_click_and_like_against_each_other(made: Path) -> None:
    valid = read(made, "valid")
    with np.load(made / "truth.npz", allow_pickle=False) as world:
        bait = synth.COMPONENTS.index("bait")
        score = world["b"][column(valid, "item_id"), bait]
    assert auc(column(valid, "click"), score) > 0.53
    assert auc(column(valid, "like"), score) < 0.47
    assert auc(column(valid, "follow"), score) == pytest.approx(0.5, abs=0.05)


def test_validation_comes_later_and_knows_most_users(made: Path) -> None:
    train, valid = read(made, "train"), read(made, "valid")
    time = np.concatenate([column(train, "timestamp"), column(valid, "timestamp")])
    assert (np.diff(time) >= 0).all()
    assert 0 <= time[0] < time[-1] < synth.DAYS * 86_400
    assert (time // 3600 % 24 == np.append(column(train, "hour"), column(valid, "hour"))).all()
    for name in ("user_id", "item_id"):
        assert np.isin(column(valid, name), column(train, name)).mean() > 0.95
    # gAUC needs users with both kinds of feedback: most rows belong to one.
    user, clicks = column(valid, "user_id"), column(valid, "click")
    rows, positive = np.bincount(user), np.bincount(user, clicks)
    assert rows[(positive > 0) & (positive < rows)].sum() > 0.9 * VALID_ROWS


def test_watch_seq_holds_the_last_clicks_before_the_row(made: Path) -> None:
    history: dict[int, list[int]] = defaultdict(list)
    longest = 0
    for part in ("train", "valid"):  # one stream: validation remembers training
        table = read(made, part).select(["user_id", "item_id", "watch_seq", "click"])
        for row in table.to_pylist():
            clicked = history[row["user_id"]]
            assert row["watch_seq"] == clicked[-HISTORY:]
            longest = max(longest, len(clicked))
            if row["click"]:
                clicked.append(row["item_id"])
    assert longest > HISTORY


@pytest.mark.parametrize("size", ["rows", "valid_rows", "users", "items"])
def test_smallest_sizes(tmp_path: Path, size: str) -> None:
    generate(tmp_path / "one", **{**SMALL, size: 1})
    table = read(tmp_path / "one", "train")
    assert table.num_rows == (1 if size == "rows" else SMALL["rows"])
    if size in ("users", "items"):
        assert set(column(table, f"{size[:-1]}_id")) == {0}


def test_a_stream_of_two_rows(tmp_path: Path) -> None:
    generate(tmp_path / "two", rows=1, valid_rows=1, users=1, items=1)
    assert read(tmp_path / "two", "valid")["watch_seq"].to_pylist()[0] in ([], [0])
    truth = json.loads((tmp_path / "two" / "truth.json").read_text())
    assert truth["valid_truth"]["tasks"]["click"]["auc"] is None


@pytest.mark.parametrize("size", ["rows", "valid_rows", "users", "items"])
def test_sizes_and_seeds_that_make_no_sense_are_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(DataError, match=rf"^{size}: expected at least 1, got 0"):
        generate(tmp_path / "x", **{**SMALL, size: 0})
    with pytest.raises(DataError, match=r"seed: expected at least 0, got -1\."):
        generate(tmp_path / "x", seed=-1, **SMALL)
    assert not list(tmp_path.iterdir())


def test_an_existing_data_set_is_kept_unless_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data"
    generate(out, seed=1, **SMALL)
    before = contents(out)
    with pytest.raises(DataError, match="holds a data set already"):
        generate(out, seed=2, **SMALL)
    assert contents(out) == before
    generate(out, seed=2, overwrite=True, **SMALL)
    assert contents(out) != before
    assert [path.name for path in out.parent.iterdir()] == ["data"]


def test_foreign_files_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"holds thesis\.tex, which is not a data set's"):
            generate(tmp_path / "data", overwrite=overwrite, **SMALL)
    assert contents(tmp_path / "data") == {"thesis.tex": b"years of work"}
    with pytest.raises(DataError, match=r"thesis\.tex is a file"):
        generate(tmp_path / "data" / "thesis.tex", overwrite=True, **SMALL)


def test_an_empty_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path, **SMALL)
    assert set(contents(tmp_path)) == set(FILES)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    generate(Path("data"), **SMALL)
    assert set(contents(tmp_path / "here" / "data")) == set(FILES)


@pytest.mark.parametrize("step", ["write", "publish"])
def test_a_failure_leaves_the_old_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    generate(tmp_path / "data", seed=1, **SMALL)
    before = contents(tmp_path / "data")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    if step == "write":
        monkeypatch.setattr(np, "savez", fail)
    else:
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda path, to: fail() if path.name == "new" else rename(path, to)
        )
    with pytest.raises(OSError, match="disk full"):
        generate(tmp_path / "data", seed=2, overwrite=True, **SMALL)
    assert contents(tmp_path / "data") == before
    assert os.listdir(tmp_path) == ["data"]
