"""TrainStep against train_step: the same steps, on CUDA replayed from a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stem_fast import step as steps
from stem_fast import train
from stem_fast.config import EMBEDDING_OPTIMIZERS, TrainingConfig
from stem_fast.data import Dataset
from stem_fast.model import STEMNet

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
ROWS, BATCH = 150, 20  # the last batch of an epoch is shorter


def model(**options: Any) -> STEMNet:
    """Of every kind of field, in float64."""
    torch.manual_seed(3)
    sizes = {"expert_hidden_units": (16, 8), "gate_hidden_units": (8,), "tower_hidden_units": (8,)}
    return STEMNet(
        {"user": 30, "item": 20},
        ["click", "time"],
        embedding_dim=4,
        num_shared_experts=2,
        numeric=["price"],
        sequences={"seen": "item"},
        kinds={"time": "regression"},
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
    assert not whole or device == "cpu" or step.graph is not None
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("name", EMBEDDING_OPTIMIZERS)
@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_steps_are_train_steps(
    name: str, norm: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a flush in the middle of each epoch."""
    monkeypatch.setattr(steps, "FLUSH", 4)
    settings = config(embedding_optimizer=name, max_gradient_norm=norm)
    ours, theirs = (trained(settings, device, whole) for whole in (True, False))
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-9, atol=0)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


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
