"""Parity with the official code: numbers made from it, see fixtures/make_official.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stem_fast import MMoE, STEMNet
from stem_fast.data.dataset import Batch
from stem_fast.training.options import TrainingConfig
from stem_fast.training.step import train_step

FIXTURES = Path(__file__).parent / "fixtures"
OFFICIAL = json.loads((FIXTURES / "official.json").read_text())["cases"]
CASES = [name for name in OFFICIAL if name != "training"]


class Case:
    """One fixture: the official model's weights, inputs and results."""

    def __init__(self, name: str) -> None:
        self.info = OFFICIAL[name]
        self.tensors = load_file(FIXTURES / self.info["file"])

    def group(self, prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        found = {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}
        return {key: found[key] for key in sorted(found)}

    def per_task(self, prefix: str) -> Tensor:
        return torch.stack([self.tensors[f"{prefix}.{t}"] for t in self.info["tasks"]], dim=1)

    def model(self, prefix: str = "state", dtype: torch.dtype = torch.float64) -> STEMNet:
        state = {
            key: t.to(dtype) if t.is_floating_point() else t
            for key, t in self.group(prefix).items()
        }
        sequences = self.info.get("sequences", {})
        return STEMNet.from_official(
            state,
            tasks=self.info["tasks"],
            fields=self.info.get("fields", list(self.info["vocab_sizes"])),
            sequences={
                name: spec["table"] if isinstance(spec["table"], str) else None
                for name, spec in sequences.items()
            },
            pooling={name: spec["pooling"] for name, spec in sequences.items()},
        )

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        columns = self.group("inputs")
        numeric = [columns[name] for name in self.info.get("numeric", [])]
        sequences = {name: columns[name] for name in self.info.get("sequences", {})}
        return {
            "ids": torch.stack([columns[name] for name in self.info["vocab_sizes"]], dim=1),
            "numeric": torch.stack(numeric, dim=1).to(dtype) if numeric else None,
            "sequences": sequences,
        }


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


# float64 agreement is the rounding of differently ordered sums; float32 is a step of 1e-7 grown
# by the same. The bounds are the project's promise.
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def close(actual: Tensor, expected: Tensor, relative: float, name: str) -> None:
    """Largest error within ``relative`` of the tensor's largest value."""
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max()
    assert error <= relative * expected.double().abs().max(), f"{name}: off by {error:.2e}"


@pytest.mark.parametrize(("dtype", "relative"), PRECISIONS)
def test_outputs_loss_and_every_gradient_agree(
    case: Case, dtype: torch.dtype, relative: float
) -> None:
    model, inputs = case.model(dtype=dtype), case.inputs(dtype)
    options = case.info["hyperparameters"]
    logits = model(**inputs)
    close(logits, case.per_task("logits"), relative, "logits")
    close(logits.sigmoid(), case.per_task("output"), relative, "output")
    labels = case.tensors["labels"].to(dtype)
    penalty = model.regularization(options["embedding_regularizer"], options["net_regularizer"])
    loss = model.loss(logits, labels) + penalty
    close(loss, case.tensors["loss"], relative, "loss")
    loss.backward()
    model.load_state_dict(
        {**model.state_dict(), **{n: p.grad for n, p in model.named_parameters()}}
    )
    gradients = model.to_official()
    largest = max(g.abs().max() for g in case.group("grad").values())
    for key, expected in case.group("grad").items():
        if expected.abs().max() < 1e-12 * largest:  # a bias before batch norm: rounding of zero
            assert gradients[key].abs().max() <= relative * largest, key
        else:
            close(gradients[key], expected, relative, key)
    for key in case.info["no_gradient"]:
        assert not gradients[key].any(), key
    compared = case.group("grad").keys() | set(case.info["no_gradient"])
    buffers = {key for key in gradients if "running_" in key or "num_batches" in key}
    shared = {
        f"embedding_layer.embedding_layer.embedding_layers.{name}.weight"
        for name, spec in case.info.get("sequences", {}).items()
        if isinstance(spec["table"], str)
    }
    assert gradients.keys() - buffers - shared == compared - shared


@pytest.mark.parametrize(("dtype", "relative"), PRECISIONS)
def test_strong_regularization_agrees(case: Case, dtype: torch.dtype, relative: float) -> None:
    strong = case.model(dtype=dtype).regularization(1e-2, 1e-3)
    close(strong, case.tensors["regularization.strong"], relative, "regularization")


def test_evaluation_mode_uses_running_statistics() -> None:
    case = Case("batch_norm")
    close(case.model().predict(**case.inputs()), case.per_task("eval"), 1e-10, "predict")


def test_running_statistics_after_a_forward_pass() -> None:
    """All but the last layer's shared gate's: the official code runs it, though nobody reads it."""
    case = Case("batch_norm")
    model = case.model()
    model(**case.inputs())
    ours, after = model.to_official(), case.group("after")
    dead = f"stem_layers.1.gate.{len(case.info['tasks'])}."
    compared = [key for key in after if not key.startswith(dead)]
    assert len(compared) > 20
    for key in compared:
        close(ours[key], after[key], 1e-10, key)


def test_round_trip_loses_nothing(case: Case) -> None:
    state = case.group("state")
    back = case.model().to_official()
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("activation", ["relu", "prelu", "dice"])
@pytest.mark.parametrize("net_dropout", [0.0, 0.3])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("tasks", "specific", "shared", "layers"), [(1, 1, 0, 1), (3, 2, 4, 3)])
def test_every_size_is_read_off_the_tensors(
    activation: str,
    net_dropout: float,
    batch_norm: bool,
    tasks: int,
    specific: int,
    shared: int,
    layers: int,
) -> None:
    model = STEMNet(
        {"user": 5, "item": 9},
        [f"task{t}" for t in range(tasks)],
        embedding_dim=3,
        num_layers=layers,
        num_specific_experts=specific,
        num_shared_experts=shared,
        expert_hidden_units=(6, 4),
        gate_hidden_units=(5,),
        tower_hidden_units=(),
        hidden_activations=activation,
        net_dropout=net_dropout,
        batch_norm=batch_norm,
        numeric=["price"],
        sequences={"history": "item", "tags": 4},
        fields=["history", "user", "price", "tags", "item"],
    )
    official = model.to_official()
    again = STEMNet.from_official(
        official,
        tasks=model.tasks,
        fields=["history", "user", "price", "tags", "item"],
        sequences={"history": "item", "tags": None},
        net_dropout=net_dropout,
    )
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_a_checkpoint_does_not_tell_is_the_callers() -> None:
    options: dict[str, Any] = {
        "sequences": {"history": "item"},
        "pooling": {"history": "sum"},
        "kinds": {"time": "regression"},
        "hidden_activations": "gelu",
    }
    model = STEMNet({"user": 5, "item": 9}, ["click", "time"], expert_hidden_units=(4,), **options)
    again = STEMNet.from_official(model.to_official(), tasks=["click", "time"], **options)
    for name in options:
        assert again.config[name] == model.config[name]


def test_official_weights_are_copies() -> None:
    """Both ways: neither model changes with the tensors, nor they with it."""
    model = STEMNet({"user": 5}, ["click"], numeric=["price"], expert_hidden_units=(4,))
    official = model.to_official()
    kept = {key: tensor.clone() for key, tensor in official.items()}
    again = STEMNet.from_official(official, tasks=["click"])
    for parameter in (*model.parameters(), *again.parameters()):
        parameter.detach().add_(1.0)
    for key, tensor in official.items():
        assert torch.equal(tensor, kept[key])


def test_200_official_training_steps() -> None:
    case = Case("training")
    model = case.model("start", torch.float32)
    model.train()
    options = case.info["hyperparameters"]
    config = TrainingConfig(
        learning_rate=options["learning_rate"],
        embedding_regularizer=options["embedding_regularizer"],
        max_gradient_norm=case.info["max_gradient_norm"],
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    ids, labels = case.tensors["batches.ids"].long(), case.tensors["batches.labels"].float()
    losses = [
        train_step(model, [optimizer], Batch(i, None, {}, y, None), config)
        for i, y in zip(ids, labels, strict=True)
    ]
    # Logits are large here, so that clipping happens, and the official loss takes the logarithm
    # of a sigmoid that float32 has rounded.
    close(torch.stack(losses), case.tensors["losses"], 1e-4, "losses")
    ours = model.to_official()
    for key, expected in case.group("end").items():
        close(ours[key], expected, 1e-4, key)
    assert len(losses) == 200


def tiny() -> dict[str, Tensor]:
    return STEMNet(
        {"user": 5, "item": 4},
        ["click", "like"],
        expert_hidden_units=(4, 4),
        gate_hidden_units=(3,),
        tower_hidden_units=(3,),
    ).to_official()


def test_scales_of_labels_go_into_the_towers() -> None:
    """The official code knows none; and a model of its checkpoint is not scaled again."""
    options: dict[str, Any] = {"kinds": {"like": "regression"}, "expert_hidden_units": (4,)}
    model = STEMNet({"user": 5}, ["click", "like"], scales={"like": (40.0, 8.0)}, **options)
    state, ids = model.to_official(), torch.arange(1, 5)[:, None]
    back = STEMNet.from_official(state, tasks=["click", "like"], kinds=options["kinds"])
    torch.testing.assert_close(back.predict(ids), model.predict(ids))
    with torch.no_grad():
        torch.testing.assert_close(back(ids)[:, 1], 8 * model(ids)[:, 1] + 40)
    assert back.config["scales"] == {"like": [0.0, 1.0]}
    options["kinds"] = {"like": "regression:log1p"}
    model = STEMNet({"user": 5}, ["click", "like"], **options)
    with pytest.raises(ValueError, match=r"task 'like' is fitted to log\(1 \+ label\), which"):
        model.to_official()


TABLE = "embedding_layer.embedding_layer.embedding_layers.user.weight"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"tasks": ["click"]}, "tasks: expected 2, one a tower of the checkpoint, got 1"),
        (
            {TABLE: torch.zeros(5, 47)},
            {},
            "tables: expected one width, a multiple of 3 for 2 tasks, got [47, 48]",
        ),
        (
            {},
            {"fields": ["user"]},
            "fields: expected the checkpoint's tables ['user', 'item'], got ['user']",
        ),
        (
            {},
            {"sequences": {"x": None}},
            "sequences: expected some of the tables ['user', 'item'], got ['x']",
        ),
        ({}, {"net_dropout": 0.1}, "net_dropout: expected 0 as in the checkpoint, got 0.1"),
        ({"extra": torch.zeros(1)}, {}, "has unknown ['extra']"),
        ({"tower.0.mlp.0.bias": None}, {}, "lacks ['tower.0.mlp.0.bias']"),
        (
            {"tower.0.mlp.0.bias": torch.zeros(9)},
            {},
            "tower.0.mlp.0.bias: expected shape [3] by the other tensors, got [9]",
        ),
    ],
)
def test_contradictions_are_refused(
    change: dict[str, Tensor | None], options: dict[str, Any], message: str
) -> None:
    state = {k: v for k, v in {**tiny(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        STEMNet.from_official(state, **{"tasks": ["click", "like"], **options})


def test_a_shared_table_that_differs_is_refused() -> None:
    """By one row: the sequence would read the field's."""
    sequences = {"history": "item"}
    state = STEMNet({"user": 5, "item": 4}, ["click"], sequences=sequences).to_official()
    STEMNet.from_official(state, tasks=["click"], sequences=sequences)
    for name in ("history", "item"):
        key = TABLE.replace("user", name)
        changed = state | {key: state[key].index_fill(0, torch.tensor(3), 1.0)}
        with pytest.raises(ValueError, match="'history' shares 'item', but their tables differ"):
            STEMNet.from_official(changed, tasks=["click"], sequences=sequences)


def test_a_checkpoint_with_dropout_needs_its_rate() -> None:
    options: dict[str, Any] = {"expert_hidden_units": (4, 4), "net_dropout": 0.5}
    state = STEMNet({"user": 5}, ["click"], **options).to_official()
    with pytest.raises(
        ValueError, match="net_dropout: expected above 0 as in the checkpoint, got None"
    ):
        STEMNet.from_official(state, tasks=["click"])


def test_other_models_have_no_official_stem_checkpoint() -> None:
    with pytest.raises(
        TypeError, match="expected STEMNet for an official STEM checkpoint, got MMoE"
    ):
        MMoE({"user": 5}, ["click"]).to_official()
