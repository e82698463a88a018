"""Train the official code and ours on the same encoded data, and compare their validation AUC.

    python -m bench.parity --official PATH --data kuairand --train A --valid B \\
        --seeds 1,2,3 --json bench/results/parity_kuairand.json

Both get the ids that stem_fast.data makes, the same hyperparameters and seeds, and stop early by
the same rule; each draws its own first weights and batch order from the seed. With --paired, ours
starts from the official first weights and both see the same batches, which leaves rounding as the
only difference. A run is written to the JSON as it ends; the same command goes on after the last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bench import official as adapter
from stem_fast import data
from stem_fast.data.dataset import Dataset
from stem_fast.data.schema import Encoding, Schema
from stem_fast.models.network import STEMNet
from stem_fast.models.official import from_official
from stem_fast.training import fit as train
from stem_fast.training.checkpoint import replacing
from stem_fast.training.options import TrainingConfig

CODES = ("official", "stem_fast")
METRICS = ("auc", "gauc", "logloss")
WARM = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
KUAIRAND_FIELDS = (
    *("user_id", "video_id", "author_id", "music_id", "tag", "video_type", "upload_type", "tab"),
    *("hour", "duration_s", "user_active_degree", "follow_user_num_range"),
    *(f"onehot_feat{i}" for i in range(12)),
)


@dataclass(frozen=True)
class Study:
    """A data set and the one set of hyperparameters that both codes train with."""

    labels: tuple[str, ...]
    categorical: tuple[str, ...]  # empty: every column that is no label
    min_count: int
    group: str | None
    network: dict[str, Any]
    training: dict[str, Any]


STUDIES = {
    "kuairand": Study(
        labels=("finish", "is_like"),
        categorical=KUAIRAND_FIELDS,
        min_count=2,
        group="user_id",
        network={
            "embedding_dim": 16,
            "num_layers": 1,
            "num_shared_experts": 4,
            "num_specific_experts": 1,
            "expert_hidden_units": [256, 128],
            "gate_hidden_units": [128, 64],
            "tower_hidden_units": [128, 64],
        },
        training={"epochs": 20, "batch_size": 1024, "learning_rate": 1e-3},
    ),
    "census": Study(
        labels=("income_50k", "never_married"),
        categorical=(),
        min_count=10,
        group=None,
        network={
            "embedding_dim": 8,
            "num_layers": 1,
            "num_shared_experts": 2,
            "num_specific_experts": 1,
            "expert_hidden_units": [64, 32],
            "gate_hidden_units": [32],
            "tower_hidden_units": [32],
        },
        training={"epochs": 20, "batch_size": 2048, "learning_rate": 1e-3},
    ),
}


def schema(study: Study, path: Path) -> Schema:
    """The columns of the study in its Parquet file."""
    names = pq.read_schema(path).names
    return Schema(
        labels=dict.fromkeys(study.labels, "binary"),
        categorical=study.categorical or tuple(n for n in names if n not in study.labels),
        group=study.group,
        min_count=study.min_count,
    )


def rows(dataset: Dataset) -> Tensor:
    """The official loader's float64 [N, columns]: categorical ids, then labels."""
    assert dataset.labels is not None
    return torch.cat([dataset.ids.double(), dataset.labels.double()], dim=1)


def build_official(
    official: adapter.Official,
    encoding: Encoding,
    network: Mapping[str, Any],
    config: TrainingConfig,
    folder: str,
) -> Any:
    """The official STEM right after its seed: the same weights on every call."""
    official.seed_everything(config.seed)
    return adapter.build(
        official,
        encoding.vocab_sizes,
        encoding.schema.tasks,
        model_root=folder,
        max_gradient_norm=config.max_gradient_norm,
        learning_rate=config.learning_rate,
        embedding_regularizer=config.embedding_regularizer,
        net_regularizer=config.net_regularizer,
        early_stop_patience=config.patience,
        **network,
    )


def run_official(
    official: adapter.Official,
    encoding: Encoding,
    splits: tuple[Dataset, Dataset],
    network: Mapping[str, Any],
    config: TrainingConfig,
    paired: bool,
) -> dict[str, Any]:
    """One run of the official `fit`: metrics of its best weights, seconds, and its epochs."""
    training, validation = (rows(split) for split in splits)
    batch = config.batch_size
    loader = adapter.Loader.shuffled(training, batch)
    if paired:
        loader = adapter.Loader(training, batch, lambda epoch: epoch_order(training, config, epoch))
    valid_loader = adapter.Loader(validation, batch)
    with tempfile.TemporaryDirectory() as folder:
        model = build_official(official, encoding, network, config, folder)
        Path(model.checkpoint).parent.mkdir(parents=True)
        epochs: list[dict[str, float]] = []
        official_evaluate = model.evaluate

        def evaluate(loader: Any, metrics: Any = None) -> Any:
            logs = official_evaluate(loader, metrics=metrics)
            epochs.append({key: float(value) for key, value in logs.items()})
            return logs

        model.evaluate = evaluate
        start = time.perf_counter()
        model.fit(
            loader,
            epochs=config.epochs,
            validation_data=valid_loader,
            max_gradient_norm=config.max_gradient_norm,
        )
        seconds = time.perf_counter() - start
    predictions = model.predict(valid_loader)
    stacked = np.stack([predictions[task] for task in encoding.schema.tasks], axis=1)
    result = train.score(stacked, splits[1], encoding.schema.labels)
    return {"tasks": result["tasks"], "epochs": epochs, "seconds": seconds}


def run_ours(
    official: adapter.Official,
    encoding: Encoding,
    splits: tuple[Dataset, Dataset],
    network: Mapping[str, Any],
    config: TrainingConfig,
    paired: bool,
) -> dict[str, Any]:
    """One run of `stem_fast.training.fit.fit`, as `run_official`."""
    tasks = encoding.schema.tasks
    if paired:
        start_weights = build_official(official, encoding, network, config, "").state_dict()
        fields = list(encoding.vocab_sizes)
        model = from_official(STEMNet, start_weights, tasks=tasks, fields=fields)
    else:
        torch.manual_seed(config.seed)
        model = STEMNet(encoding.vocab_sizes, tasks, **network)
    start = time.perf_counter()
    history = train.fit(model, *splits, config)
    seconds = time.perf_counter() - start
    result = train.evaluate(model, splits[1], batch_size=config.batch_size)
    epochs = [
        {f"{task}_AUC": record.metrics["tasks"][task]["auc"] for task in tasks}
        | {"AUC": record.monitor}
        for record in history
    ]
    return {"tasks": result["tasks"], "epochs": epochs, "seconds": seconds}


def epoch_order(training: Tensor, config: TrainingConfig, epoch: int) -> Tensor:
    """The rows in the order that `stem_fast.training.fit.fit` visits them."""
    generator = torch.Generator().manual_seed(train.epoch_seed(config.seed, epoch))
    return torch.randperm(len(training), generator=generator)


def summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation over seeds, and ours minus official, of each task's metrics."""
    found: dict[str, Any] = {}
    for code in CODES:
        done = [run for key, run in runs.items() if key.startswith(f"{code}/")]
        if not done:
            continue
        tasks: dict[str, Any] = {}
        for task in done[0]["tasks"]:
            tasks[task] = {}
            for metric in METRICS:
                values = [run["tasks"][task][metric] for run in done]
                if None not in values:
                    tasks[task][metric] = statistics.fmean(values)
                    if len(values) > 1:
                        tasks[task][f"{metric}_std"] = statistics.stdev(values)
        found[code] = {
            "seeds": len(done),
            "tasks": tasks,
            "seconds": statistics.fmean(run["seconds"] for run in done),
            "epochs": statistics.fmean(len(run["epochs"]) for run in done),
        }
    if len(found) == len(CODES):
        theirs, ours = (found[code]["tasks"] for code in CODES)
        found["difference"] = {
            task: {m: ours[task][m] - theirs[task][m] for m in METRICS if m in ours[task]}
            for task in ours
        }
    return found


def describe(path: Path, split: Dataset) -> dict[str, Any]:
    """What tells a data file without telling where it lies here."""
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    return {"file": "/".join(path.parts[-2:]), "blake2b": digest, "rows": len(split)}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Never half a file: a new one takes the old one's place."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The runs of an earlier call, which must have had the same settings."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if report["settings"].get(key) != value:
            sys.exit(
                f"{path} was made with {key} {report['settings'].get(key)}, now it is {value}: "
                "give another --json"
            )
    return dict(report["runs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--official", type=adapter.checkout, required=True, help="a checkout of the official code"
    )
    parser.add_argument("--data", required=True, choices=STUDIES)
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--valid", required=True, type=Path)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--codes", default=",".join(CODES), help="which codes to run")
    parser.add_argument("--paired", action="store_true", help="same first weights, same batches")
    parser.add_argument("--json", required=True, type=Path)
    options = parser.parse_args()
    codes = options.codes.split(",")
    if not set(codes) <= set(CODES):
        parser.error(f"--codes are {', '.join(CODES)}, not {options.codes}")

    commit = adapter.commit(Path(__file__).parent)  # now: the code is imported, files may change
    official = adapter.load(options.official)
    study = STUDIES[options.data]
    columns = schema(study, options.train)
    encoding = data.fit_encoding(options.train, columns)
    splits = (data.load(options.train, encoding), data.load(options.valid, encoding))
    settings = {
        "official": {"repository": adapter.REPOSITORY, "commit": official.commit},
        "paired": options.paired,
        "train": describe(options.train, splits[0]),
        "valid": describe(options.valid, splits[1]),
        "schema": columns.to_dict(),
        "vocabulary_rows": sum(encoding.vocab_sizes.values()),
        "network": study.network,
        "training": study.training,
    }
    command = (
        f"python -m bench.parity --official PATH --data {options.data} "
        f"--train {settings['train']['file']} --valid {settings['valid']['file']} "
        f"--seeds {options.seeds}{' --paired' if options.paired else ''} --json FILE"
    )
    for seed in (int(text) for text in options.seeds.split(",")):
        config = TrainingConfig(**study.training, seed=seed)
        for code in codes:
            runs = read(options.json, settings)
            key = f"{code}/{seed}"
            if key in runs:
                continue
            run = run_official if code == "official" else run_ours
            result = run(official, encoding, splits, study.network, config, options.paired)
            result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            # Well above the number of threads: others were at work, and `seconds` says little.
            result["load_average"] = round(os.getloadavg()[1], 1)
            if code == "stem_fast":
                result["commit"] = commit
            runs[key] = result
            report = {
                "command": command,
                "machine": {"processor": processor(), "threads": torch.get_num_threads()},
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                },
                "environment": {name: os.environ[name] for name in WARM if name in os.environ},
                "shims": official.shims,
                "settings": settings,
                "summary": summary(runs),
                "runs": runs,
            }
            write(options.json, report)
            aucs = ", ".join(f"{t} {v['auc']:.4f}" for t, v in result["tasks"].items())
            epochs = len(result["epochs"])
            print(f"{key}: {aucs}, {epochs} epochs, {result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
