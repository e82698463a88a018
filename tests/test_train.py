"""Training: the official step and its early stopping, monitors, seeds, and what is refused."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stem_fast.common import DataError
from stem_fast.data.dataset import Batch, Dataset
from stem_fast.models.network import STEMNet
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.optim import ExactAdam
from stem_fast.training import fit as train
from stem_fast.training.fit import Monitor, TrainingError
from stem_fast.training.options import EMBEDDING_OPTIMIZERS, TrainingConfig
from stem_fast.training.step import clip_grad_norm_

TINY = {
    "embedding_dim": 4,
    "num_shared_experts": 2,
    "expert_hidden_units": (8,),
    "gate_hidden_units": (4,),
    "tower_hidden_units": (4,),
}


def tiny_model(seed: int = 0, **options: object) -> STEMNet:
    torch.manual_seed(seed)
    return STEMNet({"user": 12, "item": 9}, ["click", "like"], **{**TINY, **options})


def tiny_data(rows: int = 300, seed: int = 0, *, missing: float = 0.0) -> Dataset:
    """Labels that the ids explain, some of them missing, and groups by user."""
    generator = np.random.default_rng(seed)
    user, item = generator.integers(1, 12, rows), generator.integers(1, 9, rows)
    score = np.stack([user % 3 - item % 2, item % 4 - user % 2], 1) + generator.normal(
        size=(rows, 2)
    )
    labels = (score > 0.5).astype(np.float32)
    labels[generator.random((rows, 2)) < missing] = np.nan
    ids = np.stack([user, item], 1).astype(np.int32)
    return Dataset(
        torch.from_numpy(ids), labels=torch.from_numpy(labels), group=user.astype(np.int32)
    )


def config(**options: object) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 3, "batch_size": 64, "learning_rate": 0.01, **options})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are faster on one thread, and many times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- one step ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.05, 10.0, 0.0])
def test_train_step_is_loss_plus_l2_clip_and_adam(max_norm: float) -> None:
    """Against the official step written out with torch.optim.Adam and autograd only."""
    settings = config(embedding_regularizer=0.3, net_regularizer=0.2, max_gradient_norm=max_norm)
    model, data = tiny_model().double(), tiny_data(40)
    twin = tiny_model().double()
    optimizer, other = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin))
    for batch in data.batches(20):
        loss = train.train_step(model, [optimizer], batch, settings)
        other.zero_grad()
        logits = twin(batch.ids)
        expected = sum(
            nn.functional.binary_cross_entropy(logits[:, t].sigmoid(), batch.labels[:, t].double())
            for t in range(2)
        )
        for name, parameter in twin.named_parameters():
            strength = 0.3 if name == "embedding.weight" else 0.2
            expected = expected + strength / 2 * parameter.norm() ** 2
        expected.backward()
        grads = [p.grad for p in twin.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        if max_norm and norm > max_norm:
            for grad in grads:
                grad *= max_norm / (norm + 1e-6)
        other.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        assert not loss.requires_grad
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.05, 0.0])
def test_exact_adam_trains_as_dense_adam_does(max_norm: float) -> None:
    """The default optimizer against torch's on every table, L2 and clipping included."""
    data, models = tiny_data(60), []
    for name in ("adam", "dense_adam"):
        settings = config(
            embedding_regularizer=1e-6, max_gradient_norm=max_norm, embedding_optimizer=name
        )
        model = tiny_model().double()
        optimizers = train.make_optimizers(model, settings)
        for _ in range(5):
            for batch in data.batches(6):
                train.train_step(model, optimizers, batch, settings)
        model.embedding.release()
        models.append(model)
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        # Where it clips, the norm of the L2 term of rows outside the batch is left out.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-8 if max_norm else 1e-13)


def test_a_table_has_one_weight_decay() -> None:
    """Its optimizer's own where there is no embedding_regularizer; never two."""
    batch = next(iter(tiny_data(6).batches(6)))
    for options in ({"weight_decay": 0.1}, {"decoupled": True}):
        model = tiny_model()
        table = ExactAdam(model.embedding, **options)
        with pytest.raises(
            DataError, match=r"embedding_regularizer is 0\.3, and the table's Exact"
        ):
            train.train_step(model, [table], batch, config(embedding_regularizer=0.3))
        train.train_step(model, [table], batch, config(embedding_regularizer=0.0))
        assert table.param_groups[0]["weight_decay"] == options.get("weight_decay", 0.0)
    model = tiny_model()
    table = ExactAdam([{"params": model.embedding, "weight_decay": 0.1}])
    with pytest.raises(DataError, match=r"a weight decay of its own \(weight_decay=0\.1"):
        train.train_step(model, [table], batch, config(embedding_regularizer=0.3))
    table.param_groups[0]["weight_decay"] = 0.0
    train.train_step(model, [table], batch, config(embedding_regularizer=0.3))
    assert table.param_groups[0]["weight_decay"] == 0.0  # that was the step's alone


@pytest.mark.parametrize("max_norm", [1e-3, 10.0, 0.0])
@pytest.mark.parametrize("strength", [0.0, 5.0])
def test_gradients_of_a_table_are_clipped_with_the_others(max_norm: float, strength: float) -> None:
    """The L2 term of the batch's rows counts in the norm, and is the optimizer's to add."""
    batch = next(iter(tiny_data(6).batches(6)))
    models = [tiny_model().double(), tiny_model().double()]
    ExactAdam(models[0].embedding)
    for model in models:
        nn.init.normal_(model.embedding.weight, generator=torch.Generator().manual_seed(0))
        model.loss(model(batch.ids), batch.labels).backward()
    table = models[1].embedding.weight
    decay = strength * table.detach() * (table.grad != 0)
    table.grad += decay
    norm = torch.stack([p.grad.norm() for p in models[1].parameters()]).norm()
    right = min(1.0, max_norm / (norm.item() + 1e-6)) if max_norm else 1.0
    factor = clip_grad_norm_(models[0], max_norm, embedding_regularizer=strength)
    assert float(factor) == pytest.approx(right, rel=1e-12)
    assert (factor == 1) == (not max_norm or norm < max_norm)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        grad = ours.grad.to_dense() if ours.grad.is_sparse else ours.grad
        expected = theirs.grad - decay if theirs is table else theirs.grad
        torch.testing.assert_close(grad, expected * right, rtol=1e-9, atol=1e-12)


def test_fp64_trains_with_exact_adam_as_with_dense_adam() -> None:
    """Whole trainings: in float64 only rounding of 1e-16 is between them, and the L2 term."""
    data, metrics, models = tiny_data(256), [], []
    for name in ("adam", "dense_adam"):
        model = tiny_model()
        settings = config(
            epochs=3, batch_size=32, embedding_regularizer=1e-6, embedding_optimizer=name,
            precision="fp64",
        )  # fmt: skip
        metrics.append([record.metrics for record in train.fit(model, data, data, settings)])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        models.append(model)
    assert metrics[0] == metrics[1]  # made from float32 predictions
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    (fp32,) = train.fit(tiny_model(), data, data, config(epochs=1, batch_size=32))
    assert fp32.metrics != metrics[0][0]


@pytest.mark.parametrize(
    ("options", "micro"), [({}, 0), ({}, 24), ({"net_dropout": 0.1}, 0), ({"batch_norm": True}, 0)]
)
def test_bf16_trains_as_fp32_does(options: dict[str, object], micro: int) -> None:
    """Step by step close to it, with weights and gradients in float32; and learns."""
    data, losses = tiny_data(256), []
    for precision in ("fp32", "bf16"):
        settings = config(precision=precision, micro_batch_size=micro if precision == "bf16" else 0)
        model = tiny_model(**options)
        optimizers = train.make_optimizers(model, settings)
        torch.manual_seed(1)  # of the dropout
        losses.append(
            [
                train.train_step(model, optimizers, batch, settings)
                for _ in range(8)
                for batch in data.batches(64)
            ]
        )
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    fp32, bf16 = (torch.stack(each) for each in losses)
    assert bf16.dtype == torch.float32
    assert not torch.equal(fp32, bf16)
    torch.testing.assert_close(bf16, fp32, rtol=0.05, atol=0)
    assert bf16[-4:].mean() < bf16[:4].mean() - 0.02


@pytest.mark.parametrize("name", EMBEDDING_OPTIMIZERS)
def test_every_embedding_optimizer_trains_and_lets_go(name: str) -> None:
    model, data = tiny_model(), tiny_data(60)
    before = model.embedding.weight.detach().clone()
    settings = config(epochs=2, batch_size=20, embedding_optimizer=name)
    history = train.fit(model, data, data, settings)
    assert all(math.isfinite(record.loss) for record in history)
    assert (model.embedding.weight != before).any()
    assert model.embedding.optimizer is None
    assert not model.embedding.sparse


def test_train_step_weighs_tasks_and_rows() -> None:
    data = tiny_data(32)
    weight = torch.linspace(0, 2, 32)
    batch = next(data.batches(32))._replace(weight=weight)
    model = tiny_model()
    optimizer = torch.optim.Adam(model.parameters())
    settings = config(task_weights=(1.0, 0.0), embedding_regularizer=0.0)
    with torch.no_grad():
        logits = model(batch.ids)[:, 0]
    each = nn.functional.binary_cross_entropy_with_logits(
        logits, batch.labels[:, 0], reduction="none"
    )
    loss = train.train_step(model, [optimizer], batch, settings)
    torch.testing.assert_close(loss, (each * weight).mean())


# ---- early stopping ------------------------------------------------------------------------


class Scripted(nn.Module):
    """A model whose gradients are always -1: a step moves its weight, and the row of its table, up
    by their optimizers' learning rates."""

    config: ClassVar = {"tasks": ["click"], "kinds": {"click": "binary"}}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.embedding = EmbeddingArena({"f": 2}, (), {}, {}, 1, 1)

    def forward(self, ids: Tensor, numeric: None, sequences: object) -> Tensor:
        return self.weight + self.embedding(ids)[0][0, :, 0]

    def loss(self, logits: Tensor, labels: Tensor, **_: object) -> Tensor:
        return -logits.mean()

    def regularization(self, embedding: float, net: float) -> Tensor:
        return self.weight.new_zeros(())


def two_rows() -> Dataset:
    """Twice, one of each class."""
    return Dataset(torch.ones(4, 1, dtype=torch.int32), labels=torch.tensor([[0.0], [1.0]] * 2))


def run_script(
    monkeypatch: pytest.MonkeyPatch, aucs: list[float], **options: object
) -> tuple[list[train.EpochRecord], list[float], float]:
    """fit with scripted validation results: records, weights at each on_best, the last weight."""
    records, model, saved = scripted(monkeypatch, aucs, **options)
    return records, saved, model.weight.item()


def scripted(
    monkeypatch: pytest.MonkeyPatch,
    aucs: list[float],
    on_epoch: Callable[[Scripted], None] = lambda _: None,
    **options: object,
) -> tuple[list[train.EpochRecord], Scripted, list[float]]:
    """Records, the model, and its weights at each on_best."""
    script = iter(aucs)

    def result(value: float) -> dict:
        return {"rows": 2, "tasks": {"click": {"auc": value, "logloss": value, "pcoc": value}}}

    monkeypatch.setattr(train, "evaluate", lambda *_, **__: result(next(script)))
    monkeypatch.setattr(train, "score", lambda *_: result(0.5))
    model, saved = Scripted(), []
    data = two_rows()
    records = train.fit(
        model,
        data,
        data,
        TrainingConfig(**{"batch_size": 4, "learning_rate": 1.0, "epochs": len(aucs), **options}),
        on_best=lambda m: saved.append(m.weight.item()),
        on_epoch=lambda _: on_epoch(model),
    )
    return records, model, saved


def test_patience_one_stops_at_the_first_epoch_without_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records, saved, last = run_script(monkeypatch, [0.6, 0.7, 0.65, 0.9])
    assert [r.best for r in records] == [True, True, False]
    assert [r.monitor for r in records] == [0.6, 0.7, 0.65]
    assert [r.epoch for r in records] == [1, 2, 3]
    assert saved == pytest.approx([1.0, 2.0])
    assert last == saved[-1]  # epoch 3 moved the weight, the best one is back


def test_patience_two_counts_epochs_in_a_row_and_lowers_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aucs = [0.6, 0.5, 0.7, 0.5, 0.5, 0.9]
    records, saved, last = run_script(monkeypatch, aucs, patience=2)
    assert [r.best for r in records] == [True, False, True, False, False]
    assert [r.learning_rate for r in records] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert saved == pytest.approx([1.0, 2.1])
    assert last == saved[-1]


def test_rate_does_not_fall_below_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    records, _, _ = run_script(monkeypatch, [0.6] * 10, patience=10)
    rates = [r.learning_rate for r in records]
    assert rates[:2] == [1.0, 1.0]
    assert rates[-2:] == [1e-6, 1e-6]
    assert sorted(rates, reverse=True) == rates


def test_a_rate_below_the_floor_is_not_raised_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    records, _, _ = run_script(monkeypatch, [0.6] * 4, patience=4, learning_rate=1e-7)
    assert [r.learning_rate for r in records] == [1e-7] * 4


@pytest.mark.parametrize("name", EMBEDDING_OPTIMIZERS)
def test_the_rate_of_every_optimizer_falls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [[0.0, 0.0]]

    def note(model: Scripted) -> None:
        model.embedding.flush()
        places.append([model.weight.item(), model.embedding.weight[1].item()])

    aucs = [0.6, 0.5, 0.5, 0.5]
    scripted(monkeypatch, aucs, note, patience=5, embedding_optimizer=name)
    network, table = np.diff(places, axis=0).T
    rates = np.array([1.0, 1.0, 0.1, 0.01])
    assert network == pytest.approx(rates, rel=1e-3)
    if "adagrad" in name:  # the sum of squares grows by 1 a step
        rates /= np.sqrt(np.arange(1, 5))
    assert table == pytest.approx(rates, rel=1e-2)


def test_a_model_in_evaluation_mode_is_trained_in_training_mode() -> None:
    """As one that was loaded to be trained on: in every epoch."""
    data, losses = tiny_data(60), []
    for mode in (True, False):
        model = tiny_model(net_dropout=0.5).train(mode)
        records = train.fit(model, data, data, config(patience=3))
        losses.append([record.loss for record in records])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("monitor", "values", "best"),
    [
        ("auc", [0.6, 0.6 + 0.9e-6], [True, False]),
        ("auc", [0.6, 0.6 + 1.1e-6], [True, True]),
        ("logloss", [0.6, 0.6 - 0.9e-6], [True, False]),
        ("logloss", [0.6, 0.6 - 1.1e-6], [True, True]),
        ("logloss", [0.6, 0.7], [True, False]),
        ("pcoc", [0.8, 1.1], [True, True]),
        ("pcoc", [1.1, 0.8], [True, False]),
    ],
)
def test_an_improvement_is_more_than_a_millionth(
    monkeypatch: pytest.MonkeyPatch, monitor: str, values: list[float], best: list[bool]
) -> None:
    records, _, _ = run_script(monkeypatch, values, monitor=monitor)
    assert [r.best for r in records] == best


def test_training_ends_with_its_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    records, saved, last = run_script(monkeypatch, [0.6, 0.7, 0.8])
    assert len(records) == 3
    assert last == saved[-1] == pytest.approx(3.0)


def test_an_interrupt_leaves_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([0.7, 0.6])

    def evaluate(*_: object, **__: object) -> dict:
        value = next(results, None)
        if value is None:
            raise KeyboardInterrupt
        return {"rows": 2, "tasks": {"click": {"auc": value}}}

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "score", lambda *_: {"tasks": {"click": {"auc": 0.5}}})
    model, data = Scripted(), two_rows()
    settings = TrainingConfig(batch_size=4, learning_rate=1.0, patience=5)
    with pytest.raises(KeyboardInterrupt):
        train.fit(model, data, data, settings)
    assert model.weight.item() == pytest.approx(1.0)


# ---- monitors ------------------------------------------------------------------------------

KINDS = {"finish": "binary", "like": "binary", "time": "regression"}
RESULT = {
    "rows": 9,
    "tasks": {
        "finish": {"auc": 0.8, "gauc": None, "logloss": 0.5, "pcoc": 1.3},
        "like": {"auc": 0.6, "gauc": None, "logloss": 0.1, "pcoc": 0.9},
        "time": {"rmse": 4.0, "mae": 3.0},
    },
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auc", 0.7),
        ("finish.auc", 0.8),
        ("logloss", 0.3),
        ("pcoc", 0.2),
        ("like.pcoc", 0.1),
        ("rmse", 4.0),
        ("time.mae", 3.0),
    ],
)
def test_monitor_value(name: str, value: float) -> None:
    assert Monitor.parse(name, KINDS).value(RESULT) == pytest.approx(value, abs=1e-15)


def test_monitor_leaves_undefined_tasks_out() -> None:
    tasks = {**RESULT["tasks"], "like": {**RESULT["tasks"]["like"], "auc": None}}
    assert Monitor.parse("auc", KINDS).value({"tasks": tasks}) == 0.8


def test_monitor_undefined_everywhere() -> None:
    with pytest.raises(DataError, match=r"'gauc' is undefined .*choose another --monitor"):
        Monitor.parse("gauc", KINDS).value(RESULT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acu", "monitor is 'acu', which no task has.*Did you mean 'auc'"),
        ("finish.aucc", "Did you mean 'finish.auc'"),
        ("time.auc", "'time.auc', which no task has"),
        ("AUC", "Did you mean 'auc'"),
    ],
)
def test_unknown_monitor(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Monitor.parse(name, KINDS)


def test_monitor_that_no_task_has() -> None:
    with pytest.raises(DataError, match="'auc', which no task has: use one of rmse, mae"):
        Monitor.parse("auc", {"time": "regression"})


def test_undefined_monitor_is_refused_before_training() -> None:
    data = tiny_data(40)
    one_class = Dataset(data.ids, labels=torch.zeros(40, 2))
    steps: list[int] = []
    with pytest.raises(DataError, match="no task has both classes"):
        train.fit(tiny_model(), data, one_class, config(), on_step=steps.append)
    assert steps == []


# ---- regression tasks ------------------------------------------------------------------------


def timed_data(rows: int = 300, factor: float = 1.0, shift: float = 0.0) -> Dataset:
    """As ``tiny_data``, with a time for the second label, some of them missing."""
    data, draw = tiny_data(rows), np.random.default_rng(1)
    assert data.labels is not None
    user, item = data.ids.numpy().T
    time = user % 4 + item % 3 + draw.normal(size=rows)
    time[draw.random(rows) < 0.2] = np.nan
    data.labels[:, 1] = torch.from_numpy((time * factor + shift).astype(np.float32))
    return data


def timed_fit(data: Dataset, **options: object) -> tuple[STEMNet, list[train.EpochRecord]]:
    kind = options.pop("kind", "regression")
    model = tiny_model(kinds={"like": kind})
    return model, train.fit(model, data, data, config(epochs=4, patience=4, **options))


def test_the_unit_of_a_regression_changes_nothing_but_its_errors() -> None:
    """A power of two, so that even rounding is the same: bit for bit one training."""
    seconds, (model, records) = timed_data(factor=4096.0), timed_fit(timed_data())
    scaled, others = timed_fit(seconds)
    for ours, theirs in zip(records, others, strict=True):
        assert ours.loss == theirs.loss
        assert ours.metrics["tasks"]["click"] == theirs.metrics["tasks"]["click"]
        for metric, value in ours.metrics["tasks"]["like"].items():
            assert theirs.metrics["tasks"]["like"][metric] == 4096 * value
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, scaled.state_dict()[name])
    predictions = [train.predict(each, seconds)[:, 1] for each in (model, scaled)]
    np.testing.assert_array_equal(predictions[1], 4096 * predictions[0])


def test_a_regression_in_seconds_drowns_no_binary_task() -> None:
    """The training is the one of a column that was standardised by hand."""
    data = timed_data(factor=1e4, shift=3e4)
    assert data.labels is not None
    model, records = timed_fit(data)
    mean, std = model.config["scales"]["like"]
    by_hand = data.labels.clone()
    by_hand[:, 1] = (by_hand[:, 1] - mean) / std
    _, others = timed_fit(Dataset(data.ids, labels=by_hand, group=data.group))
    for ours, theirs in zip(records, others, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        auc, other = (r.metrics["tasks"]["click"]["auc"] for r in (ours, theirs))
        assert auc == pytest.approx(other, abs=1e-4)
        rmse, other = (r.metrics["tasks"]["like"]["rmse"] for r in (ours, theirs))
        assert rmse == pytest.approx(other * std, rel=1e-4)


def test_a_regression_of_logarithms_is_undone_in_predictions() -> None:
    data = timed_data()
    assert data.labels is not None
    model, _ = timed_fit(data)
    logs = train.predict(model, data)[:, 1]
    data.labels[:, 1].expm1_()
    model, records = timed_fit(data, kind="regression:log1p", monitor="auc")
    predicted = train.predict(model, data)[:, 1]
    np.testing.assert_allclose(np.log1p(predicted), logs, rtol=1e-3, atol=1e-4)
    known = ~data.labels[:, 1].isnan().numpy()
    error = np.sqrt(np.mean((predicted - data.labels[:, 1].numpy())[known].astype(float) ** 2))
    assert [r for r in records if r.best][-1].metrics["tasks"]["like"]["rmse"] == pytest.approx(
        error, rel=1e-6
    )


def test_a_model_for_a_state_dict_is_built_from_the_config() -> None:
    """In which fit has left the scales; a program gives the network's standardised values."""
    model, data = tiny_model(kinds={"like": "regression:log1p"}), timed_data(factor=0.1)
    train.fit(model, data, data, config(epochs=1))
    again = STEMNet(**model.config).eval()
    again.load_state_dict(model.state_dict())
    ids = data.ids[:5]
    wanted = model.predict(ids)
    torch.testing.assert_close(again.predict(ids), wanted, rtol=0, atol=0)
    torch.testing.assert_close(again.compile_inference()(ids), wanted)
    mean, std = model.config["scales"]["like"]
    program = torch.export.export(again, (ids,)).module()
    for raw in (again(ids), program(ids)):
        torch.testing.assert_close((raw[:, 1] * std + mean).expm1(), wanted[:, 1])


def test_scales_that_a_model_has_stay() -> None:
    """As those of a run that is trained on: its weights are made for them."""
    model, data = tiny_model(kinds={"like": "regression"}, scales={"like": (5, 2)}), timed_data()
    train.fit(model, data, data, config(epochs=1))
    assert model.config["scales"] == {"like": [5.0, 2.0]}

    class Own(STEMNet):
        def loss(self, logits: Tensor, labels: Tensor, **_: object) -> Tensor:
            return (logits - labels.nan_to_num()).square().mean()

    model = Own({"user": 12, "item": 9}, ["click", "like"], kinds={"like": "regression"}, **TINY)
    train.fit(model, data, data, config(epochs=1))
    assert model.config["scales"] == {}


# ---- whole runs ----------------------------------------------------------------------------


def test_fit_learns_and_records() -> None:
    data, steps = tiny_data(300, missing=0.2), []
    records = train.fit(
        tiny_model(), data, data, config(epochs=6, patience=6), on_step=steps.append
    )
    assert records[-1].monitor > 0.75  # the labels' noise allows about 0.85
    assert sum(steps) == 300 * len(records)
    assert all(r.seconds > 0 and math.isfinite(r.loss) for r in records)
    assert records[0].loss > records[-1].loss
    for record in records:
        aucs = [task["auc"] for task in record.metrics["tasks"].values()]
        assert record.monitor == pytest.approx(sum(aucs) / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_the_model_ends_as_its_best_epoch(precision: str) -> None:
    """Whose metrics are in the training's precision."""
    data = tiny_data(200)
    model = tiny_model()
    settings = config(epochs=8, patience=2, learning_rate=0.2, precision=precision)
    records = train.fit(model, data, data, settings)
    best = [r for r in records if r.best][-1]
    assert best is not records[-1] or precision != "fp32"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = train.evaluate(model, data, batch_size=64, precision=precision)
    if precision == "fp64":  # its weights were rounded at the end
        aucs = ([task["auc"] for task in each["tasks"].values()] for each in (found, best.metrics))
        assert next(aucs) == pytest.approx(next(aucs), abs=1e-3)
    else:
        assert found == best.metrics
    assert (train.evaluate(model, data, batch_size=64) == found) == (precision == "fp32")


def test_an_epoch_is_its_steps() -> None:
    """In the order of its seed; the loss is their mean."""
    data, settings = tiny_data(150), config(epochs=2, patience=2)
    model, twin = tiny_model(), tiny_model()
    records = train.fit(model, data, data, settings)
    optimizers = train.make_optimizers(twin, settings)
    for record in records:
        seed = train.epoch_seed(settings.seed, record.epoch)
        losses = [
            train.train_step(twin, optimizers, batch, settings)
            for batch in data.batches(64, seed=seed)
        ]
        assert len(losses) == 3
        assert record.loss == pytest.approx(torch.stack(losses).double().mean().item(), rel=1e-12)


@pytest.mark.parametrize("error", [None, TrainingError])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp64_gives_a_model_back_in_its_type(
    error: type[Exception] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error:
        monkeypatch.setattr(train, "evaluate", mock.Mock(side_effect=error))
    model, data = tiny_model().to(dtype), tiny_data(60)
    with pytest.raises(error) if error else contextlib.nullcontext():
        train.fit(model, data, data, config(epochs=1, precision="fp64"))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_ids_that_a_device_has_noted_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a prediction, and of an epoch before it is evaluated."""
    model, data = tiny_model(), tiny_data(60)
    asked = mock.Mock(side_effect=IndexError("noted"))
    monkeypatch.setattr(train, "evaluate", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(EmbeddingArena, "raise_bad_ids", asked)
    for run in (lambda: train.predict(model, data), lambda: train.fit(model, data, data, config())):
        with pytest.raises(IndexError, match="noted"):
            run()


@pytest.mark.parametrize(
    ("rows", "batch_size", "threads"),
    [(500, 64, 1), (4000, 4096, 2)],  # the second: batches large enough to be split among threads
)
def test_same_seed_same_numbers(rows: int, batch_size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    data, valid = tiny_data(rows), tiny_data(200, seed=1)

    def once(seed: int) -> tuple[list[dict], list[float], dict[str, Tensor]]:
        model = tiny_model(seed, net_dropout=0.2)
        records = train.fit(model, data, valid, config(seed=seed, batch_size=batch_size, epochs=2))
        return [r.metrics for r in records], [r.loss for r in records], model.state_dict()

    metrics, losses, weights = once(5)
    again_metrics, again_losses, again_weights = once(5)
    assert (metrics, losses) == (again_metrics, again_losses)
    assert all(torch.equal(weights[name], again_weights[name]) for name in weights)
    assert once(6)[1] != losses


def test_epochs_have_orders_of_their_own() -> None:
    seeds = {train.epoch_seed(seed, epoch) for seed in range(50) for epoch in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    train.epoch_seed(2**63 - 1, 1)


@pytest.mark.parametrize("batch_size", [1, 7, 300, 1000])
def test_predict_keeps_rows_in_order(batch_size: int) -> None:
    model, data = tiny_model(), tiny_data(30)
    model.train()
    predictions = train.predict(model, data, batch_size=batch_size)
    assert predictions.dtype == np.float32
    assert model.training
    np.testing.assert_allclose(predictions, model.predict(data.ids).numpy(), rtol=1e-5)


def test_missing_labels_score_the_other_task_only() -> None:
    model, data = tiny_model(), tiny_data(100, missing=0.3)
    result = train.evaluate(model, data)
    kept = ~data.labels[:, 1].isnan()
    alone = Dataset(data.ids[kept], labels=data.labels[kept])
    ours, theirs = (r["tasks"]["like"]["auc"] for r in (result, train.evaluate(model, alone)))
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert result["rows"] == 100


# ---- refusals ------------------------------------------------------------------------------


class Spoiled(Dataset):
    """Gives labels that blow the loss up at one step of one epoch."""

    def batches(self, *args: object, **kwargs: object) -> Iterator[Batch]:
        for step, batch in enumerate(super().batches(*args, **kwargs)):
            if kwargs.get("seed") == train.epoch_seed(2023, 2) and step == 2:
                batch = batch._replace(weight=torch.full((len(batch.ids),), math.inf))
            yield batch


@pytest.mark.parametrize("every", [1, 1000])
def test_a_loss_that_is_not_finite_stops(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    monkeypatch.setattr(train, "LOSS_CHECK", every)
    data = tiny_data(300)
    spoiled = Spoiled(data.ids, labels=data.labels, group=data.group)
    model, best = tiny_model(), []

    def on_best(model: nn.Module) -> None:
        best.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    with pytest.raises(TrainingError, match=r"the loss is (inf|nan) in epoch 2, step 3"):
        train.fit(model, spoiled, data, config(), on_best=on_best)
    assert len(best) == 1
    assert all(torch.equal(best[0][name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("use", [train.evaluate, train.predict])
def test_predictions_that_are_not_finite_are_refused(use: Callable[..., object]) -> None:
    model, data = tiny_model(), tiny_data(10)
    with torch.no_grad():
        model.embedding.weight[model.embedding.tables["user"]][int(data.ids[3, 0])] = math.nan
    row = int((data.ids[:, 0] == data.ids[3, 0]).nonzero()[0])
    with pytest.raises(TrainingError, match=f"the prediction of click is nan in row {row}"):
        use(model, data)


def test_evaluation_needs_labels() -> None:
    data, unlabelled = tiny_data(5), Dataset(tiny_data(5).ids)
    with pytest.raises(DataError, match="without labels, so it cannot be evaluated"):
        train.evaluate(tiny_model(), unlabelled)
    with pytest.raises(DataError, match="without labels, so it cannot train"):
        train.fit(tiny_model(), unlabelled, data, config())


def test_task_weights_fit_the_tasks() -> None:
    data = tiny_data(20)
    with pytest.raises(
        DataError, match=r"task_weights: expected one for each of click, like, got \[1\.0\]\."
    ):
        train.fit(tiny_model(), data, data, config(task_weights=(1.0,)))

    with pytest.raises(
        DataError, match=r"task_weights: expected at least one above 0, got \[0.0, 0.0\]"
    ):
        train.fit(tiny_model(), data, data, config(task_weights=(0.0, 0.0)))


def test_weights_that_train_nothing_are_refused() -> None:
    data, steps = tiny_data(20), []
    for weight, message in (
        (torch.zeros(20), "every sample weight of the training data is 0"),
        (
            torch.arange(20.0) - 19,
            r"sample weight, row 0: expected a finite number of at least 0, got -19\.0\.",
        ),
        (
            torch.ones(20).index_fill(0, torch.tensor([7]), math.nan),
            r"sample weight, row 7: expected a finite number of at least 0, got nan\.",
        ),
    ):
        weighted = Dataset(data.ids, labels=data.labels, weight=weight)
        with pytest.raises(DataError, match=message):
            train.fit(tiny_model(), weighted, data, config(), on_step=steps.append)
    assert steps == []


@pytest.mark.parametrize(("rows", "batch_size"), [(65, 64), (20, 1)])
def test_batch_norm_refuses_a_row_alone(rows: int, batch_size: int) -> None:
    data = tiny_data(rows)
    model = tiny_model(batch_norm=True)
    with pytest.raises(DataError, match="batch_norm needs two rows a batch"):
        train.fit(model, data, data, config(batch_size=batch_size))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("epochs", 0, "a whole number of at least 1"),
        ("epochs", 1.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("batch_size", "many", "a whole number"),
        ("learning_rate", 0, "a number above 0"),
        ("learning_rate", math.nan, "a number above 0"),
        ("learning_rate", "fast", "a number above 0"),
        ("learning_rate", [0.1], "a number above 0"),
        ("embedding_regularizer", -1e-6, "a number of at least 0"),
        ("net_regularizer", math.inf, "a number of at least 0"),
        ("max_gradient_norm", -1, "a number of at least 0"),
        ("patience", 0, "a whole number of at least 1"),
        ("micro_batch_size", -1, "a whole number of at least 0"),
        ("monitor", 3, "text"),
        ("seed", -1, "a whole number of at least 0"),
        ("seed", 2**63, "at most 9223372036854775807"),
        ("task_weights", (1.0, -1.0), "a number of at least 0"),
        ("precision", "half", "one of fp32, tf32, bf16, fp64"),
    ],
)
def test_config_names_key_and_value(key: str, value: object, rule: str) -> None:
    with pytest.raises(DataError, match=rf"{key}: expected {rule}.*, got "):
        TrainingConfig(**{key: value})


def test_config_takes_what_yaml_gives() -> None:
    given = TrainingConfig(learning_rate="1e-3", task_weights=[1, "0.5"], max_gradient_norm=5)
    assert given.learning_rate == 1e-3
    assert given.task_weights == (1.0, 0.5)
    assert isinstance(given.max_gradient_norm, float)


def test_callbacks_come_in_order() -> None:
    """The run folder must exist when the history is written into it."""
    calls: list[str] = []
    note: Callable[[str], Callable[[object], None]] = lambda name: lambda _: calls.append(name)  # noqa: E731
    data = tiny_data(60)
    settings = config(epochs=1)
    train.fit(tiny_model(), data, data, settings, on_best=note("best"), on_epoch=note("epoch"))
    assert calls == ["best", "epoch"]
