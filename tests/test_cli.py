"""The command line: what it writes, that it reads what it wrote, and every refusal."""

from __future__ import annotations

import gc
import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from stem_fast import data, ops
from stem_fast.cli import report
from stem_fast.cli.app import app
from stem_fast.common import DataError
from stem_fast.data.schema import SequenceField
from stem_fast.training import checkpoint, config_file
from stem_fast.training import fit as train
from stem_fast.training import options as config

TASKS = ("is_click", "long_view")
NETWORK = {
    "embedding_dim": 4,
    "num_shared_experts": 2,
    "expert_hidden_units": [8],
    "gate_hidden_units": [4],
    "tower_hidden_units": [4],
}
TRAINING = {"epochs": 2, "batch_size": 64, "learning_rate": 0.01, "min_count": 2}
COLUMNS = {"labels": "is_click,long_view", "categorical": "user_id,video_id", "group": "user_id"}


def table(rows: int, seed: int) -> pa.Table:
    """Impressions with missing labels, missing and unseen values, a sequence and a number."""
    random = np.random.default_rng(seed)
    user, video = random.integers(0, 12, rows), random.integers(0, 20 + 5 * seed, rows)
    score = np.sin(user) + np.cos(3 * video) + 0.5 * random.normal(size=rows)
    return pa.table(
        {
            "user_id": user,
            "video_id": pa.array(video, mask=random.random(rows) < 0.05),
            "age": random.normal(size=rows),
            "seen": [list(map(int, random.integers(0, 20, user[i] % 4))) for i in range(rows)],
            "is_click": pa.array((score > 0).astype(np.int8), mask=random.random(rows) < 0.1),
            "long_view": (score > 0.8).astype(np.int8),
            "seconds": np.round(10 * np.exp(score), 1),
            "weight": random.integers(0, 3, rows),
        }
    )


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with tables as the working directory, a cache of its own, and one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEM_FAST_CACHE", str(tmp_path / "cache"))
    pq.write_table(table(400, 0), "train.parquet")
    pq.write_table(table(150, 1), "valid.parquet")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stem_fast(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fit(out: str = "run", *, ok: bool = True, **settings: Any) -> Any:
    """``stem-fast fit`` of a tiny network; settings are flags, None leaves one out."""
    settings = {
        "train": "train.parquet",
        "valid": "valid.parquet",
        **COLUMNS,
        **NETWORK,
        **TRAINING,
        "out": out,
        **settings,
    }
    flags: list[object] = []
    for key, value in settings.items():
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if value is not None:
            flags += [name] if value is True else [name, value]
    result = stem_fast("fit", *flags)
    assert not ok or result.exit_code == 0, result.output
    return result


def refused(result: Any, *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds every part; no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for part in parts:
        assert part in result.stderr


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


# ---- fit -----------------------------------------------------------------------------------


def test_fit_writes_a_run() -> None:
    result = fit()
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "config.json",
        "history.json",
        "metrics.json",
        "model.safetensors",
        "schema.json",
    ]
    metrics, history = read("run/metrics.json"), read("run/history.json")
    assert list(metrics) == ["rows", "tasks"]
    assert metrics["rows"] == 150
    assert list(metrics["tasks"]) == list(TASKS)
    for values in metrics["tasks"].values():
        assert list(values) == ["auc", "gauc", "logloss", "pcoc"]
        assert all(isinstance(value, float) for value in values.values())
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert metrics == [entry for entry in history if entry["best"]][-1]["metrics"]
    assert read("run/config.json")["training"]["batch_size"] == 64

    # In a pipe: a line an epoch, no bar, no colour.
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch")] == [
        "epoch 1",
        "epoch 2",
    ]
    assert "samples/s" in lines[1]
    assert "\x1b" not in result.stdout + result.stderr
    assert lines[-1] == "saved to run"
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []


def test_without_a_group_gauc_is_null() -> None:
    result = fit(group=None)
    assert {task["gauc"] for task in read("run/metrics.json")["tasks"].values()} == {None}
    assert "no gauc for is_click, long_view: the run has no --group\n" in result.stdout


def test_evaluate_gives_what_fit_wrote() -> None:
    fit(numeric="age", sequence="seen=video_id", net_dropout=0.3, batch_norm=True)
    result = stem_fast("evaluate", "run", "--data", "valid.parquet", "--json", "new/m.json")
    assert result.exit_code == 0, result.output
    assert read("new/m.json") == read("run/metrics.json")
    auc = read("run/metrics.json")["tasks"]["long_view"]["auc"]
    assert f"{auc:.5f}" in result.stdout
    assert "no gauc" not in result.stdout
    valid = pq.read_table("valid.parquet")
    pq.write_table(valid.filter(pa.compute.equal(valid["long_view"], 0)), "valid.parquet")
    result = stem_fast("evaluate", "run", "--data", "valid.parquet")
    assert "no gauc for long_view: no user_id has both classes\n" in result.stdout
    column = valid.schema.get_field_index("long_view")
    empty = pa.nulls(len(valid), pa.float64())
    pq.write_table(valid.set_column(column, "long_view", empty), "valid.parquet")
    result = stem_fast("evaluate", "run", "--data", "valid.parquet")
    assert "no gauc for long_view: no row has the label\n" in result.stdout


def test_a_runs_own_files_are_not_written() -> None:
    fit()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    Path("link").symlink_to("run")
    for name in before:
        for out in (f"run/{name}", f"link/{name}"):
            for command in (("evaluate", "run", "--data", "valid.parquet"), ("compare", "run")):
                message = f"--json is {out}, a file of the run in that folder: name another file."
                refused(stem_fast(*command, "--json", out), message)
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_place_for_output_is_tried_before_the_work() -> None:
    fit()
    Path("file").write_text("")
    for command, option, out in (
        (("evaluate", "run"), "--json", "file/m.json"),
        (("predict", "run"), "--out", "file/p.csv"),
    ):
        result = stem_fast(*command, "--data", "missing.csv", option, out)
        refused(result, f"{option} is {out}, where no file can be written (", "name another")
    result = stem_fast("predict", "run", "--data", "missing.csv", "--out", "run.csv")
    refused(result, "missing.csv")
    Path("p.csv").mkdir()
    result = stem_fast("predict", "run", "--data", "missing.csv", "--out", "p.csv")
    refused(result, "--out is p.csv, a folder: name a file.")


def test_what_is_read_is_not_written() -> None:
    fit()
    Path("side").mkdir()
    before = Path("valid.parquet").read_bytes()
    for command, option in (("predict", "--out"), ("evaluate", "--json")):
        for out, join in (("./valid.parquet", []), ("side/x.csv", ["--join", "side:user_id"])):
            arguments = (command, "run", "--data", "valid.parquet", option, out, *join)
            refused(
                stem_fast(*arguments), f"{option} is {Path(out)}, which is or lies in what is read"
            )
    assert Path("valid.parquet").read_bytes() == before
    result = stem_fast("predict", "run", "--data", "valid.parquet", "--out", "P.CSV")
    assert result.exit_code == 0, result.output


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(config: Any, kinds: Any) -> Any:
        warnings.warn("the training data\nis large", stacklevel=2)
        return check(config, kinds)

    check = train.check
    monkeypatch.setattr(train, "check", warned)
    result = fit(device="cpu")
    assert "warning: the training data is large\n" in result.stderr
    assert ".py:" not in result.stderr


@pytest.mark.filterwarnings("default")
def test_a_column_without_a_known_value_is_warned_of() -> None:
    assert "are unknown" not in fit(device="cpu").stderr
    result = fit(device="cpu", min_count=10**6, overwrite=True)
    assert "there 1000000 times, so all of them are unknown: lower --min-count" in result.stderr


def test_ids_with_a_gap_are_the_same_ids() -> None:
    """pandas turns integers to floats where a column has a gap: in one file, not in the other."""
    for name in ("train", "valid"):
        rows = pq.read_table(f"{name}.parquet")
        pa.csv.write_csv(rows.drop_columns(["seen"]), f"{name}.csv")
        lines = Path(f"{name}.csv").read_text().splitlines()
        cells = [line.split(",") for line in lines]
        pairs = [
            (user, f"{video}.0" if video.isdigit() else video, *rest)
            for user, video, *rest in cells
        ]
        Path(f"{name}_gap.csv").write_text("\n".join(",".join(row) for row in pairs) + "\n")
    fit("a", train="train.csv", valid="valid.csv")
    fit("b", train="train_gap.csv", valid="valid.csv")
    fit("c", train="train.csv", valid="valid_gap.csv")
    assert read("a/schema.json") == read("b/schema.json")
    assert read("a/metrics.json") == read("b/metrics.json") == read("c/metrics.json")


def test_the_share_of_unknown_values_is_told() -> None:
    fit(sequence="seen=video_id")
    result = stem_fast("evaluate", "run", "--data", "valid.parquet")
    cells = pq.read_table("valid.parquet")["video_id"].drop_null().to_pylist()
    unknown = sum(video >= 20 for video in cells) / len(cells)
    assert 0 < unknown < 0.5
    assert f"\nunknown values: video_id {100 * unknown:.1f} %\n" in result.stdout
    result = stem_fast("evaluate", "run", "--data", "valid.parquet", "--where", "user_id<3")
    assert f"\nunknown values of all rows: video_id {100 * unknown:.1f} %\n" in result.stdout
    result = stem_fast("predict", "run", "--data", "train.parquet", "--out", "p.csv")
    assert result.stdout.endswith("\nunknown values: none\n")


@pytest.mark.filterwarnings("default")
def test_ids_spelled_in_two_ways_are_warned_of() -> None:
    fit()
    rows = pq.read_table("valid.parquet")
    padded = pa.array([f"{user:05}" for user in rows["user_id"].to_pylist()])
    pq.write_table(rows.set_column(0, "user_id", padded), "padded.parquet")
    for command in (("evaluate",), ("predict", "--out", "p.csv")):
        result = stem_fast(*command, "run", "--data", "padded.parquet", "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert (
            "warning: padded.parquet: 100.0 % of the values of column 'user_id' are unknown to the "
            "model, such as '0"
        ) in result.stderr
        assert "unknown values: user_id 100.0 %, video_id " in result.stdout
    result = fit(valid="padded.parquet", overwrite=True)
    assert "warning: padded.parquet: 100.0 % of the values of column 'user_id'" in result.stderr


@pytest.mark.filterwarnings("default")
def test_a_join_that_matches_nothing_is_not_blamed_on_min_count() -> None:
    users = [f"u{user}" for user in range(12)]
    pq.write_table(pa.table({"user_id": users, "city": list("abcdefabcdef")}), "users.parquet")
    result = fit(categorical="video_id,city", join="users.parquet:user_id", device="cpu")
    for name in ("train", "valid"):
        assert (
            f"warning: {name}.parquet: 100.0 % of its 'user_id' are not in users.parquet, such as "
        ) in result.stderr
    assert "where that has 'u0', and get none of its columns" in result.stderr
    assert "min-count" not in result.stderr
    assert result.stderr.count("warning: ") == 2


def test_a_table_that_changes_between_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    learn = data.fit_encoding

    def then_changed(*arguments: Any, **options: Any) -> Any:
        encoding = learn(*arguments, **options)
        pq.write_table(table(400, 3), f"{name}.parquet")
        return encoding

    monkeypatch.setattr(data, "fit_encoding", then_changed)
    for name in ("train", "valid"):
        message = f"{name}.parquet: the data changed while it was read: try again."
        refused(fit(ok=False), message)
        assert not Path("run").exists()


def test_a_run_keeps_its_precision() -> None:
    fit(precision="bf16", device="cpu")
    assert read("run/config.json")["training"]["precision"] == "bf16"
    for precision, same in ((None, True), ("bf16", True), ("fp32", False)):
        option = [] if precision is None else ["--precision", precision]
        arguments = ("run", "--data", "valid.parquet", "--device", "cpu", *option)
        assert stem_fast("evaluate", *arguments, "--json", "m.json").exit_code == 0
        assert (read("m.json") == read("run/metrics.json")) == same
        assert stem_fast("predict", *arguments, "--out", f"{precision}.csv").exit_code == 0
    assert Path("None.csv").read_bytes() == Path("bf16.csv").read_bytes()
    assert Path("None.csv").read_bytes() != Path("fp32.csv").read_bytes()
    arguments = ("--data", "valid.parquet", "--device", "cpu", "--precision")
    refused(stem_fast("evaluate", "run", *arguments, "tf32"), "precision is 'tf32', which cpu")
    refused(
        stem_fast("predict", "run", *arguments, "fp8", "--out", "p.csv"),
        "precision: expected one of fp32",
    )


def test_same_seed_same_bytes() -> None:
    fit("a", net_dropout=0.1)
    fit("b", net_dropout=0.1)
    fit("c", net_dropout=0.1, seed=7)
    for name in ("metrics.json", "model.safetensors"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
        assert Path("a", name).read_bytes() != Path("c", name).read_bytes()


@pytest.mark.parametrize("model", ["single", "shared_bottom", "mmoe", "ple"])
def test_every_model(model: str) -> None:
    gates = [4] if model in ("mmoe", "ple") else None
    fit(model=model, num_shared_experts=None, gate_hidden_units=gates)
    loaded, _, _ = checkpoint.load_run("run")
    assert read("run/config.json")["model"] == model
    result = stem_fast("predict", "run", "--data", "valid.parquet", "--out", "p.parquet")
    assert result.exit_code == 0, result.output
    assert type(loaded).__name__.lower() == {"single": "singletask"}.get(
        model, model.replace("_", "")
    )


def test_regression_weights_and_monitor() -> None:
    pq.write_table(table(150, 1).drop_columns(["weight"]), "valid.parquet")  # no metric needs it
    fit(
        labels="is_click,seconds:regression",
        weight="weight",
        monitor="seconds.rmse",
        task_weights="1,0.01",
        learning_rate=0.1,
    )
    tasks = read("run/metrics.json")["tasks"]
    assert list(tasks["seconds"]) == ["rmse", "mae"]
    history = read("run/history.json")
    assert history[0]["monitor"] == history[0]["metrics"]["tasks"]["seconds"]["rmse"]
    assert stem_fast("evaluate", "run", "--data", "valid.parquet").exit_code == 0
    stem_fast("predict", "run", "--data", "valid.parquet", "--out", "p.parquet")
    assert pq.read_table("p.parquet")["seconds"].to_numpy().max() > 1  # a value, no probability


def test_side_tables_are_joined() -> None:
    names = pa.array([f"author {i % 3}" for i in range(25)])
    pq.write_table(pa.table({"video_id": np.arange(25), "author": names}), "videos.parquet")
    cities = pa.array(list("abcdefabcdef"))
    pq.write_table(pa.table({"user_id": np.arange(12), "city": cities}), "users.parquet")
    joins = ["--join", "videos.parquet:video_id", "--join", "users.parquet:user_id"]
    file = {**COLUMNS, **NETWORK, **TRAINING, "train": "train.parquet", "valid": "valid.parquet"}
    file["categorical"] = ["user_id", "author", "city"]
    Path("c.yaml").write_text(yaml.safe_dump(file))
    result = stem_fast("fit", "--config", "c.yaml", "--out", "run", *joins)
    assert result.exit_code == 0, result.output
    result = stem_fast("evaluate", "run", "--data", "valid.parquet", "--json", "m.json", *joins)
    assert result.exit_code == 0, result.output
    assert read("m.json") == read("run/metrics.json")
    # Without --join those of the run are taken, from wherever the command runs.
    source = read("run/config.json")["source"]
    assert source["join"] == [
        f"{Path('videos.parquet').absolute()}:video_id",
        f"{Path('users.parquet').absolute()}:user_id",
    ]
    assert source["train"] == str(Path("train.parquet").absolute())
    Path("m.json").unlink()
    result = stem_fast("evaluate", "run", "--data", "valid.parquet", "--json", "m.json")
    assert f"joined as in training: {source['join'][0]}, {source['join'][1]}\n" in result.stdout
    assert read("m.json") == read("run/metrics.json")
    by = stem_fast("evaluate", "run", "--data", "valid.parquet", "--by", "city", *joins)
    assert by.exit_code == 0, by.output
    # A table that holds their columns itself needs no side table.
    valid = pq.read_table("valid.parquet")
    videos, users = valid["video_id"].to_pylist(), valid["user_id"].to_pylist()
    texts = [names[v].as_py() if v is not None and v < 25 else None for v in videos]
    valid = valid.append_column("author", pa.array(texts))
    valid = valid.append_column("city", pa.array([cities[u].as_py() for u in users]))
    pq.write_table(valid, "whole.parquet")
    # It is joined for a column that a side table alone has, and not for a wrong name.
    for flags in (("--by", "citty"), ("--where", "citty=a")):
        result = stem_fast("evaluate", "run", "--data", "whole.parquet", *flags)
        refused(result, "error: whole.parquet: no column 'citty'. Did you mean 'city'?")
        assert "joined" not in result.stdout
    predict = ("predict", "run", "--data", "whole.parquet", "--out", "p.parquet", "--keep")
    refused(stem_fast(*predict, "agee"), "error: whole.parquet: no column 'agee'. Did you mean")
    ages = pa.table({"user_id": np.arange(12), "level": np.arange(12)})
    pq.write_table(ages, "users.parquet")
    pq.write_table(pa.table({"video_id": np.arange(25)}), "videos.parquet")
    result = stem_fast(*predict, "level")
    assert result.exit_code == 0, result.output
    assert "joined as in training" in result.stdout
    kept = pq.read_table("p.parquet")["level"].to_pylist()
    assert kept == valid["user_id"].to_pylist()
    pq.write_table(pa.table({"video_id": np.arange(25), "author": names}), "videos.parquet")
    Path("users.parquet").unlink()
    result = stem_fast("evaluate", "run", "--data", "whole.parquet", "--json", "m.json")
    assert "joined" not in result.stdout
    assert read("m.json") == read("run/metrics.json")
    result = stem_fast("evaluate", "run", "--data", "valid.parquet")
    refused(result, f"run was made with --join {source['join'][1]}, which is no longer there: give")
    single = ("--join", "videos.parquet:video_id")
    refused(stem_fast("evaluate", "run", "--data", "valid.parquet", *single), "no column 'city'")


# ---- predict -------------------------------------------------------------------------------


def test_predict_keeps_the_order_of_rows() -> None:
    fit(weight="weight")
    valid = pq.read_table("valid.parquet")
    features = valid.select(["video_id", "user_id"])  # neither labels nor weight, another order
    pq.write_table(features, "features.parquet")
    pq.write_table(features.take(pa.array(range(149, -1, -1))), "reversed.parquet")
    for name in ("features", "reversed"):
        arguments = ("--data", f"{name}.parquet", "--out", f"{name}_p.parquet")
        result = stem_fast("predict", "run", *arguments)
        assert result.exit_code == 0, result.output
    found = pq.read_table("features_p.parquet")
    assert found.schema == pa.schema([(task, pa.float32()) for task in TASKS])
    assert found.num_rows == 150
    backwards = pq.read_table("reversed_p.parquet")
    for task in TASKS:
        ours, theirs = found[task].to_numpy(), backwards[task].to_numpy()[::-1]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert len(np.unique(ours)) > 20
        assert 0 < ours.min() < ours.max() < 1
    model, encoding, _ = checkpoint.load_run("run")
    users = encoding.vocabularies["user_id"]
    first = [users.index(str(valid["user_id"][0])) + 1]
    video, videos = str(valid["video_id"][0]), encoding.vocabularies["video_id"]
    first += [videos.index(video) + 1 if video in videos else len(videos) + 1]
    expected = model.predict(torch.tensor([first]))[0].numpy()
    np.testing.assert_allclose([found[task][0].as_py() for task in TASKS], expected, rtol=1e-5)


@pytest.mark.parametrize("out", ["p.parquet", "p.csv"])
def test_predict_keeps_columns(out: str) -> None:
    fit()
    keep = ("--keep", "weight,video_id", "--keep", "age")
    result = stem_fast("predict", "run", "--data", "valid.parquet", "--out", out, *keep)
    assert result.exit_code == 0, result.output
    assert (
        f"150 rows of weight, video_id, age, {', '.join(TASKS)} written to {out}" in result.stdout
    )
    found = pq.read_table(out) if out == "p.parquet" else pyarrow.csv.read_csv(out)
    assert found.column_names == ["weight", "video_id", "age", *TASKS]
    valid = pq.read_table("valid.parquet")
    for name in ("weight", "video_id", "age"):
        assert found[name].to_pylist() == valid[name].to_pylist()
    if out == "p.parquet":
        assert found.schema.field("video_id").type == pa.int64()
    stem_fast("predict", "run", "--data", "valid.parquet", "--out", f"plain_{out}")
    plain = pq.read_table("plain_p.parquet") if out == "p.parquet" else None
    plain = plain or pyarrow.csv.read_csv("plain_p.csv")
    assert found.select(TASKS).equals(plain)


def test_kept_text_is_as_it_stands_there() -> None:
    """Of a CSV, zeros in front and all, and of every file of a folder."""
    fit()
    Path("rows").mkdir()
    Path("rows/a.csv").write_text("user_id,video_id\n007,1\n7,\n")
    Path("rows/b.csv").write_text("video_id,user_id\n2.0,08\n")
    arguments = ("--data", "rows", "--out", "p.parquet", "--keep", "user_id,video_id")
    result = stem_fast("predict", "run", *arguments)
    assert result.exit_code == 0, result.output
    kept = pq.read_table("p.parquet").select(["user_id", "video_id"])
    assert kept.to_pydict() == {"user_id": ["007", "7", "08"], "video_id": ["1", "", "2.0"]}


def test_what_cannot_be_kept_is_refused() -> None:
    fit()
    predict = ("predict", "run", "--data", "valid.parquet", "--out", "p.csv", "--keep")
    refused(
        stem_fast(*predict, "is_click"), "--keep names 'is_click', which is a prediction's name"
    )
    refused(stem_fast(*predict, "age,age"), "--keep names 'age', which is named twice")
    refused(stem_fast(*predict, "agee"), "no column 'agee'. Did you mean 'age'?")
    refused(stem_fast(*predict, "seen"), "--keep names 'seen', which holds large_list<")
    assert not Path("p.csv").exists()


def test_bytes_are_kept_in_a_csv_where_they_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    fit(epochs=1)
    valid = pq.read_table("valid.parquet")
    columns = {"text": [b"caf\xc3\xa9"] * 150, "bytes": [b"a"] * 149 + [b"\xff\xfe"]}
    for name, values in columns.items():
        valid = valid.append_column(name, pa.array(values))
    valid = valid.append_column("fixed", pa.array([b"\xff\xfe"] * 150, pa.binary(2)))
    pq.write_table(valid, "valid.parquet")
    predict = ("predict", "run", "--data", "valid.parquet", "--keep")
    assert stem_fast(*predict, "text", "--out", "p.csv").exit_code == 0
    assert pyarrow.csv.read_csv("p.csv")["text"].to_pylist() == ["café"] * 150
    assert stem_fast(*predict, "bytes,fixed", "--out", "p.parquet").exit_code == 0
    assert pq.read_table("p.parquet")["bytes"].to_pylist() == columns["bytes"]
    monkeypatch.delattr(train, "predict")  # refused before the work
    for name, kind in (("bytes", "large_binary"), ("fixed", "fixed_size_binary[2]")):
        result = stem_fast(*predict, name, "--out", "q.csv")
        refused(result, f"--keep names '{name}', which holds {kind}: a .csv has no place for it")
    assert not Path("q.csv").exists()


def flat(result: dict[str, Any]) -> dict[str, float]:
    """Rows and metrics, to compare but for the rounding of batches."""
    tasks = result["tasks"].items()
    values = {f"{t} {m}": v for t, each in tasks for m, v in each.items() if v is not None}
    return {"rows": result["rows"], **values}


def expected(rows: pa.Table) -> Any:
    """As ``flat``, of a table of these rows."""
    pq.write_table(rows, "part.parquet")
    assert stem_fast("evaluate", "run", "--data", "part.parquet", "--json", "p.json").exit_code == 0
    return pytest.approx(flat(read("p.json")), rel=1e-5)


def test_evaluate_by_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "BY", 3)
    fit()
    arguments = ("--data", "valid.parquet", "--by", "video_id", "--json", "m.json")
    result = stem_fast("evaluate", "run", *arguments)
    assert result.exit_code == 0, result.output
    found, whole, valid = read("m.json"), read("run/metrics.json"), pq.read_table("valid.parquet")
    by = found.pop("by")
    assert found == whole
    assert by["column"] == "video_id"
    counts: dict[int | None, int] = {}
    for value in valid["video_id"].to_pylist():
        counts[value] = counts.get(value, 0) + 1
    assert [each["rows"] for each in by["values"]] == sorted(counts.values())[:-4:-1]
    taken = pa.array(np.zeros(150, bool))
    for each in by["values"]:
        value = None if each["value"] is None else int(each["value"])
        mask = pa.compute.fill_null(pa.compute.equal(valid["video_id"], value or 0), value is None)
        if value is None:
            mask = pa.compute.is_null(valid["video_id"])
        taken = pa.compute.or_(taken, mask)
        assert flat(each) == expected(valid.filter(mask))
    rest = by["rest"]
    assert rest["values"] == len(counts) - 3
    assert flat(rest) == expected(valid.filter(pa.compute.invert(taken)))
    assert f"{len(counts) - 3} other values" in result.stdout


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        (["user_id=3"], lambda r: r["user_id"] == 3),
        (["user_id == 3.0"], lambda r: r["user_id"] == 3),
        (["user_id!=3"], lambda r: r["user_id"] != 3),
        (["user_id>=10"], lambda r: r["user_id"] >= 10),  # as numbers: text "9" is above "10"
        (["user_id<10", "video_id>20"], lambda r: r["user_id"] < 10 and (r["video_id"] or 0) > 20),
        (["video_id="], lambda r: r["video_id"] is None),
        (["video_id!="], lambda r: r["video_id"] is not None),
        (["video_id!=4"], lambda r: r["video_id"] != 4),
        (["age<=-0.5"], lambda r: r["age"] <= -0.5),
        (["day>2022-05-01"], lambda r: r["day"] > "2022-05-01"),
        # As the file, Arrow or another program spells a value.
        (["new=True"], lambda r: r["new"] == "True"),
        (["new!=TRUE"], lambda r: r["new"] != "True"),
        (["new=false"], lambda r: r["new"] == "False"),
        (["at>=2022-05-02 00:00:00"], lambda r: r["at"] >= "2022-05-02"),
        (["at=2022-05-02T00:00:00.000"], lambda r: r["at"] == "2022-05-02 00:00:00"),
    ],
)
def test_evaluate_where(conditions: list[str], kept: Any) -> None:
    fit(sequence="seen=video_id", numeric="age", epochs=1)
    valid = pq.read_table("valid.parquet")
    days = pa.array([f"2022-05-0{1 + i % 3}" for i in range(150)])
    truths = pa.array([("True", "False", None)[i % 3] for i in range(150)])
    times = pa.array([f"2022-05-0{1 + i % 3} 0{i % 2}:00:00" for i in range(150)])
    valid = valid.append_column("day", days).append_column("new", truths)
    pq.write_table(valid := valid.append_column("at", times), "valid.parquet")
    flags = [part for text in conditions for part in ("--where", text)]
    result = stem_fast("evaluate", "run", "--data", "valid.parquet", *flags, "--json", "m.json")
    assert result.exit_code == 0, result.output
    rows = [i for i, row in enumerate(valid.to_pylist()) if kept(row)]
    assert 0 < len(rows) < 150
    found = read("m.json")
    assert len(found.pop("where")) == len(conditions)
    assert flat(found) == expected(valid.take(pa.array(rows)))
    assert f"{len(rows)} rows" in result.stdout


def test_conditions_that_hold_nowhere_or_are_none_are_refused() -> None:
    fit(epochs=1)
    evaluate = ("evaluate", "run", "--data", "valid.parquet", "--where")
    refused(stem_fast(*evaluate, "user_id"), "--where is 'user_id': give COLUMN=VALUE, or one of")
    refused(stem_fast(*evaluate, "user_id>"), "--where is 'user_id>': give COLUMN=VALUE")
    refused(stem_fast(*evaluate, "user_id<NULL"), "--where is 'user_id<NULL': give COLUMN=VALUE")
    refused(stem_fast(*evaluate, "user_id=NULL"), "none of its 150 rows has user_id=.")
    refused(stem_fast(*evaluate, "user_id=\udcff"), "--where is 'user_id=\\udcff': give COLUMN=")
    refused(stem_fast(*evaluate, "user_id>99"), "none of its 150 rows has user_id>99.")
    refused(stem_fast(*evaluate, "userid=1"), "no column 'userid'. Did you mean 'user_id'?")
    result = stem_fast("evaluate", "run", "--data", "valid.parquet", "--by", "videoid")
    refused(result, "no column 'videoid'. Did you mean 'video_id'?")
    valid = pq.read_table("valid.parquet")
    letters = pa.array(["7"] * 149 + ["x7"])
    pq.write_table(valid.append_column("code", letters), "valid.parquet")
    result = stem_fast(*evaluate, "code>5")
    refused(result, "column 'code', row 149: 'x7' is no number, which --where code>5 compares")
    assert stem_fast(*evaluate, "code=7").exit_code == 0


def test_predict_writes_csv() -> None:
    fit()
    for out in ("p.csv", "p.parquet"):
        stem_fast("predict", "run", "--data", "valid.parquet", "--out", out, "--batch-size", 7)
    as_csv, as_parquet = pyarrow.csv.read_csv("p.csv"), pq.read_table("p.parquet")
    assert as_csv.column_names == list(TASKS)
    for task in TASKS:
        np.testing.assert_allclose(as_csv[task].to_numpy(), as_parquet[task].to_numpy(), rtol=1e-6)


def test_a_csv_is_the_same_data() -> None:
    """All but the list column, whose text form is another."""
    for name in ("train", "valid"):
        columns = pq.read_table(f"{name}.parquet").drop_columns(["seen"])
        pyarrow.csv.write_csv(columns, f"{name}.csv")
    fit("a")
    fit("b", train="train.csv", valid="valid.csv")
    assert read("a/metrics.json") == read("b/metrics.json")


# ---- the configuration file ----------------------------------------------------------------

FILE = {
    "train": "train.parquet",
    "valid": "valid.parquet",
    "labels": {"is_click": "binary", "seconds": "regression"},
    "categorical": ["user_id", "video_id"],
    "sequences": {"seen": {"shares": "video_id", "max_len": 3}},
    "monitor": "is_click.auc",
    "task_weights": [1, 0.01],
    **NETWORK,
    **TRAINING,
}


def test_a_list_flag_given_twice_adds_up() -> None:
    Path("c.yaml").write_text(yaml.safe_dump(FILE))
    twice = ["--categorical", "user_id", "--categorical", "video_id"]
    result = stem_fast("fit", "--config", "c.yaml", "--out", "run", "--epochs", 1, *twice)
    assert result.exit_code == 0, result.output
    assert list(read("run/config.json")["config"]["vocab_sizes"]) == ["user_id", "video_id"]


def test_flags_override_the_file() -> None:
    Path("c.yaml").write_text(yaml.safe_dump(FILE) + "learning_rate: 1e-4\n".replace("l", "#l", 1))
    result = stem_fast("fit", "--config", "c.yaml", "--out", "run", "--epochs", 1, "--model", "ple")
    assert result.exit_code == 0, result.output
    written = read("run/config.json")
    assert written["model"] == "ple"
    assert written["training"]["epochs"] == 1
    assert written["training"]["batch_size"] == 64
    assert written["config"]["expert_hidden_units"] == [8]
    schema = read("run/schema.json")["schema"]
    assert schema["labels"] == FILE["labels"]
    assert schema["sequences"][0]["max_len"] == 3


def settings(**changes: Any) -> config.FitSettings:
    return config.fit_settings({"out": "run", **FILE, **changes})


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ("seen=video_id,tags", ["sum", "sum"]),
        (["seen", {"name": "tags", "pooling": "mean"}], ["sum", "mean"]),
        ({"seen": None, "tags": {"pooling": "mean"}}, ["sum", "mean"]),
    ],
)
def test_pooling_is_the_default_of_sequences(sequences: Any, expected: list[str]) -> None:
    found = settings(sequences=sequences, pooling="sum").schema.sequences
    assert [field.pooling for field in found] == expected
    plain = settings(sequences=sequences).schema.sequences
    assert found[0] == SequenceField(plain[0].name, plain[0].shares, pooling="sum")


def test_values_have_their_types() -> None:
    found = settings(
        learning_rate="1e-4", gate_hidden_units=[], tower_hidden_units=7, task_weights="1,2"
    )
    assert found.training.learning_rate == 1e-4
    assert found.training.task_weights == (1.0, 2.0)
    assert found.network["gate_hidden_units"] == ()
    assert found.network["tower_hidden_units"] == (7,)
    assert found.train == Path("train.parquet")
    assert settings(join="a:b/c.csv:id").joins == ((Path("a:b/c.csv"), "id"),)
    assert settings(group=None, cache=None).cache is None


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("embedding_dim", 0, "a whole number of at least 1"),
        ("embedding_dim", 2.5, "a whole number of at least 1"),
        ("num_layers", "two", "a whole number of at least 1"),
        ("num_shared_experts", -1, "a whole number of at least 0"),
        ("expert_hidden_units", [8, 0], "a whole number of at least 1"),
        ("tower_hidden_units", "8;4", "a whole number of at least 1"),
        ("net_dropout", 1.0, "a number from 0 to below 1"),
        ("batch_norm", "yes", "true or false"),
        ("overwrite", 1, "true or false"),
        ("hidden_activations", 3, "text"),
        ("model", ["stem"], "one of stem, single"),
        ("model", "stm", "ple, got 'stm'. Did you mean 'stem'?"),
        ("pooling", "max", "mean or sum"),
        ("join", "users.parquet", "FILE:KEY"),
        ("join", [3], "FILE:KEY"),
        ("train", 3, "a path"),
        ("train", "a\0b.csv", "a path"),
        ("join", "a\0b.csv:user_id", "FILE:KEY"),
        ("embedding_dim", 10**30, "at most 65536"),
        ("num_layers", 2_000_000_000, "at most 1024"),
        ("num_shared_experts", 10**30, "at most 64"),
        ("tower_hidden_units", [10**30], "at most 1048576"),
        ("epochs", int("9" * 400), "at most 2147483647"),
        ("learning_rate", int("9" * 400), "a number above 0"),
        ("monitor", ["x" * 1000] * 1000, "text"),
        ("device", 0, "text"),
        ("epochs", 0, "a whole number of at least 1"),
        ("learning_rate", -1, "a number above 0"),
        ("embedding_optimizer", "adamm", "one of adam, dense_adam, lazy_adam, sgd"),
        ("precision", "fp16", "one of fp32, tf32, bf16"),
    ],
)
def test_bad_values_name_key_and_value(key: str, value: Any, rule: str) -> None:
    file = Path("c.yaml")
    file.write_text(yaml.safe_dump({**FILE, "out": "run", key: value}))
    for name, flags in ((key, {}), (f"--{key.replace('_', '-')}", {key: value})):
        with pytest.raises(DataError) as error:
            config.fit_settings(flags, file)
        assert str(error.value).startswith(f"{name}: expected ")
        assert len(str(error.value)) < 1100
        assert rule in str(error.value)


def test_the_default_monitor_is_a_metric_that_the_tasks_have() -> None:
    file = {key: value for key, value in FILE.items() if key != "monitor"}
    for labels, monitor in (("a:regression,b:regression", "rmse"), ("a,b:regression", "auc")):
        given = {**file, "labels": labels, "out": "run"}
        assert config.fit_settings(given).training.monitor == monitor
    given["labels"], given["monitor"] = "a:regression", "mae"
    assert config.fit_settings(given).training.monitor == "mae"


@pytest.mark.parametrize("sequences", [5, [5], {"seen": 5}, True])
def test_pooling_beside_sequences_of_a_wrong_type(sequences: Any) -> None:
    with pytest.raises(DataError, match=r"sequences?: expected a "):
        settings(sequences=sequences, pooling="sum")


def test_pooling_that_would_be_ignored_is_refused() -> None:
    for sequences in (None, [{"name": "seen", "pooling": "mean"}]):
        with pytest.raises(DataError, match="pooling is 'sum', but there is no sequence"):
            settings(sequences=sequences, pooling="sum")


# 10**9 values in ten lines.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "c.yaml: unknown key 'epoch'. Did you mean 'epochs'?"),
        ("batch-size: 3", "c.yaml: unknown key 'batch-size'. Did you mean 'batch_size'?"),
        ("config: d.yaml", "c.yaml: unknown key 'config'"),
        ("3: 4", "c.yaml: unknown key '3'"),
        ("epochs: 3\nepochs: 4", "c.yaml is not valid YAML: key 'epochs' stands twice"),
        ("labels: {a: binary, a: binary}", "key 'a' stands twice"),
        ("? [a, b]\n: 3", "c.yaml is not valid YAML: a key must be text, not a list or mapping"),
        ("labels: {? {a: b} : binary}", "a key must be text, not a list or mapping"),
        ("group: 2022-13-01", "c.yaml is not valid YAML: month must be in 1..12"),
        ("epochs: [", "c.yaml is not valid YAML"),
        ("- epochs", "c.yaml: expected `key: value` lines"),
        ("", "c.yaml: expected `key: value` lines"),
        ("labels: " + "[" * 3000, "c.yaml is not valid YAML"),
        ("labels: " + "[" * 3000 + "]" * 3000, "c.yaml is not valid YAML: it is nested too deeply"),
        ("{a: " * 3000 + "}" * 3000, "it is nested too deeply"),
        (BOMB, "c.yaml is not valid YAML: with its aliases written out it is too long"),
        ("labels: &a [*a]", "with its aliases written out it is too long"),
        ("header: x" + "x" * config_file.MAX_TEXT, "c.yaml: is longer than a configuration file's"),
        ("epochs: " + "9" * 5000, "c.yaml is not valid YAML: Exceeds the limit"),
        (
            "categorical: user_id\nepochs: 0x" + "f" * 5000,
            "epochs: expected at most 2147483647, got a number of thousands of",
        ),
        ('categorical: ["\\ud800"]', "categorical: expected a column name, got '\\ud800'"),
        ("x: !!python/object:os.system {}", "c.yaml is not valid YAML"),
        ("sequences: [{name: seen, share: video_id}]", "unknown key 'share'"),
    ],
)
def test_bad_files(text: str, message: str) -> None:
    Path("c.yaml").write_text(text)
    refused(fit(config="c.yaml", ok=False, epochs=None, categorical=None), message)


def test_aliases_are_read() -> None:
    text = "categorical: &columns [user_id, video_id]\nlabels: {a: binary}\nnumeric: *columns\n"
    Path("c.yaml").write_text(text)
    columns = ["user_id", "video_id"]
    found = config.read_yaml(Path("c.yaml"))
    assert found == {"categorical": columns, "labels": {"a": "binary"}, "numeric": columns}


# ---- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train": None, "labels": None}, ["missing: --train, --labels (or the same key"]),
        ({"train": "nope.parquet"}, ["nope.parquet"]),
        ({"config": "nope.yaml"}, ["no configuration file nope.yaml"]),
        ({"config": "."}, ["configuration file . cannot be read: Is a directory."]),
        ({"categorical": "user_id,vide_id"}, ["vide_id", "video_id"]),
        ({"labels": "is_click,seconds"}, ["seconds", "row 0"]),
        ({"labels": "is_click:bin"}, ["label 'is_click': expected a kind of binary"]),
        ({"monitor": "acu"}, ["monitor is 'acu'", "Did you mean 'auc'?"]),
        ({"monitor": "gauc", "group": None}, ["--monitor is 'gauc', which needs the --group"]),
        (
            {"task_weights": "1"},
            ["--task-weights: expected one for each of is_click", "is_click, long_view"],
        ),
        ({"model": "stm"}, ["--model: expected one of stem", "Did you mean 'stem'?"]),
        (
            {"model": "mmoe", "num_specific_experts": 1},
            ["no mmoe model of these options: ", "--num-specific-experts: expected 0"],
        ),
        ({"hidden_activations": "rellu"}, ["no stem model of these options: ", "rellu"]),
        ({"device": "tpu"}, ["device: expected auto, cpu, cuda or cuda:N, got 'tpu'"]),
        ({"device": "cuda:²"}, ["device: expected auto, cpu, cuda or cuda:N, got 'cuda:²'"]),
        ({"device": "cuda:" + "9" * 5000}, ["expected auto, cpu, cuda or cuda:N"]),
        ({"device": "cuda:99"}, ["device is 'cuda:99'", "stem-fast doctor"]),
        ({"device": "cpu:7"}, ["device: expected cpu without an index, got 'cpu:7'."]),
        ({"header": "a,b"}, ["header is ('a', 'b'), but train.parquet is Parquet"]),
        ({"delimiter": "é"}, ["delimiter: expected one ASCII character"]),
        ({"out": "train.parquet/run"}, ["train.parquet/run: a run cannot be written there"]),
        (
            {"model": "shared_bottom", "num_shared_experts": None},
            ["--gate-hidden-units is given, but shared_bottom has no gates: drop it."],
        ),
        (
            {"precision": "tf32", "device": "cpu"},
            ["precision is 'tf32', which cpu cannot do", "give fp32 or bf16"],
        ),
        ({"epochs": "x"}, ["--epochs"]),
        ({"epoch": 3}, ["--epoch"]),
        ({"batch_size": 0}, ["--batch-size: expected a whole number of at least 1, got 0"]),
        ({"out": "train.parquet"}, ["train.parquet is a file"]),
        ({"out": ".", "overwrite": True}, ["which no run has"]),
    ],
)
def test_fit_refuses(change: dict[str, Any], parts: list[str]) -> None:
    refused(fit(ok=False, **change), *parts)
    assert not Path("run").exists()


def test_a_run_is_replaced_only_when_asked() -> None:
    fit(epochs=1)
    before = Path("run/model.safetensors").read_bytes()
    refused(fit(ok=False, seed=4), "run already holds a run", "--overwrite")
    refused(fit(ok=False, overwrite=True, train="nope.parquet"), "nope.parquet")
    assert Path("run/model.safetensors").read_bytes() == before
    fit(overwrite=True, seed=4)
    assert Path("run/model.safetensors").read_bytes() != before
    assert len(read("run/history.json")) == 2


def test_other_commands_refuse() -> None:
    fit(epochs=1)
    data = ("--data", "valid.parquet")
    refused(stem_fast("evaluate", "nope", *data), "no run folder nope")
    refused(stem_fast("evaluate", "run"), "--data")
    refused(stem_fast("evaluate", "run", *data, "--batch-size", 0), "--batch-size")
    refused(stem_fast("evaluate", "run", *data, "--batch-size", "ten"), "--batch-size", "'ten'")
    refused(stem_fast("evaluate", "run", *data, "--batch-size", 10**30), "--batch-size")
    refused(
        stem_fast("synth", "--out", "log", "--rows", 10**30),
        "rows: expected at most",
        "at most 2147483647",
    )
    refused(stem_fast("predict", "run", *data, "--out", "p.txt"), "name a .parquet or .csv file")
    refused(
        stem_fast("predict", "run", *data, "--out", "p.csv", "--join", "x"),
        "--join: expected FILE:KEY",
    )
    pq.write_table(table(5, 0).drop_columns(["is_click"]), "unlabelled.parquet")
    refused(stem_fast("evaluate", "run", "--data", "unlabelled.parquet"), "is_click")
    refused(stem_fast("evaluate", "run", *data, "--json", "."), "--json is ., a folder: name a")
    refused(stem_fast("compare", "run", "nope"), "no run folder nope: name the folder that")
    refused(stem_fast("compare", "run", "--json", "."), "--json is ., a folder: name a file.")
    Path("run/metrics.json").write_text("[" * 200_000)
    refused(stem_fast("compare", "run"), "metrics.json is not a run's: it is nested too deeply")
    Path("run/metrics.json").unlink()
    os.mkfifo("run/metrics.json")
    refused(stem_fast("compare", "run"), "metrics.json is no regular file")
    Path("run/metrics.json").unlink()
    Path("run/metrics.json").write_text("[]")
    refused(stem_fast("compare", "run"), "metrics.json does not hold the metrics of a run")
    Path("run/metrics.json").unlink()
    refused(stem_fast("compare", "run"), "run has no metrics.json", "whose fit has ended")
    refused(stem_fast("fitt"), "fitt")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(train, "fit", broken)
    assert isinstance(fit(ok=False).exception, RuntimeError)


def test_a_network_too_large_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ("out of memory: lower --batch-size, give fit a --micro-batch-size", "--min-count")
    wide = {"embedding_dim": 2**16, "expert_hidden_units": [2**20, 2**20]}
    refused(
        fit(ok=False, **wide),
        "a stem model of these options takes ",
        "fit a smaller",
        "--min-count",
    )
    with monkeypatch.context() as patch:
        patch.setattr("stem_fast.cli.fit._memory", lambda: float("inf"))
        refused(fit(ok=False, **wide), *said, "DefaultCPUAllocator")

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 7 TiB")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore words.")

    monkeypatch.setattr(train, "fit", no_memory)
    refused(fit(ok=False), *said, "(Unable to allocate 7 TiB).")
    monkeypatch.setattr(train, "fit", full)
    refused(fit(ok=False), *said, "(CUDA out of memory.).")


# ---- interruptions -------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "said"), [(3, "nothing is saved"), (10, "run holds the best")])
def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, step: int, said: str) -> None:
    """400 rows in batches of 64 are 7 steps an epoch."""
    steps, train_step = iter(range(1, 100)), train.train_step

    def interrupted(*arguments: Any) -> torch.Tensor:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*arguments)

    monkeypatch.setattr("stem_fast.training.step.train_step", interrupted)
    # Where the tests run in the background (nohup), Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = fit(ok=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert said in result.stderr
    assert "Traceback" not in result.output
    if step < 7:
        assert not Path("run").exists()
    else:
        checkpoint.load_run("run")
        assert not Path("run/metrics.json").exists()
        assert len(read("run/history.json")) == 1


def test_a_loss_that_explodes_keeps_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, train_step = iter(range(1, 100)), train.train_step

    def exploding(*arguments: Any) -> torch.Tensor:
        loss = train_step(*arguments)
        return loss * float("nan") if next(steps) == 9 else loss

    monkeypatch.setattr("stem_fast.training.step.train_step", exploding)
    result = fit(ok=False)
    refused(result, "the loss is nan in epoch 2, step 2", "run holds the best weights so far")
    checkpoint.load_run("run")


def test_killed_at_every_moment(tmp_path: Path) -> None:
    """The real command, SIGKILLed at its file operations in the folder that holds the run."""
    flags = ["--train", "train.parquet", "--valid", "valid.parquet", "--labels", "long_view"]
    flags += ["--categorical", "user_id", "--expert-hidden-units", "4", "--epochs", "2"]
    flags += ["--patience", "2", "--learning-rate", "0.01"]
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, script, "fit", tmp_path / "w", *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states = done.stdout.split()
    first = next(i for i, state in enumerate(states) if state != "absent")
    assert first > 3
    assert len(states) - first > 3
    assert "absent" not in states[first:]  # and a run that does not load ends the script
    assert len(set(states[first:])) == 2  # the weights of each epoch
    assert list(tmp_path.joinpath("w").iterdir()) == []


# ---- what is printed -----------------------------------------------------------------------


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, markup=False)
    monkeypatch.setattr(report, "console", lambda **_: terminal)
    fit()
    shown = screen.getvalue()
    assert "epoch 1/2" in shown
    assert "samples/s" in shown
    assert shown.count("best") >= 1
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_compare_marks_the_best() -> None:
    for name in ("a", "b", "sub/b"):
        fit(name, epochs=1, model="single", num_shared_experts=None, gate_hidden_units=None)
    metrics = {"auc": 0.5, "gauc": None, "logloss": 0.5, "pcoc": 1.2}
    other = {"auc": 0.500001, "gauc": 0.4, "logloss": 0.6, "pcoc": 0.9}
    last = {"auc": 0.4, "gauc": None, "logloss": 0.4}
    for name, values in {"a": metrics, "b": other, "sub/b": last}.items():
        Path(name, "metrics.json").write_text(json.dumps({"rows": 9, "tasks": {"[like]": values}}))
    result = stem_fast("compare", "a", "b", "sub/b", "--json", "out/c.json")
    assert result.exit_code == 0, result.output
    written = json.loads(Path("out/c.json").read_text())
    assert written["runs"]["a"]["metrics"]["tasks"]["[like]"] == metrics
    assert written["runs"]["sub/b"]["config"]["model"] == "single"
    assert written["machine"]["torch"] == torch.__version__
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["a", "b", "sub/b"] in lines
    rows = [line for line in lines if line[:1] == ["[like]"]]
    assert rows == [
        ["[like]", "auc", "0.50000", "*", "0.50000", "*", "0.40000"],
        ["[like]", "gauc", "-", "0.40000", "-"],
        ["[like]", "logloss", "0.50000", "0.60000", "0.40000", "*"],
        ["[like]", "pcoc", "1.20000", "0.90000", "*", "-"],
    ]
    assert "note" not in result.stdout
    Path("b/metrics.json").write_text(json.dumps({"rows": 8, "tasks": {"like": other}}))
    assert "validated on different data (8, 9 rows)" in stem_fast("compare", "a", "b").stdout


def test_compare_takes_seeds_together() -> None:
    """As mean and deviation, of which no lucky seed is starred."""
    aucs = {"s_1": 0.70, "s_2": 0.74, "s_3": 0.72, "other": 0.725, "worse": 0.6}
    for name, auc in aucs.items():
        seed = int(name[-1]) if name[-1].isdigit() else 1
        more = {"learning_rate": {"other": 0.02, "worse": 0.03}.get(name, 0.01)}
        fit(name, epochs=1, seed=seed, device="cpu", **more)
        result = {"rows": 9, "tasks": {"like": {"auc": auc, "gauc": None if seed == 2 else 0.5}}}
        Path(name, "metrics.json").write_text(json.dumps(result))
    result = stem_fast("compare", *aucs, "--json", "c.json")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["s", "other", "worse"] in lines
    assert "(stem, 3 seeds)" in result.stdout
    rows = [line for line in lines if line[:1] == ["like"]]
    assert rows[0] == ["like", "auc", "0.72000", "±", "0.02000", "*", "0.72500", "*", "0.60000"]
    assert rows[1] == ["like", "gauc", "-", "0.50000", "*", "0.50000", "*"]
    assert "or a standard deviation from it" in result.stdout
    written = read("c.json")
    assert written["seeds"]["s"]["runs"] == ["s_1", "s_2", "s_3"]
    found = written["seeds"]["s"]["tasks"]["like"]
    assert found["auc"] == pytest.approx({"mean": 0.72, "std": 0.02})
    assert found["gauc"] == {"mean": None, "std": None}
    assert list(written["runs"]) == list(aucs)
    # Other settings of the encoding make another run.
    fit("s_3", epochs=1, seed=3, min_count=3, overwrite=True, device="cpu")
    shown = stem_fast("compare", "s_1", "s_2", "s_3").stdout
    assert ["s", "s_3"] in [line.split() for line in shown.splitlines()]


def test_the_cache_is_listed_limited_and_cleared() -> None:
    def names() -> list[str]:
        return sorted(path.name for path in Path("cache").iterdir())

    assert "cache holds 0 data sets, 0.0 MB" in stem_fast("cache").stdout
    fit(epochs=1)
    assert len(names()) == 2
    Path("cache/notes.txt").write_text("not an entry")
    shown = stem_fast("cache").stdout
    assert "cache holds 2 data sets, 0.0 MB" in shown
    assert all(name in shown for name in names() if name != "notes.txt")
    gc.collect()  # the data of fit
    # What a command reads stays, whatever the limit.
    evaluate = ("evaluate", "run", "--data", "valid.parquet")
    assert stem_fast(*evaluate, "--cache-limit", "1GB").exit_code == 0
    assert len(names()) == 3
    assert stem_fast(*evaluate, "--cache-limit", "0").exit_code == 0
    assert len(names()) == 2
    gc.collect()
    result = stem_fast("cache", "clear")
    assert "1 data set, 0.0 MB, removed from " in result.stdout
    assert names() == ["notes.txt"]
    assert stem_fast(*evaluate, "--cache", "other").exit_code == 0
    gc.collect()
    assert "other holds 1 data set, 0.0 MB\n" in stem_fast("cache", "--cache", "other").stdout
    for flags in (("cache", "clear", "--cache", "other"), ("cache", "--cache", "other", "clear")):
        assert stem_fast(*evaluate, "--cache", "other").exit_code == 0
        gc.collect()
        assert "1 data set, 0.0 MB, removed from other\n" in stem_fast(*flags).stdout
        assert list(Path("other").iterdir()) == []
    refused(stem_fast(*evaluate, "--cache-limit", "much"), "--cache-limit: expected a size")
    refused(fit(ok=False, cache_limit="1..5GB"), "--cache-limit: expected a size such as")


def test_synth_then_fit() -> None:
    result = stem_fast("synth", "--out", "data", "--rows", 300, "--valid-rows", 100, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "data holds " in result.stdout
    assert pq.read_table("data/train.parquet").num_rows == 300
    again = ("synth", "--out", "data", "--rows", 200, "--valid-rows", 50)
    refused(stem_fast(*again), "data")
    assert stem_fast(*again, "--overwrite").exit_code == 0
    assert pq.read_table("data/valid.parquet").num_rows == 50
    tables = {"train": "data/train.parquet", "valid": "data/valid.parquet"}
    fit(**tables, labels="click,like", categorical="user_id,item_id", sequence="watch_seq=item_id")


def test_doctor() -> None:
    result = stem_fast("doctor")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    shown = {key: value.strip() for key, value in lines}
    for name in ("python", "stem_fast", "torch", "triton", "numpy", "pyarrow", "cpu", "cuda"):
        assert shown[name]
    assert shown["torch"] == torch.__version__
    for backend, state in ops.backends().items():
        assert f"backend {backend} {state}" in " ".join(result.stdout.split())


def test_version() -> None:
    result = stem_fast("--version")
    assert result.exit_code == 0
    assert result.stdout == f"stem_fast {importlib.metadata.version('stem_fast')}\n"


def test_help() -> None:
    assert "fit" in stem_fast().stdout
    assert stem_fast("--help").exit_code == 0
    shown = stem_fast("fit", "--help").stdout
    for key in config.OPTIONS:
        assert f"--{key.replace('_', '-')}" in shown  # every key of the file is a flag
    for command in ("fit", "synth"):
        shown = stem_fast(command, "--help").stdout.splitlines()
        assert not [line for line in shown if "<bool>" in line and "--help" not in line]


def in_a_process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_python_runs_the_command_as_a_module() -> None:
    result = in_a_process("-m", "stem_fast", "--version")
    assert result.stdout == f"stem_fast {importlib.metadata.version('stem_fast')}\n"


def test_a_wrong_backend_is_one_line() -> None:
    result = in_a_process("-m", "stem_fast", "doctor", STEM_FAST_BACKEND="cuda9")
    assert result.returncode == 2
    assert result.stderr.startswith("error: STEM_FAST_BACKEND='cuda9' is none of auto, ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_names_are_there_for_a_module_whose_package_imports_them(tmp_path: Path) -> None:
    """Python names the module that it runs only once the packages around it are imported."""
    (package := tmp_path / "own").mkdir()
    (package / "__init__.py").write_text("from stem_fast import STEMNet\n")
    (package / "train.py").write_text("from own import STEMNet\nprint(STEMNet.__name__)\n")
    result = in_a_process("-m", "own.train", PYTHONPATH=str(tmp_path))
    assert result.stdout == "STEMNet\n", result.stderr
