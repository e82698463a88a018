"""The arguments of a model's constructor, checked: what ``model.config`` holds."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from stem_fast import ops
from stem_fast.common import KINDS

# Far beyond any use, and small enough for sizes of tensors to stay within 64 bits.
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
    """Arguments as :class:`stem_fast.STEMNet` takes them, with defaults filled in, as plain types.

    Raises ValueError for sizes, names or orders that don't fit together.
    """
    for name, given in (
        ("tasks", tasks),
        ("numeric", numeric),
        ("fields", fields or ()),
        ("expert_hidden_units", expert_hidden_units),
        ("gate_hidden_units", gate_hidden_units),
        ("tower_hidden_units", tower_hidden_units),
    ):
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ValueError(f"{name} is {reprlib.repr(given)}: give a list")
    for name, mapping in (
        ("vocab_sizes", vocab_sizes),
        ("kinds", kinds or {}),
        ("scales", scales or {}),
    ):
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{name} is {reprlib.repr(mapping)}: give a mapping from names")
    if not isinstance(sequences or {}, Mapping):
        raise ValueError(f"sequences is {reprlib.repr(sequences)}: give a mapping from names")
    sequences = dict(sequences or {})
    if not isinstance(pooling, (str, Mapping)):
        raise ValueError(
            f"pooling is {reprlib.repr(pooling)}: give mean, sum, or a mapping to them"
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
        raise ValueError("expert_hidden_units is empty; an expert has at least one layer")
    dropout = config["net_dropout"]
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"net_dropout is {reprlib.repr(dropout)}, must be in [0, 1)")
    if not isinstance(config["batch_norm"], bool):
        raise ValueError(
            f"batch_norm is {reprlib.repr(config['batch_norm'])}, must be True or False"
        )
    if not isinstance(config["hidden_activations"], str):
        found = reprlib.repr(config["hidden_activations"])
        raise ValueError(f"hidden_activations is {found}, must be the name of one")
    for where in ("tasks", "vocab_sizes", "numeric", "sequences", "fields"):
        for name in config[where]:
            if not isinstance(name, str):
                raise ValueError(f"{where} names {reprlib.repr(name)}, a name must be text")
    for where in ("vocab_sizes", "sequences"):
        for name, size in config[where].items():
            if where == "vocab_sizes" or not isinstance(size, str):
                _check_size(f"the vocabulary of {name!r}", size, 1, MAX_ROWS)
    tasks = config["tasks"]
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks {tasks} must be one or more different names")
    if len(set(default_order)) != len(default_order):
        raise ValueError(f"a field is named twice in {list(default_order)}")
    if not default_order:
        raise ValueError("the model has no field")
    if sorted(config["fields"]) != sorted(default_order):
        raise ValueError(f"fields {config['fields']} must name each of {list(default_order)}")
    if config["pooling"].keys() != config["sequences"].keys():
        raise ValueError(f"pooling {config['pooling']} must name each sequence once")
    for name, pooling in config["pooling"].items():
        if pooling not in ("mean", "sum"):
            raise ValueError(f"sequence {name!r}: pooling {pooling!r} is not mean or sum")
    for task, kind in config["kinds"].items():
        if task not in tasks:
            raise ValueError(f"kinds names {task!r}, which is no task of {tasks}")
        if kind not in KINDS:
            raise ValueError(f"task {task!r}: kind {kind!r} is not one of {', '.join(KINDS)}")
    for task, scale in config["scales"].items():
        if config["kinds"].get(task, "binary") == "binary":
            raise ValueError(f"scales names {task!r}, which is no regression task")
        try:
            mean, std = map(float, scale)
        except (TypeError, ValueError):
            mean = std = math.nan
        if not (math.isfinite(mean) and 0 < std < math.inf):
            found = reprlib.repr(scale)
            raise ValueError(
                f"scales of {task!r} are {found}: give a mean, and a deviation above 0"
            )
        config["scales"][task] = [mean, std]


def _check_size(name: str, value: Any, low: int, high: int) -> None:
    rule = f"be at least {low}" if low else "not be negative"
    if isinstance(value, bool) or not isinstance(value, Integral):
        rule = "be a whole number"
    elif int(value) > high:
        rule = f"be at most {high}"
    elif int(value) >= low:
        return
    raise ValueError(f"{name} is {reprlib.repr(value)}, must {rule}")
