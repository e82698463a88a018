"""``stem-fast predict``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
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
from stem_fast.common import DataError
from stem_fast.data import select
from stem_fast.data.tables import refuse_changed, signatures
from stem_fast.nn.precision import check as check_precision
from stem_fast.training import checkpoint
from stem_fast.training import fit as training
from stem_fast.training.options import parse_size


def predict(
    run: Run,
    table: Annotated[Path, typer.Option("--data", help="table; labels are not needed")],
    out: Annotated[Path, typer.Option(help="file to write: .parquet or .csv")],
    keep: Annotated[
        list[str] | None,
        typer.Option(help="columns of the table to copy: user_id,video_id", metavar="A,B"),
    ] = None,
    join: Joins = None,
    cache: CacheFolder = None,
    cache_limit: CacheLimit = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    precision: Precision = None,
) -> None:
    """Write one column a task, probabilities (values of regression tasks), rows in order."""
    writers = {".parquet": pyarrow.parquet.write_table, ".csv": pyarrow.csv.write_csv}
    if out.suffix.lower() not in writers:
        raise DataError(f"--out is {out}: name a .parquet or .csv file.")
    limit = None if cache_limit is None else parse_size("--cache-limit", cache_limit)
    names = [each.strip() for text in keep or () for each in text.split(",") if each.strip()]
    model, encoding, config = checkpoint.load_run(run, find_device(device))
    schema = encoding.schema
    for name in names:
        if name in schema.tasks or names.count(name) > 1:
            other = "a prediction's name too" if name in schema.tasks else "named twice"
            raise DataError(f"--keep names {name!r}, which is {other}: leave it out.")
    joins = find_joins(join, run, table, schema, schema.features, names)
    refuse_output("--out", out, table, *(Path(each.path) for each in joins))
    check_precision(precision or config.precision, find_device(device))
    with report.console().status(f"predicting {table}"):
        before = signatures(table, *(each.path for each in joins))
        rows = data.load(table, encoding, cache=cache, joins=joins, labels=False)
        trim_cache(cache, limit)
        kept = select.read_columns(table, schema, names, joins=joins) if names else pa.table({})
        for name in names:
            if out.suffix.lower() == ".csv":
                _refuse_in_csv(name, kept[name])
        refuse_changed(before)
        predictions = training.predict(
            model,
            rows,
            batch_size=batch_size or config.batch_size,
            device=find_device(device),
            precision=precision or config.precision,
        )
    columns = {name: kept[name] for name in names}
    columns |= {task: pa.array(p) for task, p in zip(schema.tasks, predictions.T, strict=True)}
    with checkpoint.replacing(out) as partial:
        writers[out.suffix.lower()](pa.table(columns), partial)
    report.console().print(f"{len(rows):,} rows of {', '.join(columns)} written to {out}")
    report.print_unknown(rows.known)


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
