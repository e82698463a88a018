"""Settings of ``fit``: from a YAML file and command-line flags to checked, typed values.

A key is a flag's name with underscores. Flags override the file, unknown keys are errors, and every
value is checked for type and range before any data is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stem_fast.common import (
    COLUMNS,
    DATA,
    NETWORK,
    TRAINING,
    DataError,
    Option,
    described,
    nearest,
    options_of,
    shown,
)
from stem_fast.data.joins import Join
from stem_fast.data.schema import LARGEST, Schema, parse_sequences
from stem_fast.models.config import MAX_DIM, MAX_LAYERS, MAX_UNITS
from stem_fast.models.family import MODELS
from stem_fast.nn.precision import PRECISIONS
from stem_fast.ops import MAX_EXPERTS
from stem_fast.training.config_file import read_yaml

EMBEDDING_OPTIMIZERS = ("adam", "dense_adam", "lazy_adam", "sgd", "adagrad", "rowwise_adagrad")

Check = Callable[[str, Any], Any]  # (key, value) -> typed value, or DataError


def _refuse(key: str, value: Any, rule: str) -> DataError:
    return DataError(f"{key}: expected {rule}, got {shown(value)}.")


def _integer(low: int, high: int = LARGEST) -> Check:
    def check(key: str, value: Any) -> int:
        try:
            number: Any = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool) or number < low:
            raise _refuse(key, value, f"a whole number of at least {low}")
        if number > high:
            raise _refuse(key, value, f"at most {high}")
        return number

    return check


def _number(rule: str, valid: Callable[[float], bool]) -> Check:
    def check(key: str, value: Any) -> float:
        try:
            # YAML 1.1 reads 1e-3 as text, so text is tried too.
            number = float(value) if isinstance(value, (int, float, str)) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number) or not valid(number):
            raise _refuse(key, value, rule)
        return number

    return check


def _list_of(item: Check) -> Check:
    """A list, or the same as comma-separated text, as a tuple; one bare number counts as a list."""

    def check(key: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif not isinstance(value, Sequence):
            value = [value]
        return tuple(item(key, part) for part in value)

    return check


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _refuse(key, value, "text")
    return value


def _path(key: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise _refuse(key, value, "a path")
    return Path(value)


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(key, value, "true or false")
    return value


def _one_of(known: Collection[str]) -> Check:
    def check(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            hint = nearest(str(value), known)
            raise DataError(f"{key}: expected one of {', '.join(known)}, got {shown(value)}.{hint}")
        return value

    return check


def _pooling(key: str, value: Any) -> str:
    if value not in ("mean", "sum"):
        raise _refuse(key, value, "mean or sum")
    return value


def parse_join(key: str, value: Any) -> Join:
    """Reads FILE:KEY: "users.parquet:user_id" is Join("users.parquet", "user_id")."""
    path, _, column = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not path or not column or "\0" in path:
        raise _refuse(key, value, "FILE:KEY, a side table and the column it is joined on")
    return Join(Path(path), column)


def parse_size(key: str, value: Any) -> float:
    """Bytes: "10GB", "500MB", "1.5 TB", or a number of them."""
    found = re.fullmatch(r"\s*([0-9.]{1,20})\s*([KMGT]?)B?\s*", str(value), re.IGNORECASE)
    if found is None or isinstance(value, bool) or found[1].count(".") > 1 or found[1] == ".":
        raise _refuse(key, value, "a size such as 10GB or 500MB")
    return float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")


_POSITIVE = _number("a number above 0", lambda x: x > 0)
_NOT_NEGATIVE = _number("a number of at least 0", lambda x: x >= 0)
_COUNT = _integer(1)


def _widths(text: str) -> Option:
    return Option(NETWORK, text, many=True, check=_list_of(_integer(1, MAX_UNITS)), metavar="N,N")


FILES: dict[str, Option] = {
    "train": Option(DATA, "training table: CSV, TSV, Parquet, or a folder (needed)", check=_path),
    "valid": Option(DATA, "validation table (needed)", check=_path),
    "out": Option(DATA, "run folder to make (needed)", check=_path),
    "overwrite": Option(
        DATA, "replace a run", bool, check=_boolean, flags=("--overwrite",), metavar=""
    ),
    "join": Option(
        DATA,
        "FILE:KEY, a side table joined on a column; may be given several times",
        many=True,
        check=_list_of(parse_join),
    ),
    "cache": Option(
        DATA,
        "folder for encoded data",
        check=_path,
        shown="$STEM_FAST_CACHE, ~/.cache/stem_fast",
    ),
    "cache_limit": Option(
        DATA,
        "size such as 10GB: remove cached data, that longest unused first, beyond it",
        check=parse_size,
    ),
    "device": Option(TRAINING, "auto, cpu, cuda or cuda:N", check=_text, shown="auto"),
}
POOLING = Option(COLUMNS, "of the sequences: mean or sum", check=_pooling)
MODEL = Option(NETWORK, ", ".join(MODELS), check=_one_of(MODELS), shown="stem")
# Their defaults are those of the model's constructor.
SIZES: dict[str, Option] = {
    "embedding_dim": Option(
        NETWORK, "of each embedding space", int, check=_integer(1, MAX_DIM), shown=16
    ),
    "num_layers": Option(
        NETWORK, "of experts and gates", int, check=_integer(1, MAX_LAYERS), shown=1
    ),
    "num_shared_experts": Option(
        NETWORK, "default: the model's", int, check=_integer(0, MAX_EXPERTS)
    ),
    "num_specific_experts": Option(
        NETWORK, "a task; default: the model's", int, check=_integer(0, MAX_EXPERTS)
    ),
    "expert_hidden_units": _widths("widths")._replace(shown="512,512,512"),
    "gate_hidden_units": _widths("widths, where there are gates")._replace(shown="128,64"),
    "tower_hidden_units": _widths("widths")._replace(shown="128,64"),
    "hidden_activations": Option(NETWORK, "by name", check=_text, shown="relu"),
    "net_dropout": Option(
        NETWORK,
        "after hidden layers",
        float,
        check=_number("a number from 0 to below 1", lambda x: 0 <= x < 1),
        shown=0,
    ),
    "batch_norm": Option(
        NETWORK,
        "in hidden layers",
        bool,
        check=_boolean,
        flags=("--batch-norm/--no-batch-norm",),
        metavar="",
    ),
}


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; the defaults are the official code's for STEM.

    epochs                 at most
    batch_size             rows
    learning_rate          the first
    embedding_optimizer    of the embedding tables: adam (exact, at the cost of a batch's rows),
                           dense_adam (torch's), lazy_adam, sgd, adagrad or rowwise_adagrad
    embedding_regularizer  lambda of (lambda / 2) * ||W||^2 over the embedding tables
    net_regularizer        the same over all other weights
    max_gradient_norm      the global norm gradients are clipped to; 0: never clipped
    patience               epochs without an improvement, in a row, that end the training
    monitor                metric that decides which epoch is best, see ``train.Monitor``
    seed                   of the shuffles (and, in ``stem-fast fit``, of the first weights)
    task_weights           factor on each task's loss; None: all 1
    precision              of matrix products: fp32, tf32 (CUDA) or bf16, or all in fp64, see
                           :mod:`stem_fast.nn.precision`
    micro_batch_size       rows of a batch that are in the network together, forward and backward,
                           for less memory; 0: all

    Raises DataError for a value of another type or out of range.
    """

    epochs: int = described(20, TRAINING, "at most", kind=int, check=_COUNT)
    batch_size: int = described(4096, TRAINING, "rows", kind=int, check=_COUNT)
    learning_rate: float = described(1e-3, TRAINING, "the first", kind=float, check=_POSITIVE)
    embedding_optimizer: str = described(
        "adam", TRAINING, ", ".join(EMBEDDING_OPTIMIZERS), check=_one_of(EMBEDDING_OPTIMIZERS)
    )
    embedding_regularizer: float = described(
        1e-6, TRAINING, "L2 of embeddings", kind=float, check=_NOT_NEGATIVE
    )
    net_regularizer: float = described(
        0.0, TRAINING, "L2 of other weights", kind=float, check=_NOT_NEGATIVE
    )
    max_gradient_norm: float = described(
        10.0, TRAINING, "clipping, 0 = none", kind=float, check=_NOT_NEGATIVE
    )
    patience: int = described(1, TRAINING, "epochs without progress", kind=int, check=_COUNT)
    monitor: str = described(
        "auc",
        TRAINING,
        "auc, gauc, logloss, finish.auc ...",
        check=_text,
        shown="auc; rmse if all tasks are regressions",
    )
    seed: int = described(
        2023, TRAINING, "of weights, shuffles", kind=int, check=_integer(0, 2**63 - 1)
    )
    task_weights: tuple[float, ...] | None = described(
        None,
        TRAINING,
        "one a task: 1,0.5",
        many=True,
        check=_list_of(_NOT_NEGATIVE),
        metavar="X,X",
    )
    precision: str = described(
        "fp32",
        TRAINING,
        "of products: fp32, tf32, bf16; or fp64",
        check=_one_of(PRECISIONS),
    )
    micro_batch_size: int = described(
        0,
        TRAINING,
        "rows in the network together, 0 = all: for less memory",
        kind=int,
        check=_integer(0),
    )

    def __post_init__(self) -> None:
        for key, option in options_of(TrainingConfig).items():
            value = getattr(self, key)
            if option.check and (key != "task_weights" or value is not None):
                object.__setattr__(self, key, option.check(key, value))


OPTIONS: dict[str, Option] = {
    **FILES,
    **options_of(Schema),
    "pooling": POOLING,
    "model": MODEL,
    **SIZES,
    **options_of(TrainingConfig),
}


@dataclass(frozen=True)
class FitSettings:
    """All that ``fit`` needs to know."""

    train: Path
    valid: Path
    out: Path
    schema: Schema
    model: str
    network: dict[str, Any]  # the model's options that were given
    training: TrainingConfig
    joins: tuple[Join, ...] = ()
    cache: Path | None = None
    cache_limit: float | None = None  # bytes
    device: str = "auto"
    overwrite: bool = False


def fit_settings(flags: Mapping[str, Any], file: Path | None = None) -> FitSettings:
    """Settings from a YAML file and the flags that were given, which override it.

    A key whose value is None (YAML: null) counts as not given. Raises DataError naming the key (or
    the flag) and the value for anything unknown, missing or out of range. The default monitor is
    "auc", or "rmse" where every task is a regression.
    """
    given = {} if file is None else read_yaml(file)
    for key in given:
        if key not in OPTIONS:
            found = str(key)[:100]
            raise DataError(f"{file}: unknown key '{found}'.{nearest(found, OPTIONS)}")
    given = {key: value for key, value in {**given, **flags}.items() if value is not None}
    absent = [key for key in ("train", "valid", "labels", "out") if key not in given]
    if absent:
        options = ", ".join(f"--{key}" for key in absent)
        raise DataError(f"missing: {options} (or the same key in the --config file).")

    def named(key: str) -> str:
        return f"--{key.replace('_', '-')}" if flags.get(key) is not None else key

    def take(options: Mapping[str, Option]) -> dict[str, Any]:
        return {
            key: option.check(named(key), given[key]) if option.check else given[key]
            for key, option in options.items()
            if key in given
        }

    files = take(FILES)
    files["joins"] = files.pop("join", ())
    schema = take(options_of(Schema))
    if pooling := take({"pooling": POOLING}).get("pooling"):
        schema["sequences"] = _with_pooling(schema.get("sequences"), pooling)
    columns = Schema.from_dict(schema)
    training = take(options_of(TrainingConfig))
    if "binary" not in columns.labels.values():
        training.setdefault("monitor", "rmse")
    return FitSettings(
        **files,
        schema=columns,
        model=take({"model": MODEL}).get("model", MODEL.shown),
        network=take(SIZES),
        training=TrainingConfig(**training),
    )


def _with_pooling(sequences: Any, pooling: str) -> Any:
    """The YAML or text form of ``sequences``, with ``pooling`` where a field names none."""
    if isinstance(sequences, str):
        sequences = [sequences]
    elif isinstance(sequences, Mapping):
        sequences = [_named(name, options) for name, options in sequences.items()]
    sequences = sequences or ()
    if not isinstance(sequences, Sequence) or not all(
        isinstance(item, (str, Mapping)) for item in sequences
    ):
        return sequences  # for Schema to refuse
    items: list[Any] = []
    for item in sequences:
        fields = parse_sequences(item) if isinstance(item, str) else ()
        items += [{"name": f.name, "shares": f.shares} for f in fields] if fields else [item]
    if not any("pooling" not in item for item in items):
        raise DataError(
            f"pooling is {pooling!r}, but there is no sequence that does not name its own: "
            "leave it out."
        )
    return [{"pooling": pooling, **item} for item in items]


def _named(name: str, options: Any) -> Any:
    """An entry of the mapping form, as the list form has it."""
    if isinstance(options, str):
        return {"name": name, "shares": options}
    return {"name": name, **(options or {})} if isinstance(options or {}, Mapping) else options
