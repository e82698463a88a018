"""Settings of ``fit``: from a YAML file and command-line flags to checked, typed values.

A key is a flag's name with underscores. Flags override the file, unknown keys are errors, and every
value is checked for type and range before any data is read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stem_fast.common import DataError, nearest, shown
from stem_fast.data.joins import Join
from stem_fast.data.schema import LARGEST, Schema, parse_sequences
from stem_fast.models.config import MAX_DIM, MAX_LAYERS, MAX_UNITS
from stem_fast.models.family import MODELS
from stem_fast.nn.precision import PRECISIONS
from stem_fast.ops import MAX_EXPERTS

EMBEDDING_OPTIMIZERS = ("adam", "dense_adam", "lazy_adam", "sgd", "adagrad", "rowwise_adagrad")

MAX_TEXT = 1 << 22  # characters and values of a file, its aliases written out

Check = Callable[[str, Any], Any]  # (key, value) -> typed value, or DataError


def _refuse(key: str, value: Any, rule: str) -> DataError:
    return DataError(f"{key} is {shown(value)}: give {rule}.")


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
        raise _refuse(key, value, "a text")
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
            raise DataError(f"{key} is {shown(value)}: give one of {', '.join(known)}.{hint}")
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
_WIDTHS = _list_of(_integer(1, MAX_UNITS))

_FILES: dict[str, Check] = {
    "train": _path,
    "valid": _path,
    "join": _list_of(parse_join),
    "cache": _path,
    "cache_limit": parse_size,
    "out": _path,
    "overwrite": _boolean,
    "device": _text,
}
_NETWORK: dict[str, Check] = {
    "embedding_dim": _integer(1, MAX_DIM),
    "num_layers": _integer(1, MAX_LAYERS),
    "num_shared_experts": _integer(0, MAX_EXPERTS),
    "num_specific_experts": _integer(0, MAX_EXPERTS),
    "expert_hidden_units": _WIDTHS,
    "gate_hidden_units": _WIDTHS,
    "tower_hidden_units": _WIDTHS,
    "hidden_activations": _text,
    "net_dropout": _number("a number from 0 to below 1", lambda x: 0 <= x < 1),
    "batch_norm": _boolean,
}
_TRAINING: dict[str, Check] = {
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "learning_rate": _POSITIVE,
    "embedding_optimizer": _one_of(EMBEDDING_OPTIMIZERS),
    "embedding_regularizer": _NOT_NEGATIVE,
    "net_regularizer": _NOT_NEGATIVE,
    "max_gradient_norm": _NOT_NEGATIVE,
    "patience": _COUNT,
    "monitor": _text,
    "seed": _integer(0, 2**63 - 1),
    "task_weights": _list_of(_NOT_NEGATIVE),
    "precision": _one_of(PRECISIONS),
    "micro_batch_size": _integer(0),
}
_SCHEMA = tuple(field.name for field in dataclasses.fields(Schema))
KEYS = (*_FILES, *_SCHEMA, "pooling", "model", *_NETWORK, *_TRAINING)


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

    epochs: int = 20
    batch_size: int = 4096
    learning_rate: float = 1e-3
    embedding_optimizer: str = "adam"
    embedding_regularizer: float = 1e-6
    net_regularizer: float = 0.0
    max_gradient_norm: float = 10.0
    patience: int = 1
    monitor: str = "auc"
    seed: int = 2023
    task_weights: tuple[float, ...] | None = None
    precision: str = "fp32"
    micro_batch_size: int = 0

    def __post_init__(self) -> None:
        for key, check in _TRAINING.items():
            value = getattr(self, key)
            if key != "task_weights" or value is not None:
                object.__setattr__(self, key, check(key, value))


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
        if key not in KEYS:
            found = str(key)[:100]
            raise DataError(f"{file}: unknown key '{found}'.{nearest(found, KEYS)}")
    given = {key: value for key, value in {**given, **flags}.items() if value is not None}
    absent = [key for key in ("train", "valid", "labels", "out") if key not in given]
    if absent:
        options = ", ".join(f"--{key}" for key in absent)
        raise DataError(f"missing: {options} (or the same key in the --config file).")

    def named(key: str) -> str:
        return f"--{key.replace('_', '-')}" if flags.get(key) is not None else key

    def take(checks: Mapping[str, Check]) -> dict[str, Any]:
        return {key: check(named(key), given[key]) for key, check in checks.items() if key in given}

    files = take(_FILES)
    files["joins"] = files.pop("join", ())
    schema = {key: given[key] for key in _SCHEMA if key in given}
    if "pooling" in given:
        pooling = _pooling(named("pooling"), given["pooling"])
        schema["sequences"] = _with_pooling(schema.get("sequences"), pooling)
    columns = Schema.from_dict(schema)
    training = take(_TRAINING)
    if "binary" not in columns.labels.values():
        training.setdefault("monitor", "rmse")
    return FitSettings(
        **files,
        schema=columns,
        model=_one_of(MODELS)(named("model"), given.get("model", "stem")),
        network=take(_NETWORK),
        training=TrainingConfig(**training),
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises DataError if it cannot be read, is damaged or no
    mapping, or names a key twice."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
        if len(text) > MAX_TEXT:
            raise DataError(f"{path}: is longer than a configuration file's {MAX_TEXT} characters.")
        content = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise DataError(f"no configuration file {path}.") from None
    except OSError as error:
        raise DataError(f"configuration file {path} cannot be read: {error.strerror}.") from error
    except RecursionError as error:
        raise DataError(f"{path} is not valid YAML: it is nested too deeply.") from error
    except DataError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, no such date
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = str(content)
        found = f"{found[:60]!r} ..." if len(found) > 60 else repr(found)
        raise DataError(f"{path} must hold `key: value` lines, found {found}.")
    return content


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key that stands twice (YAML would drop the first), and
    aliases of aliases that a few lines make a content of gigabytes with."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def _measure(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """Values and characters of a node with its aliases written out."""
        if id(node) not in sizes:
            sizes[id(node)] = MAX_TEXT + 1  # for an alias of what it is itself in
            if isinstance(node, yaml.ScalarNode):
                size = len(node.value)
            elif isinstance(node, yaml.MappingNode):
                size = sum(self._measure(each, sizes) for pair in node.value for each in pair)
            else:
                size = sum(self._measure(each, sizes) for each in node.value)
            if size > MAX_TEXT:
                raise yaml.constructor.ConstructorError(
                    None, None, "with its aliases written out it is too long", node.start_mark
                )
            sizes[id(node)] = 1 + size
        return sizes[id(node)]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be text, not a list or mapping", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


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
