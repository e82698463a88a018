"""Encoding: FuxiCTR's ids against a plain-Python reference, any format and block size alike."""

from __future__ import annotations

import csv
import datetime
import tempfile
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from encoded import jagged, parquet, refused, same
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_fast.data import encode, tables
from stem_fast.data.blocks import Values
from stem_fast.data.dataset import Dataset, Known
from stem_fast.data.encode import fit_encoding, load
from stem_fast.data.joins import Join
from stem_fast.data.schema import Encoding, Schema, SequenceField


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("STEM_FAST_CACHE", str(folder))
    return folder


# --- The reference: FuxiCTR's tokenizer, one value at a time.


def vocabulary(columns: list[list[str | None]], min_count: int) -> list[str]:
    """Values of the columns that share a table, in id order: by (-count, text)."""
    counts = Counter(value for column in columns for value in column if value)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [value for value, count in ordered if count >= min_count]


def ids(values: list[str | None], words: list[str]) -> list[int]:
    known = {word: index for index, word in enumerate(words, 1)}
    return [known.get(value or "", len(words) + 1) for value in values]


# Texts that CSV has to quote, that differ late in Unicode, and none that means "missing".
words = st.sampled_from(
    ["a", "B", "ab", "é", "z", "﹫", "😀", "1", "10", "007", " ", 'q"', "x,y", "l\nl"]
)
cells = st.one_of(st.none(), words)
items = cells.filter(lambda cell: cell not in ("x,y", "l\nl"))  # alone, lists in another form
rows = st.lists(st.tuples(cells, cells, st.lists(items, max_size=5)), min_size=1, max_size=30)


def write(path: Path, table: list[tuple[str | None, str | None, list[str | None]]]) -> None:
    users, videos, seen = ([row[i] for row in table] for i in range(3))
    if path.suffix == ".parquet":
        columns = {"user": pa.array(users, "string"), "video": pa.array(videos, "string")}
        columns["seen"] = pa.array(seen, pa.list_(pa.string()))
        parquet(path, y=[0] * len(table), **columns)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["y", "user", "video", "seen"])
            writer.writerows(
                [0, user, video, "|".join(v or "" for v in s)] for user, video, s in table
            )


@pytest.mark.filterwarnings("ignore:.*(are unknown|is missing)")
@settings(max_examples=60)
@given(
    train=rows,
    valid=rows,
    min_count=st.integers(1, 3),
    max_len=st.integers(1, 4),
    shared=st.booleans(),
    suffix=st.sampled_from([".csv", ".parquet"]),
    block_rows=st.sampled_from([1, 2, 7, 1000]),
)
def test_ids_are_those_of_the_reference(
    train: list[Any],
    valid: list[Any],
    min_count: int,
    max_len: int,
    shared: bool,
    suffix: str,
    block_rows: int,
) -> None:
    field = SequenceField("seen", shares="video" if shared else None, max_len=max_len)
    schema = Schema(
        {"y": "binary"}, ("user", "video"), sequences=(field,), group="user", min_count=min_count
    )
    with tempfile.TemporaryDirectory() as name, mock.patch.object(tables, "BLOCK_ROWS", block_rows):
        folder = Path(name)
        write(folder / f"train{suffix}", train)
        write(folder / f"valid{suffix}", valid)
        encoding = fit_encoding(folder / f"train{suffix}", schema)
        encoded = load(folder / f"valid{suffix}", encoding, cache=folder / "cache")

        users, videos, seen = ([row[i] for row in train] for i in range(3))
        flat = [value for values in seen for value in values]
        wanted = {"user": vocabulary([users], min_count)}
        wanted["video"] = vocabulary([videos, flat] if shared else [videos], min_count)
        if not shared:
            wanted["seen"] = vocabulary([flat], min_count)
        assert encoding.vocabularies == wanted

        users, videos, seen = ([row[i] for row in valid] for i in range(3))
        assert encoded.ids[:, 0].tolist() == ids(users, wanted["user"])
        assert encoded.ids[:, 1].tolist() == ids(videos, wanted["video"])
        table = wanted["video" if shared else "seen"]
        kept = [ids([v for v in values if v], table)[-max_len:] for values in seen]
        assert jagged(*encoded.sequences["seen"]) == kept
        codes: dict[str, int] = {}
        group = [codes.setdefault(user, len(codes)) if user else -1 for user in users]
        assert encoded.group is not None
        assert encoded.group.tolist() == group


SCHEMA = Schema(
    {"click": "binary", "time": "regression"},
    categorical=("user", "video", "day", "new"),
    numeric=("age", "price"),
    sequences=(SequenceField("seen", shares="video", max_len=3), SequenceField("tags")),
    group="user",
    weight="w",
    min_count=2,
)


@pytest.fixture
def table() -> pa.Table:
    """300 rows with a column of every kind, and missing values wherever they may be."""
    random = np.random.default_rng(0)
    size = 300

    def missing(values: np.ndarray) -> pa.Array:
        return pa.array(values, mask=random.random(size) < 0.1)

    lists = [random.integers(0, 20, random.integers(0, 6)).tolist() for _ in range(size)]
    texts = [[f"t{value % 7}" for value in values] or None for values in reversed(lists)]
    return pa.table(
        {
            "click": missing(random.integers(0, 2, size).astype(np.int8)),
            "time": missing(random.normal(size=size)),
            "user": missing(random.zipf(1.5, size) % 50),
            "video": missing(random.integers(0, 20, size)),
            "day": missing(np.datetime64("2022-04-09") + random.integers(0, 9, size)),
            "new": missing(random.random(size) < 0.5),
            "age": missing(random.integers(10, 80, size)),
            "price": missing(random.lognormal(size=size)),
            "seen": pa.array(lists, pa.list_(pa.int64())),
            "tags": pa.array(texts, pa.large_list(pa.string())),
            "w": pa.array(random.random(size)),
        }
    )


def with_text_lists(table: pa.Table) -> pa.Table:
    for name in ("seen", "tags"):
        texts = ["|".join(map(str, cells or ())) for cells in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, [pa.array(texts, "string")])
    return table


def test_csv_and_parquet_and_any_block_size_encode_alike(
    tmp_path: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    pa.csv.write_csv(with_text_lists(table), tmp_path / "a.csv")
    encoding = fit_encoding(tmp_path / "a.parquet", SCHEMA)
    wanted = load(tmp_path / "a.parquet", encoding)
    assert wanted.rows == len(wanted) == 300
    assert len(encoding.vocabularies["video"]) == 20
    for number, (name, rows) in enumerate([("a.csv", 1000), ("a.csv", 11), ("a.parquet", 4)]):
        monkeypatch.setattr(tables, "BLOCK_ROWS", rows)
        found = fit_encoding(tmp_path / name, SCHEMA)
        assert found.vocabularies == encoding.vocabularies
        np.testing.assert_allclose(found.numeric_mean, encoding.numeric_mean, rtol=1e-14)
        np.testing.assert_allclose(found.numeric_std, encoding.numeric_std, rtol=1e-14)
        same(load(tmp_path / name, encoding, cache=tmp_path / f"cache{number}"), wanted)


def test_shapes_and_types(tmp_path: Path, table: pa.Table) -> None:
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    encoded = load(tmp_path / "a.parquet", fit_encoding(tmp_path / "a.parquet", SCHEMA))
    assert (encoded.ids.shape, encoded.ids.dtype) == ((300, 4), torch.int32)
    assert encoded.numeric is not None
    assert encoded.labels is not None
    assert encoded.weight is not None
    assert encoded.group is not None
    assert (encoded.numeric.shape, encoded.numeric.dtype) == ((300, 2), torch.float32)
    assert (encoded.labels.shape, encoded.labels.dtype) == ((300, 2), torch.float32)
    assert (encoded.weight.shape, encoded.weight.dtype) == ((300,), torch.float32)
    assert (encoded.group.shape, encoded.group.dtype) == ((300,), np.int32)
    values, offsets = encoded.sequences["seen"]
    assert (values.dtype, offsets.dtype, offsets.shape) == (torch.int32, torch.int64, (301,))
    assert offsets[-1] == len(values)
    np.testing.assert_array_equal(encoded.weight, table["w"].to_numpy().astype(np.float32))
    for task, name in enumerate(("click", "time")):
        labels = table[name].to_numpy().astype(np.float32)  # null becomes NaN
        np.testing.assert_array_equal(encoded.labels[:, task], labels)


def test_numbers_are_standardised_with_the_training_moments(tmp_path: Path) -> None:
    schema = Schema({"y": "binary"}, numeric=("x", "same", "none"))
    columns = {"y": [0, 1, 0, 1], "same": [0.1] * 3 + [None], "none": pa.nulls(4)}
    train = parquet(tmp_path / "train.parquet", x=[1.0, 2.0, None, 6.0], **columns)
    encoding = fit_encoding(train, schema)
    np.testing.assert_allclose(encoding.numeric_mean, [3, 0.1, 0], rtol=1e-15)
    np.testing.assert_allclose(encoding.numeric_std, [np.sqrt(14 / 3), 1, 1], rtol=1e-15)
    valid = parquet(
        tmp_path / "valid.parquet", y=[0, 1], x=[None, 4.0], same=[0.1, 2.1], none=["", "5"]
    )
    numeric = load(valid, encoding).numeric
    assert numeric is not None
    np.testing.assert_allclose(numeric, [[0, 0, 0], [np.sqrt(3 / 14), 2, 5]], rtol=1e-6)


@settings(max_examples=100)
@given(
    st.lists(
        st.lists(st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6))), min_size=1, max_size=5
    ),
    st.sampled_from([0.0, 1e9]),
)
def test_streamed_moments(blocks: list[list[float]], offset: float) -> None:
    moments = encode._Moments()
    for block in blocks:
        moments.add(np.array(block, float) + offset)
    values = np.array([value for block in blocks for value in block], float) + offset
    values = values[~np.isnan(values)]
    if not len(values):
        assert (moments.mean, moments.std) == (0, 1)
        return
    scale = np.abs(values).max()
    np.testing.assert_allclose(moments.mean, values.mean(), atol=1e-14 * scale)
    if (values == values[0]).all():
        assert (moments.mean, moments.std) == (values[0], 1)
    elif np.ptp(values) > 1e-3:
        # numpy's own two-pass result loses digits of values far from zero: compare to that.
        np.testing.assert_allclose(moments.std, values.std(), rtol=1e-9, atol=1e-13 * scale)


def test_shared_counts_decide_together(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", y=[0, 1], x=["a", "b"], s=[["b", "c"], ["b", "c", "c"]])
    schema = Schema({"y": "binary"}, ("x",), sequences=(SequenceField("s", "x"),), min_count=3)
    encoding = fit_encoding(path, schema)
    assert encoding.vocabularies == {"x": ["b", "c"]}
    assert load(path, encoding).ids.tolist() == [[3], [1]]


def test_counts_take_in_what_max_len_cuts(tmp_path: Path) -> None:
    # FuxiCTR counts a sequence before it cuts it.
    path = parquet(tmp_path / "a.parquet", y=[0, 1], s=[["a", "a", "b"], ["b", "c"]])
    field = SequenceField("s", max_len=1)
    encoding = fit_encoding(path, Schema({"y": "binary"}, sequences=(field,), min_count=2))
    assert encoding.vocabularies == {"s": ["a", "b"]}
    values, offsets = load(path, encoding).sequences["s"]
    assert values.tolist() == [2, 3]
    assert offsets.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("limit", "tables"), [("MERGE_ROWS", 1), ("MERGE_BYTES", 10)])
def test_many_distinct_values_are_merged_on_the_way(
    monkeypatch: pytest.MonkeyPatch, limit: str, tables: int
) -> None:
    monkeypatch.setattr(encode, limit, 4 * tables)
    counts = encode._Counts(tables)
    for start in range(0, 20, 2):
        texts = pa.array([f"{start + i:02}" for i in range(4)], encode.TEXT)
        codes = pa.array([0, 1, 1, 2, 3, None], pa.int32())
        counts.add(Values(texts, codes, texts))
    assert sum(map(len, counts.texts)) < 40
    # "02" .. "19": texts 0 and 1 of one block are texts 2 and 3 of the one before.
    assert counts.vocabulary(3) == [f"{i:02}" for i in range(3, 20, 2)]


def test_nothing_reaches_min_count(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", y=[0, 1], x=["a", None], s=[["b"], []])
    schema = Schema({"y": "binary"}, ("x",), sequences=(SequenceField("s"),))
    encoding = fit_encoding(path, schema)
    assert encoding.vocab_sizes == {"x": 2}
    assert encoding.sequence_tables == {"s": 2}
    encoded = load(path, encoding)
    assert encoded.ids.tolist() == [[1], [1]]
    assert encoded.sequences["s"][0].tolist() == [1]


def test_one_row_and_no_categorical_field(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", y=[1], x=[2.5], s=pa.array([None], pa.list_(pa.int8())))
    schema = Schema({"y": "binary"}, numeric=("x",), sequences=(SequenceField("s"),))
    encoded = load(path, fit_encoding(path, schema))
    (batch,) = encoded.batches(8, seed=0)
    assert batch.ids.shape == (1, 0)
    assert batch.numeric is not None
    assert batch.numeric.tolist() == [[0.0]]
    assert [part.tolist() for part in batch.sequences["s"]] == [[], [0, 0]]


@pytest.mark.parametrize(
    "values",
    [[0, 1, None], [0.0, 1.0, None], [False, True, None], ["0", "1", None], ["0.0", "1.0", "NaN"]],
)
def test_binary_labels_of_every_type(tmp_path: Path, values: list[Any]) -> None:
    path = parquet(tmp_path / "a.parquet", y=values, x=[1, 2, 3])
    labels = load(path, fit_encoding(path, Schema({"y": "binary"}, ("x",)))).labels
    np.testing.assert_array_equal(labels, [[0], [1], [np.nan]])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("y", [0, 2], "column 'y', row 1: 2 is not 0 or 1: correct it, leave it empty, or fit"),
        ("y", ["1", "0.5"], "column 'y', row 1: '0.5' is not 0 or 1"),
        ("y", ["1", "yes"], "column 'y', row 1: 'yes' is not a number"),
        ("y", [None, None], "label 'y' is missing on every row: leave it out."),
        ("r", [float("inf"), 0], "column 'r', row 0: inf is not finite"),
        ("r", [1e39, 0], "column 'r', row 0: 1e+39 is beyond float32: rescale it."),
        ("r", [None, None], "label 'r' is missing on every row: leave it out."),
        ("l", [3, -1], "column 'l', row 1: -1 is not above -1, and has no log1p: correct it,"),
        ("l", ["3", "-1.00000000001"], "column 'l', row 1: '-1.00000000001' is not above -1"),
        ("l", [-7.5, 0], "column 'l', row 0: -7.5 is not above -1"),
        ("n", ["1", "2a"], "column 'n', row 1: '2a' is not a number"),
        ("n", [1.0, float("-inf")], "column 'n', row 1: -inf is not finite"),
        ("n", [1e308, -1e308], "column 'n' holds numbers too large to standardise: rescale it."),
        ("w", [1.0, -0.5], "column 'w', row 1: -0.5 is no weight (finite, at least 0): correct"),
        ("w", [1.0, None], "column 'w', row 1: None is no weight"),
        ("w", [1.0, 1e39], "column 'w', row 1: 1e+39 is no weight"),
        (
            "c",
            [[1], [2]],
            "column 'c' holds list<element: int64>, which has no text form; a column",
        ),
    ],
)
def test_bad_values_are_refused(
    tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    good = {"y": [0, 1], "r": [0.5, 2], "l": [0, -0.5], "n": [1, 2], "w": [1, 2], "c": ["a", "b"]}
    labels = {"y": "binary", "r": "regression", "l": "regression:log1p"}
    schema = Schema(labels, ("c",), ("n",), weight="w")
    encoding = fit_encoding(parquet(tmp_path / "good.parquet", **good), schema)
    bad = parquet(tmp_path / "bad.parquet", **{**good, column: values})
    with refused(message):
        fit_encoding(bad, schema)
    if "every row" not in message and "too large" not in message:  # fine in other splits
        with refused(message):
            load(bad, encoding)
        assert list((tmp_path / "cache").iterdir()) == []


def test_numbers_far_beyond_the_training_ones(tmp_path: Path) -> None:
    schema = Schema({"y": "binary"}, numeric=("x",))
    encoding = fit_encoding(parquet(tmp_path / "a.parquet", y=[0, 1], x=[1, 2]), schema)
    far = parquet(tmp_path / "b.parquet", y=[0, 1], x=[1, 1e39])
    with refused("b.parquet: column 'x', row 1: 1e+39 is too large to standardise: correct it."):
        load(far, encoding)


def test_absent_columns_are_refused(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(table.drop_columns(["user", "w", "click"]), path)
    with refused("a.parquet: no column 'user', 'click', 'w'."):
        fit_encoding(path, SCHEMA)


def test_labels_are_not_needed_to_predict(tmp_path: Path, table: pa.Table) -> None:
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    schema = Schema.from_dict({**SCHEMA.to_dict(), "group": "g"})
    train = table.append_column("g", table["user"])
    pa.parquet.write_table(train, tmp_path / "train.parquet")
    encoding = fit_encoding(tmp_path / "train.parquet", schema)
    bare = tmp_path / "bare.parquet"
    pa.parquet.write_table(table.drop_columns(["click", "time", "w"]), bare)
    encoded = load(bare, encoding, labels=False)
    assert encoded.labels is encoded.weight is encoded.group is None
    full = load(tmp_path / "train.parquet", encoding)
    np.testing.assert_array_equal(encoded.ids, full.ids)
    batch = next(encoded.batches(10, seed=0))
    assert batch.labels is batch.weight is None
    with refused("bare.parquet: no column 'click', 'time', 'g', 'w'."):
        load(bare, encoding)


def test_the_weight_is_needed_to_train_only(tmp_path: Path, table: pa.Table) -> None:
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    pa.parquet.write_table(table.drop_columns(["w"]), tmp_path / "bare.parquet")
    encoding = fit_encoding(tmp_path / "a.parquet", SCHEMA)
    full = load(tmp_path / "a.parquet", encoding)
    assert full.weight is not None
    for name in ("a", "bare"):  # "a" after an entry with weights was made
        same(load(tmp_path / f"{name}.parquet", encoding, weight=False), replace(full, weight=None))
    with refused("bare.parquet: no column 'w'."):
        load(tmp_path / "bare.parquet", encoding)


@pytest.mark.parametrize(("key", "value"), [("header", ("y", "user")), ("delimiter", ";")])
def test_what_parquet_would_ignore_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    log = parquet(tmp_path / "log.parquet", y=[1, 0], user=[7, 8])
    age = parquet(tmp_path / "age.parquet", user=[7, 8], age=[1, 2])
    schema = Schema.from_dict({"labels": "y", "categorical": "user,age", key: value})
    with refused(f"{key} is {value!r}, but {log} is Parquet, which has none: leave it out."):
        fit_encoding(log, schema, joins=[Join(age, "user")])
    csv = tmp_path / "log.csv"
    csv.write_text("1;7\n0;8\n" if key == "header" else "y;user\n1;7\n0;8\n")
    schema = replace(schema, delimiter=";")
    fit_encoding(csv, schema, joins=[Join(age, "user")])


def test_the_delimiter_of_a_side_table_beside_parquet(tmp_path: Path) -> None:
    log = parquet(tmp_path / "log.parquet", y=[1, 0], user=[7, 8])
    (tmp_path / "age.csv").write_text("user;age\n7;x\n8;x\n")
    schema = Schema({"y": "binary"}, ("age",), min_count=1, delimiter=";")
    found = fit_encoding(log, schema, joins=[Join(tmp_path / "age.csv", "user")])
    assert found.vocabularies == {"age": ["x"]}


def test_rows_are_taken_in_any_order(tmp_path: Path, table: pa.Table) -> None:
    pa.parquet.write_table(table, tmp_path / "all.parquet")
    rows = np.array([250, 3, 4, 4, 299, 0])
    pa.parquet.write_table(table.take(pa.array(rows)), tmp_path / "some.parquet")
    encoding = fit_encoding(tmp_path / "all.parquet", SCHEMA)
    taken = load(tmp_path / "all.parquet", encoding).take(rows)
    some = load(tmp_path / "some.parquet", encoding)
    group = np.unique(some.group, return_inverse=True)[1]
    codes = np.unique(taken.group, return_inverse=True)[1]
    assert len(np.unique(np.stack([group, codes], 1), axis=0)) == len(np.unique(group))
    same(replace(taken, group=None), replace(some, group=None))


def test_joined_columns_are_features_like_others(tmp_path: Path) -> None:
    log = parquet(tmp_path / "log.parquet", y=[1, 0, 1, 0], user=[7, 8, 9, 7])
    users = parquet(tmp_path / "users.parquet", user=[8, 7], seen=[[7, 7], [8]], age=[30.0, 10.0])
    schema = Schema(
        {"y": "binary"}, ("user",), ("age",), (SequenceField("seen", "user"),), min_count=1
    )
    joins = [Join(users, "user")]
    encoding = fit_encoding(log, schema, joins=joins)
    # Counts are those of the joined table: 7 twice in the log and twice in a list.
    assert encoding.vocabularies == {"user": ["7", "8", "9"]}
    assert encoding.numeric_mean == (50 / 3,)
    encoded = load(log, encoding, joins=joins)
    values, offsets = encoded.sequences["seen"]
    assert values.tolist() == [2, 1, 1, 2]
    assert offsets.tolist() == [0, 1, 3, 3, 4]
    assert encoded.numeric is not None
    assert encoded.numeric[2].item() == 0


# --- One value, one id.


def encoded_alike(tmp_path: Path, train: pa.Table, valid: pa.Table | str) -> Dataset:
    """``valid`` (a table, or a CSV's text) encoded by ``train``."""
    pa.parquet.write_table(train, tmp_path / "train.parquet")
    encoding = fit_encoding(
        tmp_path / "train.parquet", Schema({"y": "binary"}, ("x",), min_count=1)
    )
    if isinstance(valid, str):
        (tmp_path / "valid.csv").write_text(valid)
        return load(tmp_path / "valid.csv", encoding)
    pa.parquet.write_table(valid, tmp_path / "valid.parquet")
    return load(tmp_path / "valid.parquet", encoding)


INTEGERS = [1170, 1169, 2**53 + 2, 7]


@pytest.mark.parametrize(
    "valid",
    [
        "y,x\n0,1170\n1,1169\n0,9007199254740994\n1,7\n",
        "y,x\n0,1170.0\n1,1169.0\n0,9007199254740994.0\n1,7.0\n",
        "y,x\n0,1170.00\n1,1169.00\n0,9.007199254740994e+15\n1,7.00\n",
        pa.table({"y": [0, 1, 0, 1], "x": INTEGERS}),
        pa.table({"y": [0, 1, 0, 1], "x": pa.array(map(float, INTEGERS))}),
        pa.table({"y": [0, 1, 0, 1], "x": pa.array(INTEGERS, pa.uint64())}),
        pa.table(
            {"y": [0, 1, 0, 1], "x": pa.array(INTEGERS, pa.int64()).cast(pa.decimal128(30, 3))}
        ),
        pa.table({"y": [0, 1, 0, 1], "x": ["1170.0", "1169", "9007199254740994", "7.000"]}),
    ],
)
def test_an_integer_is_one_value_in_every_file_and_type(
    tmp_path: Path, valid: pa.Table | str
) -> None:
    """As pandas writes it once its column has a gap, or a database with decimals."""
    for values in (INTEGERS, pa.array(map(float, INTEGERS))):
        train = pa.table({"y": [0, 1, 0, 1], "x": values})
        found = encoded_alike(tmp_path, train, valid)
        assert found.ids[:, 0].tolist() == [2, 1, 4, 3]  # by text where counts are equal


def test_neighbours_past_two_to_the_53_are_two_values(tmp_path: Path) -> None:
    for kind in (pa.int64(), pa.uint64()):
        table = pa.table({"y": [0, 1], "x": pa.array([2**53, 2**53 + 1], kind)})
        assert encoded_alike(tmp_path, table, table).ids.tolist() == [[1], [2]]
        csv = "y,x\n0,9007199254740993\n1,9007199254740993.0\n"
        assert encoded_alike(tmp_path, table, csv).ids.tolist() == [[2], [2]]


def test_versions_stay_apart(tmp_path: Path) -> None:
    versions = ["1.1", "1.10", "1.0", "1.100"]
    table = pa.table({"y": [0, 1, 0, 1], "x": versions})
    csv = "y,x\n" + "".join(f"0,{version}\n" for version in versions)
    assert encoded_alike(tmp_path, table, csv).ids[:, 0].tolist() == [2, 3, 1, 4]


def test_sequences_groups_and_keys_are_spelled_alike_too(tmp_path: Path) -> None:
    side = parquet(tmp_path / "side.parquet", user=[1.0, 2.0, None], city=["a", "b", "c"])
    train = parquet(tmp_path / "train.parquet", y=[0, 1], user=[1, 2], seen=[[5, 6], [6]])
    schema = Schema(
        {"y": "binary"}, ("city",), (), (SequenceField("seen"),), group="user", min_count=1
    )
    encoding = fit_encoding(train, schema, joins=[Join(side, "user")])
    assert encoding.vocabularies == {"city": ["a", "b"], "seen": ["6", "5"]}
    (tmp_path / "valid.csv").write_text("y,user,seen\n0,2.0,6.0|5.0\n1,1.0,5.0\n0,2,5\n")
    found = load(tmp_path / "valid.csv", encoding, joins=[Join(side, "user")])
    assert found.ids.tolist() == [[2], [1], [2]]
    assert jagged(*found.sequences["seen"]) == [[1, 2], [2], [2]]
    assert found.group is not None
    assert found.group.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("words", "cells", "wanted"),
    [
        # What an older release learned from "1170.0" finds it still, and 1170 as well.
        (["1170.0", "7"], ["1170.0", "1170", "7.0"], [1, 1, 2]),
        (["7", "7.0"], ["7.0", "7", "7.00"], [2, 1, 1]),  # two ids of one value, as it learned
        (["True", "1e+16"], ["True", "true", "1e+16"], [1, 1, 2]),
    ],
)
def test_runs_of_older_releases_encode_as_they_did(
    tmp_path: Path, words: list[str], cells: list[str], wanted: list[int]
) -> None:
    encoding = Encoding(Schema({"y": "binary"}, ("x",)), {"x": words})
    path = parquet(tmp_path / "a.parquet", y=[0] * len(cells), x=cells)
    assert load(path, encoding).ids[:, 0].tolist() == wanted


def test_decimals_and_times_of_older_releases(tmp_path: Path) -> None:
    """They learned Arrow's text of the type: "1.50", "2022-04-09 00:00:00.000"."""
    at = datetime.datetime(2022, 4, 9)
    for word, cells in (
        ("1.50", pa.array([Decimal("1.50")])),
        ("1e+16", pa.array([1e16])),
        ("2022-04-09 00:00:00.000", pa.array([at], pa.timestamp("ms"))),
        ("2022-04-09 02:00:00.000+0200", pa.array([at], pa.timestamp("ms", "+02:00"))),
    ):
        encoding = Encoding(Schema({"y": "binary"}, ("x",)), {"x": ["a", word]})
        path = parquet(tmp_path / "a.parquet", y=[0], x=cells)
        assert load(path, encoding).ids.tolist() == [[2]]


# --- What is not known is counted, and warned of where it is nearly all.


def test_what_is_known_is_counted(tmp_path: Path) -> None:
    train = parquet(
        tmp_path / "train.parquet",
        y=[0] * 3,
        x=["a", "a", "b"],
        n=[1, 2, 3],
        s=[["u", "u"], [], []],
    )
    schema = Schema({"y": "binary"}, ("x",), ("n",), (SequenceField("s", max_len=1),), min_count=2)
    encoding = fit_encoding(train, schema)
    valid = parquet(
        tmp_path / "valid.parquet",
        y=[0] * 4,
        x=["a", "?", None, "b"],
        n=[1, None, 2, 3],
        s=[["u", "v"], [None, "u"], None, []],
    )
    wanted = {
        "x": Known(4, 3, 1, "?", "a"),
        "n": Known(4, 3, 3, None, None),
        "s": Known(4, 3, 2, "v", "u"),
    }
    for _ in range(2):  # the second time from the cache
        found = load(valid, encoding)
        assert found.known == wanted
        assert found.to("cpu").known == wanted
    assert wanted["x"].unknown_share == 2 / 3
    assert Known(4, 0, 0, None, None).unknown_share == 0


@pytest.mark.parametrize("known", [0, 2])
def test_a_column_nearly_all_unknown_is_warned_of(tmp_path: Path, known: int) -> None:
    schema = Schema({"y": "binary"}, ("x", "z"), sequences=(SequenceField("s", "x"),), min_count=1)
    columns = {"y": [0] * 40, "z": ["z"] * 40}
    train = parquet(tmp_path / "train.parquet", **columns, x=["u07"] * 40, s=["u07|u08"] * 40)
    encoding = fit_encoding(train, schema)
    cells = ["u07"] * known + ["7"] * (40 - known)
    valid = parquet(tmp_path / "valid.parquet", **columns, x=cells, s=["u07 u08"] * 40)
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="unknown") as caught:
            load(valid, encoding)
        assert [str(warning.message) for warning in caught] == [
            f"{valid}: {95 if known else 100}.0 % of the values of column 'x' are unknown to the "
            "model, such as '7' where it knows 'u07': are they spelled in two ways, or rarer than "
            "min_count 1 in training?",
            f"{valid}: 100.0 % of the values of column 's' are unknown to the model, such as "
            "'u07 u08' where it knows 'u07': are they spelled in two ways, divided by something "
            "else than '|', or rarer than min_count 1 in training?",
        ]
        assert {warning.filename for warning in caught} == {__file__}
    few = parquet(tmp_path / "few.parquet", y=[0] * 19, z=["z"] * 19, x=["7"] * 19, s=["7"] * 19)
    load(few, encoding)  # that many may be new by chance
    half = parquet(tmp_path / "half.parquet", **columns, x=["u07", "7"] * 20, s=["7|u08"] * 40)
    load(half, encoding)


def test_a_column_missing_everywhere_is_warned_of(tmp_path: Path) -> None:
    schema = Schema({"y": "binary"}, ("x",), ("n",), min_count=1)
    train = parquet(tmp_path / "train.parquet", y=[0, 1], x=["a", "b"], n=[1, 2])
    encoding = fit_encoding(train, schema)
    empty = parquet(tmp_path / "empty.parquet", y=[0] * 20, x=pa.nulls(20), n=pa.nulls(20))
    with pytest.warns(UserWarning, match="missing") as caught:
        load(empty, encoding)
    assert [str(warning.message) for warning in caught] == [
        f"{empty}: column '{name}' is missing on every row" for name in ("x", "n")
    ]


def test_a_join_that_matches_nearly_nothing_is_warned_of(tmp_path: Path) -> None:
    log = parquet(tmp_path / "log.parquet", y=[0, 1] * 20, user=[f"u{i}" for i in range(40)])
    side = parquet(tmp_path / "side.parquet", user=[None, "0", "1"], city=["c", "a", "b"])
    schema = Schema({"y": "binary"}, ("city",), min_count=1)
    joins = [Join(side, "user")]
    encoding = fit_encoding(log, schema, joins=joins)
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="keys") as caught:
            load(log, encoding, joins=joins)
        # Not that its column is missing, or all of it unknown: that is what follows.
        assert [str(warning.message) for warning in caught] == [
            f"{log}: 100.0 % of its 'user' are not in {side}, such as 'u0' where that has '0', and "
            "get none of its columns: are the keys spelled in two ways?"
        ]
    part = parquet(tmp_path / "part.parquet", user=["u1", "u2", "u3", "u4"], city=list("abab"))
    joins = [Join(part, "user")]
    load(log, fit_encoding(log, schema, joins=joins), joins=joins)


# --- Texts of sequences that are divided otherwise.


@pytest.mark.parametrize(
    ("cells", "delimiter", "message"),
    [
        (["", "[1, 2, 3]"], "|", "row 1: '[1, 2, 3]' is a list's text, whose brackets would be in"),
        (
            ["[1, 2]", "[3]"],
            ",",
            "row 0: '[1, 2]' is a list's text, whose brackets would be in its",
        ),
        (
            ["{1,2}"],
            "|",
            "row 0: '{1,2}' is a list's text, whose brackets would be in its values: ",
        ),
        (
            ["[1\n 2]"],
            "|",
            "is a list's text, whose brackets would be in its values: write 1|2|3, or",
        ),
    ],
)
def test_lists_in_brackets_are_refused(
    tmp_path: Path, cells: list[str], delimiter: str, message: str
) -> None:
    path = parquet(tmp_path / "a.parquet", y=[0] * len(cells), s=cells)
    field = SequenceField("s", delimiter=delimiter)
    with refused(message):
        fit_encoding(path, Schema({"y": "binary"}, sequences=(field,), min_count=1))


@pytest.mark.parametrize(
    ("cells", "delimiter", "wanted"),
    [
        (["a b|c", "d e", "f g"], "|", ["a b", "c", "d e", "f g"]),
        (["[none]", "a|b", "c"], "|", ["[none]", "a", "b", "c"]),
        (["1 2 3", "4"], " ", ["1", "2", "3", "4"]),
        (["new", "New York", "old"], "|", ["New York", "new", "old"]),
        (["New York", "Los Angeles"], "||", ["Los Angeles", "New York"]),
        ([5, 6], "|", ["5", "6"]),
        ([[" 1,2 "]], "|", [" 1,2 "]),
        ([None, ""], "|", []),
    ],
)
def test_other_texts_of_sequences_stay_as_they_are(
    tmp_path: Path, cells: Any, delimiter: str, wanted: list[str]
) -> None:
    path = parquet(tmp_path / "a.parquet", y=[0] * len(cells), s=cells)
    field = SequenceField("s", delimiter=delimiter)
    schema = Schema({"y": "binary"}, sequences=(field,), min_count=1)
    assert fit_encoding(path, schema).vocabularies == {"s": wanted}


def test_several_words_without_the_delimiter_are_warned_of(tmp_path: Path) -> None:
    """And are one value, as honest names of several words are."""
    cells = ["7", "1 2 3", "4,5"]
    path = parquet(tmp_path / "a.parquet", y=[0] * 3, s=cells)
    schema = Schema({"y": "binary"}, sequences=("s",), min_count=1)
    with pytest.warns(UserWarning, match="one value") as caught:
        encoding = fit_encoding(path, schema)
    assert [str(warning.message) for warning in caught] == [
        f"{path}: column 's', row 1: '1 2 3' is one value, for no row has a '|': if it is several, "
        "name what divides them (in YAML, sequences: {s: {delimiter: ...}}), write 1|2|3, or save "
        "lists in Parquet."
    ]
    assert encoding.vocabularies == {"s": ["1 2 3", "4,5", "7"]}
    assert load(path, encoding).sequences["s"][0].tolist() == [3, 1, 2]


def test_sequences_are_judged_by_all_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by one in which no row has the delimiter, or every row a bracket."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", 1)
    cells = ["new york", "[none]", "san jose|rome", "oslo"]
    path = parquet(tmp_path / "a.parquet", y=[0] * 4, s=cells)
    schema = Schema({"y": "binary"}, sequences=("s",), min_count=1)
    wanted = ["[none]", "new york", "oslo", "rome", "san jose"]
    assert fit_encoding(path, schema).vocabularies == {"s": wanted}


def test_tiktok_form(tmp_path: Path) -> None:
    """The paper's file: tab-separated, no header line."""
    path = tmp_path / "final_track1_train.txt"
    path.write_text("1\t5\t0\t1\n1\t6\t1\t0\n2\t5\t0\t0\n")
    header = ("uid", "item", "finish", "like")
    schema = Schema({"finish": "binary", "like": "binary"}, header[:2], min_count=2, header=header)
    encoding = fit_encoding(path, schema)
    assert encoding.vocabularies == {"uid": ["1"], "item": ["5"]}
    encoded = load(path, encoding)
    assert encoded.ids.tolist() == [[1, 1], [1, 2], [2, 1]]
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [[0, 1], [1, 0], [0, 0]]
