"""TrainStep against train_step: the same steps, replayed from a CUDA graph or, without a GPU, from
a stand-in for one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from cases import Ops
from torch import nn

from stem_fast.common import DataError
from stem_fast.data.dataset import Batch, Dataset
from stem_fast.models.family import MODELS
from stem_fast.models.network import STEMNet
from stem_fast.nn import arena
from stem_fast.optim import base, step_log
from stem_fast.training import fit as train
from stem_fast.training import step as steps
from stem_fast.training.options import EMBEDDING_OPTIMIZERS, TrainingConfig

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
ROWS, BATCH = 150, 20  # the last batch of an epoch is shorter


def model(name: str = "stem", **options: Any) -> STEMNet:
    """Of every kind of field, in float64."""
    torch.manual_seed(3)
    sizes = {"expert_hidden_units": (16, 8), "gate_hidden_units": (8,), "tower_hidden_units": (8,)}
    experts = {"single": 0, "shared_bottom": 1}.get(name, 2)
    return MODELS[name](
        {"user": 30, "item": 20},
        ["click", "time"],
        embedding_dim=4,
        num_shared_experts=experts,
        numeric=["price"],
        sequences={"seen": "item"},
        kinds={"time": "regression"},
        scales={"time": (0.5, 0.25)},
        **{**sizes, **options},
    ).double()


def data() -> Dataset:
    draw = torch.Generator().manual_seed(4)
    ids = torch.stack([torch.randint(1, n, (ROWS,), generator=draw) for n in (30, 20)], 1)
    lengths = torch.randint(0, 6, (ROWS,), generator=draw)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    seen = torch.randint(1, 20, (int(offsets[-1]),), generator=draw)
    labels = torch.stack([(ids[:, 0] + ids[:, 1]) % 2, ids[:, 1]], 1).float() / 20
    labels[:, 0] *= 20
    labels[::7, 0] = torch.nan
    return Dataset(
        ids.int(),
        torch.randn(ROWS, 1, generator=draw),
        {"seen": (seen.int(), offsets)},
        labels,
        torch.rand(ROWS, generator=draw),
    )


def config(**options: Any) -> TrainingConfig:
    given = {
        "epochs": 3,
        "batch_size": BATCH,
        "learning_rate": 0.01,
        "embedding_regularizer": 1e-3,
        "max_gradient_norm": 0.5,
        "precision": "fp64",
        "monitor": "auc",
    }
    return TrainingConfig(**{**given, **options})


def trained(settings: TrainingConfig, device: str, whole: bool, **options: Any) -> STEMNet:
    """After two epochs, the second with another learning rate, and a look at the model between."""
    found = model(**options).to(device)
    optimizers = train.make_optimizers(found, settings)
    step = steps.TrainStep(found, optimizers, settings)
    losses = []
    for epoch in range(2):
        for batch in data().batches(BATCH, seed=epoch, device=device):
            losses.append(
                step(batch) if whole else steps.train_step(found, optimizers, batch, settings)
            )
        first = data().batches(BATCH, device=device)
        ids, numeric, sequences, *_ = next(iter(first))
        losses.append(found.predict(ids, numeric, sequences).sum())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
    found.embedding.release()
    found.losses = torch.stack([loss.double().cpu() for loss in losses])
    assert not whole or step.graph is not None
    return found


class StandIn:
    """A CUDA graph on the CPU. It has no memory of kernels: what it replays is a train_step, which
    must do what the captured one did."""

    step: steps.TrainStep  # whose graphs these are
    capturing = False

    @contextlib.contextmanager
    def capture(self, **options: Any) -> Iterator[None]:
        StandIn.capturing = True
        try:
            with Ops() as self.ops:
                yield
        finally:
            StandIn.capturing = False
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return  # the stand-in's capture has made the step
        step = self.step
        assert step.batch is not None
        StandIn.capturing = True  # the host decides nothing anew
        with Ops() as ops:
            loss = steps.train_step(step.model, step.optimizers, step.batch, step.config)
        StandIn.capturing = False
        assert ops.seen == self.ops.seen
        step.loss.copy_(loss)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """TrainStep and the optimizers as on CUDA."""

    def capturable(step: steps.TrainStep, batch: Any) -> bool:
        StandIn.step = step
        return len(batch.ids) == step.config.batch_size and step.model.training

    monkeypatch.setattr(steps.TrainStep, "_capturable", capturable)
    for module in (base, step_log):
        monkeypatch.setattr(module, "is_captured", lambda tensor: StandIn.capturing)
    for module in (arena, steps):
        monkeypatch.setattr(module, "runs_ahead", lambda tensor: True)
    for name, fake in {
        "Stream": lambda *_: mock.MagicMock(),
        "current_stream": mock.MagicMock,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "CUDAGraph": StandIn,
        "graph": lambda graph, **options: graph.capture(**options),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """ "cuda", or "cpu" with the stand-in."""
    if request.param == "cpu":
        request.getfixturevalue("stand_in")
    return str(request.param)


everywhere = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=gpu)], indirect=True
)


@everywhere
@pytest.mark.parametrize("name", EMBEDDING_OPTIMIZERS)
@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_steps_are_train_steps(
    name: str, norm: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With flushes in the middle of each epoch."""
    monkeypatch.setattr(steps, "FLUSH", 2)
    settings = config(embedding_optimizer=name, max_gradient_norm=norm)
    ours, theirs = (trained(settings, device, whole) for whole in (True, False))
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-9, atol=0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("size", [1, 7, BATCH - 1])
@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in MODELS), ("stem", {"num_layers": 2})]
)
def test_micro_batches_change_nothing_but_memory(
    name: str, options: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses with missing labels and weights, every gradient, clipping and updates."""
    network, rows = STEMNet._network, []

    def counted(own: STEMNet, x: torch.Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled():  # not of the prediction between the epochs
            rows.append(x.shape[1])
        return network(own, x, *rest)

    monkeypatch.setattr(STEMNet, "_network", counted)
    found = []
    for micro in (0, size):
        settings = config(micro_batch_size=micro, net_regularizer=0.1, task_weights=(1.0, 0.5))
        rows.clear()
        found.append(trained(settings, "cpu", False, name=name, **options))
    assert max(rows) == size
    assert sum(rows) == 2 * ROWS
    torch.testing.assert_close(found[1].losses, found[0].losses, rtol=1e-10, atol=0)
    for one, other in zip(*(each.parameters() for each in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@everywhere
def test_micro_batches_are_captured(device: str) -> None:
    ours = trained(config(micro_batch_size=7), device, True)
    theirs = trained(config(), device, False)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-9, atol=0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_micro_batches_of_a_model_with_frozen_embeddings() -> None:
    found = []
    for micro in (0, 7):
        settings, each = config(micro_batch_size=micro), model()
        each.embedding.requires_grad_(False)
        step = steps.TrainStep(each, train.make_optimizers(each, settings), settings)
        found.append([step(batch) for batch in data().batches(BATCH)])
    torch.testing.assert_close(*map(torch.stack, found), rtol=1e-10, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_in_kept_memory(precision: str) -> None:
    """At sizes whose buffers are handed from step to step, in types with products of their own."""
    torch.manual_seed(5)
    batches = [
        Batch(
            torch.randint(0, 500, (2100, 8), dtype=torch.int32),
            None,
            {},
            torch.randint(0, 2, (2100, 2)).float(),
            None,
        )
        for _ in range(3)
    ]
    found = []
    for name, micro in (("fp64", 0), (precision, 0), (precision, 700)):
        torch.manual_seed(6)
        own = STEMNet(
            {str(n): 500 for n in range(8)},
            ["click", "like"],
            embedding_dim=32,
            num_shared_experts=2,
            expert_hidden_units=(256, 128),
        )
        nn.init.normal_(own.embedding.weight, std=0.1)
        # Adam's first steps are gradients' signs, which rounding turns: short ones change little.
        settings = TrainingConfig(precision=name, micro_batch_size=micro, learning_rate=1e-7)
        own = own.double() if name == "fp64" else own
        optimizers = train.make_optimizers(own, settings)
        losses = [steps.train_step(own, optimizers, batch, settings) for batch in batches]
        grads = [p.grad.to_dense().flatten() for p in own.parameters() if p.grad is not None]
        found.append([torch.stack(losses), *grads])
    for exact, whole, parts in zip(*found, strict=True):
        size = exact.norm()
        error = (whole - exact).norm() / size
        assert (parts - exact).norm() / size <= 2 * error + 1e-6
        assert error < (0.2 if precision == "bf16" else 1e-3)


def test_a_net_regularizer_where_the_table_alone_is_trained() -> None:
    own, settings = model(), config(net_regularizer=0.1)
    own.requires_grad_(False)
    own.embedding.weight.requires_grad_(True)
    optimizers = train.make_optimizers(own, settings)
    before = own.embedding.weight.detach().clone()
    for batch in data().batches(BATCH):
        steps.train_step(own, optimizers, batch, settings)
    own.embedding.release()
    assert (own.embedding.weight != before).any()


class OwnForward(STEMNet):
    def forward(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return super().forward(*arguments, **options)


class OwnLoss(STEMNet):
    def loss(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return super().loss(*arguments, **options)


def test_micro_batches_are_refused_where_they_would_change_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = "has a {} of its own, of whole batches: set it to 0"
    for kind, options, message in [
        (STEMNet, {"batch_norm": True}, "the model has batch norm"),
        (STEMNet, {"hidden_activations": "dice"}, "the model has batch norm"),
        (OwnForward, {}, f"OwnForward {own.format('forward')}"),
        (OwnLoss, {}, f"OwnLoss {own.format('loss')}"),
    ]:
        monkeypatch.setitem(MODELS, "stem", kind)
        with pytest.raises(DataError, match=f"micro_batch_size is 7, and {message}"):
            trained(config(micro_batch_size=7), "cpu", False, **options)
        assert trained(config(), "cpu", False, **options).losses.isfinite().all()


@everywhere
@pytest.mark.parametrize(
    "change",
    ["lr", "weight_decay", "state", "table", "lr of the table", "lr in a tensor", "frozen"],
)
def test_a_graph_is_captured_anew(change: str, device: str) -> None:
    """Where it would go on with options or memory that are no longer the optimizers'."""
    settings, changed = config(), steps.WARM_UP + 2
    ours, theirs = (model().to(device) for _ in range(2))
    optimizers = [train.make_optimizers(each, settings) for each in (ours, theirs)]
    if change == "lr in a tensor":
        for _, table in optimizers:
            table.param_groups[0]["lr"] = torch.tensor(0.01)
    step = steps.TrainStep(ours, optimizers[0], settings)
    epochs = (data().batches(BATCH, seed=seed, device=device) for seed in (1, 2))
    batches = [batch for epoch in epochs for batch in epoch if len(batch.ids) == BATCH]
    for number, batch in enumerate(batches[: changed + steps.WARM_UP + 3]):
        if number == changed:
            before = step.graph
            assert before is not None
            for dense, table in optimizers:
                if change == "state":
                    dense.load_state_dict(copy.deepcopy(dense.state_dict()))
                elif change == "table":
                    table.load_state_dict(table.state_dict())
                elif change == "lr of the table":
                    table.param_groups[0]["lr"] = 0.05
                elif change == "lr in a tensor":
                    table.param_groups[0]["lr"].fill_(0.05)
                elif change == "frozen":
                    for each in (ours, theirs):
                        each.towers.requires_grad_(False)
                else:  # torch's Adam's weight_decay is set by no step
                    dense.param_groups[0][change] = 0.05
        expected = steps.train_step(theirs, optimizers[1], batch, settings)
        torch.testing.assert_close(step(batch), expected, rtol=1e-9, atol=0)
    assert step.graph not in (None, before)


@everywhere
@pytest.mark.parametrize("failing", [0, 1, steps.WARM_UP])
def test_a_failed_step_leaves_no_graph(
    failing: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, settings = model().to(device), config()
    step = steps.TrainStep(found, train.make_optimizers(found, settings), settings)
    real, calls = steps.train_step, 0

    def fails_once(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise torch.OutOfMemoryError("no room")
        return real(*arguments)

    monkeypatch.setattr(steps, "train_step", fails_once)
    batches = list(data().batches(BATCH, device=device))
    for batch in batches[:failing]:
        step(batch)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        step(batches[failing])
    assert step.graph is None
    for batch in batches[failing : steps.WARM_UP + 1]:
        assert step(batch).isfinite()
    assert step.graph is not None


@everywhere
def test_a_batch_of_another_shape_is_refused_as_by_train_step(device: str) -> None:
    found, settings = model().to(device), config()
    step = steps.TrainStep(found, train.make_optimizers(found, settings), settings)
    batches = list(data().batches(BATCH, device=device))[: steps.WARM_UP + 1]
    assert batches[0].labels is not None
    wrong = batches[0]._replace(labels=batches[0].labels[:, :1])
    for batch in (wrong, *batches, wrong, batches[0]._replace(sequences={})):
        if any(batch is right for right in batches):
            step(batch)
        else:
            with pytest.raises(ValueError, match=r"labels: expected shape|'seen'"):
                step(batch)


@everywhere
@pytest.mark.parametrize("name", ["adam", "dense_adam"])
def test_longer_sequences_get_more_room(name: str, device: str) -> None:
    settings = config(embedding_optimizer=name)
    ours = [model().to(device) for _ in range(2)]
    optimizers = [train.make_optimizers(each, settings) for each in ours]
    step = steps.TrainStep(ours[0], optimizers[0], settings)
    batches = list(data().batches(BATCH, device=device))[: steps.WARM_UP + 2]
    longest = batches[0]
    values, offsets = longest.sequences["seen"]
    longest = longest._replace(sequences={"seen": (values.repeat(9), offsets * 9)})
    for batch in (*batches, longest, *batches):
        expected = steps.train_step(ours[1], optimizers[1], batch, settings)
        torch.testing.assert_close(step(batch), expected, rtol=1e-9, atol=0)
    assert step.batch is not None
    assert len(step.batch.sequences["seen"][0]) >= 9 * len(values)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("options", [{"batch_norm": True}, {"net_dropout": 0.2}])
def test_steps_of_models_with_batch_norm_and_dropout(options: dict[str, Any], device: str) -> None:
    """Masks are drawn anew in every replay: training goes on, and no two losses are alike."""
    found = trained(config(), device, whole=True, **options)
    assert found.losses.isfinite().all()
    if "batch_norm" in options:
        other = trained(config(), device, whole=False, **options)
        torch.testing.assert_close(found.losses, other.losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.state_dict(), other.state_dict(), rtol=1e-7, atol=1e-10)
    else:
        assert len(found.losses.unique()) == len(found.losses)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_without_a_backend_on_the_gpu_no_step_is_captured(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps.ops, "capturable", lambda: False)
    found = model().to(device)
    step = steps.TrainStep(found, train.make_optimizers(found, config()), config())
    for batch in data().batches(BATCH, device=device):
        assert step(batch).isfinite()
    assert step.graph is None


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("resident", [True, False])
def test_fit_is_what_it_is_on_the_cpu(
    resident: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 the same losses and metrics, from data on the device or copied batch by batch."""
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 10))
    histories = []
    for where in ("cpu", device):
        found = model()
        if where == device and not resident:
            with pytest.warns(UserWarning, match="batches are copied there one by one"):
                histories.append(train.fit(found, data(), data(), config(), device=where))
        else:
            histories.append(train.fit(found, data(), data(), config(), device=where))
    for ours, theirs in zip(*histories, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-9)
        assert ours.metrics["tasks"]["time"]["rmse"] == pytest.approx(
            theirs.metrics["tasks"]["time"]["rmse"], rel=1e-5
        )
        assert ours.monitor == pytest.approx(theirs.monitor, abs=1e-3)


def test_data_moves_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what gradients and the optimizer's state will leave is the data's, all of it."""
    found, rows = model(), data()
    free = 3 * sum(p.nbytes for p in found.parameters()) + 2 * rows.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    with pytest.warns(UserWarning, match=r"the validation data takes 0\.0 GB, and 0\.0 GB of cpu"):
        train_rows, valid_rows = train._resident(
            {"training": rows, "validation": rows}, found, "cpu"
        )
    assert train_rows is not rows
    assert valid_rows is rows
    free -= 2
    with pytest.warns(UserWarning, match="the training data"):
        assert train._resident({"training": rows}, found, "cpu") == [rows]
