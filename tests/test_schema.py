"""Schemas: every accepted form means the same, every contradiction is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from encoded import refused
from hypothesis import given
from hypothesis import strategies as st

from stem_fast.common import nearest
from stem_fast.data.schema import (
    Encoding,
    Schema,
    SequenceField,
    parse_labels,
    parse_sequences,
    table_owners,
)

SCHEMA = Schema(
    {"finish": "binary", "time": "regression"},
    categorical=("user", "video"),
    numeric=("age",),
    sequences=(SequenceField("seen", shares="video", pooling="sum"), SequenceField("tags")),
    group="user",
    weight="w",
    min_count=2,
    header=("finish", "time", "user", "video", "age", "seen", "tags", "w"),
    delimiter=";",
)
ENCODING = Encoding(
    SCHEMA, {"user": ["b", "é"], "video": [], "tags": ["1"]}, (1 / 3,), (1e-17 + 0.1,)
)


def test_yaml_forms_mean_the_same() -> None:
    lists = """
        labels: {finish: binary, time: regression}
        categorical: [user, video]
        numeric: [age]
        sequences:
          - {name: seen, shares: video, pooling: sum}
          - tags
        group: user
        weight: w
        min_count: 2
        header: [finish, time, user, video, age, seen, tags, w]
        delimiter: ";"
    """
    texts = """
        labels: finish,time:regression
        categorical: user, video
        numeric: age
        sequences:
          seen: {shares: video, pooling: sum}
          tags:
        group: user
        weight: w
        min_count: 2
        header: finish,time,user,video,age,seen,tags,w
        delimiter: ";"
    """
    assert Schema.from_dict(yaml.safe_load(lists)) == SCHEMA
    assert Schema.from_dict(yaml.safe_load(texts)) == SCHEMA


def test_list_of_labels_is_binary_in_order() -> None:
    schema = Schema.from_dict({"labels": ["b", "a"], "categorical": ["x"]})
    assert schema.labels == {"b": "binary", "a": "binary"}
    assert schema.tasks == ("b", "a")


def test_a_regression_of_logarithms() -> None:
    labels = {"a": "binary", "b": "regression:log1p"}
    for form in ("a,b:regression:log1p", ["a", {"b": "regression:log1p"}], labels):
        assert Schema.from_dict({"labels": form, "categorical": "c"}).labels == labels
    assert parse_labels("a:Regression") == {"a": "Regression"}
    with refused("label 'a': expected a kind of binary, regression, regression:log1p, got"):
        Schema({"a": "Regression"}, ("c",))


def test_a_hint_knows_no_case() -> None:
    assert nearest("STEM", ["stem", "ple"]) == " Did you mean 'stem'?"
    assert nearest("userid", ["Item", "User_ID"]) == " Did you mean 'User_ID'?"
    assert nearest("zzz", ["stem"]) == ""


@pytest.mark.parametrize(
    "labels",
    [
        "a,b:regression",
        ["a", "b:regression"],
        ["a", {"b": "regression"}],
        {"a": "binary", "b": "regression"},
    ],
)
def test_every_form_names_a_regression_label(labels: Any) -> None:
    schema = Schema.from_dict({"labels": labels, "categorical": ["x"]})
    assert schema.labels == {"a": "binary", "b": "regression"}


@pytest.mark.parametrize("sequences", ["s=x,t", ["s=x", "t"], {"s": "x", "t": None}])
def test_every_form_shares_a_table(sequences: Any) -> None:
    schema = Schema.from_dict({"labels": ["y"], "categorical": ["x"], "sequences": sequences})
    assert schema.sequences == (SequenceField("s", shares="x"), SequenceField("t"))


def test_null_means_not_given() -> None:
    mapping = {"labels": ["y"], "categorical": "x", "numeric": None, "sequences": None}
    schema = Schema.from_dict(mapping)
    assert schema == Schema({"y": "binary"}, categorical=("x",))
    assert schema.min_count == 10


def test_features_in_the_order_of_the_network() -> None:
    assert SCHEMA.features == ("user", "video", "age", "seen", "tags")


def test_a_schema_does_not_change_with_the_mapping_it_was_made_from() -> None:
    labels = {"y": "binary"}
    schema = Schema(labels, categorical=("x",))
    labels["z"] = "binary"
    assert schema.tasks == ("y",)


def test_schema_round_trips_through_json() -> None:
    assert Schema.from_dict(json.loads(json.dumps(SCHEMA.to_dict()))) == SCHEMA
    plain = Schema({"y": "binary"}, numeric=("x",))
    assert Schema.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain


names = st.text(min_size=1)


@given(
    st.lists(names, min_size=6, max_size=6, unique=True),
    st.lists(names, unique=True),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_encoding_round_trips_exactly(columns: list[str], words: list[str], mean: float) -> None:
    y, c, n, own, shared, group = columns
    sequences = (SequenceField(own), SequenceField(shared, shares=c, max_len=3, delimiter=" "))
    schema = Schema({y: "binary"}, (c,), (n,), sequences, group=group)
    encoding = Encoding(schema, {c: words, own: words[::-1]}, (mean,), (abs(mean) + 1e-300,))
    assert Encoding.from_dict(json.loads(json.dumps(encoding.to_dict()))) == encoding


def test_encoding_describes_the_model_inputs() -> None:
    assert ENCODING.vocab_sizes == {"user": 4, "video": 2}
    assert ENCODING.sequence_tables == {"seen": "video", "tags": 3}
    assert ENCODING.pooling == {"seen": "sum", "tags": "mean"}
    assert table_owners(SCHEMA) == {
        "user": ["user"],
        "video": ["video", "seen"],
        "tags": ["tags"],
    }


def damaged(**changes: Any) -> dict[str, Any]:
    return {**ENCODING.to_dict(), **changes}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "encoding version: expected 1, got None of another release of stem_fast:"),
        ([], "encoding version: expected 1, got None of another release of stem_fast:"),
        (
            damaged(version=2),
            "encoding version: expected 1, got 2 of another release of stem_fast:",
        ),
        (
            damaged(vocabularies={"user": []}),
            "damaged encoding: expected the vocabularies of its schema, got others.",
        ),
        (damaged(vocabularies=[]), "damaged encoding: AttributeError"),
        (
            damaged(vocabularies={"user": [1], "video": [], "tags": []}),
            "a value of 'user' is not text",
        ),
        (
            damaged(numeric_mean=[]),
            "damaged encoding: expected one mean and std a numeric column, got",
        ),
        (damaged(numeric_mean=["x"]), "damaged encoding: a mean: expected int or float, got 'x'."),
        (
            damaged(numeric_mean=["1.5"]),
            "damaged encoding: a mean: expected int or float, got '1.5'.",
        ),
        (damaged(numeric_std=[True]), "damaged encoding: a std: expected int or float, got True."),
        (
            damaged(numeric_std=[-1.5]),
            "damaged encoding: std of 'age': expected above 0, got -1.5.",
        ),
        (damaged(numeric_std=[0]), "damaged encoding: std of 'age': expected above 0, got 0.0."),
        (
            damaged(vocabularies={"user": "ab", "video": [], "tags": []}),
            "damaged encoding: the vocabulary of 'user': expected list, got 'ab'.",
        ),
        (
            damaged(vocabularies={"user": ["a", "b", "a"], "video": [], "tags": []}),
            "a value of 'user' stands there twice",
        ),
        (
            damaged(numeric_std=[float("nan")]),
            "damaged encoding: expected a finite mean and std, got NaN or infinity.",
        ),
        ({"version": 1}, "damaged encoding: KeyError: 'schema'"),
        (
            damaged(schema={"labels": ["y"]}),
            "features: expected at least one column in categorical, numeric or",
        ),
    ],
)
def test_damaged_encodings_are_refused(mapping: Any, message: str) -> None:
    with refused(message):
        Encoding.from_dict(mapping)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": []}, "labels: expected at least one column, got none."),
        ({"labels": None}, "labels: expected at least one column, got none."),
        ({"categorical": []}, "features: expected at least one column in categorical, numeric or"),
        (
            {"labels": {"y": "binray"}},
            "label 'y': expected a kind of binary, regression, regression:log1p, got",
        ),
        (
            {"labels": "y:regresion"},
            "label 'y': expected a kind of binary, regression, regression:log1p, got",
        ),
        (
            {"labels": {"y": None}},
            "label 'y': expected a kind of binary, regression, regression:log1p, got",
        ),
        ({"labels": ["y", "y"]}, "labels name 'y' twice."),
        ({"labels": 3}, "labels: expected a list of column names, got 3."),
        ({"labels": [True]}, "labels: expected a column name, got True: write it as quoted text."),
        (
            {"labels": {1: "binary"}},
            "labels: expected a column name, got 1: write it as quoted text.",
        ),
        (
            {"categorical": [1]},
            "categorical: expected a column name, got 1: write it as quoted text.",
        ),
        ({"numeric": [""]}, "numeric: expected a column name, got '': write it as quoted text."),
        ({"numeric": 1.5}, "numeric: expected a list of column names, got 1.5."),
        (
            {"categorical": ["x", "x"]},
            "column 'x' is used twice: expected one label or one feature a column.",
        ),
        ({"numeric": ["x"]}, "column 'x' is used twice"),
        ({"numeric": ["y"]}, "column 'y' is used twice"),
        ({"sequences": ["x"]}, "column 'x' is used twice"),
        ({"sequences": 5}, "sequences: expected a list or a mapping, got 5."),
        ({"sequences": [{"shares": "x"}]}, "sequences: expected a name, got {'shares': 'x'}."),
        ({"sequences": [7]}, "sequence: expected a mapping with keys of name, shares, pooling,"),
        (
            {"sequences": {"s": [1]}},
            "sequence 's': expected a mapping with keys of name, shares, pooling,",
        ),
        (
            {"sequences": {3: None}},
            "sequence: expected a column name, got 3: write it as quoted text.",
        ),
        ({"sequences": {"s": {"share": "x"}}}, "sequence 's': unknown key 'share', known: name, "),
        ({"sequences": {"s": {"share": "x"}}}, "Did you mean 'shares'?"),
        (
            {"sequences": "s=X"},
            "sequence 's': expected to share a categorical field, got 'X'. Did you",
        ),
        ({"categorical": "xyz", "sequences": "s=xy"}, "Did you mean 'xyz'?"),
        (
            {"sequences": {"s": {"shares": 4}}},
            "sequence 's': shares: expected a column name, got 4: write it as quoted",
        ),
        (
            {"sequences": {"s": {"pooling": "man"}}},
            "sequence 's': expected pooling mean or sum, got 'man'. Did you mean",
        ),
        (
            {"sequences": {"s": {"max_len": 0}}},
            "sequence 's', max_len: expected a whole number of at least 1, got 0.",
        ),
        (
            {"sequences": {"s": {"delimiter": ""}}},
            "sequence 's': expected delimiter as text, got ''.",
        ),
        ({"group": "y"}, "group 'y' is a label: name another column."),
        ({"group": 3}, "group: expected a column name, got 3: write it as quoted text."),
        ({"weight": "x"}, "weight 'x' is a label or a feature too: name another column."),
        ({"weight": "y"}, "weight 'y' is a label or a feature too: name another column."),
        ({"min_count": 0}, "min_count: expected a whole number of at least 1, got 0."),
        ({"min_count": 2.0}, "min_count: expected a whole number of at least 1, got 2.0."),
        ({"min_count": True}, "min_count: expected a whole number of at least 1, got True."),
        ({"header": ["a", "a"]}, "header names column 'a' twice."),
        ({"header": [0]}, "header: expected a column name, got 0: write it as quoted text."),
        (
            {"delimiter": "||"},
            "delimiter: expected one ASCII character other than a line end or quote,",
        ),
        (
            {"delimiter": "é"},
            "delimiter: expected one ASCII character other than a line end or quote,",
        ),
        (
            {"delimiter": "\n"},
            "delimiter: expected one ASCII character other than a line end or quote,",
        ),
        (
            {"delimiter": '"'},
            "delimiter: expected one ASCII character other than a line end or quote,",
        ),
        (
            {"delimiter": 1},
            "delimiter: expected one ASCII character other than a line end or quote,",
        ),
        ({"catgorical": ["x"]}, "schema: unknown key 'catgorical', known: labels, categorical, "),
        ({"catgorical": ["x"]}, "Did you mean 'categorical'?"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with refused(message):
        Schema.from_dict({"labels": ["y"], "categorical": ["x"], **changes})


def test_a_missing_or_wrong_mapping_is_refused() -> None:
    with refused("labels: expected at least one column, got none."):
        Schema.from_dict({"categorical": ["x"]})
    with refused("schema: expected a mapping with keys of labels, categorical, numeric,"):
        Schema.from_dict(["x"])  # type: ignore[arg-type]


def test_parse_labels() -> None:
    assert parse_labels(" a, b:regression ,c:binary,") == {
        "a": "binary",
        "b": "regression",
        "c": "binary",
    }
    assert list(parse_labels("b,a")) == ["b", "a"]
    with refused("labels name 'a' twice."):
        parse_labels("a,a:regression")


def test_parse_sequences() -> None:
    assert parse_sequences("watch=video, tags") == (
        SequenceField("watch", shares="video"),
        SequenceField("tags"),
    )
    with refused("sequence: expected a column name, got '': write it as quoted text."):
        parse_sequences("=video")


def test_nearest() -> None:
    assert nearest("usr_id", ["user_id", "video_id"]) == " Did you mean 'user_id'?"
    assert nearest("qqqq", ["user_id"]) == ""
    assert nearest("x", []) == ""
