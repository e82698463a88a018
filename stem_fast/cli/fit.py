"""``stem-fast fit``."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stem_fast import data
from stem_fast.cli import report
from stem_fast.cli.app import SMALLER
from stem_fast.cli.arguments import find_device, flag, trim_cache
from stem_fast.common import DATA, DataError, Option
from stem_fast.data.schema import Encoding, table_owners
from stem_fast.data.tables import refuse_changed, signatures
from stem_fast.models.family import MODELS
from stem_fast.models.network import STEMNet
from stem_fast.nn.precision import check as check_precision
from stem_fast.training import checkpoint
from stem_fast.training import fit as training
from stem_fast.training.options import OPTIONS, FitSettings, fit_settings


def fit_command(context: typer.Context, **_: Any) -> None:
    """Train a model with early stopping and keep its best weights in a run folder."""
    given = {k: v for k, v in context.params.items() if v not in (None, (), [])}
    config = given.pop("config", None)
    for name, value in given.items():
        if OPTIONS[name].many and name != "join":
            given[name] = ",".join(value)
    with _flags_named(given):
        _fit(fit_settings(given, config))


def _parameter(name: str, option: Option) -> inspect.Parameter:
    kind: Any = list[option.kind] if option.many else option.kind  # type: ignore[name-defined]
    annotation = Annotated[kind | None, flag(option)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=annotation)


# typer reads a command's flags off its signature.
_CONFIG = Option(
    DATA, "YAML file of these settings (names with underscores); flags override it", kind=Path
)
_parameters = [
    inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
    _parameter("config", _CONFIG),
    *(_parameter(name, option) for name, option in OPTIONS.items()),
]
fit_command.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]
fit_command.__annotations__ = {each.name: each.annotation for each in _parameters}


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
            name = f"--{key.replace('_', '-')}"  # as it was given
            message = re.sub(
                rf"{start}{key}(?=:? (?:expected|is|must|names?|has|needs|'))", name, message
            )
        raise DataError(message) from error


def _fit(settings: FitSettings) -> None:
    config, schema = settings.training, settings.schema
    # All that can be refused without reading data is refused first.
    monitor = training.check(config, schema.labels)
    if monitor.metric == "gauc" and schema.group is None:
        raise DataError(f"--monitor is {monitor.name!r}, which needs the --group that it is by.")
    device = find_device(settings.device)
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
        trim_cache(settings.cache, settings.cache_limit)
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
    report.print_scores(
        best.metrics, f"validation, epoch {best.epoch} of {len(records)}", schema.group
    )
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
                f"machine has {memory / 1e9:,.1f}: {SMALLER}."
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
