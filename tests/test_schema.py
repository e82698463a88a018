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
    with refused("unknown kind 'Regression', known: binary, regression"):
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
        ({}, "encoding version None is not supported, only 1"),
        ([], "encoding version None is not supported"),
        (damaged(version=2), "encoding version 2 is not supported, only 1"),
        (damaged(vocabularies={"user": []}), "its vocabularies are not those of its schema"),
        (damaged(vocabularies=[]), "damaged encoding: AttributeError"),
        (
            damaged(vocabularies={"user": [1], "video": [], "tags": []}),
            "a value of 'user' is not text",
        ),
        (damaged(numeric_mean=[]), "one mean and std a numeric column are needed"),
        (damaged(numeric_mean=["x"]), "a mean is 'x', expected int or float"),
        (damaged(numeric_mean=["1.5"]), "a mean is '1.5', expected int or float"),
        (damaged(numeric_std=[True]), "a std is True, expected int or float"),
        (damaged(numeric_std=[-1.5]), "the std of 'age' is -1.5, not above 0"),
        (damaged(numeric_std=[0]), "the std of 'age' is 0.0, not above 0"),
        (
            damaged(vocabularies={"user": "ab", "video": [], "tags": []}),
            "the vocabulary of 'user' is 'ab', expected list",
        ),
        (
            damaged(vocabularies={"user": ["a", "b", "a"], "video": [], "tags": []}),
            "a value of 'user' stands there twice",
        ),
        (damaged(numeric_std=[float("nan")]), "a mean or std is not finite"),
        ({"version": 1}, "damaged encoding: KeyError: 'schema'"),
        (damaged(schema={"labels": ["y"]}), "no feature"),
    ],
)
def test_damaged_encodings_are_refused(mapping: Any, message: str) -> None:
    with refused(message):
        Encoding.from_dict(mapping)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": []}, "no label: name at least one column in labels."),
        ({"labels": None}, "no label: name at least one column in labels."),
        ({"categorical": []}, "no feature: name columns in categorical, numeric or sequences."),
        (
            {"labels": {"y": "binray"}},
            "unknown kind 'binray', known: binary, regression, regress",
        ),
        ({"labels": "y:regresion"}, "label 'y': unknown kind 'regresion'"),
        ({"labels": {"y": None}}, "label 'y': unknown kind None"),
        ({"labels": ["y", "y"]}, "labels name 'y' twice."),
        ({"labels": 3}, "labels must be a list of column names, not 3."),
        ({"labels": [True]}, "labels: True is not a column name: write it as quoted text."),
        ({"labels": {1: "binary"}}, "labels: 1 is not a column name"),
        ({"categorical": [1]}, "categorical: 1 is not a column name"),
        ({"numeric": [""]}, "numeric: '' is not a column name"),
        ({"numeric": 1.5}, "numeric must be a list of column names, not 1.5."),
        ({"categorical": ["x", "x"]}, "column 'x' is used twice: a column is one label or one fe"),
        ({"numeric": ["x"]}, "column 'x' is used twice"),
        ({"numeric": ["y"]}, "column 'y' is used twice"),
        ({"sequences": ["x"]}, "column 'x' is used twice"),
        ({"sequences": 5}, "sequences must be a list or a mapping, not 5."),
        ({"sequences": [{"shares": "x"}]}, "a sequence has no name: {'shares': 'x'}."),
        ({"sequences": [7]}, "sequence must be a mapping with keys of name, shares, pooling"),
        ({"sequences": {"s": [1]}}, "sequence 's' must be a mapping with keys of name, shares"),
        ({"sequences": {3: None}}, "sequence: 3 is not a column name"),
        ({"sequences": {"s": {"share": "x"}}}, "sequence 's': unknown key 'share', known: name, "),
        ({"sequences": {"s": {"share": "x"}}}, "Did you mean 'shares'?"),
        (
            {"sequences": "s=X"},
            "sequence 's' shares 'X', which is not a categorical field.",
        ),
        ({"categorical": "xyz", "sequences": "s=xy"}, "Did you mean 'xyz'?"),
        ({"sequences": {"s": {"shares": 4}}}, "sequence 's': shares: 4 is not a column name"),
        (
            {"sequences": {"s": {"pooling": "man"}}},
            "sequence 's': unknown pooling 'man', known: mean, sum. Did you mean 'mean'?",
        ),
        ({"sequences": {"s": {"max_len": 0}}}, "sequence 's': max_len must be a whole number of"),
        ({"sequences": {"s": {"delimiter": ""}}}, "sequence 's': delimiter must be text, not ''."),
        ({"group": "y"}, "group 'y' is a label: name another column."),
        ({"group": 3}, "group: 3 is not a column name"),
        ({"weight": "x"}, "weight 'x' is a label or a feature too: name another column."),
        ({"weight": "y"}, "weight 'y' is a label or a feature too: name another column."),
        ({"min_count": 0}, "min_count must be a whole number of at least 1, not 0."),
        ({"min_count": 2.0}, "min_count must be a whole number of at least 1, not 2.0."),
        ({"min_count": True}, "min_count must be a whole number of at least 1, not True."),
        ({"header": ["a", "a"]}, "header names column 'a' twice."),
        ({"header": [0]}, "header: 0 is not a column name"),
        (
            {"delimiter": "||"},
            "delimiter must be one ASCII character, no line end and no quote, not",
        ),
        ({"delimiter": "é"}, "delimiter must be one ASCII character"),
        ({"delimiter": "\n"}, "delimiter must be one ASCII character"),
        ({"delimiter": '"'}, "delimiter must be one ASCII character"),
        ({"delimiter": 1}, "no line end and no quote, not 1."),
        ({"catgorical": ["x"]}, "schema: unknown key 'catgorical', known: labels, categorical, "),
        ({"catgorical": ["x"]}, "Did you mean 'categorical'?"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with refused(message):
        Schema.from_dict({"labels": ["y"], "categorical": ["x"], **changes})


def test_a_missing_or_wrong_mapping_is_refused() -> None:
    with refused("no label: name at least one column in labels."):
        Schema.from_dict({"categorical": ["x"]})
    with refused("schema must be a mapping with keys of labels"):
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
    with refused("sequence: '' is not a column name"):
        parse_sequences("=video")


def test_nearest() -> None:
    assert nearest("usr_id", ["user_id", "video_id"]) == " Did you mean 'user_id'?"
    assert nearest("qqqq", ["user_id"]) == ""
    assert nearest("x", []) == ""
