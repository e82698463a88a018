"""The arguments of a model's constructor, checked: what ``model.config`` holds."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from stem_fast import ops
from stem_fast.common import KINDS

# Far beyond any use, but small enough that sizes of tensors stay within 64 bits.
MAX_DIM, MAX_LAYERS, MAX_UNITS, MAX_ROWS = 1 << 16, 1 << 10, 1 << 20, 2**31 - 1


def make_config(
    *,
    vocab_sizes: Mapping[str, int],
    tasks: Sequence[str],
    expert_hidden_units: Sequence[int],
    gate_hidden_units: Sequence[int],
    tower_hidden_units: Sequence[int],
    numeric: Sequence[str],
    sequences: Mapping[str, int | str] | None,
    pooling: str | Mapping[str, str],
    kinds: Mapping[str, str] | None,
    scales: Mapping[str, Sequence[float]] | None,
    fields: Sequence[str] | None,
    **others: Any,
) -> dict[str, Any]:
    """The arguments of :class:`stem_fast.STEMNet` as plain types, with defaults filled in.

    Raises ValueError for sizes, names or orders that do not fit together.
    """
    for name, value in (
        ("tasks", tasks),
        ("numeric", numeric),
        ("fields", fields or ()),
        ("expert_hidden_units", expert_hidden_units),
        ("gate_hidden_units", gate_hidden_units),
        ("tower_hidden_units", tower_hidden_units),
    ):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError(f"{name}: expected a list, got {reprlib.repr(value)}")
    for name, mapping in (
        ("vocab_sizes", vocab_sizes),
        ("kinds", kinds or {}),
        ("scales", scales or {}),
    ):
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{name}: expected a mapping from names, got {reprlib.repr(mapping)}")
    if not isinstance(sequences or {}, Mapping):
        raise ValueError(f"sequences: expected a mapping from names, got {reprlib.repr(sequences)}")
    sequences = dict(sequences or {})
    if not isinstance(pooling, (str, Mapping)):
        raise ValueError(
            f"pooling: expected mean, sum or a mapping to them, got {reprlib.repr(pooling)}"
        )
    if isinstance(pooling, str):
        pooling = dict.fromkeys(sequences, pooling)
    kinds = {task: (kinds or {}).get(task, "binary") for task in tasks} | dict(kinds or {})
    default_order = [*vocab_sizes, *numeric, *sequences]
    fields = list(default_order if fields is None else fields)
    config: dict[str, Any] = {
        "vocab_sizes": dict(vocab_sizes),
        "tasks": list(tasks),
        **others,
        "expert_hidden_units": list(expert_hidden_units),
        "gate_hidden_units": list(gate_hidden_units),
        "tower_hidden_units": list(tower_hidden_units),
        "numeric": list(numeric),
        "sequences": sequences,
        "pooling": dict(pooling),
        "kinds": kinds,
        "scales": dict(scales or {}),
        "fields": fields,
    }
    _check(config, default_order)
    return config


def _check(config: dict[str, Any], default_order: Sequence[str]) -> None:
    for name, low, high in (
        ("embedding_dim", 1, MAX_DIM),
        ("num_layers", 1, MAX_LAYERS),
        ("num_shared_experts", 0, ops.MAX_EXPERTS),
        ("num_specific_experts", 0, ops.MAX_EXPERTS),
    ):
        _check_size(name, config[name], low, high)
    for name in ("expert_hidden_units", "gate_hidden_units", "tower_hidden_units"):
        _check_size(f"the length of {name}", len(config[name]), 0, MAX_LAYERS)
        for units in config[name]:
            _check_size(name, units, 1, MAX_UNITS)
    if not config["expert_hidden_units"]:
        raise ValueError("expert_hidden_units: expected at least one layer, got []")
    dropout = config["net_dropout"]
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"net_dropout: expected a number in [0, 1), got {reprlib.repr(dropout)}")
    if not isinstance(config["batch_norm"], bool):
        raise ValueError(
            f"batch_norm: expected True or False, got {reprlib.repr(config['batch_norm'])}"
        )
    if not isinstance(config["hidden_activations"], str):
        got = reprlib.repr(config["hidden_activations"])
        raise ValueError(f"hidden_activations: expected the name of one, got {got}")
    for where in ("tasks", "vocab_sizes", "numeric", "sequences", "fields"):
        for name in config[where]:
            if not isinstance(name, str):
                raise ValueError(f"{where}: expected names as text, got {reprlib.repr(name)}")
    for where in ("vocab_sizes", "sequences"):
        for name, size in config[where].items():
            if where == "vocab_sizes" or not isinstance(size, str):
                _check_size(f"the vocabulary of {name!r}", size, 1, MAX_ROWS)
    tasks = config["tasks"]
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks: expected one or more different names, got {tasks}")
    if len(set(default_order)) != len(default_order):
        raise ValueError(f"fields: expected different names, got {list(default_order)}")
    if not default_order:
        raise ValueError(
            "fields: expected at least one in vocab_sizes, numeric or sequences, got none"
        )
    if sorted(config["fields"]) != sorted(default_order):
        raise ValueError(
            f"fields: expected each of {list(default_order)} once, got {config['fields']}"
        )
    if config["pooling"].keys() != config["sequences"].keys():
        raise ValueError(
            f"pooling: expected each of {list(config['sequences'])}, got {config['pooling']}"
        )
    for name, pooling in config["pooling"].items():
        if pooling not in ("mean", "sum"):
            raise ValueError(f"sequence {name!r}: expected pooling mean or sum, got {pooling!r}")
    for task, kind in config["kinds"].items():
        if task not in tasks:
            raise ValueError(f"kinds: expected tasks of {tasks}, got {task!r}")
        if kind not in KINDS:
            raise ValueError(f"task {task!r}: expected a kind of {', '.join(KINDS)}, got {kind!r}")
    for task, scale in config["scales"].items():
        if config["kinds"].get(task, "binary") == "binary":
            raise ValueError(f"scales: expected regression tasks, got {task!r}")
        try:
            mean, std = map(float, scale)
        except (TypeError, ValueError):
            mean = std = math.nan
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError(
                f"scales of {task!r}: expected a mean and a deviation above 0, got "
                f"{reprlib.repr(scale)}"
            )
        config["scales"][task] = [mean, std]


def _check_size(name: str, value: Any, low: int, high: int) -> None:
    expected = f"at least {low}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        expected = "a whole number"
    elif int(value) > high:
        expected = f"at most {high}"
    elif int(value) >= low:
        return
    raise ValueError(f"{name}: expected {expected}, got {reprlib.repr(value)}")
