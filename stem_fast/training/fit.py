"""Train, predict and evaluate, step for step as the official code does.

Source: ``fuxictr/pytorch/models/rank_model.py`` and ``multitask_model.py`` of LiangcaiSu/STEM.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stem_fast import metrics
from stem_fast.common import DataError, nearest
from stem_fast.data.dataset import Dataset
from stem_fast.models.network import STEMNet
from stem_fast.nn.grouped import has_batch_norm
from stem_fast.nn.precision import check as check_precision
from stem_fast.training import checks
from stem_fast.training.options import TrainingConfig as TrainingConfig
from stem_fast.training.step import TrainStep, make_optimizers
from stem_fast.training.step import train_step as train_step

MIN_DELTA = 1e-6  # an epoch must be better than the best one by this much
LR_FACTOR, MIN_LR = 0.1, 1e-6  # after an epoch that is not
BY = 25  # values of a column that are scored one by one
LOSS_CHECK = 1000  # steps between two looks at the loss: each look waits for the device


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or a prediction that is not finite."""


@dataclass(frozen=True)
class EpochRecord:
    """One entry of a run's ``history.json``."""

    epoch: int  # from 1
    loss: float  # mean over the steps, L2 included (of the tables: see train_step)
    learning_rate: float
    seconds: float  # of training, the evaluation not included
    samples_per_second: float
    monitor: float
    best: bool
    metrics: dict[str, Any]  # metrics.evaluate on the validation data


@dataclass(frozen=True)
class Monitor:
    """What decides which epoch is best: the mean of a metric over tasks, or one task's metric.

    Metrics where more is better (auc, gauc) must rise, errors (logloss, rmse, mae) must fall, and
    pcoc must come closer to 1. ``Monitor.parse`` raises DataError for an unknown name.
    """

    name: str
    metric: str
    tasks: tuple[str, ...]

    @classmethod
    def parse(cls, name: str, kinds: Mapping[str, str]) -> Monitor:
        """``name``: "auc" (the mean over the tasks that have one) or "finish.auc" (one task's)."""
        known: dict[str, tuple[str, tuple[str, ...]]] = {}
        for task, kind in kinds.items():
            binary = ("auc", "gauc", "logloss", "pcoc")
            for metric in binary if kind == "binary" else ("rmse", "mae"):
                known[metric] = (metric, (*known.get(metric, ("", ()))[1], task))
                known[f"{task}.{metric}"] = (metric, (task,))
        if name not in known:
            means = ", ".join(key for key, (metric, _) in known.items() if key == metric)
            raise DataError(
                f"monitor is {name!r}, which no task has: use one of {means}, or one task's as in "
                f"{next(iter(kinds))}.{next(iter(known))}.{nearest(name.lower(), known)}"
            )
        return cls(name, *known[name])

    def value(self, result: Mapping[str, Any]) -> float:
        """The monitored value of what ``evaluate`` gave; tasks where it is undefined are left out.

        Raises DataError when it is undefined for all of them.
        """
        values = [result["tasks"][task][self.metric] for task in self.tasks]
        values = [abs(v - 1) if self.metric == "pcoc" else v for v in values if v is not None]
        if not values:
            why = {
                "auc": "no task has both classes there",
                "gauc": "no group has both classes there, or no group column is named",
            }.get(self.metric, "its labels are missing or without a positive")
            raise DataError(
                f"monitor {self.name!r} is undefined on the validation data ({why}): choose "
                "another --monitor."
            )
        return math.fsum(values) / len(values)

    def improves(self, value: float, best: float | None) -> bool:
        """Whether ``value`` beats ``best`` (None: there is none yet) by at least ``MIN_DELTA``."""
        if best is None:
            return True
        rises = self.metric in ("auc", "gauc")
        return value >= best + MIN_DELTA if rises else value <= best - MIN_DELTA


def check(config: TrainingConfig, kinds: Mapping[str, str]) -> Monitor:
    """The monitor that ``config`` names. Raises DataError if something does not fit the tasks."""
    weights = config.task_weights
    if weights is not None and len(weights) != len(kinds):
        raise DataError(
            f"task_weights: expected one for each of {', '.join(kinds)}, got {list(weights)}."
        )
    if weights is not None and not any(weights):
        raise DataError(f"task_weights: expected at least one above 0, got {list(weights)}.")
    return Monitor.parse(config.monitor, kinds)


def fit(
    model: STEMNet,
    train: Dataset,
    valid: Dataset,
    config: TrainingConfig,
    *,
    device: str | torch.device = "cpu",
    on_step: Callable[[int], None] | None = None,
    on_best: Callable[[STEMNet], None] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> list[EpochRecord]:
    """Train with early stopping; the model ends with the weights of its best epoch.

    Each epoch: all rows in an order that (seed, epoch) decides, then the metrics on ``valid``. An
    epoch that does not improve the monitored value by ``MIN_DELTA`` divides the learning rate by
    ten; ``patience`` of them in a row end the training. The best weights are back in the model on
    every way out, an interrupt included.

    Calls ``on_step(rows)`` after a step, ``on_best(model)`` after an epoch that improved, then
    ``on_epoch(record)``. The model's weights and dropout come from torch's global generator: seed
    that before building the model to make a run repeatable.
    Regression tasks without ``scales`` get those of their training labels, so that tasks in any
    unit weigh alike (a model with a loss of its own gets none). They stand in ``model.config``, not
    in ``state_dict()``: what loads that is built by ``type(model)(**model.config)``. Metrics,
    ``predict`` and ``compile_inference`` are in the labels' units; ``model(ids)`` and exported
    programs give standardised values. What a "regression:log1p" task predicts, expm1 of a mean of
    logarithms, is nearer the labels' median than their mean.
    Warns of labels with one value and of features that give a label away.
    Raises DataError for a monitor, task weights, a precision or micro-batches that do not fit, and
    for sample weights that are negative or all 0, TrainingError for a loss or a prediction that is
    not finite.
    """
    kinds = task_kinds(model)
    monitor = check(config, kinds)
    check_precision(config.precision, device)
    _refuse_batch_norm(model, len(train), config)
    _look_at(train, model, kinds)
    # Whether a metric is defined depends on labels alone: say so before training, not after.
    monitor.value(score(np.full((len(valid), len(kinds)), 0.5), valid, kinds))

    model.to(device)
    dtype = model.embedding.weight.dtype
    if config.precision == "fp64":
        model.double()
    optimizers = make_optimizers(model, config)
    step = TrainStep(model, optimizers, config)
    if torch.device(device).type == "cuda":
        train, valid = _resident({"training": train, "validation": valid}, model, device)
    history: list[EpochRecord] = []
    best_value: float | None = None
    best_weights: dict[str, Tensor] = {}
    stale = 0
    try:
        for epoch in range(1, config.epochs + 1):
            learning_rate = optimizers[0].param_groups[0]["lr"]
            start = time.perf_counter()
            loss = _train_epoch(step, train, epoch, device, on_step)
            seconds = time.perf_counter() - start
            result = evaluate(
                model,
                valid,
                batch_size=config.batch_size,
                device=device,
                precision=config.precision,
            )
            value = monitor.value(result)
            best = monitor.improves(value, best_value)
            if best:
                best_value, stale = value, 0
                best_weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
                if on_best is not None:
                    on_best(model)
            else:
                stale += 1
                for group in (group for each in optimizers for group in each.param_groups):
                    # A rate that starts below the floor stays there.
                    group["lr"] = max(group["lr"] * LR_FACTOR, min(group["lr"], MIN_LR))
            speed = len(train) / seconds
            history.append(
                EpochRecord(epoch, loss, learning_rate, seconds, speed, value, best, result)
            )
            if on_epoch is not None:
                on_epoch(history[-1])
            if stale >= config.patience:
                break
    finally:
        model.embedding.release()
        if best_weights:
            model.load_state_dict(best_weights)
        if config.precision == "fp64":
            model.to(dtype)
    return history


def _resident(
    sets: Mapping[str, Dataset], model: STEMNet, device: str | torch.device
) -> list[Dataset]:
    """The data on a CUDA device, as far as it takes at most half of the memory that is free there
    once gradients and the optimizer's state, not made yet, have theirs."""
    free, _ = torch.cuda.mem_get_info(device)
    room = (free - 3 * sum(parameter.nbytes for parameter in model.parameters())) // 2
    found = []
    for name, data in sets.items():
        here = data.ids.is_cpu
        if here and data.nbytes <= room:
            room -= data.nbytes
            data = data.to(device)
        elif here:
            warnings.warn(
                f"the {name} data takes {data.nbytes / 1e9:.1f} GB, and {max(room, 0) / 1e9:.1f} "
                f"GB of {device} are left for it: batches are copied there one by one",
                stacklevel=3,
            )
        found.append(data)
    return found


def _train_epoch(
    train_step: TrainStep,
    train: Dataset,
    epoch: int,
    device: str | torch.device,
    on_step: Callable[[int], None] | None,
) -> float:
    """One pass over the training data; returns the mean loss of its steps."""
    model, config = train_step.model, train_step.config
    model.train()
    seed = epoch_seed(config.seed, epoch)
    # Losses stay on the device until they are looked at, so that steps can run ahead.
    losses = torch.zeros(math.ceil(len(train) / config.batch_size), device=device)
    for step, batch in enumerate(train.batches(config.batch_size, seed=seed, device=device)):
        losses[step] = train_step(batch)
        if on_step is not None:
            on_step(len(batch.ids))
        if (step + 1) % LOSS_CHECK == 0 or step + 1 == len(losses):
            bad = (~losses.isfinite()).nonzero()
            if len(bad):
                raise TrainingError(
                    f"the loss is {losses[bad[0]].item()} in epoch {epoch}, step {int(bad[0]) + 1}:"
                    " try a lower --learning-rate, and look for extreme numeric values or labels."
                )
    model.embedding.raise_bad_ids()
    return losses.double().mean().item()


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's shuffle: well mixed, so that neighbouring seeds share no order."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> 1)


@torch.no_grad()
def predict(
    model: STEMNet,
    data: Dataset,
    *,
    batch_size: int = 4096,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> np.ndarray:
    """Predictions float32 [N, T] in row order: probabilities, or values of regression tasks.

    Raises DataError for a precision that the device cannot do, TrainingError if a prediction is not
    finite.
    """
    inference = model.to(device).compile_inference(precision)
    out = torch.empty(len(data), len(task_kinds(model)), device=device)
    start = 0
    for batch in data.batches(batch_size, device=device):
        end = start + len(batch.ids)
        out[start:end] = inference(batch.ids, batch.numeric, batch.sequences)
        start = end
    inference.model.embedding.raise_bad_ids()
    predictions = out.cpu().numpy()
    bad = np.argwhere(~np.isfinite(predictions))
    if len(bad):
        row, column = bad[0]
        raise TrainingError(
            f"the prediction of {list(task_kinds(model))[column]} is {predictions[row, column]} in "
            f"row {row}: the weights are no longer finite, or a number of that row is far beyond "
            "those of training; try a lower --learning-rate."
        )
    return predictions


def evaluate(
    model: STEMNet,
    data: Dataset,
    *,
    batch_size: int = 4096,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> dict[str, Any]:
    """``metrics.evaluate`` of the model's predictions on labelled data; raises as ``predict``."""
    predictions = predict(model, data, batch_size=batch_size, device=device, precision=precision)
    return score(predictions, data, task_kinds(model))


def score(predictions: np.ndarray, data: Dataset, kinds: Mapping[str, str]) -> dict[str, Any]:
    """``metrics.evaluate`` of given predictions [N, T]; DataError if ``data`` has no labels."""
    if data.labels is None:
        raise DataError("the data was loaded without labels, so it cannot be evaluated.")
    return metrics.evaluate(data.labels.cpu().numpy(), predictions, kinds, data.group)


def score_by(
    predictions: np.ndarray, data: Dataset, kinds: Mapping[str, str], values: pa.ChunkedArray
) -> dict[str, Any]:
    """``score`` of the rows of each of the ``BY`` most frequent values [N] (null = missing), most
    rows first, and of all other rows together.

    Returns {"values": [{"value", "rows", "tasks"}], "rest": None or {"values", "rows", "tasks"}}.
    """
    assert data.labels is not None
    labels = data.labels.cpu().numpy()
    encoded = values.combine_chunks().dictionary_encode(null_encoding="encode")
    codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    order = np.argsort(-np.bincount(codes, minlength=len(names)), kind="stable")

    def part(rows: np.ndarray) -> dict[str, Any]:
        group = None if data.group is None else data.group[rows]
        return metrics.evaluate(labels[rows], predictions[rows], kinds, group)

    found = [{"value": names[c], **part(np.flatnonzero(codes == c))} for c in order[:BY]]
    rest = None
    if len(order) > BY:
        others = np.flatnonzero(np.isin(codes, order[BY:]))
        rest = {"values": len(order) - BY, **part(others)}
    return {"values": found, "rest": rest}


def task_kinds(model: STEMNet) -> dict[str, str]:
    """Task -> its kind, in task order."""
    return {task: model.config["kinds"][task] for task in model.config["tasks"]}


def _look_at(data: Dataset, model: STEMNet, kinds: Mapping[str, str]) -> None:
    """Warns of what the training data tells, refuses what it cannot teach, and gives the model the
    scales of its regressions' labels."""
    if data.labels is None:
        raise DataError("the data was loaded without labels, so it cannot train.")
    checks.check_weights(data)
    scales = checks.label_scales(data, kinds)
    checks.warn_of_leaks(data, model.config)
    # A loss that is not STEMNet's compares labels in their units.
    if scales and getattr(model.loss, "__func__", None) is STEMNet.loss:
        for task, scale in scales.items():
            model.config["scales"].setdefault(task, list(scale))


def _refuse_batch_norm(model: STEMNet, rows: int, config: TrainingConfig) -> None:
    """Batch norm has no variance over one row, and would stop in the middle of an epoch."""
    if not has_batch_norm(model):
        return
    if 1 in (config.batch_size, rows % config.batch_size):
        raise DataError(
            f"batch_norm needs two rows a batch, and {rows} training rows in batches of "
            f"{config.batch_size} leave one alone: choose another --batch-size."
        )
