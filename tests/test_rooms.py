"""The rooms of the package: what they may import of each other, and what was made before them."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import stem_fast
from stem_fast import data
from stem_fast.training import fit, load_run

PACKAGE = Path(stem_fast.__file__).parent
BEFORE = Path(__file__).parent / "fixtures" / "run_before_rooms"
# What a room may import, itself aside; all of them may import common.
BELOW = {
    "common": set(),
    "metrics": {"common"},
    "reference": set(),
    "ops": {"reference", "kernels"},
    "nn": {"reference", "ops"},
    "models": {"reference", "ops", "nn"},
    "optim": {"reference", "ops", "nn"},
    "data": {"metrics"},
    "training": {"metrics", "ops", "nn", "models", "optim", "data"},
    "serving": {"ops", "nn", "models"},
    "cli": {"metrics", "ops", "nn", "models", "data", "training"},
    "__main__": {"cli"},
    "__init__": {"_moved", "models", "ops"},
    "_moved": set(),
}
# STEMNet.compile_inference makes what lies above it.
KNOWN = {("models/network.py", "serving")}


def imports(path: Path) -> Iterator[str]:
    """The rooms that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [node.module or ""]
            if node.module == "stem_fast":
                names = [f"stem_fast.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "stem_fast":
                yield rest.split(".")[0]


def test_imports_run_one_way() -> None:
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        inner = path.relative_to(PACKAGE)
        room = inner.parts[0].removesuffix(".py")
        seen.add(room)
        for name in imports(path):
            if name.startswith("__") or (inner.as_posix(), name) in KNOWN:
                continue
            assert name in BELOW[room] | {room, "common"}, f"{inner} imports {name}"
    assert seen == BELOW.keys()


def test_the_rules_have_no_circle() -> None:
    left = dict(BELOW)
    while left:
        free = [room for room, below in left.items() if not below & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for room in free:
            del left[room]


def test_every_room_says_what_it_imports() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert 3 <= len(text.splitlines()) <= 8, path
        assert "import" in text.lower(), path


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("checkpoint", "load_run", "training.checkpoint"),
        ("config", "TrainingConfig", "training.options"),
        ("step", "TrainStep", "training.step"),
        ("train", "fit", "training.fit"),
        ("tables", "Join", "data"),
        ("schema", "Schema", "data.schema"),
        ("model", "STEMNet", "models"),
        ("layers", "EmbeddingArena", "nn"),
        ("inference", "Inference", "serving.inference"),
        ("precision", "tf32", "nn.precision"),
    ],
)
def test_names_are_still_found_where_they_were(module: str, name: str, home: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"stem_fast\.{module} has moved to stem_fast\."):
        old = getattr(importlib.import_module(f"stem_fast.{module}"), name)
    assert old is getattr(importlib.import_module(f"stem_fast.{home}"), name)


def test_names_that_never_were_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError), warnings.catch_warnings():
        importlib.import_module("stem_fast.nowhere")


def test_a_run_made_before_the_rooms_predicts_the_same(tmp_path: Path) -> None:
    """Made by the commit before them, from table.csv in the same folder."""
    run = shutil.copytree(BEFORE, tmp_path / "run")
    with (run / "predictions.csv").open() as file:
        expected = list(csv.DictReader(file))
    model, encoding, config = load_run(run)
    assert (config.epochs, config.learning_rate) == (12, 0.03)
    rows = data.load(run / "table.csv", encoding, cache=tmp_path)
    predictions = fit.predict(model, rows, batch_size=40)
    for task, column in zip(model.tasks, predictions.T, strict=True):
        np.testing.assert_allclose(
            column, [float(row[task]) for row in expected], rtol=1e-4, atol=1e-6
        )
    metrics = json.loads((run / "metrics.json").read_text())
    found = fit.score(predictions, rows, encoding.schema.labels)
    assert found["tasks"]["click"]["gauc"] == pytest.approx(
        metrics["tasks"]["click"]["gauc"], abs=1e-6
    )
