"""The run folder: what ``fit`` leaves behind and everything that reads it.

    RUN/model.safetensors   weights of the best epoch
        schema.json         the encoding: columns, vocabularies, scaling
        config.json         model, its sizes, and how it was trained, from what
        history.json        one entry an epoch
        metrics.json        validation metrics of the best weights, written when ``fit`` has ended

Every change is one rename, so a process killed at any moment leaves no RUN or one that loads.
"""

from __future__ import annotations

import dataclasses
import errno
import glob
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stem_fast.common import DataError, nearest, shown
from stem_fast.data.cache import DAY
from stem_fast.data.schema import Encoding
from stem_fast.models.family import MODELS
from stem_fast.models.network import STEMNet
from stem_fast.training.options import TrainingConfig

if TYPE_CHECKING:
    from stem_fast.training.fit import EpochRecord

VERSION = 2
WEIGHTS, SCHEMA, CONFIG = "model.safetensors", "schema.json", "config.json"
HISTORY, METRICS = "history.json", "metrics.json"
_FILES = (WEIGHTS, SCHEMA, CONFIG, HISTORY, METRICS)
# By a killed process; earlier releases gave the file no name of its own.
_LEFT = re.compile(rf"\.({'|'.join(map(re.escape, _FILES))})(\.\w{{8}})?\.partial")


def create_run(
    path: str | Path,
    model: STEMNet,
    encoding: Encoding,
    training: TrainingConfig,
    *,
    overwrite: bool = False,
    records: Sequence[EpochRecord] = (),
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write a complete run folder in one step.

    ``records``, which ``train.fit`` returns, are its history, and the best epoch's metrics its
    ``metrics.json``; without them there is none yet. ``source`` (command, data paths, joins; plain
    JSON types) is kept in config.json. With ``overwrite`` an earlier run is replaced as a whole.
    Where PATH is a link, the run is what it names. Raises DataError as ``prepare`` does.
    """
    path = _real(path)
    prepare(path, overwrite=overwrite)
    _refuse_mismatch(path, model, encoding)
    names = [name for name, kind in MODELS.items() if kind is type(model)]
    if not names:
        raise DataError(
            f"a run holds one of {', '.join(MODELS)}, and this is a {type(model).__name__}: keep "
            "its state_dict() yourself."
        )
    config = {
        "version": VERSION,
        "model": names[0],
        "config": model.config,
        "training": dataclasses.asdict(training),
        "source": dict(source or {}),
    }
    work = _work_folder(path)
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        save_weights(new, model)
        save_json(new / SCHEMA, encoding.to_dict())
        save_json(new / CONFIG, config)
        save_json(new / HISTORY, [dataclasses.asdict(record) for record in records])
        for record in [record for record in records if record.best][-1:]:
            save_json(new / METRICS, record.metrics)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(work, ignore_errors=True)


def save_weights(path: str | Path, model: STEMNet) -> None:
    """Replace the weights of the run folder PATH in one step; float32, also of a float64 model."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        kept = tensor.float() if tensor.dtype == torch.float64 else tensor
        tensors[name] = kept.cpu().contiguous()
    with replacing(Path(path) / WEIGHTS) as partial:
        save_file(tensors, partial)


def save_json(path: str | Path, value: Any) -> None:
    """Write VALUE to the file PATH in one step; dictionaries keep their order, NaN is refused."""
    # Field order is part of a model, so keys are never sorted.
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _real(path: str | Path) -> Path:
    """What a path names in the end: links are written through, not replaced."""
    return Path(os.path.realpath(path))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside PATH to write to, of a name that nobody else has; it becomes PATH
    when the block ends well, else it is removed. Where PATH is a link, what it names is replaced.

    Raises DataError where it cannot be written, a full disk included.
    """
    path = _real(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        partial.open("xb").close()  # new, so that it is no link of somebody else's to another file
        try:
            mode = partial.stat().st_mode
            yield partial
            os.chmod(partial, mode)  # safetensors makes files that only their owner may read
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{path}: cannot be written ({why}): free some space, or name another place."
        ) from error


def check_output(option: str, path: Path) -> None:
    """Make the parent of the file PATH, and find out by trying whether a file can be written there.

    Raises DataError if not, and where PATH is a folder, a device or FIFO, or a run's own file;
    ``option`` names it. A link is what it names.
    """
    real = _real(path)
    if real.is_dir():
        raise DataError(f"{option} is {path}, a folder: name a file.")
    if real.exists() and not real.is_file():
        raise DataError(f"{option} is {path}, which is no regular file: name one.")
    if real.name in _FILES and (real.parent / CONFIG).exists():
        raise DataError(f"{option} is {path}, a file of the run in that folder: name another file.")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        if real.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        # As long a name as ``replacing`` will give.
        with tempfile.NamedTemporaryFile(
            prefix=f".{real.name}.", suffix=".partial", dir=real.parent
        ):
            pass
    except OSError as error:
        raise DataError(
            f"{option} is {path}, where no file can be written ({error.strerror}): name another."
        ) from error


def prepare(path: str | Path, *, overwrite: bool) -> None:
    """Make PATH's parent, and find out by trying whether a run can be written there.

    What a killed ``create_run`` left is cleared away; an old run that it had set aside comes back.
    Raises DataError if the place cannot be written to, if PATH holds files and ``overwrite`` is
    off, or if it holds anything that is not a run's.
    """
    path = _real(path)
    try:
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        path.parent.mkdir(parents=True, exist_ok=True)
        _work_folder(path).rmdir()
        _restore(path)
        if path.is_dir() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path.name} is not to be written to")
    except OSError as error:
        raise DataError(
            f"{path}: a run cannot be written there ({error}): choose another --out."
        ) from error
    if path.is_mount():
        raise DataError(f"{path} is a mount point, not to be replaced: name a folder inside it.")
    refuse_existing(path, overwrite=overwrite)


def _work_folder(path: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))


def _restore(path: Path) -> None:
    for work in _left(path):
        if (work / "old").exists() and not path.exists():
            os.rename(work / "old", path)
            shutil.rmtree(work, ignore_errors=True)
    _sweep(path)


def _sweep(path: Path) -> None:
    """Remove what killed processes left beside PATH a day ago: surely no living one's."""
    for left in _left(path):
        with suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - left.lstat().st_mtime <= DAY:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _left(path: Path) -> list[Path]:
    # Eight characters are random: ".run.*" would match what belongs to "run.b" too.
    return list(path.parent.glob(f".{glob.escape(path.name)}.????????.partial"))


def refuse_existing(path: str | Path, *, overwrite: bool) -> None:
    """Raise DataError if PATH is a file, or holds files that a new run may not replace."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} is a file: --out names the folder of the new run.")
    held = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    foreign = [name for name in held if name not in _FILES and not _LEFT.fullmatch(name)]
    if foreign:
        raise DataError(f"{path} holds {foreign[0]}, which no run has: choose another folder.")
    if held and not overwrite:
        raise DataError(f"{path} already holds a run: choose another folder or add --overwrite.")


def load_run(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[STEMNet, Encoding, TrainingConfig]:
    """The model (best weights, in evaluation mode, on ``device``), its encoding and its training.

    Raises DataError for a folder that is no complete run, another version's, or one whose files
    contradict each other (tensors missing, left over or of another shape).
    """
    path = Path(path)
    require_folder(path)
    missing = [name for name in (WEIGHTS, SCHEMA, CONFIG) if not (path / name).is_file()]
    if missing:
        raise DataError(f"{path} is not a complete run: it lacks {', '.join(missing)}.")
    config = read_config(path)
    try:
        options = _with_scales(config["config"])
        # Without memory, which sizes of a damaged file could be too large for.
        with torch.device("meta"):
            model = MODELS[config["model"]](**options)
        training = TrainingConfig(**config["training"])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path / CONFIG} describes no {config['model']!r} run: {str(error)[:500]}"
        ) from error
    encoding = Encoding.from_dict(read_json(path / SCHEMA))
    _refuse_mismatch(path, model, encoding)
    weights = _read_weights(path / WEIGHTS, model)
    model = MODELS[config["model"]](**options)
    model.load_state_dict(weights)
    return model.to(device).eval(), encoding, training


def _with_scales(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's configuration; one from before labels were standardised says that none was."""
    kinds = config.get("kinds") if isinstance(config, Mapping) else None
    if not isinstance(kinds, Mapping) or "scales" in config:
        return config
    return {**config, "scales": {task: (0, 1) for task, k in kinds.items() if k != "binary"}}


def require_folder(path: Path) -> None:
    """Raises DataError for a run folder that is not there."""
    if not path.is_dir():
        raise DataError(f"no run folder {path}: name the folder that `stem-fast fit --out` made.")


def read_config(path: Path) -> dict[str, Any]:
    """The checked config.json of the run folder PATH."""
    config = read_json(path / CONFIG)
    keys = ("version", "model", "config", "training")
    for key in keys:
        if not isinstance(config, dict) or key not in config:
            raise DataError(f"{path / CONFIG} has no {key!r}: it is not a run's configuration.")
    if config["version"] != VERSION:
        raise DataError(
            f"{path / CONFIG}: expected version {VERSION}, got {shown(config['version'])}: use the "
            "release that made the run, or fit again."
        )
    name = config["model"]
    if not isinstance(name, str) or name not in MODELS:
        raise DataError(
            f"{path / CONFIG}: unknown model {shown(name)}.{nearest(shown(name), MODELS)}"
        )
    for key in ("config", "training", "source"):
        if not isinstance(value := config.setdefault(key, {}), dict):
            raise DataError(f"{path / CONFIG}: {key}: expected a mapping, got {shown(value)}.")
    join = config["source"].get("join", [])
    if not isinstance(join, list) or not all(isinstance(text, str) for text in join):
        raise DataError(f"{path / CONFIG}: join: expected a list of FILE:KEY, got {shown(join)}.")
    return config


def but_for_the_seed(path: Path, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The same text for runs of one model, training, encoding and number of validation rows."""
    training = {key: value for key, value in config["training"].items() if key != "seed"}
    schema = read_json(path / SCHEMA)
    return json.dumps([config["model"], config["config"], training, schema, metrics["rows"]])


def read_metrics(path: Path) -> dict[str, Any]:
    """The checked metrics.json of the run folder PATH."""
    result = read_json(path / METRICS)
    tasks = result.get("tasks") if isinstance(result, dict) else None
    if (
        not isinstance(tasks, dict)
        or type(result.get("rows")) is not int
        or not all(isinstance(values, dict) for values in tasks.values())
        or not all(
            value is None or (type(value) in (int, float) and abs(value) < math.inf)
            for values in tasks.values()
            for value in values.values()
        )
    ):
        raise DataError(f"{path / METRICS} does not hold the metrics of a run: fit it again.")
    return result


def read_json(path: Path) -> Any:
    """The content of one of a run's JSON files; DataError if it is absent or damaged."""
    if path.exists() and not path.is_file():  # reading a FIFO would wait for ever
        raise DataError(f"{path} is no regular file: name the folder of a run.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise DataError(f"{path} is not a run's: it is nested too deeply.") from error
    except FileNotFoundError:
        raise DataError(
            f"{path.parent} has no {path.name}: name the folder of a run whose fit has ended."
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error


def _read_weights(path: Path, model: STEMNet) -> dict[str, torch.Tensor]:
    """The file's tensors, after their names and shapes have been held against the model's."""
    wanted = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            missing, extra = [n for n in wanted if n not in found], sorted(found - wanted.keys())
            if missing or extra:
                lists = {"lacks": missing, "has, beyond the model's,": extra}
                said = "; ".join(f"{verb} {_some(names)}" for verb, names in lists.items() if names)
                raise DataError(f"{path} does not fit its config.json: it {said}.")
            for name, tensor in wanted.items():
                shape = file.get_slice(name).get_shape()
                if shape != list(tensor.shape):
                    raise DataError(
                        f"{path}: tensor {name}: expected shape {list(tensor.shape)} by "
                        f"config.json, got {shape}."
                    )
            tensors = {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise DataError(
                f"{path}: tensor {name}: expected {wanted[name].dtype} by config.json, got "
                f"{tensor.dtype}."
            )
        # Extremes of a tensor show NaN and infinity without a copy of it.
        for value in tensor.aminmax() if tensor.numel() and tensor.is_floating_point() else ():
            if not value.isfinite():
                raise DataError(
                    f"{path}: tensor {name} holds {value.item()}, which no prediction can be made "
                    "from: fit again."
                )
    return tensors


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _refuse_mismatch(path: Path, model: STEMNet, encoding: Encoding) -> None:
    """Ids mean nothing to a model made for other vocabularies, nor outputs to one of other kinds of
    task, so both sides must agree."""
    config = model.config
    pairs = {
        "tasks": (list(config["tasks"]), list(encoding.schema.tasks)),
        "vocab_sizes": (list(config["vocab_sizes"].items()), list(encoding.vocab_sizes.items())),
        "numeric": (list(config["numeric"]), list(encoding.schema.numeric)),
        "sequences": (dict(config["sequences"]), encoding.sequence_tables),
        "pooling": (dict(config["pooling"]), encoding.pooling),
        "kinds": (dict(config["kinds"]), dict(encoding.schema.labels)),
    }
    for key, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise DataError(
                f"{path}: the model's {key} {shown(ours)} are not the schema's {shown(theirs)}."
            )
