"""Run the official code (github.com/LiangcaiSu/STEM) on plain tensors, from an untouched checkout.

The official models are built from files that its preprocessing writes, and read one 2-D tensor:
the features' columns, then the labels'. Here the same feature map is made in memory:

    official = load("path/to/STEM")
    model = build(official, {"user": 9, "item": 7}, ["click", "like"], embedding_dim=4)
    batch = inputs(model, {"user": user, "item": item}, labels)
    model.forward(batch); model.train_step(batch); model.evaluate([batch])

The official code is written for numpy 1 and an older scikit-learn. `load` bridges what has changed
since, at run time and nowhere else, and lists each bridge in `Official.shims`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

REPOSITORY = "https://github.com/LiangcaiSu/STEM"
COMMIT = "769e2af0d0d1a0be9f58b475b95e05f502a20df5"  # what our numbers were made from


class Official(NamedTuple):
    """A loaded checkout: its `models` module, its FeatureMap class, and how it was loaded."""

    models: types.ModuleType
    feature_map: Callable[..., Any]
    seed_everything: Callable[[int], None]
    commit: str | None
    shims: tuple[str, ...]


class SequenceFeature(NamedTuple):
    """A padded sequence: `table` is its vocabulary size, or the field whose table it shares."""

    table: int | str
    max_len: int
    pooling: str = "mean"


def _root(path: str | Path) -> Path:
    if not (Path(path) / "models" / "STEM.py").is_file():
        raise FileNotFoundError(f"{path}/models/STEM.py is not there: is it {REPOSITORY}?")
    return Path(path).resolve()


def checkout(path: str) -> str:
    """The value of ``--official``, for argparse."""
    try:
        _root(path)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def load(path: str | Path) -> Official:
    """Import the official packages `fuxictr` and `models` from a checkout.

    Raises FileNotFoundError if PATH is no checkout, RuntimeError if other packages of these names
    have been imported already.
    """
    path = _root(path)
    for name in ("models", "fuxictr"):
        loaded = sys.modules.get(name)
        if loaded is not None and path not in Path(str(loaded.__file__)).resolve().parents:
            raise RuntimeError(f"a module named {name} is already imported from {loaded.__file__}")
    shims = []
    if not hasattr(np, "Inf"):
        setattr(np, "Inf", np.inf)  # noqa: B010  (fit's starting value of the best metric)
        shims.append("numpy.Inf, gone in numpy 2, is set to numpy.inf")
    stubs = {name: stub for name, stub in _stubs().items() if not importlib.util.find_spec(name)}
    shims += [f"{name} is not installed and replaced by a stub" for name in stubs]
    # The stubs stand in only while the official modules are imported: elsewhere a stubbed pandas
    # would be taken for the real one.
    sys.modules.update(stubs)
    try:
        with mock.patch.object(sys, "path", [str(path), *sys.path]):
            models = importlib.import_module("models")
            features = importlib.import_module("fuxictr.features")
            metrics = importlib.import_module("fuxictr.metrics")
            utilities = importlib.import_module("fuxictr.pytorch.torch_utils")
    finally:
        for name in stubs:
            del sys.modules[name]
    setattr(metrics, "log_loss", _log_loss)  # noqa: B010
    shims.append("sklearn.metrics.log_loss(eps=), gone in scikit-learn 1.5, clips by hand")
    return Official(
        models, features.FeatureMap, utilities.seed_everything, commit(path), tuple(shims)
    )


def build(
    official: Official,
    vocab_sizes: Mapping[str, int],
    tasks: Sequence[str],
    *,
    model: str = "STEM",
    numeric: Sequence[str] = (),
    sequences: Mapping[str, SequenceFeature] | None = None,
    fields: Sequence[str] | None = None,
    group: str | None = None,
    max_gradient_norm: float = 10.0,
    model_root: str | Path = "checkpoints",
    **hyperparameters: Any,
) -> Any:
    """An official model (STEM, PLE, MMoE, SharedBottom, ...) on the CPU, in float32.

    `vocab_sizes` counts padding (0) and the unknown value. `fields` orders the fields in the
    network's input: categorical, numeric, sequence by default; a shared table must come before the
    sequence that uses it. `group` is a column that the network does not read, for gAUC.
    `hyperparameters` go to the official constructor under their own names;
    those left out have its defaults, except early_stop_patience=1, the official configuration's.
    `fit` writes its best weights under `model_root`.
    """
    sequences = dict(sequences or {})
    specs: dict[str, dict[str, Any]] = {}
    for name, size in vocab_sizes.items():
        specs[name] = {"type": "categorical", "padding_idx": 0, "vocab_size": size}
    for name in numeric:
        specs[name] = {"type": "numeric"}
    for name, sequence in sequences.items():
        pooling = {"mean": "MaskedAveragePooling", "sum": "MaskedSumPooling"}[sequence.pooling]
        specs[name] = {
            "type": "sequence",
            "feature_encoder": f"layers.{pooling}()",
            "padding_idx": 0,
            "max_len": sequence.max_len,
        }
        if isinstance(sequence.table, str):
            specs[name]["share_embedding"] = sequence.table
            specs[name]["vocab_size"] = vocab_sizes[sequence.table]
        else:
            specs[name]["vocab_size"] = sequence.table
    fields = tuple(specs) if fields is None else tuple(fields)
    if sorted(fields) != sorted(specs):
        raise ValueError(f"fields {fields} are not the features {tuple(specs)}")
    for name, sequence in sequences.items():
        # The official code would quietly make a second table.
        if isinstance(sequence.table, str) and fields.index(sequence.table) > fields.index(name):
            raise ValueError(f"fields: {sequence.table} must come before {name}, which shares it")
    feature_map = official.feature_map("in_memory", "")
    feature_map.features.update((name, {"source": "", **specs[name]}) for name in fields)
    if group is not None:
        feature_map.features[group] = {"source": "", "type": "meta"}
        feature_map.group_id = group
    feature_map.labels = list(tasks)
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.set_column_index()
    arguments = {
        "task": ["binary_classification"] * len(tasks),
        "num_tasks": len(tasks),
        "optimizer": "adam",
        "loss": ["binary_crossentropy"] * len(tasks),
        "metrics": ["AUC", "logloss"],
        "model_root": str(model_root),
        "early_stop_patience": 1,
        "verbose": 0,
    }
    arguments.update(
        {k: list(v) if isinstance(v, tuple) else v for k, v in hyperparameters.items()}
    )
    built = getattr(official.models, model)(feature_map, **arguments)
    built._max_gradient_norm = max_gradient_norm  # fit sets it; train_step alone needs it too
    return built


def inputs(model: Any, columns: Mapping[str, Tensor], labels: Tensor | None = None) -> Tensor:
    """The official batch: float64 [B, columns], features in the model's order, then the labels.

    `columns` maps a field to [B], or [B, max_len] for a sequence; `labels` is [B, T]. The official
    loader stacks integer and float columns into float64 as well.
    """
    parts = []
    for name, spec in model.feature_map.features.items():
        column = torch.as_tensor(columns[name]).double()
        width = spec.get("max_len", 1)
        column = column.reshape(len(column), -1)
        if column.shape[1] != width:
            raise ValueError(f"field {name} has {column.shape[1]} columns, the model reads {width}")
        parts.append(column)
    if labels is not None:
        parts.append(torch.as_tensor(labels).double())
    return torch.cat(parts, dim=1)


def loss(model: Any, batch: Tensor) -> Tensor:
    """The official training loss: the sum over tasks of mean BCE, plus L2."""
    value: Tensor = model.compute_loss(model.forward(batch), model.get_labels(batch))
    return value


def probabilities(model: Any, batch: Tensor) -> Tensor:
    """[B, T], in the order of the tasks, in the model's present mode (train or eval)."""
    outputs = model.forward(batch)
    return torch.cat([outputs[f"{label}_pred"] for label in model.feature_map.labels], dim=1)


def logits(model: Any, batch: Tensor) -> Tensor:
    """[B, T]: `probabilities` before the sigmoid."""
    identity = nn.ModuleList(nn.Identity() for _ in model.output_activation)
    with mock.patch.object(model, "output_activation", identity):
        return probabilities(model, batch)


@contextmanager
def float64() -> Iterator[None]:
    """The official code casts numeric features and labels by `.float()`; in here it means float64.

    For models after `model.double()`.
    """
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


class Loader:
    """The official data loader in memory: batches of rows of one tensor, the last one shorter.

    `order(epoch)`, epochs from 1, gives an epoch's permutation of the rows; without it they come in
    order. `shuffled` draws as the official DataLoader does. Rows are gathered a batch at a time:
    the official loader, which indexes row by row in Python, yields such batches more slowly.
    """

    def __init__(
        self, rows: Tensor, batch_size: int, order: Callable[[int], Tensor] | None = None
    ) -> None:
        self.rows, self.batch_size, self.order = rows, batch_size, order
        self.epoch = 0

    @classmethod
    def shuffled(cls, rows: Tensor, batch_size: int) -> Loader:
        """A new permutation each epoch, from torch's global generator."""
        return cls(rows, batch_size, lambda _: torch.randperm(len(rows)))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        self.epoch += 1
        if self.order is None:
            yield from self.rows.split(self.batch_size)
            return
        for chosen in self.order(self.epoch).split(self.batch_size):
            yield self.rows[chosen]


def commit(path: Path) -> str | None:
    """The git commit checked out at PATH; "+changes" where tracked files differ, None if PATH is no
    checkout (a folder inside of one is none)."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(path), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != path.resolve():
            return None
        edited = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if edited else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _log_loss(y: np.ndarray, p: np.ndarray, eps: float) -> float:
    from sklearn.metrics import log_loss

    return float(log_loss(y, np.clip(p, eps, 1 - eps)))


def _stubs() -> dict[str, types.ModuleType]:
    """Stand-ins for what the official code imports but its models don't need."""

    def no_bar(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
        return iterable

    tqdm = types.ModuleType("tqdm")
    setattr(tqdm, "tqdm", no_bar)  # noqa: B010
    return {"tqdm": tqdm, "h5py": types.ModuleType("h5py"), "pandas": types.ModuleType("pandas")}
