"""STEM-Net and its family: shapes, who teaches whom, losses, refusals."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stem_fast import MODELS, PLE, MMoE, SharedBottom, SingleTask, STEMNet, reference
from stem_fast.models import network
from stem_fast.models.wiring import Wiring

VOCAB = {"user": 6, "item": 9}
TASKS = ["click", "like", "follow"]
SMALL: dict[str, Any] = {
    "embedding_dim": 3,
    "expert_hidden_units": (7, 5),
    "gate_hidden_units": (4,),
    "tower_hidden_units": (4,),
}


def ids(batch: int = 11) -> Tensor:
    draw = torch.Generator().manual_seed(batch)
    columns = [torch.randint(1, size, (batch,), generator=draw) for size in VOCAB.values()]
    return torch.stack(columns, dim=1)


def alive(model: STEMNet) -> STEMNet:
    """In float64, with weights large enough for every gradient to show."""
    model.double()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight" in name or "bias" in name:
                parameter.normal_(0, 0.5)
        padding = [table.start for table in model.embedding.tables.values()]
        model.embedding.weight[padding] = 0
    return model


def small(name: str = "stem", **options: Any) -> STEMNet:
    torch.manual_seed(0)
    shared = {"num_shared_experts": 2} if name in ("stem", "ple", "mmoe") else {}
    return alive(MODELS[name](VOCAB, TASKS, **{**SMALL, **shared, **options}))


def test_the_signature_is_the_official_one() -> None:
    parameters = inspect.signature(STEMNet).parameters
    assert {name: p.default for name, p in list(parameters.items())[2:12]} == {
        "embedding_dim": 16,
        "num_layers": 1,
        "num_shared_experts": 8,
        "num_specific_experts": 1,
        "expert_hidden_units": (512, 512, 512),
        "gate_hidden_units": (128, 64),
        "tower_hidden_units": (128, 64),
        "hidden_activations": "relu",
        "net_dropout": 0.0,
        "batch_norm": False,
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [0, 1, 11])
def test_logits_and_probabilities(name: str, batch: int) -> None:
    model = small(name)
    logits = model(ids(batch))
    assert logits.shape == (batch, 3)
    assert logits.requires_grad
    probabilities = model.predict(ids(batch))
    assert not probabilities.requires_grad
    torch.testing.assert_close(probabilities, logits.detach().sigmoid())
    assert torch.equal(model(ids(batch).int()), logits)


def test_stem_is_the_papers_network() -> None:
    """The forward pass written from the paper's equations, two layers."""
    model = small(num_layers=2, num_specific_experts=2)
    rows = model.embedding.weight.view(-1, 4, 3)  # [R, G, D]
    user, item = rows[ids()[:, 0]], rows[VOCAB["user"] + ids()[:, 1]]
    x = torch.cat([user, item], dim=2).transpose(0, 1)  # [G, B, F*D]

    def mlp(networks: Any, e: int, h: Tensor, hidden: int) -> Tensor:
        linear = [b for b in networks.blocks if hasattr(b, "weight")]
        for i, block in enumerate(linear):
            h = F.linear(h, block.weight[e], block.bias[e])
            h = h.relu() if i < hidden else h
        return h

    for experts, gates in zip(model.experts, model.gate_mlps, strict=True):
        y = [mlp(experts, e, x[min(e // 2, 3)], 2) for e in range(8)]
        outputs = []
        for k in range(4):
            inputs = x[k] + x[3] if k < 3 else x[3]
            p = mlp(gates, k, inputs, 1).softmax(-1)
            outputs.append(sum(p[:, e, None] * y[e] for e in range(8)))
        x = torch.stack(outputs)
    expected = torch.cat([mlp(model.towers, t, x[t], 1) for t in range(3)], dim=1)
    torch.testing.assert_close(model(ids()), expected)


def gradients(model: STEMNet, task: int) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids())[:, task].sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_a_task_teaches_its_own_and_the_shared_parts_of_one_layer() -> None:
    model = small()
    for task in range(3):
        grads = gradients(model, task)
        spaces = grads["embedding.weight"].view(-1, 4, 3).abs().sum((0, 2))
        assert [g for g in range(4) if spaces[g]] == [task, 3]
        experts = grads["experts.0.blocks.0.weight"].abs().sum((1, 2))
        assert [e for e in range(5) if experts[e]] == [task, 3, 4]
        gates = grads["gate_mlps.0.blocks.0.weight"].abs().sum((1, 2))
        assert [k for k in range(4) if gates[k]] == [task]


def test_every_task_sees_every_expert() -> None:
    model = small()
    before = model(ids())
    with torch.no_grad():
        model.experts[0].blocks[0].weight[1] += 1  # an expert of the second task
    assert ((model(ids()) - before).abs().amax(0) > 1e-6).all()


def test_two_layers_let_other_tasks_embeddings_learn_through_the_shared_gate() -> None:
    """A fact of the official code: layer 0's shared output is not detached."""
    grads = gradients(small(num_layers=2), 0)
    spaces = grads["embedding.weight"].view(-1, 4, 3).abs().sum((0, 2))
    assert spaces.all()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_shared_gate_is_never_run(layers: int) -> None:
    model = small(num_layers=layers)
    grads = gradients(model, 0)
    for name, grad in grads.items():
        if name.startswith(f"gate_mlps.{layers - 1}"):
            assert not grad[3].any()
    with torch.no_grad():
        for block in model.gate_mlps[-1].blocks:
            if hasattr(block, "weight"):
                block.weight[3] = float("nan")
    assert model(ids()).isfinite().all()


def test_single_task_shares_nothing() -> None:
    model = small("single", num_specific_experts=2)
    for task in range(3):
        grads = gradients(model, task)
        spaces = grads["embedding.weight"].view(-1, 3, 3).abs().sum((0, 2))
        assert [g for g in range(3) if spaces[g]] == [task]
        experts = grads["experts.0.blocks.0.weight"].abs().sum((1, 2))
        assert [e for e in range(6) if experts[e]] == [2 * task, 2 * task + 1]


def test_shared_bottom_is_one_network_with_towers() -> None:
    model = small("shared_bottom")
    h = model.embedding.weight[ids() + model.embedding.offsets].flatten(1)
    for block in model.experts[0].blocks[::2]:
        h = F.linear(h, block.weight[0], block.bias[0]).relu()
    first, _, last = model.towers.blocks
    for t in range(3):
        hidden = F.linear(h, first.weight[t], first.bias[t]).relu()
        expected = F.linear(hidden, last.weight[t], last.bias[t])[:, 0]
        torch.testing.assert_close(model(ids())[:, t], expected)


def test_ple_and_mmoe_gates_see_what_they_should() -> None:
    ple = small("ple")
    (weights,) = ple.gates(ids())
    assert (weights > 0).tolist() == [[e == t or e >= 3 for e in range(5)] for t in range(3)]
    (weights,) = small("mmoe").gates(ids())
    assert (weights > 0).all()
    assert small("ple").embedding.weight.shape[1] == SMALL["embedding_dim"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [0, 1, 11])
def test_recompute_changes_nothing_but_memory(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "RECOMPUTED", 4)
    model = small(name, num_layers=2) if name == "stem" else small(name)
    forward = model._network
    parts: list[int] = []

    def counted(x: Tensor, *rest: Any) -> Any:
        parts.append(x.shape[1])
        return forward(x, *rest)

    monkeypatch.setattr(model, "_network", counted)
    found = []
    for recompute in (False, True):
        model.zero_grad()
        logits = model(ids(rows), recompute=recompute)
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(again, kept, rtol=0, atol=1e-11)
    assert parts[0] == rows
    assert max(parts[1:]) <= 4
    assert sum(parts[1:]) == 2 * rows, "forward and once more in the backward pass"


def test_recompute_repeats_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(net_dropout=0.5).train()

    def gradients() -> list[Tensor | None]:
        torch.manual_seed(4)
        model.zero_grad()
        model(ids(), recompute=True).square().sum().backward()
        return [p.grad for p in model.parameters()]

    again = gradients()
    monkeypatch.setattr(network, "checkpoint", lambda part, *rows, **_: part(*rows))
    for kept, repeated in zip(gradients(), again, strict=True):
        torch.testing.assert_close(repeated, kept, rtol=0, atol=1e-11)


def test_recompute_refuses_batch_norm() -> None:
    for options in ({"batch_norm": True}, {"hidden_activations": "dice"}):
        with pytest.raises(
            ValueError, match="recompute: expected a model without batch norm and Dice: turn one of"
        ):
            small(**options)(ids(), recompute=True)


def test_gates_are_mean_weights_with_names() -> None:
    model = small(num_layers=2)
    first, last = model.gates(ids())
    assert first.shape == (4, 5)
    assert last.shape == (3, 5)
    torch.testing.assert_close(first.sum(1), torch.ones(4, dtype=torch.float64))
    assert model.gate_names == [*TASKS, "shared"]
    assert model.expert_names == ["click.0", "like.0", "follow.0", "shared.0", "shared.1"]
    assert small("shared_bottom").gates(ids()) == []
    assert small("shared_bottom").gate_names == []


@pytest.mark.parametrize("name", MODELS)
def test_config_rebuilds_the_model(name: str) -> None:
    model = small(
        name,
        numeric=["price"],
        sequences={"history": "item"},
        pooling="sum",
        kinds={"follow": "regression"},
        fields=["item", "price", "history", "user"],
    )
    again = type(model)(**model.config).double()
    again.load_state_dict(model.state_dict())
    inputs = ids(4), torch.randn(4, 1), {"history": torch.randint(0, 9, (4, 3))}
    assert torch.equal(again(*inputs), model(*inputs))


def test_fields_order_the_networks_input() -> None:
    plain, turned = small(), small(fields=["item", "user"])
    with torch.no_grad():
        for a, b in zip(plain.parameters(), turned.parameters(), strict=True):
            b.copy_(a)
        for networks in (turned.experts[0], turned.gate_mlps[0]):
            networks.blocks[0].weight.copy_(networks.blocks[0].weight.roll(3, dims=2))
    torch.testing.assert_close(turned(ids()), plain(ids()))


def test_predict_and_gates_leave_the_mode_alone() -> None:
    model = small(net_dropout=0.5, batch_norm=True)
    model.train()
    assert torch.equal(model.predict(ids()), model.predict(ids()))
    model.gates(ids())
    assert model.training
    assert not torch.equal(model(ids()), model(ids()))
    model.experts.eval()  # a part of it stays as it was
    model.predict(ids())
    assert [module.training for module in (model, model.experts[0], model.towers)] == [1, 0, 1]


def test_loss_is_the_sum_of_mean_cross_entropies() -> None:
    model, logits = small(), torch.randn(4, 3)
    labels = torch.randint(0, 2, (4, 3)).float()
    expected = F.binary_cross_entropy(logits.sigmoid(), labels, reduction="none").mean(0).sum()
    torch.testing.assert_close(model.loss(logits, labels), expected)


def test_regression_tasks_have_squared_error_and_no_sigmoid() -> None:
    model = small(kinds={"like": "regression"})
    logits, labels = torch.randn(4, 3), torch.rand(4, 3)
    only = torch.tensor([0.0, 1.0, 0.0])
    loss = model.loss(logits, labels, task_weights=only)
    torch.testing.assert_close(loss, F.mse_loss(logits[:, 1], labels[:, 1]))
    raw, out = model(ids()).detach(), model.predict(ids())
    torch.testing.assert_close(out[:, 1], raw[:, 1])
    torch.testing.assert_close(out[:, 0], raw[:, 0].sigmoid())


def test_regressions_are_standardised_and_predicted_in_their_units() -> None:
    kinds = {"like": "regression", "follow": "regression:log1p"}
    model = small(kinds=kinds, scales={"like": (100.0, 20.0), "follow": (2.0, 0.5)})
    logits, labels = torch.randn(4, 3), torch.rand(4, 3).round()
    labels[:, 1:] = torch.tensor([[80.0, 3.0], [120.0, 0.0], [torch.nan, 9.0], [100.0, -0.5]])
    wanted = labels.clone()
    wanted[:, 1] = torch.tensor([-1.0, 1.0, torch.nan, 0.0])
    wanted[:, 2] = (labels[:, 2].log1p() - 2) / 0.5
    torch.testing.assert_close(model.standardised(labels), wanted, equal_nan=True)
    expected = small().loss(logits[:, :1].expand(4, 3), labels[:, :1].expand(4, 3)) / 3
    expected = expected + F.mse_loss(logits[[0, 1, 3], 1], wanted[[0, 1, 3], 1])
    expected = expected + F.mse_loss(logits[:, 2], wanted[:, 2])
    torch.testing.assert_close(model.loss(logits, labels), expected)
    raw, out = model(ids()).detach(), model.predict(ids())
    torch.testing.assert_close(out[:, 0], raw[:, 0].sigmoid())
    torch.testing.assert_close(out[:, 1], raw[:, 1] * 20 + 100)
    torch.testing.assert_close(out[:, 2], (raw[:, 2] / 2 + 2).exp() - 1)
    # A model whose labels have no scale has none of their work either.
    assert small().standardised(labels) is labels
    assert small(kinds={"like": "regression"}).standardised(labels) is labels


def test_missing_labels_and_masks_leave_other_tasks_alone() -> None:
    model = small()
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (4, 3)).double()
    missing = labels.clone()
    missing[1, 0] = math.nan
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 0] = False
    rest = F.binary_cross_entropy_with_logits
    expected = rest(logits[[0, 2, 3], 0], labels[[0, 2, 3], 0]) + sum(
        rest(logits[:, t], labels[:, t]) for t in (1, 2)
    )
    for loss in (model.loss(logits, missing), model.loss(logits, labels, mask=mask)):
        torch.testing.assert_close(loss, expected)
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad[1, 0] == 0
        assert grad.isfinite().all()


def test_a_task_without_labels_adds_nothing() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = small().loss(logits, torch.full((4, 3), math.nan))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_weights_of_tasks_and_samples() -> None:
    model, logits = small(), torch.randn(4, 3)
    labels = torch.randint(0, 2, (4, 3)).float()
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    tasks, samples = torch.tensor([1.0, 0.0, 2.5]), torch.tensor([1.0, 0.5, 0.0, 3.0])
    loss = model.loss(logits, labels, task_weights=tasks, sample_weights=samples)
    torch.testing.assert_close(loss, ((each * samples[:, None]).mean(0) * tasks).sum())


def test_loss_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"labels: expected shape \[4, 3\], got \[4\]"):
        small().loss(torch.zeros(4, 3), torch.zeros(4))


def test_regularization_covers_tables_and_networks_apart() -> None:
    model = small(hidden_activations="dice", numeric=["price"])
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):  # it starts at 0
            torch.nn.init.normal_(parameter)
    table = model.embedding.weight.square().sum()
    rest = sum(
        p.square().sum()
        for name, p in model.named_parameters()
        if name != "embedding.weight" and "alpha" not in name
    )
    torch.testing.assert_close(model.regularization(0.5, 0.0), 0.25 * table)
    torch.testing.assert_close(model.regularization(0.5, 0.1), 0.25 * table + 0.05 * rest)
    assert model.regularization() == 0


def test_regularization_of_a_large_table_is_added_up_well() -> None:
    model = STEMNet({"user": 300_000}, TASKS)
    torch.nn.init.normal_(model.embedding.weight, std=0.1)
    exact = model.embedding.weight.double().square().sum()
    torch.testing.assert_close(model.regularization(2.0).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": {f"s{i}": 9 for i in range(64)}}, "sequences: expected at most 63, got 64"),
        ({"embedding_dim": 10**30}, "embedding_dim: expected at most 65536, got"),
        ({"num_layers": 2_000_000_000}, "num_layers: expected at most 1024, got 2000000000"),
        ({"num_specific_experts": 10**30}, "num_specific_experts: expected at most 64, got"),
        ({"tower_hidden_units": [2.0]}, r"tower_hidden_units: expected a whole number, got 2\.0"),
        ({"hidden_activations": 5}, "hidden_activations: expected the name of one, got 5"),
        ({"net_dropout": "0"}, r"net_dropout: expected a number in \[0, 1\), got '0'"),
        ({"batch_norm": "no"}, "batch_norm: expected True or False, got 'no'"),
        (
            {"vocab_sizes": {"user": 10**30}},
            "the vocabulary of 'user': expected at most 2147483647, got",
        ),
        ({"tasks": [5]}, "tasks: expected names as text, got 5"),
        ({"embedding_dim": 0}, "embedding_dim: expected at least 1, got 0"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"num_shared_experts": -1}, "num_shared_experts: expected at least 0, got -1"),
        (
            {"num_shared_experts": 0, "num_specific_experts": 0},
            "num_shared_experts, num_specific_experts: expected at least 1 expert,",
        ),
        (
            {"num_shared_experts": 62},
            "expected at most 64 experts and 16 gates, got 65 and 4: use fewer",
        ),
        (
            {"expert_hidden_units": ()},
            r"expert_hidden_units: expected at least one layer, got \[\]",
        ),
        ({"gate_hidden_units": (4, 0)}, "gate_hidden_units: expected at least 1, got 0"),
        ({"net_dropout": 1.0}, r"net_dropout: expected a number in \[0, 1\), got 1\.0"),
        ({"tasks": []}, r"tasks: expected one or more different names, got \[\]"),
        ({"tasks": ["a", "a"]}, r"tasks: expected one or more different names, got \['a', 'a'\]"),
        (
            {"vocab_sizes": {}},
            "fields: expected at least one in vocab_sizes, numeric or sequences, got",
        ),
        (
            {"numeric": ["user"]},
            r"fields: expected different names, got \['user', 'item', 'user'\]",
        ),
        ({"fields": ["user"]}, r"fields: expected each of \['user', 'item'\] once, got \['user'\]"),
        (
            {"pooling": {"history": "mean"}},
            r"pooling: expected each of \[\], got \{'history': 'mean'\}",
        ),
        (
            {"sequences": {"h": 3}, "pooling": "max"},
            "sequence 'h': expected pooling mean or sum, got 'max'",
        ),
        (
            {"kinds": {"clik": "binary"}},
            r"kinds: expected tasks of \['click', 'like', 'follow'\], got 'clik'",
        ),
        (
            {"kinds": {"click": "ranking"}},
            "task 'click': expected a kind of binary, regression, regression:log1p,",
        ),
        ({"scales": {"click": (0, 1)}}, "scales: expected regression tasks, got 'click'"),
        ({"scales": {"clik": (0, 1)}}, "scales: expected regression tasks, got 'clik'"),
        (
            {"kinds": {"click": "regression"}, "scales": {"click": (0, 0)}},
            r"scales of 'click': expected a mean and a deviation above 0, got \(0, 0\)",
        ),
        (
            {"kinds": {"click": "regression"}, "scales": {"click": 3}},
            "scales of 'click': expected a mean and a deviation above 0, got 3",
        ),
        (
            {"kinds": {"click": "regression"}, "scales": {"click": (math.nan, 1)}},
            r"scales of 'click': expected a mean and a deviation above 0, got \(nan, 1\)",
        ),
        ({"hidden_activations": "rellu"}, "unknown activation 'rellu'"),
        ({"tasks": "like"}, "tasks: expected a list, got 'like'"),
        ({"numeric": "age"}, "numeric: expected a list, got 'age'"),
        ({"fields": "user"}, "fields: expected a list, got 'user'"),
        ({"expert_hidden_units": 64}, "expert_hidden_units: expected a list, got 64"),
        ({"kinds": ["binary"]}, r"kinds: expected a mapping from names, got \['binary'\]"),
        (
            {"vocab_sizes": {"user": 10.5}},
            r"the vocabulary of 'user': expected a whole number, got 10\.5",
        ),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"vocab_sizes": VOCAB, "tasks": TASKS, **SMALL, **options}
    with pytest.raises(ValueError, match=message):
        STEMNet(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"towers": (0,)}, "towers: expected 3 entries, got 1"),
        ({"towers": (0, 1, 4)}, "towers: expected numbers from 0 to 3, got 4"),
        ({"learn": (1,)}, "learn: expected 4 entries, got 1"),
        ({"learn": (63, 1, 1, 1)}, "learn: expected masks from 0b0 to 0b11111, got 0b111111"),
        (
            {"learn": (1, 2, 4, 8), "see": (31, 31, 31, 7)},
            r"learn: expected only experts in see \(0b111\), got 0b1000",
        ),
        ({"see": (31, 31, 0, 31)}, "see: expected masks from 0b1 to 0b11111, got 0b0"),
        ({"see": (31, 31, 31, 32)}, "see: expected masks from 0b1 to 0b11111, got 0b100000"),
        ({"gates": ()}, "see: expected one expert a mixture without gates, got several"),
        (
            {"gates": ((0,), (1,), (), (3,))},
            "gates: expected at least one input a gate, got a gate of none",
        ),
        ({"gates": ((0,), (1,), (9,), (3,))}, "gates: expected numbers from 0 to 3, got 9"),
        ({"reads": (0, 1, 2, 3, 4)}, "reads: expected numbers from 0 to 3, got 4"),
        ({"spaces": (0, 1)}, "reads: expected numbers from 0 to 1, got 2"),
        ({"spaces": (0, 1, -2, 3)}, "spaces: expected numbers from 0 to 3, got -2"),
    ],
)
def test_wires_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    class Own(STEMNet):
        @staticmethod
        def wire(tasks: int, specific: int, shared: int) -> Wiring:
            return dataclasses.replace(STEMNet.wire(tasks, specific, shared), **change)

    with pytest.raises(ValueError, match=f"wire: {message}"):
        Own(VOCAB, TASKS, num_shared_experts=2, **SMALL)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            SharedBottom,
            {"num_shared_experts": 2},
            "SharedBottom: expected num_shared_experts 1 and num_specific_experts 0,",
        ),
        (MMoE, {"num_specific_experts": 1}, "num_specific_experts: expected 0 for MMoE, got 1"),
        (MMoE, {"num_layers": 2}, "num_layers: expected 1 for MMoE, got 2"),
        (
            SingleTask,
            {"num_shared_experts": 1},
            "SingleTask: expected num_shared_experts 0 and num_specific_experts of",
        ),
        (
            PLE,
            {"num_shared_experts": 0},
            "num_shared_experts: expected at least 1 for PLE's shared gate, got 0",
        ),
    ],
)
def test_options_that_a_model_has_no_use_for(
    model: type[STEMNet], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(VOCAB, TASKS, **SMALL, **options)


def test_ids_outside_the_vocabulary_name_the_field() -> None:
    bad = ids()
    bad[2, 1] = 9
    with pytest.raises(IndexError, match="field 'item': id 9 at row 2 is outside its"):
        small()(bad)


@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_graph(name: str) -> None:
    model = small(name).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(ids())
    torch.testing.assert_close(out, model(ids()))
    grads = torch.autograd.grad(out.sum(), model.embedding.weight)
    expected = torch.autograd.grad(model(ids()).sum(), model.embedding.weight)
    torch.testing.assert_close(grads, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor itself
def test_compiles_with_inductor() -> None:
    """Generated code believes the shapes and strides that the ops' fakes promise."""
    model = small().float()
    compiled = torch.compile(model, fullgraph=True)
    grads = torch.autograd.grad(compiled(ids()).sum(), model.embedding.weight)
    torch.testing.assert_close(
        grads, torch.autograd.grad(model(ids()).sum(), model.embedding.weight)
    )


EXTRAS: dict[str, Any] = {
    "numeric": ["price"],
    "sequences": {"history": "item", "tags": 5},
    "pooling": {"history": "mean", "tags": "sum"},
    "fields": ["tags", "user", "price", "item", "history"],
}


def sample(batch: int, jagged: bool = False) -> tuple[Any, ...]:
    """Inputs of a model with EXTRAS."""
    draw = torch.Generator().manual_seed(batch)
    padded = {
        "history": torch.randint(0, 9, (batch, 3), generator=draw),
        "tags": torch.randint(0, 5, (batch, 2), generator=draw),
    }
    flat = {
        name: (values.flatten(), torch.arange(batch + 1) * values.shape[1])
        for name, values in padded.items()
    }
    return ids(batch), torch.randn(batch, 1, generator=draw).double(), flat if jagged else padded


@pytest.mark.parametrize("jagged", [False, True], ids=["padded", "jagged"])
@pytest.mark.parametrize("name", MODELS)
def test_exports_with_a_dynamic_batch(name: str, jagged: bool) -> None:
    model = small(name, **EXTRAS).eval()
    batch = torch.export.Dim("batch")
    rows = {0: batch}
    shapes: dict[str, Any] = {
        field: ({0: torch.export.Dim(f"{field}_values")}, {0: batch + 1})
        if jagged
        else {0: batch, 1: torch.export.Dim(f"{field}_length")}
        for field in EXTRAS["sequences"]
    }
    shapes = {"ids": rows, "numeric": rows, "sequences": shapes}
    program = torch.export.export(model, sample(4, jagged), dynamic_shapes=shapes).module()
    for size in (7, 2, 1, 0):
        given = sample(size, jagged)
        torch.testing.assert_close(program(*given), model(*given))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch itself
def test_compiles_with_aot_inductor(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = {"expert_hidden_units": (4,), "gate_hidden_units": (), "tower_hidden_units": ()}
    model = small("mmoe", **sizes).float().eval()
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (ids(4),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={  # half the time of the C++ compiler
            "aot_inductor.compile_wrapper_opt_level": "O0",
            "aot_inductor.precompile_headers": False,
            "cpp_cache_precompile_headers": False,
        },
    )
    run = torch._inductor.aoti_load_package(package)
    for size in (7, 1, 0):
        torch.testing.assert_close(run(ids(size)), model(ids(size)))
    wrong = ids(3)
    wrong[2, 0] = 6
    with pytest.raises(RuntimeError) as caught:
        run(wrong)
    said = str(caught.value) + capfd.readouterr().err  # where torch 2.11 says it
    assert "field 'user': id 6 at row 2 is outside" in said


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_transforms_of_torch_func_agree_with_autograd(name: str, sparse: bool) -> None:
    model = small(name, **EXTRAS)
    given, labels = sample(6, jagged=True), torch.rand(6, len(TASKS)).double()
    weights = {key: p.detach() for key, p in model.named_parameters()}
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return model.loss(torch.func.functional_call(model, weights, given), labels)

    expected = torch.autograd.grad(
        model.loss(model(*given), labels), list(model.parameters()), **options
    )
    logits = model(*given)
    expected_vjp = torch.autograd.grad(logits, list(model.parameters()), logits.detach(), **options)
    model.embedding.sparse = sparse  # a transform wants a dense gradient all the same
    found = torch.func.grad(loss)(weights)
    assert found["embedding.weight"].any()
    for actual, right in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(actual, right)
    out, pull = torch.func.vjp(lambda w: torch.func.functional_call(model, w, given), weights)
    torch.testing.assert_close(out, logits.detach())
    for actual, right in zip(pull(logits.detach())[0].values(), expected_vjp, strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@pytest.mark.parametrize("copied", [False, True], ids=["", "deepcopy"])
def test_a_model_that_began_on_meta_is_what_it_loads(assign: bool, copied: bool) -> None:
    right = small(**EXTRAS, batch_norm=True).eval()
    with torch.device("meta"):
        model = STEMNet(VOCAB, TASKS, **SMALL, num_shared_experts=2, **EXTRAS, batch_norm=True)
    model = copy.deepcopy(model) if copied else model
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if not assign:
        model.double().to_empty(device="cpu")
    model.load_state_dict(right.state_dict(), assign=assign)
    given = sample(6)
    assert torch.equal(model.eval()(*given), right(*given))
    with pytest.raises(IndexError, match="field 'user': id 6 at row 0"):
        model(given[0].clone().fill_(6), *given[1:])


@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_parameters_of_an_emptied_model_are_drawn_anew(activation: str) -> None:
    options = {**SMALL, **EXTRAS, "batch_norm": True, "hidden_activations": activation}
    torch.manual_seed(4)
    right = STEMNet(VOCAB, TASKS, **options)
    model = copy.deepcopy(right).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
    torch.manual_seed(4)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[name]), name


def test_a_model_of_numeric_fields_alone_trains() -> None:
    model = STEMNet({}, ["a", "b"], numeric=["p", "q"], expert_hidden_units=[4])
    model(torch.zeros(3, 0, dtype=torch.int64), torch.randn(3, 2)).sum().backward()
    assert model.embedding.numeric_weight.grad.any()


def test_the_model_agrees_with_the_reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(num_layers=2)
    model(ids()).sin().sum().backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr("stem_fast.ops.lookup", lambda *arguments: reference.lookup(*arguments[:7]))
    monkeypatch.setattr("stem_fast.ops.mixture", reference.mixture)
    model(ids()).sin().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(fast[name], p.grad)
