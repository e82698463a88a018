"""``stem-fast evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from stem_fast import data
from stem_fast.cli import report
from stem_fast.cli.arguments import (
    BatchSize,
    CacheFolder,
    CacheLimit,
    Device,
    Joins,
    Precision,
    Run,
    find_device,
    find_joins,
    refuse_output,
    trim_cache,
)
from stem_fast.data import select
from stem_fast.data.tables import refuse_changed, signatures
from stem_fast.nn.precision import check as check_precision
from stem_fast.training import checkpoint
from stem_fast.training import fit as training
from stem_fast.training.options import parse_size


def evaluate(
    run: Run,
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
    join: Joins = None,
    cache: CacheFolder = None,
    cache_limit: CacheLimit = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    precision: Precision = None,
) -> None:
    """Score a run on labelled data."""
    limit = None if cache_limit is None else parse_size("--cache-limit", cache_limit)
    conditions = [select.Where.parse(text) for text in where or ()]
    model, encoding, config = checkpoint.load_run(run, find_device(device))
    schema = encoding.schema
    needed = [*schema.features, *schema.tasks, *([schema.group] if schema.group else [])]
    asked = [*([] if by is None else [by]), *(each.column for each in conditions)]
    joins = find_joins(join, run, table, schema, needed, asked)
    refuse_output("--json", json, table, *(Path(each.path) for each in joins))
    check_precision(precision or config.precision, find_device(device))
    with report.console().status(f"evaluating {table}"):
        before = signatures(table, *(each.path for each in joins))
        found = rows = data.load(table, encoding, cache=cache, joins=joins, weight=False)
        trim_cache(cache, limit)
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
            device=find_device(device),
            precision=precision or config.precision,
        )
        result = training.score(predictions, rows, schema.labels)
        if values is not None:
            parts = training.score_by(predictions, rows, schema.labels, values)
            result["by"] = {"column": by, **parts}
        if conditions:
            result["where"] = [str(each) for each in conditions]
    held = f", {' and '.join(result['where'])}" if conditions else ""
    report.print_scores(result, f"{run} on {table}{held}", schema.group)
    if by is not None:
        report.print_by(result["by"])
    report.print_unknown(found.known, " of all rows" if conditions else "")
    if json is not None:
        checkpoint.save_json(json, result)
