"""The run folder: whole or absent at every moment, and refused when its files disagree."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from killed import ENCODING, marked_model
from safetensors.torch import load_file, save_file

from stem_fast.common import DataError
from stem_fast.data.schema import Encoding, Schema, SequenceField
from stem_fast.models.family import MODELS
from stem_fast.models.network import STEMNet
from stem_fast.training import checkpoint
from stem_fast.training.fit import EpochRecord
from stem_fast.training.options import TrainingConfig

TRAINING = TrainingConfig(epochs=7, learning_rate=0.1, task_weights=(2.0,), monitor="click.auc")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    checkpoint.create_run(path, marked_model(5), ENCODING, TRAINING)
    return path


def test_a_model_of_ones_own_is_no_run(tmp_path: Path) -> None:
    class Own(STEMNet):
        pass

    model = Own(ENCODING.vocab_sizes, ENCODING.schema.tasks, expert_hidden_units=(2,))
    with pytest.raises(DataError, match="a run holds one of stem, single, shared_bottom"):
        checkpoint.create_run(tmp_path / "run", model, ENCODING, TRAINING)
    assert not (tmp_path / "run").exists()


def test_round_trip(run: Path) -> None:
    model, encoding, training = checkpoint.load_run(run)
    assert training == TRAINING
    assert encoding == ENCODING
    assert not model.training
    wanted = marked_model(5)
    assert model.config == wanted.config
    loaded = model.state_dict()
    assert loaded.keys() == wanted.state_dict().keys()
    assert (model.embedding.weight[1:] == 5).all()
    assert json.loads((run / "history.json").read_text()) == []
    assert len({p.stat().st_mode for p in run.iterdir()}) == 1  # who may read one may read all
    assert sorted(p.name for p in run.iterdir()) == [
        "config.json",
        "history.json",
        "model.safetensors",
        "schema.json",
    ]


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_and_kind_of_field(tmp_path: Path, name: str) -> None:
    schema = Schema(
        {"like": "binary", "time": "regression"},
        categorical=("b", "a"),  # not in the order of the alphabet: order is part of a model
        numeric=("age",),
        sequences=(SequenceField("seen", shares="a", pooling="sum"), SequenceField("tags")),
    )
    words = {"b": ["x", "é"], "a": [], "tags": ["1", "2", "3"]}
    encoding = Encoding(schema, words, (0.25,), (1.5,))
    model = MODELS[name](
        encoding.vocab_sizes,
        schema.tasks,
        numeric=schema.numeric,
        sequences=encoding.sequence_tables,
        pooling=encoding.pooling,
        kinds=schema.labels,
        embedding_dim=2,
        expert_hidden_units=(3,),
        batch_norm=True,
    )
    checkpoint.create_run(tmp_path / "run", model, encoding, TrainingConfig())
    loaded, found, _ = checkpoint.load_run(tmp_path / "run")
    assert type(loaded) is MODELS[name]
    assert found == encoding
    assert loaded.config == model.config
    assert list(loaded.config["vocab_sizes"]) == ["b", "a"]
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_keeps_the_scales_of_its_labels_and_an_older_one_has_none(tmp_path: Path) -> None:
    schema = Schema({"like": "binary", "time": "regression", "paid": "regression"}, ("a",))
    encoding = Encoding(schema, {"a": ["x", "y"]})
    model = STEMNet(
        encoding.vocab_sizes,
        schema.tasks,
        kinds=schema.labels,
        expert_hidden_units=(3,),
        scales={"time": (30.0, 7.0), "paid": (0.5, 2.0)},
    )
    run, ids = tmp_path / "run", torch.tensor([[1], [2], [3]])
    checkpoint.create_run(run, model, encoding, TrainingConfig())
    loaded, _, _ = checkpoint.load_run(run)
    assert loaded.config["scales"] == {"time": [30.0, 7.0], "paid": [0.5, 2.0]}
    assert torch.equal(loaded.predict(ids), model.predict(ids))
    config = json.loads((run / "config.json").read_text())
    del config["config"]["scales"]
    (run / "config.json").write_text(json.dumps(config))
    loaded, _, _ = checkpoint.load_run(run)
    with torch.no_grad():
        assert torch.equal(loaded.predict(ids)[:, 1:], model(ids)[:, 1:])
    # Training it on keeps the units that its weights are made for.
    assert loaded.config["scales"] == {"time": [0.0, 1.0], "paid": [0.0, 1.0]}


def test_records_of_a_training_become_history_and_metrics(tmp_path: Path) -> None:
    records = [
        EpochRecord(
            i + 1, 0.5, 0.1, 1.0, 9.0, auc, best, {"rows": i, "tasks": {"click": {"auc": auc}}}
        )
        for i, (auc, best) in enumerate([(0.6, True), (0.7, True), (0.65, False)])
    ]
    source = {"command": "python own.py", "train": "/data/train.csv"}
    run = tmp_path / "run"
    checkpoint.create_run(run, marked_model(5), ENCODING, TRAINING, records=records, source=source)
    assert checkpoint.read_metrics(run) == {"rows": 1, "tasks": {"click": {"auc": 0.7}}}
    history = json.loads((run / "history.json").read_text())
    assert [entry["monitor"] for entry in history] == [0.6, 0.7, 0.65]
    assert checkpoint.read_config(run)["source"] == source


def test_weights_that_are_not_finite_are_no_run(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    name = next(name for name in tensors if name.startswith("towers"))
    for value in (math.nan, math.inf, -math.inf):
        tensors[name].view(-1)[-1] = value
        save_file(tensors, run / "model.safetensors")
        with pytest.raises(DataError, match=f"tensor {name} holds {value}, which no prediction"):
            checkpoint.load_run(run)


def test_save_weights_changes_the_weights_only(run: Path) -> None:
    before = (run / "config.json").read_bytes()
    checkpoint.save_weights(run, marked_model(6))
    assert (checkpoint.load_run(run)[0].embedding.weight[1:] == 6).all()
    assert (run / "config.json").read_bytes() == before


def test_a_model_in_float64_is_saved_in_float32(run: Path) -> None:
    model = marked_model(1 / 3).double()
    checkpoint.save_weights(run, model)
    assert {t.dtype for t in load_file(run / "model.safetensors").values()} == {torch.float32}
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64}
    loaded = checkpoint.load_run(run)[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor.float())


def test_parents_are_made_and_an_empty_folder_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    path.mkdir(parents=True)
    checkpoint.create_run(path, marked_model(1), ENCODING, TRAINING)
    checkpoint.create_run(tmp_path / "c" / "d", marked_model(1), ENCODING, TRAINING)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    checkpoint.load_run(tmp_path / "c" / "d")


@pytest.mark.parametrize(
    "name",
    [".metrics.json.0a1b2c3d.partial", ".model.safetensors.partial"],
    ids=["this release", "an earlier one"],
)
def test_overwrite_replaces_the_whole_run(run: Path, name: str) -> None:
    checkpoint.save_json(run / "metrics.json", {"rows": 1})
    left = run / name  # of a killed fit
    left.write_text("{")
    with pytest.raises(DataError, match="already holds a run: choose another folder or add --over"):
        checkpoint.create_run(run, marked_model(6), ENCODING, TRAINING)
    checkpoint.create_run(run, marked_model(6), ENCODING, TRAINING, overwrite=True)
    assert (checkpoint.load_run(run)[0].embedding.weight[1:] == 6).all()
    assert not (run / "metrics.json").exists()
    assert not left.exists()
    assert [p.name for p in run.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds thesis.tex, which no run has"):
        checkpoint.create_run(tmp_path, marked_model(1), ENCODING, TRAINING, overwrite=overwrite)
    with pytest.raises(DataError, match="is a file: --out names the folder"):
        checkpoint.refuse_existing(tmp_path / "thesis.tex", overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_place_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/run: a run cannot be written there \(.*another"):
        checkpoint.prepare(tmp_path / "file" / "run", overwrite=False)

    def denied(**_: object) -> None:
        raise PermissionError("denied")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.tempfile, "mkdtemp", denied)
        with pytest.raises(DataError, match=r"run: a run cannot be written there \(denied\)"):
            checkpoint.prepare(tmp_path / "run", overwrite=False)
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(DataError, match=r"disk is a mount point, .*: name a folder inside it"):
        checkpoint.prepare(tmp_path / "disk", overwrite=True)
    checkpoint.prepare(tmp_path / "disk" / "new" / "run", overwrite=False)
    assert list((tmp_path / "disk").rglob("*")) == [tmp_path / "disk" / "new"]


def test_what_a_killed_replacement_left(run: Path) -> None:
    def leave(name: str, days: float) -> Path:
        left = run.parent / name
        (left / "new").mkdir(parents=True)
        os.utime(left, (then := time.time() - 86400 * days, then))
        return left

    stale, fresh = leave(".run.abcdefg1.partial", 2), leave(".run.abcdefg2.partial", 0)
    other = leave(".run.b.abcdefg3.partial", 2)  # of the run "run.b"
    aside = leave(".run.abcdefg4.partial", 0)
    run.rename(aside / "old")
    with pytest.raises(DataError, match="already holds a run"):
        checkpoint.prepare(run, overwrite=False)
    assert (checkpoint.load_run(run)[0].embedding.weight[1:] == 5).all()
    assert sorted(run.parent.iterdir()) == sorted([other, fresh, run])
    assert not stale.exists()


# ---- interruptions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "states"),
    [("write", ["absent", "1", "2", "3"]), ("replace", ["-1", "absent", "1", "2", "3"])],
)
def test_killed_at_every_moment(tmp_path: Path, mode: str, states: list[str]) -> None:
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, script, mode, tmp_path / "w"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = done.stdout.split()
    assert len(seen) > 30
    assert list(dict.fromkeys(seen)) == states  # each in turn, and never a run that does not load


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("operation", ["save_file", "save_json"])
def test_an_error_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, old: bool
) -> None:
    run = tmp_path / "run"
    if old:
        checkpoint.create_run(run, marked_model(5), ENCODING, TRAINING)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, operation, full)
    with pytest.raises((OSError, DataError), match="no space left"):
        checkpoint.create_run(run, marked_model(6), ENCODING, TRAINING, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"] * old
    if old:
        assert (checkpoint.load_run(run)[0].embedding.weight[1:] == 5).all()


def test_an_old_run_comes_back_when_the_new_one_cannot_take_its_place(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = checkpoint.os.rename

    def interrupted(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.create_run(run, marked_model(6), ENCODING, TRAINING, overwrite=True)
    assert (checkpoint.load_run(run)[0].embedding.weight[1:] == 5).all()
    assert [p.name for p in run.parent.iterdir()] == ["run"]


def test_replacing_keeps_the_old_file_on_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with checkpoint.replacing(path) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with checkpoint.replacing(path) as first:
        first.write_text("first")
        with checkpoint.replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_at_a_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "input").write_text("years of work")
    monkeypatch.setattr(checkpoint.secrets, "token_hex", lambda size: "0" * 2 * size)
    for name in (".file.partial", ".file.00000000.partial"):
        (tmp_path / name).symlink_to("input")
    with pytest.raises(DataError, match=r"file: cannot be written \(File exists\)"):
        checkpoint.save_json(tmp_path / "file", 1)
    assert (tmp_path / "input").read_text() == "years of work"


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path: Path) -> None:
    old, new, other = (
        tmp_path / f".{name}.partial" for name in ("f.0a1b2c3d", "f.1", "g.0a1b2c3d")
    )
    for left in (old, new, other):
        left.touch()
        os.utime(left, (then := time.time() - 2 * 86400, then))
    new = new.rename(tmp_path / ".f.1a1b2c3d.partial")
    os.utime(new)
    checkpoint.save_json(tmp_path / "f", 1)
    assert set(tmp_path.iterdir()) == {tmp_path / "f", new, other}


@pytest.mark.parametrize("target", ["there", "new/there"])
def test_a_link_is_written_through(tmp_path: Path, target: str) -> None:
    """A dangling one too."""
    link = tmp_path / "link"
    link.symlink_to(target)
    if target == "there":
        (tmp_path / target).write_text("old")
    checkpoint.check_output("--json", link)
    checkpoint.save_json(link, 1)
    assert link.is_symlink()
    assert (tmp_path / target).read_text() == "1\n"
    assert {path.name for path in tmp_path.iterdir()} == {"link", target.partition("/")[0]}


@pytest.mark.parametrize("dangling", [False, True])
def test_a_run_at_a_link_is_what_it_names(tmp_path: Path, run: Path, dangling: bool) -> None:
    link = tmp_path / "latest"
    link.symlink_to("new/run" if dangling else run)
    checkpoint.prepare(link, overwrite=not dangling)
    checkpoint.create_run(link, marked_model(6), ENCODING, TRAINING, overwrite=not dangling)
    checkpoint.save_json(link / "history.json", [1])
    assert link.is_symlink()
    assert (checkpoint.load_run(link)[0].embedding.weight[1:] == 6).all()
    assert (checkpoint.load_run(run)[0].embedding.weight[1:] == (5 if dangling else 6)).all()


def test_places_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("fifo", "which is no regular file: name one"),
        ("loop", "where no file can be written .Too many levels of symbolic links."),
        ("x" * 240, "where no file can be written .File name too long."),
    ):
        with pytest.raises(DataError, match=message):
            checkpoint.check_output("--json", tmp_path / name)
    with pytest.raises(DataError, match="which is no regular file: name one"):
        checkpoint.check_output("--json", Path("/dev/null"))
    with pytest.raises(DataError, match=r"loop: a run cannot be written there \(.*symbolic links"):
        checkpoint.prepare(tmp_path / "loop", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "loop"}


@pytest.mark.parametrize("write", [checkpoint.save_weights, checkpoint.create_run])
def test_a_full_disk_is_named(run: Path, write: Callable[..., None]) -> None:
    """A limit on the size of files stands for it; safetensors has an error of its own for it."""
    more = (ENCODING, TRAINING) if write is checkpoint.create_run else ()
    options = {"overwrite": True} if more else {}
    model = marked_model(6)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(
            DataError, match=r"model.safetensors: cannot be written \(.*: free some"
        ):
            write(run, model, *more, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert list(run.parent.iterdir()) == [run]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save_json(tmp_path / "x.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


# ---- folders that are refused --------------------------------------------------------------


def edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A change of config.json."""

    def apply(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        change(config)
        (run / "config.json").write_text(json.dumps(config))

    return apply


def edit_weights(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A change of model.safetensors."""

    def apply(run: Path) -> None:
        tensors = load_file(run / "model.safetensors")
        change(tensors)
        save_file(tensors, run / "model.safetensors")

    return apply


def truncate(run: Path) -> None:
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(content[:-1])


def other_vocabulary(run: Path) -> None:
    more = Encoding(ENCODING.schema, {"user": ["a", "b", "c"]})
    checkpoint.save_json(run / "schema.json", more.to_dict())


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        lambda run: (run / "model.safetensors").unlink(),
        "is not a complete run: it lacks model.safetensors",
    ),
    "no schema, no config": (
        lambda run: [(run / name).unlink() for name in ("schema.json", "config.json")],
        "it lacks schema.json, config.json",
    ),
    "damaged json": (
        lambda run: (run / "config.json").write_text('{"version": 1'),
        "config.json is not valid JSON",
    ),
    "other json": (lambda run: (run / "config.json").write_text("[]"), "has no 'version'"),
    "no model": (edit(lambda c: c.pop("model")), "has no 'model'"),
    "version": (
        edit(lambda c: c.update(version=1)),
        r"config\.json: expected version 2, got 1: use the release that made the",
    ),
    "schema version": (
        lambda run: (run / "schema.json").write_text('{"version": 99}'),
        "encoding version: expected 1, got 99 of another release of stem_fast:",
    ),
    "unknown model": (edit(lambda c: c.update(model="stm")), "unknown model 'stm'.*'stem'"),
    "model list": (edit(lambda c: c.update(model=["x"])), r"unknown model \['x'\]"),
    "model option": (
        edit(lambda c: c["config"].update(width=3)),
        "describes no 'stem' run: .*width",
    ),
    "model value": (
        edit(lambda c: c["config"].update(embedding_dim=0)),
        "describes no 'stem' run: embedding_dim: expected at least 1, got 0",
    ),
    "config": (
        edit(lambda c: c.update(config=5)),
        r"config\.json: config: expected a mapping, got 5\.",
    ),
    "training": (
        edit(lambda c: c.update(training=[])),
        r"config\.json: training: expected a mapping, got \[\]\.",
    ),
    "source": (
        edit(lambda c: c.update(source=[])),
        r"config\.json: source: expected a mapping, got \[\]\.",
    ),
    "join": (
        edit(lambda c: c.update(source={"join": 5})),
        r"config\.json: join: expected a list of FILE:KEY, got 5\.",
    ),
    "joins": (
        edit(lambda c: c.update(source={"join": ["a:b", 5]})),
        r"config\.json: join: expected a list of FILE:KEY, got \['a:b', 5\]\.",
    ),
    "types": (
        edit(lambda c: c["config"].update(hidden_activations=5)),
        r"config\.json describes no 'stem' run: hidden_activations: expected the",
    ),
    "layers": (
        edit(lambda c: c["config"].update(num_layers=2_000_000_000)),
        "describes no 'stem' run: num_layers: expected at most 1024, got 2000000000",
    ),
    "a model beyond memory": (
        edit(lambda c: c["config"].update(embedding_dim=2**16, expert_hidden_units=[2**20] * 2)),
        "does not fit its config.json: it lacks",
    ),
    "deep json": (
        lambda run: (run / "schema.json").write_text("[" * 200_000),
        "schema.json is not a run's: it is nested too deeply",
    ),
    "training option": (edit(lambda c: c["training"].update(speed=3)), "describes no .*speed"),
    "training value": (
        edit(lambda c: c["training"].update(epochs=0)),
        r"config\.json describes no 'stem' run: epochs: expected a whole number of",
    ),
    "not safetensors": (
        lambda run: (run / "model.safetensors").write_bytes(b"\x80\x04 a pickle, say"),
        "is not a readable safetensors file",
    ),
    "truncated": (truncate, "is not a readable safetensors file"),
    "missing tensor": (
        edit_weights(lambda t: t.pop("embedding.weight")),
        "does not fit its config.json: it lacks embedding.weight",
    ),
    "extra tensors": (
        edit_weights(lambda t: t.update({f"more.{i}": torch.ones(1) for i in range(5)})),
        "it has, beyond the model's, more.0, more.1, more.2 and 2 more",
    ),
    "shape": (
        edit_weights(lambda t: t.update({"embedding.weight": torch.ones(3, 4)})),
        r"model\.safetensors: tensor embedding\.weight: expected shape \[4, 4\] by",
    ),
    "type": (
        edit_weights(lambda t: t.update({"embedding.weight": torch.ones(4, 4).int()})),
        r"model\.safetensors: tensor embedding\.weight: expected torch\.float32 by",
    ),
    "vocabulary": (other_vocabulary, "the model's vocab_sizes .* are not the schema's"),
}


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A run with two of everything, of which one file may have other than the other."""
    schema = Schema(
        {"like": "binary", "time": "regression"},
        categorical=("b", "a"),
        numeric=("n", "m"),
        sequences=(SequenceField("s", shares="a"), SequenceField("t", pooling="sum")),
    )
    words = {name: ["x", "y"] for name in ("b", "a", "t")}
    encoding = Encoding(schema, words, (0.0, 1.0), (1.0, 2.0))
    model = STEMNet(
        encoding.vocab_sizes,
        schema.tasks,
        numeric=schema.numeric,
        sequences=encoding.sequence_tables,
        pooling=encoding.pooling,
        kinds=schema.labels,
        embedding_dim=2,
        expert_hidden_units=(3,),
    )
    checkpoint.create_run(tmp_path / "rich", model, encoding, TrainingConfig())
    return tmp_path / "rich"


CONTRADICTIONS: dict[str, tuple[str, list[str], object, str]] = {
    # Shapes of weights don't tell any of these.
    "kinds": ("config.json", ["kinds"], {"like": "regression", "time": "regression"}, "kinds"),
    "kind": ("schema.json", ["schema", "labels", "time"], "binary", "kinds"),
    "tasks": ("config.json", ["tasks"], ["time", "like"], "tasks"),
    "pooling": ("config.json", ["pooling", "t"], "mean", "pooling"),
    "poolings": ("schema.json", ["schema", "sequences", "0", "pooling"], "sum", "pooling"),
    "vocabularies": ("config.json", ["vocab_sizes"], {"a": 4, "b": 4}, "vocab_sizes"),
    "categorical": ("schema.json", ["schema", "categorical"], ["a", "b"], "vocab_sizes"),
    "numeric": ("config.json", ["numeric"], ["m", "n"], "numeric"),
    "table": ("config.json", ["sequences", "s"], "b", "sequences"),
    "shares": ("schema.json", ["schema", "sequences", "0", "shares"], "b", "sequences"),
    "sequence": ("config.json", ["sequences"], {"t": "a", "s": 4}, "sequences"),
}


@pytest.mark.parametrize("case", list(CONTRADICTIONS))
def test_files_that_contradict_each_other(rich: Path, case: str) -> None:
    file, path, value, word = CONTRADICTIONS[case]
    checkpoint.load_run(rich)
    content = json.loads((rich / file).read_text())
    place = content["config"] if file == "config.json" else content
    for key in path[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    assert place[path[-1]] != value or isinstance(value, dict)  # of a mapping, the order
    place[path[-1]] = value
    (rich / file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"the model's {word} .* are not the schema's"):
        checkpoint.load_run(rich)


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refused(run: Path, case: str) -> None:
    damage, message = REFUSALS[case]
    damage(run)
    with pytest.raises(DataError, match=message):
        checkpoint.load_run(run)


WRONG = [None, True, -1, 2.5, 1e999, 10**30, "", "x", "\ud800", [], [[]], {}, {"a": 1}, [None]]
WRONG += [["user", "user"], [10**30], {"user": 10**30}, {"click": []}, "x" * 10**5, [1] * 10**4]


def keys(mapping: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in mapping.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from keys(value, (*above, key))


@pytest.mark.parametrize("file", ["config.json", "schema.json"])
def test_every_value_of_a_wrong_type(run: Path, file: str) -> None:
    """A value may be one that another run has; else it is refused in one short line."""
    text = (run / file).read_text()
    refused: list[str] = []
    for path in keys(json.loads(text)):
        for value in WRONG:
            changed = json.loads(text)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            (run / file).write_text(json.dumps(changed))
            try:
                checkpoint.load_run(run)
            except DataError as error:
                refused.append(str(error))
    assert len(refused) > 200
    assert max(map(len, refused)) < 1500


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"a": 1}',
        '{"rows": 1, "tasks": []}',
        '{"rows": "1", "tasks": {}}',
        '{"rows": 1, "tasks": {"click": 1}}',
        '{"rows": 1, "tasks": {"click": {"auc": "high"}}}',
        '{"rows": 1, "tasks": {"click": {"rmse": 1e999}}}',
        '{"rows": 1, "tasks": {"click": {"rmse": NaN}}}',
    ],
)
def test_metrics_of_another_form(run: Path, content: str) -> None:
    (run / "metrics.json").write_text(content)
    with pytest.raises(DataError, match=r"metrics.json does not hold the metrics of a run"):
        checkpoint.read_metrics(run)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run folder .*nowhere: name the folder that"):
        checkpoint.load_run(tmp_path / "nowhere")


def test_a_model_of_another_schema_is_not_saved(tmp_path: Path) -> None:
    other = Encoding(Schema({"like": "binary"}, categorical=("user",)), {"user": ["a", "b"]})
    with pytest.raises(DataError, match=r"the model's tasks \['click'\] are not the schema's"):
        checkpoint.create_run(tmp_path / "run", marked_model(1), other, TRAINING)
    assert list(tmp_path.iterdir()) == []
