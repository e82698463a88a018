"""The ``stem-fast`` command."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import math
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
import typer
from typer.core import TyperGroup

from stem_fast import __version__, data, ops, report
from stem_fast.common import DataError
from stem_fast.data import cache as caching
from stem_fast.data import select, synth
from stem_fast.data.schema import LARGEST, Encoding, Schema, table_owners
from stem_fast.data.tables import Table, refuse_changed, signatures
from stem_fast.models.family import MODELS
from stem_fast.models.network import STEMNet
from stem_fast.nn.precision import check as check_precision
from stem_fast.training import checkpoint
from stem_fast.training import fit as training
from stem_fast.training.options import (
    EMBEDDING_OPTIMIZERS,
    FitSettings,
    TrainingConfig,
    fit_settings,
    parse_join,
    parse_size,
)

_SMALLER = (
    "fit a smaller network with a lower --embedding-dim, --expert-hidden-units or "
    "--num-shared-experts, or a higher --min-count"
)


class _Commands(TyperGroup):
    """Makes every refusal one line on stderr and exit code 2, and Ctrl-C exit code 130."""

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False  # else typer prints its own, longer, errors
        try:
            with warnings.catch_warnings():
                warnings.showwarning = report.warning
                code = super().main(*args, **extra)
        except (DataError, training.TrainingError, OSError) as error:
            report.error(str(error))
            code = 2
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            reason, _, _ = str(error).partition("\n")
            report.error(
                "out of memory: lower --batch-size, give fit a --micro-batch-size, or "
                f"{_SMALLER} ({reason})."
            )
            code = 2
        except Exception as error:
            # Usage errors: their class has moved between releases of typer, this method has not.
            if not hasattr(error, "format_message"):
                raise
            if message := error.format_message():  # empty where the help has been printed
                report.error(message + _value(error))
            code = 2
        sys.exit(code or 0)


def _value(error: Exception) -> str:
    """The value that a usage error is about, where releases of typer by pydantic leave it out."""
    cause: Any = error.__cause__
    found = cause.errors() if hasattr(cause, "errors") else []
    return f": {found[0]['input']!r}" if found else ""


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """torch has a class for the memory of GPUs only; its CPU allocator is known by its words."""
    words = ("DefaultCPUAllocator", "not enough memory")
    classes = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, classes) or any(word in str(error) for word in words)


app = typer.Typer(
    cls=_Commands,
    help="Multi-task recommenders around STEM-Net: fit, evaluate, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the console script."""
    app()


def _version(asked: bool) -> None:
    if asked:
        report.console().print(f"stem_fast {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="print it", is_eager=True, callback=_version, metavar=""),
    ] = False,
) -> None:
    pass


def _flag(panel: str, text: str, *names: str, default: object = None, **extra: Any) -> Any:
    text = text if default is None else f"{text} (default {default})"
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **extra)


_DATA, _COLUMNS, _NETWORK, _TRAINING = "Data", "Columns", "Network", "Training"
_OFFICIAL = TrainingConfig()
_Text = str | None
_List = list[str] | None  # comma-separated, and may be given several times
_Int = int | None
_Float = float | None
_Bool = bool | None
_Join = Annotated[
    list[str] | None,
    _flag(_DATA, "FILE:KEY, a side table joined on a column; may be given several times"),
]
_Cache = Annotated[
    Path | None,
    _flag(_DATA, "folder for encoded data", default="$STEM_FAST_CACHE, ~/.cache/stem_fast"),
]
_CacheLimit = Annotated[
    str | None,
    _flag(_DATA, "size such as 10GB: remove cached data, that longest unused first, beyond it"),
]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
_Run = Annotated[Path, typer.Argument(metavar="RUN", help="run folder, made by fit --out")]
_Precision = Annotated[
    str | None, typer.Option(help="fp32, tf32, bf16, fp64 (default: as in training)")
]
_BatchSize = Annotated[
    int | None, typer.Option(min=1, max=LARGEST, help="rows (default: as in training)")
]


@app.command()
def fit(
    context: typer.Context,
    config: Annotated[
        Path | None,
        _flag(_DATA, "YAML file of these settings (names with underscores); flags override it"),
    ] = None,
    train: Annotated[
        _Text, _flag(_DATA, "training table: CSV, TSV, Parquet, or a folder (needed)")
    ] = None,
    valid: Annotated[_Text, _flag(_DATA, "validation table (needed)")] = None,
    out: Annotated[_Text, _flag(_DATA, "run folder to make (needed)")] = None,
    overwrite: Annotated[_Bool, _flag(_DATA, "replace a run", "--overwrite", metavar="")] = None,
    join: _Join = None,
    cache: _Cache = None,
    cache_limit: _CacheLimit = None,
    labels: Annotated[
        _List, _flag(_COLUMNS, "tasks (needed): is_click,watch_time:regression", metavar="A,B")
    ] = None,
    categorical: Annotated[
        _List, _flag(_COLUMNS, "columns looked up in a vocabulary", metavar="A,B")
    ] = None,
    numeric: Annotated[
        _List, _flag(_COLUMNS, "columns standardised as numbers", metavar="A,B")
    ] = None,
    sequences: Annotated[
        _List,
        _flag(
            _COLUMNS,
            "list columns: watch_seq=video_id (shares video_id's vocabulary),tags",
            "--sequence",
            "--sequences",
            metavar="A,B",
        ),
    ] = None,
    pooling: Annotated[_Text, _flag(_COLUMNS, "of the sequences: mean or sum")] = None,
    group: Annotated[_Text, _flag(_COLUMNS, "column that gAUC groups by")] = None,
    weight: Annotated[_Text, _flag(_COLUMNS, "column of sample weights")] = None,
    min_count: Annotated[_Int, _flag(_COLUMNS, "rarer values become unknown", default=10)] = None,
    header: Annotated[
        _List, _flag(_COLUMNS, "column names of a file without them", metavar="A,B")
    ] = None,
    delimiter: Annotated[_Text, _flag(_COLUMNS, "of text files (default: by suffix)")] = None,
    model: Annotated[_Text, _flag(_NETWORK, ", ".join(MODELS), default="stem")] = None,
    embedding_dim: Annotated[_Int, _flag(_NETWORK, "of each embedding space", default=16)] = None,
    num_layers: Annotated[_Int, _flag(_NETWORK, "of experts and gates", default=1)] = None,
    num_shared_experts: Annotated[_Int, _flag(_NETWORK, "default: the model's")] = None,
    num_specific_experts: Annotated[_Int, _flag(_NETWORK, "a task; default: the model's")] = None,
    expert_hidden_units: Annotated[
        _List, _flag(_NETWORK, "widths", default="512,512,512", metavar="N,N")
    ] = None,
    gate_hidden_units: Annotated[
        _List, _flag(_NETWORK, "widths, where there are gates", default="128,64", metavar="N,N")
    ] = None,
    tower_hidden_units: Annotated[
        _List, _flag(_NETWORK, "widths", default="128,64", metavar="N,N")
    ] = None,
    hidden_activations: Annotated[_Text, _flag(_NETWORK, "by name", default="relu")] = None,
    net_dropout: Annotated[_Float, _flag(_NETWORK, "after hidden layers", default=0)] = None,
    batch_norm: Annotated[
        _Bool, _flag(_NETWORK, "in hidden layers", "--batch-norm/--no-batch-norm", metavar="")
    ] = None,
    epochs: Annotated[_Int, _flag(_TRAINING, "at most", default=_OFFICIAL.epochs)] = None,
    batch_size: Annotated[_Int, _flag(_TRAINING, "rows", default=_OFFICIAL.batch_size)] = None,
    learning_rate: Annotated[
        _Float, _flag(_TRAINING, "the first", default=_OFFICIAL.learning_rate)
    ] = None,
    embedding_optimizer: Annotated[
        _Text,
        _flag(_TRAINING, ", ".join(EMBEDDING_OPTIMIZERS), default=_OFFICIAL.embedding_optimizer),
    ] = None,
    embedding_regularizer: Annotated[
        _Float, _flag(_TRAINING, "L2 of embeddings", default=_OFFICIAL.embedding_regularizer)
    ] = None,
    net_regularizer: Annotated[
        _Float, _flag(_TRAINING, "L2 of other weights", default=_OFFICIAL.net_regularizer)
    ] = None,
    max_gradient_norm: Annotated[
        _Float, _flag(_TRAINING, "clipping, 0 = none", default=_OFFICIAL.max_gradient_norm)
    ] = None,
    patience: Annotated[
        _Int, _flag(_TRAINING, "epochs without progress", default=_OFFICIAL.patience)
    ] = None,
    monitor: Annotated[
        _Text,
        _flag(
            _TRAINING,
            "auc, gauc, logloss, finish.auc ...",
            default=f"{_OFFICIAL.monitor}; rmse if all tasks are regressions",
        ),
    ] = None,
    task_weights: Annotated[_List, _flag(_TRAINING, "one a task: 1,0.5", metavar="X,X")] = None,
    seed: Annotated[_Int, _flag(_TRAINING, "of weights, shuffles", default=_OFFICIAL.seed)] = None,
    precision: Annotated[
        _Text,
        _flag(_TRAINING, "of products: fp32, tf32, bf16; or fp64", default=_OFFICIAL.precision),
    ] = None,
    micro_batch_size: Annotated[
        _Int,
        _flag(
            _TRAINING,
            "rows in the network together, 0 = all: for less memory",
            default=_OFFICIAL.micro_batch_size,
        ),
    ] = None,
    device: Annotated[_Text, _flag(_TRAINING, "auto, cpu, cuda or cuda:N", default="auto")] = None,
) -> None:
    """Train a model with early stopping and keep its best weights in a run folder."""
    given = {k: v for k, v in context.params.items() if k != "config" and v not in (None, (), [])}
    lists = {
        k: ",".join(v) for k, v in given.items() if isinstance(v, (list, tuple)) and k != "join"
    }
    given |= lists
    with _flags_named(given):
        _fit(fit_settings(given, config))


@contextmanager
def _flags_named(given: Iterable[str]) -> Iterator[None]:
    """Messages that name an option as the --config file does, by the flag that gave it."""
    try:
        yield
    except DataError as error:
        message = str(error)
        for key in given:
            # A name of one word is a word like others but at the start.
            start = r"(?<![\w'-])" if "_" in key else "^"
            flag = f"--{key.replace('_', '-')}"
            message = re.sub(rf"{start}{key}(?=:? (?:is|must|names?|has|needs|'))", flag, message)
        raise DataError(message) from error


def _fit(settings: FitSettings) -> None:
    config, schema = settings.training, settings.schema
    # All that can be refused without reading data is refused first.
    monitor = training.check(config, schema.labels)
    if monitor.metric == "gauc" and schema.group is None:
        raise DataError(f"--monitor is {monitor.name!r}, which needs the --group that it is by.")
    device = _device(settings.device)
    check_precision(config.precision, device)
    checkpoint.prepare(settings.out, overwrite=settings.overwrite)

    console = report.console()
    before = signatures(settings.train, settings.valid, *(join.path for join in settings.joins))
    with console.status("reading and encoding the tables"):
        encoding = data.fit_encoding(settings.train, schema, joins=settings.joins)
        torch.manual_seed(config.seed)
        model = _build(settings, encoding)
        train, valid = (
            data.load(path, encoding, cache=settings.cache, joins=settings.joins, weight=weight)
            for path, weight in ((settings.train, True), (settings.valid, False))
        )
        _trim(settings.cache, settings.cache_limit)
        # A vocabulary of what was there before does not suit what is encoded by it.
        refuse_changed(before)
    owners = table_owners(schema)
    for column, values in encoding.vocabularies.items():
        if not values and any(train.known[name].values for name in owners[column]):
            warnings.warn(
                f"no value of column {column!r} is there {schema.min_count} times, so all of them "
                "are unknown: lower --min-count, or leave the column out",
                stacklevel=1,
            )
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{settings.model}: {size:,} parameters on {device}; "
        f"{len(train):,} training rows, {len(valid):,} validation rows"
    )
    history: list[dict[str, Any]] = []

    def on_best(model: STEMNet) -> None:
        if history:
            checkpoint.save_weights(settings.out, model)
        else:
            checkpoint.create_run(
                settings.out,
                model,
                encoding,
                config,
                overwrite=settings.overwrite,
                source=_source(settings),
            )

    def on_epoch(record: training.EpochRecord) -> None:
        history.append(dataclasses.asdict(record))
        checkpoint.save_json(settings.out / checkpoint.HISTORY, history)
        progress.epoch(record)

    try:
        with report.FitReport(len(train), config.epochs, config.monitor) as progress:
            records = training.fit(
                model,
                train,
                valid,
                config,
                device=device,
                on_step=progress.step,
                on_best=on_best,
                on_epoch=on_epoch,
            )
    except KeyboardInterrupt:
        state = f"{settings.out} holds the best weights so far" if history else "nothing is saved"
        report.error(f"interrupted: {state}.")
        raise typer.Exit(130) from None
    except training.TrainingError as error:
        kept = f" {settings.out} holds the best weights so far." if history else ""
        raise training.TrainingError(f"{error}{kept}") from error
    best = [record for record in records if record.best][-1]
    checkpoint.save_json(settings.out / checkpoint.METRICS, best.metrics)
    _print_metrics(best.metrics, f"validation, epoch {best.epoch} of {len(records)}", schema.group)
    console.print(f"saved to {settings.out}")


def _source(settings: FitSettings) -> dict[str, Any]:
    """What a run was made by and from, with paths that hold wherever it is read."""
    return {
        "command": shlex.join(["stem-fast", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "train": str(settings.train.absolute()),
        "valid": str(settings.valid.absolute()),
        "join": [f"{Path(join.path).absolute()}:{join.key}" for join in settings.joins],
    }


def _build(settings: FitSettings, encoding: Encoding) -> STEMNet:
    def build() -> STEMNet:
        return MODELS[settings.model](
            encoding.vocab_sizes,
            encoding.schema.tasks,
            numeric=encoding.schema.numeric,
            sequences=encoding.sequence_tables,
            pooling=encoding.pooling,
            kinds=encoding.schema.labels,
            **settings.network,
        )

    try:
        with torch.device("meta"):  # which has no memory to run out of
            size = sum(parameter.nbytes for parameter in build().parameters())
        if size > (memory := _memory()):
            raise DataError(
                f"a {settings.model} model of these options takes {size / 1e9:,.1f} GB, and this "
                f"machine has {memory / 1e9:,.1f}: {_SMALLER}."
            )
        model = build()
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"no {settings.model} model of these options: {error}.") from error
    if "gate_hidden_units" in settings.network and not model.wiring.gates:
        raise DataError(f"gate_hidden_units is given, but {settings.model} has no gates: drop it.")
    return model


def _memory() -> float:
    """Bytes of the machine's memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is any, else the CPU.

    Raises DataError for one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not re.fullmatch("[0-9]{1,9}", index)):
        raise DataError(f"device is {name!r}: give auto, cpu, cuda or cuda:N.")
    if kind == "cpu" and name != "cpu":
        raise DataError(f"device is {name!r}: cpu takes no index, give cpu.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise DataError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices: "
            "`stem-fast doctor` says more."
        )
    return torch.device(name)


@app.command()
def evaluate(
    run: _Run,
    table: Annotated[Path, typer.Option("--data", help="labelled table")],
    json: Annotated[Path | None, typer.Option(help="write the metrics to this file too")] = None,
    by: Annotated[
        str | None, typer.Option(help="column: metrics of each of its values too", metavar="COLUMN")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="rows to score: tab=1, date>=20220501, city!=Oslo; several: all hold",
            metavar="CONDITION",
        ),
    ] = None,
    join: _Join = None,
    cache: _Cache = None,
    cache_limit: _CacheLimit = None,
    batch_size: _BatchSize = None,
    device: _Device = "auto",
    precision: _Precision = None,
) -> None:
    """Score a run on labelled data."""
    limit = None if cache_limit is None else parse_size("--cache-limit", cache_limit)
    conditions = [select.Where.parse(text) for text in where or ()]
    model, encoding, config = checkpoint.load_run(run, _device(device))
    schema = encoding.schema
    needed = [*schema.features, *schema.tasks, *([schema.group] if schema.group else [])]
    asked = [*([] if by is None else [by]), *(each.column for each in conditions)]
    joins = _joins(join, run, table, schema, needed, asked)
    _check_output("--json", json, table, *(Path(each.path) for each in joins))
    check_precision(precision or config.precision, _device(device))
    with report.console().status(f"evaluating {table}"):
        before = signatures(table, *(each.path for each in joins))
        found = rows = data.load(table, encoding, cache=cache, joins=joins, weight=False)
        _trim(cache, limit)
        values = None
        if by is not None:
            values = select.read_columns(table, schema, [by], joins=joins, texts=True)[by]
        if conditions:
            chosen = select.matching(table, schema, conditions, joins=joins)
            rows = rows.take(chosen)
            values = None if values is None else values.take(pa.array(chosen))
        refuse_changed(before)
        predictions = training.predict(
            model,
            rows,
            batch_size=batch_size or config.batch_size,
            device=_device(device),
            precision=precision or config.precision,
        )
        result = training.score(predictions, rows, schema.labels)
        if values is not None:
            parts = training.score_by(predictions, rows, schema.labels, values)
            result["by"] = {"column": by, **parts}
        if conditions:
            result["where"] = [str(each) for each in conditions]
    held = f", {' and '.join(result['where'])}" if conditions else ""
    _print_metrics(result, f"{run} on {table}{held}", schema.group)
    if by is not None:
        report.print_by(result["by"])
    _print_unknown(found, " of all rows" if conditions else "")
    if json is not None:
        checkpoint.save_json(json, result)


@app.command()
def predict(
    run: _Run,
    table: Annotated[Path, typer.Option("--data", help="table; labels are not needed")],
    out: Annotated[Path, typer.Option(help="file to write: .parquet or .csv")],
    keep: Annotated[
        list[str] | None,
        typer.Option(help="columns of the table to copy: user_id,video_id", metavar="A,B"),
    ] = None,
    join: _Join = None,
    cache: _Cache = None,
    cache_limit: _CacheLimit = None,
    batch_size: _BatchSize = None,
    device: _Device = "auto",
    precision: _Precision = None,
) -> None:
    """Write one column a task, probabilities (values of regression tasks), rows in order."""
    writers = {".parquet": pyarrow.parquet.write_table, ".csv": pyarrow.csv.write_csv}
    if out.suffix.lower() not in writers:
        raise DataError(f"--out is {out}: name a .parquet or .csv file.")
    limit = None if cache_limit is None else parse_size("--cache-limit", cache_limit)
    names = [each.strip() for text in keep or () for each in text.split(",") if each.strip()]
    model, encoding, config = checkpoint.load_run(run, _device(device))
    schema = encoding.schema
    for name in names:
        if name in schema.tasks or names.count(name) > 1:
            other = "a prediction's name too" if name in schema.tasks else "named twice"
            raise DataError(f"--keep names {name!r}, which is {other}: leave it out.")
    joins = _joins(join, run, table, schema, schema.features, names)
    _check_output("--out", out, table, *(Path(each.path) for each in joins))
    check_precision(precision or config.precision, _device(device))
    with report.console().status(f"predicting {table}"):
        before = signatures(table, *(each.path for each in joins))
        rows = data.load(table, encoding, cache=cache, joins=joins, labels=False)
        _trim(cache, limit)
        kept = select.read_columns(table, schema, names, joins=joins) if names else pa.table({})
        for name in names:
            if out.suffix.lower() == ".csv":
                _refuse_in_csv(name, kept[name])
        refuse_changed(before)
        predictions = training.predict(
            model,
            rows,
            batch_size=batch_size or config.batch_size,
            device=_device(device),
            precision=precision or config.precision,
        )
    columns = {name: kept[name] for name in names}
    columns |= {task: pa.array(p) for task, p in zip(schema.tasks, predictions.T, strict=True)}
    with checkpoint.replacing(out) as partial:
        writers[out.suffix.lower()](pa.table(columns), partial)
    report.console().print(f"{len(rows):,} rows of {', '.join(columns)} written to {out}")
    _print_unknown(rows)


def _refuse_in_csv(name: str, values: pa.ChunkedArray) -> None:
    """Raises DataError for a kept column of a type, or of bytes, that no CSV file can hold."""
    try:
        if "binary" in str(values.type):
            values.cast(pa.large_string())  # which looks whether all of it is UTF-8
        pyarrow.csv.write_csv(pa.table({name: values[:1]}), io.BytesIO())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"--keep names {name!r}, which holds {values.type}: a .csv has no place for it "
            f"({error}), name a .parquet file."
        ) from error


def _print_unknown(rows: data.Dataset, which: str = "") -> None:
    """A line of the columns with the most values that the model has not learned."""
    shares = {name: known.unknown_share for name, known in rows.known.items()}
    most = sorted((name for name in shares if shares[name]), key=lambda name: -shares[name])
    parts = [f"{name} {100 * shares[name]:.1f} %" for name in most[:5]]
    parts += [f"less in {len(most) - 5} more"] * (len(most) > 5)
    report.console().print(f"unknown values{which}: {', '.join(parts) or 'none'}")


def _print_metrics(result: dict[str, Any], title: str, group: str | None) -> None:
    report.print_metrics(result, title)
    reasons: dict[str, list[str]] = {}
    for task, values in result["tasks"].items():
        if values.get("gauc", 0) is None:
            why = "the run has no --group" if group is None else f"no {group} has both classes"
            why = "no row has the label" if values["logloss"] is None else why
            reasons.setdefault(why, []).append(task)
    for why, tasks in reasons.items():
        report.console().print(f"no gauc for {', '.join(tasks)}: {why}")


def _check_output(option: str, out: Path | None, *sources: Path) -> None:
    """Refuses an output that cannot be written, or would replace what it is made from."""
    if out is None:
        return
    real = Path(os.path.realpath(out))
    if any(Path(os.path.realpath(each)) in (real, *real.parents) for each in sources):
        raise DataError(f"{option} is {out}, which is or lies in what is read: name another file.")
    checkpoint.check_output(option, out)


def _joins(
    texts: list[str] | None,
    run: Path,
    table: Path,
    schema: Schema,
    needed: Sequence[str],
    asked: Sequence[str],
) -> tuple[data.Join, ...]:
    """The joins of --join; without one those that the run was made with, where the table lacks a
    column that is ``needed``, or one that is ``asked`` for and that a side table has."""
    own = checkpoint.read_config(run)["source"].get("join", [])
    if texts or not own:
        return tuple(parse_join("--join", text) for text in texts or ())
    names = Table(table, schema.header, schema.delimiter).names()
    joins = tuple(parse_join("join", text) for text in own)
    if set(needed) <= set(names):
        absent = {*asked} - {*names}
        there = [join.path for join in joins if absent and Path(join.path).exists()]
        if not any(absent & {*Table(path, None, schema.delimiter).names()} for path in there):
            return ()
    for join in joins:
        if not Path(join.path).exists():
            raise DataError(
                f"{run} was made with --join {join.path}:{join.key}, which is no longer there: "
                "give --join FILE:KEY."
            )
    shown = ", ".join(f"{join.path}:{join.key}" for join in joins)
    report.console().print(f"joined as in training: {shown}")
    return joins


def _trim(cache: Path | None, limit: float | None) -> None:
    """Keeps the cache within --cache-limit; what is in use, as this command's data, stays."""
    if limit is not None:
        caching.evict(caching.cache_root(cache), limit)


cache_app = typer.Typer(help="What encoded data the cache holds.", invoke_without_command=True)
app.add_typer(cache_app, name="cache")


@cache_app.callback()
def list_cache(context: typer.Context, cache: _Cache = None) -> None:
    """List the data sets in the cache: sizes, and when each was last used. `clear` removes them."""
    context.obj = root = caching.cache_root(cache)
    if context.invoked_subcommand is None:
        found = caching.entries(root)
        report.print_cache(str(root), found)


@cache_app.command("clear")
def clear_cache(context: typer.Context, cache: _Cache = None) -> None:
    """Remove all cached data that no process uses."""
    root = context.obj if cache is None else caching.cache_root(cache)
    removed = caching.evict(root, -1)
    left = len(caching.entries(root))
    rest = f"; {left} in use left" if left else ""
    report.console().print(f"{report.data_sets(removed)}, removed from {root}{rest}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")],
    json: Annotated[Path | None, typer.Option(help="write them, and the machine, here too")] = None,
) -> None:
    """Show the validation metrics of several runs side by side; those that differ in their seed
    alone as one, by mean and standard deviation."""
    _check_output("--json", json)
    names = [run.name for run in runs]
    results: dict[str, dict[str, Any]] = {}
    alike: dict[str, list[str]] = {}
    for run in runs:
        checkpoint.require_folder(run)
        config, metrics = checkpoint.read_config(run), checkpoint.read_metrics(run)
        name = run.name if names.count(run.name) == 1 else str(run)
        results[name] = {"config": config, "metrics": metrics}
        alike.setdefault(checkpoint.but_for_the_seed(run, config, metrics), []).append(name)
    columns, seeds = {}, {}
    for members in alike.values():
        each = [results[name] for name in members]
        several = len({found["config"]["training"].get("seed") for found in each}) > 1
        for group in [members] if several else [[name] for name in members]:
            # What the names of a group begin with, if that is of use and nobody's name.
            start = os.path.commonprefix(group).rstrip("_-./ ")  # noqa: RUF071, letters are meant
            start = start if several else group[0]
            title = start if start and start not in columns else ", ".join(group)
            model = results[group[0]]["config"]["model"]
            columns[title] = model, [results[name]["metrics"] for name in group]
            if several:
                seeds[title] = group
    report.print_comparison(columns)
    if json is not None:
        made = {
            "command": " ".join(["stem-fast", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": _machine(),
        }
        means = {
            title: {"runs": group, "tasks": report.spreads(columns[title][1])}
            for title, group in seeds.items()
        }
        checkpoint.save_json(json, {**made, "runs": results, "seeds": means})


@app.command("synth")
def make_synthetic(
    out: Annotated[Path, typer.Option(help="folder to make")],
    rows: Annotated[int, typer.Option(help="of the training table")] = 120_000,
    valid_rows: Annotated[int, typer.Option(help="of the validation table")] = 20_000,
    seed: int = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an older one", metavar="")
    ] = False,
) -> None:
    """Make a feedback log whose tasks share some tastes and conflict in others, with its truth."""
    synth.generate(out, rows=rows, valid_rows=valid_rows, seed=seed, overwrite=overwrite)
    names = ", ".join(sorted(path.name for path in out.iterdir()))
    report.console().print(f"{out} holds {names}")


@app.command()
def doctor() -> None:
    """Versions, devices, and which backends are available (and why not)."""
    report.print_pairs(_machine())


def _machine() -> dict[str, str]:
    rows = {"python": platform.python_version()}
    for package in ("stem_fast", "torch", "triton", "numpy", "pyarrow"):
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows["torch"] = torch.__version__  # which says for what CUDA it was built
    capability = torch.backends.cpu.get_cpu_capability()
    rows["cpu"] = f"{capability}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    without = "no device found" if torch.version.cuda else "torch is built without CUDA"
    rows["cuda"] = ", ".join(names) or without
    for backend, state in ops.backends().items():
        rows[f"backend {backend}"] = state
    return rows
