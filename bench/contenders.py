"""Who is compared in bench/peers.py: a model, its batches, its training step and its requests.

Every contender trains and predicts as its own code does it; what our harness adds is outside of the
time, or noted here. The official code and the two libraries are optional: where one is absent, its
contenders raise NotInstalledError. What keeps a library from running is bridged at run time, here
and nowhere else, and listed in SHIMS. bench/turns.py checks and times them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import cases, parity
from bench import official as adapter
from bench.ops.adam import WARM_UP
from stem_fast import data
from stem_fast.data.dataset import Batch, Dataset
from stem_fast.data.schema import Encoding
from stem_fast.models.network import STEMNet
from stem_fast.nn.precision import autocast, tf32
from stem_fast.optim import TableOptimizer
from stem_fast.training import fit as train
from stem_fast.training.options import TrainingConfig
from stem_fast.training.step import TrainStep

SETTINGS = {
    "tiktok": cases.SETTINGS["tiktok"],
    "2m_rows": cases.SETTINGS["tiktok"]._replace(rows=2_000_000),
    "10m_rows": cases.SETTINGS["tall"],
    "4_tasks": cases.SETTINGS["tiktok"]._replace(tasks=4),
    "2_layers": cases.SETTINGS["tiktok"]._replace(layers=2),
    "tiny": cases.SETTINGS["tiny"],  # for tests of the bench
}
GATES, TOWERS = (128, 64), (128, 64)  # hidden units
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "embedding_regularizer": 1e-6,
    "max_gradient_norm": 10.0,
}
REQUESTS = (1, 64, 512, 4096)  # rows of a request
WORKERS = 3  # of the official loader: config/model_config.yaml, Base, num_workers
GROUP = "group"  # the official loader's column of the groups of gAUC
SHIMS = {
    "deepctr-torch": (
        "its thread that asks a server for newer versions is not started",
        "its PLE makes as many shared experts as specific ones, and then fails where there are to "
        "be more: the missing ones are added",
    ),
}

State = Mapping[str, Tensor]


class NotAvailableError(Exception):
    """A contender that the code at hand, or its model, does not have."""


class Problem(NamedTuple):
    """What is trained: fields and their rows, tasks, sizes, and where batches come from."""

    fields: dict[str, int]
    tasks: tuple[str, ...]
    network: dict[str, Any]  # named as STEMNet's arguments, which are the official code's
    config: TrainingConfig
    # Rows of a batch -> batch after batch, ids int64 [B, F] and labels [B, T].
    draw: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    grouped: bool = False  # the official batches have a column of groups


class Study(NamedTuple):
    """Data files, and what they are encoded to."""

    files: tuple[Path, Path]
    encoding: Encoding
    splits: tuple[Dataset, Dataset]


def synthetic(setting: cases.Setting) -> Problem:
    """A setting's sizes, Zipf ids and coin flips as labels: the same ones in every process."""
    s, vocab = setting, setting.rows // setting.fields

    def draw(rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(3)
        while True:
            ids = cases.zipf(vocab, (rows, s.fields), 1.1, generator)
            yield ids, torch.randint(0, 2, (rows, s.tasks), generator=generator).float()

    network = {
        "embedding_dim": s.dim,
        "num_layers": s.layers,
        "num_shared_experts": s.shared,
        "num_specific_experts": s.specific,
        "expert_hidden_units": [s.width] * 3,
        "gate_hidden_units": list(GATES),
        "tower_hidden_units": list(TOWERS),
    }
    fields = {f"f{f}": vocab for f in range(s.fields)}
    tasks = tuple(f"t{t}" for t in range(s.tasks))
    config = TrainingConfig(batch_size=s.batch, **TRAINING)
    return Problem(fields, tasks, network, config, draw)


def kuairand(files: tuple[Path, Path]) -> tuple[Problem, Study]:
    """The network and training of bench/parity.py's study, on its data."""
    study = parity.STUDIES["kuairand"]
    encoding = data.fit_encoding(files[0], parity.schema(study, files[0]))
    splits = (data.load(files[0], encoding), data.load(files[1], encoding))

    def draw(rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in splits[0].batches(rows):
            assert batch.labels is not None
            yield batch.ids.long(), batch.labels

    config = TrainingConfig(**{**TRAINING, **study.training, "epochs": 1})
    tasks = encoding.schema.tasks
    problem = Problem(encoding.vocab_sizes, tuple(tasks), study.network, config, draw, True)
    return problem, Study(files, encoding, splits)


class Contender:
    """A model with its optimizer. ``start``: first weights, as ``state`` gives them."""

    device = "cpu"
    low = False  # less than float32 inside
    module: nn.Module

    def batch(self, ids: Tensor, labels: Tensor) -> Any:
        """What ``train_step`` reads."""
        raise NotImplementedError

    def request(self, ids: Tensor) -> Any:
        """What ``predict`` reads."""
        raise NotImplementedError

    def train_step(self, batch: Any) -> object:
        raise NotImplementedError

    def predict(self, request: Any) -> Any:
        """In evaluation mode and without autograd."""
        raise NotImplementedError

    def outputs(self, batch: Any) -> dict[str, Tensor]:
        """Of the present weights: what two contenders of one kind must agree on."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in self.module.state_dict().items()}

    def age(self, problem: Problem) -> None:
        """Bring the optimizer to where it is in the middle of a training."""

    def epoch(self, study: Study) -> dict[str, float]:
        """One epoch, from loading to evaluation: {"seconds", and metrics that it gives}."""
        raise NotImplementedError

    def evaluation(self, batch: Any) -> object:
        """What ``epoch`` does with a batch of validation rows."""
        return self.outputs(batch)

    def compile(self) -> None:
        """As ``torch.compile(model)`` does, for whoever calls the model or its forward."""
        setattr(self.module, "forward", cases.compiled(self.module.forward, self.device))  # noqa: B010

    @property
    def expert_weights(self) -> int | None:
        """How many there are in the matrices of all experts; None: ``outputs`` tells enough."""
        return None


class Ours(Contender):
    """stem_fast's public API. ``training``: options of TrainingConfig; ``inference``: options of
    STEMNet.compile_inference, None for STEMNet.predict. On CUDA both are in ``precision``, and
    requests go to compile_inference."""

    def __init__(
        self,
        problem: Problem,
        start: State | None = None,
        official: str | None = None,
        *,
        training: Mapping[str, Any] | None = None,
        inference: Mapping[str, Any] | None = None,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        training = training or {}
        if precision != "fp32":
            training = {**training, "precision": precision}
        if device == "cuda":
            inference = {"precision": precision}
        self.config = dataclasses.replace(problem.config, **training)
        if start is None:
            self.module = STEMNet(problem.fields, problem.tasks, **problem.network)
        else:
            fields = list(problem.fields)
            self.module = STEMNet.from_official(start, tasks=problem.tasks, fields=fields)
        self.model, self.device, self.inference = self.module.to(device), device, inference
        given = [each["precision"] for each in (training, inference or {}) if "precision" in each]
        self.low = given not in ([], ["fp32"])

    @functools.cached_property
    def answer(self) -> Callable[..., Tensor]:
        if self.inference is None:
            return self.model.predict
        return self.model.compile_inference(**self.inference)

    @functools.cached_property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return train.make_optimizers(self.model, self.config)

    @functools.cached_property
    def step(self) -> Callable[[Batch], Tensor]:
        return TrainStep(self.model, self.optimizers, self.config)

    def batch(self, ids: Tensor, labels: Tensor) -> Batch:
        return Batch(self.request(ids), None, {}, labels.to(self.device), None)

    def request(self, ids: Tensor) -> Tensor:
        return ids.to(self.device, torch.int32)

    def train_step(self, batch: Batch) -> Tensor:
        self.model.train()
        return self.step(batch)

    def predict(self, request: Tensor) -> Tensor:
        return self.answer(request)

    @torch.no_grad()
    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        logits = self.model(batch.ids)
        loss = self.model.loss(logits, batch.labels)
        return {"logits": logits, "loss": loss, "probabilities": self.answer(batch.ids)}

    def state(self) -> dict[str, Tensor]:
        return self.model.to_official()

    def age(self, problem: Problem) -> None:
        """Steps of the tables alone: by the first that is timed, rows have missed some of them."""
        *_, table = self.optimizers
        if not isinstance(table, TableOptimizer):
            return
        table.param_groups[0]["weight_decay"] = self.config.embedding_regularizer
        small = self.model.embedding.weight.shape[0] < 1000
        batches = problem.draw(self.config.batch_size)
        for _ in range(2 if small else WARM_UP):
            table.zero_grad()
            x, _ = self.model.embedding(self.request(next(batches)[0]))
            x.backward(torch.full_like(x, 1e-6))
            table.step()
        table.param_groups[0]["weight_decay"] = 0.0  # train_step brings its own

    def epoch(self, study: Study) -> dict[str, float]:
        self.model.embedding.release()  # what a warm-up had
        vars(self).pop("step", None), vars(self).pop("optimizers", None)
        start = time.perf_counter()
        splits = [data.load(file, study.encoding) for file in study.files]
        (record,) = train.fit(self.model, splits[0], splits[1], self.config, device=self.device)
        seconds = time.perf_counter() - start
        tasks = record.metrics["tasks"].values()
        means = {name: float(np.mean([task[name] for task in tasks])) for name in ("auc", "gauc")}
        return {"seconds": seconds, **means}


class Official(Contender):
    """The official code's own train_step, forward, loader and fit. On CUDA its get_inputs and
    get_labels move a batch that is not there yet.

    In bf16 its forward runs under autocast. Its loss does not: CUDA's autocast refuses binary cross
    entropy of probabilities.
    """

    def __init__(
        self,
        problem: Problem,
        start: State | None = None,
        official: str | None = None,
        *,
        model: str = "STEM",
        compiled: bool = False,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        if official is None:
            raise cases.NotInstalledError("the official code (--official PATH)")
        config = problem.config
        self.module = adapter.build(
            adapter.load(official),
            problem.fields,
            problem.tasks,
            model=model,
            group=GROUP if problem.grouped else None,
            max_gradient_norm=config.max_gradient_norm,
            learning_rate=config.learning_rate,
            embedding_regularizer=config.embedding_regularizer,
            # fit evaluates what it monitors.
            monitor={"AUC": 1, "gAUC": 0, "logloss": 0} if problem.grouped else "AUC",
            gpu=0 if device == "cuda" else -1,
            **problem.network,
        )
        self.model: Any = self.module
        self.device, self.precision, self.low = device, precision, precision != "fp32"
        self.config, self.compiled = config, compiled
        self.fields = list(problem.fields)
        if start is not None:
            self.model.load_state_dict(start)
        if compiled:
            self.compile()
        forward = self.model.forward

        def low(inputs: Tensor) -> dict[str, Tensor]:
            with autocast(precision, device):
                return {key: tensor.float() for key, tensor in forward(inputs).items()}

        if precision == "bf16":
            self.model.forward = low

    def batch(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        columns = dict(zip(self.fields, ids.T, strict=True))
        return adapter.inputs(self.model, {**columns, GROUP: ids[:, 0]}, labels)

    def request(self, ids: Tensor) -> Tensor:
        return self.batch(ids)

    def train_step(self, batch: Tensor) -> Tensor:
        self.model.train()
        with tf32(self.precision):
            loss: Tensor = self.model.train_step(batch)
        return loss

    @torch.no_grad()
    def predict(self, request: Tensor) -> Any:
        self.model.eval()
        with tf32(self.precision):
            return self.model.forward(request)

    @torch.no_grad()
    def outputs(self, batch: Tensor) -> dict[str, Tensor]:
        model = self.model
        # As a request: a compiled model need not be compiled for this alone.
        predicted = self.predict(batch[:, : -len(model.feature_map.labels)].contiguous())
        # Without L2, of which its float32 loses up to 1e-3; the weights after a step tell of it.
        with mock.patch.object(model, "_embedding_regularizer", None):
            loss = model.compute_loss(predicted, model.get_labels(batch))
        found = {"loss": loss, "probabilities": torch.cat(list(predicted.values()), dim=1)}
        if not self.compiled:  # a compiled forward keeps its sigmoid
            with tf32(self.precision):
                found["logits"] = adapter.logits(model, batch)
        return found

    def evaluation(self, batch: Tensor) -> object:
        return self.predict(batch)

    def epoch(self, study: Study) -> dict[str, float]:
        for name in ("h5py", "pandas"):
            if importlib.util.find_spec(name) is None:
                raise cases.NotInstalledError(name)
        h5py: Any = importlib.import_module("h5py")
        loader = importlib.import_module("fuxictr.pytorch.dataloaders").H5DataLoader
        model, logs = self.model, {}
        evaluate = model.evaluate

        def recorded(*arguments: Any, **options: Any) -> Any:
            logs.update(evaluate(*arguments, **options))
            return logs

        model.evaluate = recorded
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for name, split in zip(("train", "valid"), study.splits, strict=True):
                files[f"{name}_data"] = f"{folder}/{name}.h5"
                with h5py.File(files[f"{name}_data"], "w") as file:
                    for key, column in columns(split, study.encoding).items():
                        file[key] = column
                    file[GROUP] = split.group
            model.checkpoint = f"{folder}/best.model"  # fit writes and reads it
            start = time.perf_counter()
            generators = loader(
                model.feature_map,
                stage="train",
                batch_size=self.config.batch_size,
                shuffle=True,
                num_workers=WORKERS,
                **files,
            ).make_iterator()
            with tf32(self.precision):
                model.fit(
                    generators[0],
                    epochs=1,
                    validation_data=generators[1],
                    max_gradient_norm=self.config.max_gradient_norm,
                )
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "auc": float(logs["AUC"]), "gauc": float(logs["gAUC"])}


def columns(split: Dataset, encoding: Encoding) -> dict[str, np.ndarray]:
    """Name -> column, of the ids and the labels."""
    assert split.labels is not None
    names = [*encoding.schema.categorical, *encoding.schema.tasks]
    arrays = [*split.ids.numpy().T, *split.labels.numpy().T]
    return dict(zip(names, arrays, strict=True))


class Library(Contender):
    """What both libraries have in common; neither clips gradients or knows gAUC."""

    def __init__(self, problem: Problem, package: str) -> None:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise cases.NotInstalledError(package) from None
        if importlib.util.find_spec("pandas") is None:
            raise cases.NotInstalledError(f"pandas, for {package}")
        self.config, self.fields = problem.config, list(problem.fields)
        self.network = problem.network

    def ready(self, start: State | None, compiled: bool) -> None:
        if start is not None:
            self.module.load_state_dict(start)
        if compiled:
            self.compile()

    @torch.no_grad()
    def predict(self, request: Any) -> Tensor:
        self.module.eval()
        return self.module(request)

    def outputs(self, batch: Any) -> dict[str, Tensor]:
        return {"probabilities": self.predict(batch[0])}

    @property
    def expert_weights(self) -> int:
        return sum(p.numel() for m in self.experts() for p in m.parameters() if p.dim() == 2)

    def experts(self) -> list[nn.Module]:
        raise NotImplementedError


class TorchRechub(Library):
    """torch-rechub's PLE and MTLTrainer. Its experts always have batch norm, its gates no hidden
    layer, and its last layer no shared gate."""

    def __init__(
        self,
        problem: Problem,
        start: State | None = None,
        official: str | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__(problem, "torch-rechub")
        features = importlib.import_module("torch_rechub.basic.features")
        models = importlib.import_module("torch_rechub.models.multi_task")
        trainers = importlib.import_module("torch_rechub.trainers")
        n, kinds = problem.network, ["classification"] * len(problem.tasks)
        self.module = models.PLE(
            [
                features.SparseFeature(name, size, embed_dim=n["embedding_dim"], padding_idx=0)
                for name, size in problem.fields.items()
            ],
            kinds,
            n_level=n["num_layers"],
            n_expert_specific=n["num_specific_experts"],
            n_expert_shared=n["num_shared_experts"],
            expert_params={"dims": n["expert_hidden_units"]},
            tower_params_list=[{"dims": n["tower_hidden_units"]} for _ in kinds],
        )
        self.ready(start, compiled)
        self.trainer = trainers.MTLTrainer(
            self.module,
            kinds,
            optimizer_params={"lr": self.config.learning_rate},
            # It adds lambda * ||W||^2.
            regularization_params={"embedding_l2": self.config.embedding_regularizer / 2},
        )

    def batch(self, ids: Tensor, labels: Tensor) -> Any:
        return self.request(ids), labels

    def request(self, ids: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.fields, ids.T.contiguous(), strict=True))

    def train_step(self, batch: Any) -> object:
        return self.trainer.train_one_epoch([batch])

    def experts(self) -> list[nn.Module]:
        layers: Any = self.module.cgc_layers
        return [e for layer in layers for e in (*layer.experts_specific, *layer.experts_shared)]

    def epoch(self, study: Study) -> dict[str, float]:
        utilities = importlib.import_module("torch_rechub.utils.data")
        tables = []
        for split in study.splits:
            found = columns(split, study.encoding)
            labels = np.stack([found.pop(task) for task in study.encoding.schema.tasks], axis=1)
            tables.append((found, labels))
        (x, y), (x_valid, y_valid) = tables
        start = time.perf_counter()
        training, validation, _ = utilities.DataGenerator(x, y).generate_dataloader(
            x_valid, y_valid, x_valid, y_valid, batch_size=self.config.batch_size
        )
        self.trainer.train_one_epoch(training)
        scores = self.trainer.evaluate(self.module, validation)
        return {"seconds": time.perf_counter() - start, "auc": float(np.mean(scores))}


class DeepCTR(Library):
    """DeepCTR-Torch's PLE and MMOE. Its loss is a sum over the batch."""

    def __init__(
        self,
        problem: Problem,
        start: State | None = None,
        official: str | None = None,
        *,
        model: str,
        compiled: bool = False,
    ) -> None:
        super().__init__(problem, "deepctr-torch")
        n, tasks = problem.network, problem.tasks
        if model == "MMOE" and n["num_layers"] > 1:
            raise NotAvailableError("MMoE has one layer")
        # It imports requests for its question to the server, and for nothing else.
        stubbed = importlib.util.find_spec("requests") is None
        if stubbed:
            sys.modules["requests"] = types.ModuleType("requests")
        with mock.patch.object(threading.Thread, "start"):
            inputs = importlib.import_module("deepctr_torch.inputs")
            models = importlib.import_module("deepctr_torch.models")
        if stubbed:
            del sys.modules["requests"]
        features = [
            inputs.SparseFeat(name, size, embedding_dim=n["embedding_dim"])
            for name, size in problem.fields.items()
        ]
        shared, specific = n["num_shared_experts"], n["num_specific_experts"]
        sizes = {
            "PLE": {
                "shared_expert_num": shared,
                "specific_expert_num": specific,
                "num_levels": n["num_layers"],
            },
            "MMOE": {"num_experts": shared + specific * len(tasks)},
        }
        self.model = getattr(models, model)(
            features,
            expert_dnn_hidden_units=n["expert_hidden_units"],
            gate_dnn_hidden_units=n["gate_hidden_units"],
            tower_dnn_hidden_units=n["tower_hidden_units"],
            # It adds lambda * ||W||^2.
            l2_reg_embedding=self.config.embedding_regularizer / 2,
            task_types=["binary"] * len(tasks),
            task_names=list(tasks),
            **sizes[model],
        )
        self.module = self.model
        if model == "PLE":
            for (level,) in self.model.shared_experts:
                for _ in range(shared - len(level)):
                    level.append(copy.deepcopy(level[0]))
                    for parameter in level[-1].parameters():
                        if parameter.dim() == 2:
                            nn.init.normal_(parameter, std=1e-4)  # as it draws the others
        self.model.compile(
            torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate),
            loss=["binary_crossentropy"] * len(tasks),
            metrics=["auc"],
        )
        self.ready(start, compiled)

    def batch(self, ids: Tensor, labels: Tensor) -> Any:
        return self.request(ids), labels

    def request(self, ids: Tensor) -> Tensor:
        return ids.float()

    def train_step(self, batch: Any) -> Tensor:
        """The body of the loop in its ``fit``, which loads row by row and can't be called alone."""
        model = self.model.train()
        x, y = batch
        predicted = model(x)
        model.optim.zero_grad()
        loss = sum(
            F.binary_cross_entropy(predicted[:, t], y[:, t], reduction="sum")
            for t in range(y.shape[1])
        )
        total = loss + model.get_regularization_loss() + model.aux_loss
        total.backward()
        model.optim.step()
        return total

    def experts(self) -> list[nn.Module]:
        if hasattr(self.module, "expert_dnn"):
            return [self.model.expert_dnn]
        return [*self.model.specific_experts, *self.model.shared_experts]

    def epoch(self, study: Study) -> dict[str, float]:
        tables: list[Any] = []
        for split in study.splits:
            found = columns(split, study.encoding)
            labels = np.stack([found.pop(task) for task in study.encoding.schema.tasks], axis=1)
            tables.append((found, labels))
        start = time.perf_counter()
        self.model.fit(
            *tables[0],
            batch_size=self.config.batch_size,
            epochs=1,
            verbose=0,
            validation_data=tables[1],
        )
        return {"seconds": time.perf_counter() - start}  # its AUC mixes the tasks


class Entry(NamedTuple):
    build: Callable[..., Contender]  # (problem, start, official path); on CUDA device and precision
    network: str  # "stem", "ple" or "mmoe", see bench.peers.cost
    reference: str | None = None  # the contender with whose numbers it must agree
    what: tuple[str, ...] = ("step", "epoch", "inference", "memory")


def both(name: str, build: Callable[..., Contender], network: str) -> dict[str, Entry]:
    """A peer, eager and under torch.compile."""
    compiled = functools.partial(build, compiled=True)
    return {name: Entry(build, network), f"{name}, compiled": Entry(compiled, network, name)}


OURS = cases.OURS
MICRO = f"{OURS}, micro-batches"
_TRAINING = ("step", "epoch", "memory")
CONTENDERS: dict[str, Entry] = {
    OURS: Entry(Ours, "stem", "official"),
    f"{OURS}, bf16": Entry(
        functools.partial(Ours, training={"precision": "bf16"}), "stem", "official", _TRAINING
    ),
    MICRO: Entry(
        functools.partial(Ours, training={"micro_batch_size": 512}), "stem", "official", _TRAINING
    ),
    f"{OURS}, compiled": Entry(
        functools.partial(Ours, inference={}), "stem", "official", ("inference",)
    ),
    f"{OURS}, compiled bf16": Entry(
        functools.partial(Ours, inference={"precision": "bf16"}),
        "stem",
        "official",
        ("inference",),
    ),
    **both("official", Official, "stem"),
    **both("official PLE", functools.partial(Official, model="PLE"), "ple"),
    **both("torch-rechub PLE", TorchRechub, "ple"),
    **both("DeepCTR-Torch PLE", functools.partial(DeepCTR, model="PLE"), "ple"),
    **both("DeepCTR-Torch MMoE", functools.partial(DeepCTR, model="MMOE"), "mmoe"),
}
# On CUDA; the first four by default. torch.compile takes longest, and is last of these.
ON_GPU = (
    OURS,
    "official",
    "official PLE",
    "official, compiled",
    MICRO,
    "official PLE, compiled",
)
