"""Checkpoints of the official code (LiangcaiSu/STEM, built on FuxiCTR), both ways without loss.

========================  ==========================================================
here                      official key
========================  ==========================================================
``embedding.weight``      ``embedding_layer.embedding_layer.embedding_layers.{field}.weight``,
                          a table [V_f, (T+1)*D] a field; a numeric field's is [(T+1)*D, 1]
``experts.{l}``           ``stem_layers.{l}.specific_experts.{t}.{p}``,
                          ``stem_layers.{l}.shared_experts.{s}``
``gate_mlps.{l}``         ``stem_layers.{l}.gate.{t}``, the shared gate last
``towers``                ``tower.{t}``
========================  ==========================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stem_fast.nn.grouped import GroupedMLP

_Model = TypeVar("_Model", bound=nn.Module)
_TABLE = "embedding_layer.embedding_layer.embedding_layers.{}.weight"


def to_official(model: Any) -> dict[str, Tensor]:
    """The state dict that the official STEM of the same configuration loads.

    The tensors are copies, so training the model on does not change them. The official code knows
    no scaling of labels: a regression's goes into the last layer of its tower.

    Raises ValueError for a task that is fitted to the logarithm of its label.
    """
    model.embedding.flush()
    state = {key: tensor.clone() for key, tensor in _views(model)}
    for number, task in enumerate(model.tasks):
        if model.config["kinds"][task] == "regression:log1p":
            raise ValueError(
                f"task {task!r} is fitted to log(1 + label), which the official code cannot undo"
            )
        mean, std = model.config["scales"].get(task, (0.0, 1.0))
        last = list(_linears(state, f"tower.{number}"))[-1]
        state[f"tower.{number}.mlp.{last}.weight"].mul_(std)
        state[f"tower.{number}.mlp.{last}.bias"].mul_(std).add_(mean)
    return state


def from_official(
    cls: Callable[..., _Model],
    state_dict: Mapping[str, Tensor],
    *,
    tasks: Sequence[str],
    fields: Sequence[str] | None = None,
    sequences: Mapping[str, str | None] | None = None,
    pooling: str | Mapping[str, str] = "mean",
    kinds: Mapping[str, str] | None = None,
    hidden_activations: str = "relu",
    net_dropout: float | None = None,
) -> _Model:
    """Build a STEM-Net from an official checkpoint; every size is read off the tensors.

    Args:
        state_dict: as ``torch.load(path, weights_only=True)`` returns it.
        tasks: label names in the official order (``feature_map.labels``).
        fields: the features in the official order; default: the order of the checkpoint's keys.
        sequences: fields that hold sequences -> the field whose table they share, or None. A
            checkpoint does not tell a sequence's table from a categorical one.
        pooling, kinds: as for :class:`STEMNet`; labels of regression tasks are not scaled.
        hidden_activations: PReLU and Dice are recognised, the others leave no trace.
        net_dropout: needed only where the checkpoint was made with dropout, whose rate it does
            not hold.

    Raises:
        ValueError: keys that are missing, not known, or whose sizes contradict each other.
    """
    tables = {
        match[1]: tensor
        for key, tensor in state_dict.items()
        if (match := re.fullmatch(re.escape(_TABLE).replace(r"\{\}", "(.+)"), key))
    }
    order = list(tables if fields is None else fields)
    if sorted(order) != sorted(tables):
        raise ValueError(f"fields: expected the checkpoint's tables {list(tables)}, got {order}")
    shared = dict(sequences or {})
    if not shared.keys() <= tables.keys():
        raise ValueError(
            f"sequences: expected some of the tables {list(tables)}, got {list(shared)}"
        )
    sizes = _sizes(state_dict, len(tasks))
    numeric = [name for name in order if tables[name].shape[1] == 1]
    spaces = len(tasks) + 1
    width = {t.shape[0] if name in numeric else t.shape[1] for name, t in tables.items()}
    if len(width) != 1 or next(iter(width)) % spaces:
        raise ValueError(
            f"tables: expected one width, a multiple of {spaces} for {len(tasks)} tasks, got "
            f"{sorted(width)}"
        )
    has_dropout = sizes.pop("has_dropout")
    if has_dropout is not None and has_dropout != bool(net_dropout):
        raise ValueError(
            f"net_dropout: expected {'above 0' if has_dropout else '0'} as in the checkpoint, got "
            f"{net_dropout}"
        )
    sizes.setdefault("hidden_activations", hidden_activations)
    model = cls(
        {n: len(tables[n]) for n in order if n not in numeric and n not in shared},
        tasks,
        embedding_dim=next(iter(width)) // spaces,
        net_dropout=net_dropout or 0.0,
        numeric=numeric,
        sequences={n: shared[n] or len(tables[n]) for n in order if n in shared},
        pooling=pooling,
        kinds=kinds,
        scales={task: (0.0, 1.0) for task, kind in (kinds or {}).items() if kind != "binary"},
        fields=order,
        **sizes,
    )
    model.to(next(iter(tables.values())).dtype)
    views = dict(_views(model))
    if views.keys() != state_dict.keys():
        missing, unknown = sorted(views.keys() - state_dict), sorted(state_dict.keys() - views)
        raise ValueError(
            f"expected the model's tensors; the checkpoint lacks {missing[:5]} and has unknown "
            f"{unknown[:5]}"
        )
    for key, view in views.items():
        if view.shape != state_dict[key].shape:
            expected, got = list(view.shape), list(state_dict[key].shape)
            raise ValueError(f"{key}: expected shape {expected} by the other tensors, got {got}")
        view.copy_(state_dict[key])
    for name, other in shared.items():
        if other is not None and not torch.equal(tables[name], tables[other]):
            raise ValueError(f"sequence {name!r} shares {other!r}, but their tables differ")
    return model


def _sizes(state_dict: Mapping[str, Tensor], tasks: int) -> dict[str, Any]:
    """Constructor arguments that show in the keys and shapes of the networks."""

    def count(pattern: str) -> int:
        """How many numbers stand in the group of ``pattern`` at the start of the keys."""
        return len({m[1] for key in state_dict if (m := re.match(pattern, key))})

    if (towers := count(r"tower\.(\d+)\.")) != tasks:
        raise ValueError(f"tasks: expected {towers}, one a tower of the checkpoint, got {tasks}")
    specific = count(r"stem_layers\.0\.specific_experts\.0\.(\d+)\.")
    common = count(r"stem_layers\.0\.shared_experts\.(\d+)\.")
    first = "stem_layers.0." + ("specific_experts.0.0" if specific else "shared_experts.0")
    linears = {
        name: _linears(state_dict, name) for name in (first, "stem_layers.0.gate.0", "tower.0")
    }
    if not all(linears.values()):
        raise ValueError(
            "expected a checkpoint of the official STEM, got one without experts, gates or towers"
        )
    keys = [re.sub(r".*\.mlp\.\d+\.", "", key) for key in state_dict if ".mlp." in key]
    batch_norm = "running_mean" in keys
    steps = [b - a for at in linears.values() for a, b in zip(at, list(at)[1:], strict=False)]
    sizes: dict[str, Any] = {
        "num_layers": count(r"stem_layers\.(\d+)\."),
        "num_specific_experts": specific,
        "num_shared_experts": common,
        "expert_hidden_units": list(linears[first].values()),
        "gate_hidden_units": list(linears["stem_layers.0.gate.0"].values())[:-1],
        "tower_hidden_units": list(linears["tower.0"].values())[:-1],
        "batch_norm": batch_norm,
        # Blocks from one linear layer to the next: itself, batch norm, activation, dropout.
        "has_dropout": None if not steps else steps[0] == 3 + batch_norm,
    }
    if "alpha" in keys:
        sizes["hidden_activations"] = "dice"
    elif _has_prelu(state_dict, first):
        sizes["hidden_activations"] = "prelu"
    return sizes


def _linears(state_dict: Mapping[str, Tensor], prefix: str) -> dict[int, int]:
    """Index in MLP_Block -> outputs, of the linear layers of one MLP."""
    found = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(re.escape(prefix) + r"\.mlp\.(\d+)\.weight", key)
        if match and tensor.dim() == 2:
            found[int(match[1])] = tensor.shape[0]
    return dict(sorted(found.items()))


def _has_prelu(state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    """PReLU is the one block with a vector ``weight`` and no ``bias``."""
    return any(
        re.fullmatch(re.escape(prefix) + r"\.mlp\.\d+\.weight", key)
        and key.removesuffix("weight") + "bias" not in state_dict
        for key in state_dict
    )


def _views(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(official key, view of our tensor), for the whole checkpoint."""
    config, arena = model.config, model.embedding
    for name in config["fields"]:
        if name in arena.tables:
            yield _TABLE.format(name), arena.weight.detach()[arena.tables[name]]
        elif arena.numeric_weight is not None:
            row = arena.numeric.index(name)
            yield _TABLE.format(name), arena.numeric_weight.detach()[row, :, None]
    tasks, specific = len(model.tasks), config["num_specific_experts"]

    def mlp(prefix: str, group: int, networks: nn.Module) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(networks, GroupedMLP)
        for key, view in networks.official(group):
            yield f"{prefix}.{key}", view

    for layer in range(config["num_layers"]):
        experts, gates = model.experts[layer], model.gate_mlps[layer]
        for shared in range(config["num_shared_experts"]):
            prefix = f"stem_layers.{layer}.shared_experts.{shared}"
            yield from mlp(prefix, tasks * specific + shared, experts)
        for expert in range(tasks * specific):
            task, index = divmod(expert, specific)
            prefix = f"stem_layers.{layer}.specific_experts.{task}.{index}"
            yield from mlp(prefix, expert, experts)
        for gate in range(tasks + 1):
            yield from mlp(f"stem_layers.{layer}.gate.{gate}", gate, gates)
    for task in range(tasks):
        yield from mlp(f"tower.{task}", task, model.towers)
