"""Arguments that several commands take, and what becomes of them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stem_fast import data
from stem_fast.cli import report
from stem_fast.common import DataError, Option
from stem_fast.data import cache as caching
from stem_fast.data.schema import LARGEST, Schema
from stem_fast.data.tables import Table
from stem_fast.training import checkpoint
from stem_fast.training.options import FILES, parse_join


def flag(option: Option) -> Any:
    """The flag of an option, for ``Annotated``."""
    text = option.help if option.shown is None else f"{option.help} (default {option.shown})"
    extra: dict[str, Any] = {} if option.metavar is None else {"metavar": option.metavar}
    return typer.Option(
        *option.flags, help=text, rich_help_panel=option.panel, show_default=False, **extra
    )


Joins = Annotated[list[str] | None, flag(FILES["join"])]
CacheFolder = Annotated[Path | None, flag(FILES["cache"])]
CacheLimit = Annotated[str | None, flag(FILES["cache_limit"])]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="run folder, made by fit --out")]
Precision = Annotated[
    str | None, typer.Option(help="fp32, tf32, bf16, fp64 (default: as in training)")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, max=LARGEST, help="rows (default: as in training)")
]


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is any, else the CPU.

    Raises DataError for one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not re.fullmatch("[0-9]{1,9}", index)):
        raise DataError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}.")
    if kind == "cpu" and name != "cpu":
        raise DataError(f"device: expected cpu without an index, got {name!r}.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise DataError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices: "
            "`stem-fast doctor` says more."
        )
    return torch.device(name)


def refuse_output(option: str, out: Path | None, *sources: Path) -> None:
    """Refuses an output that cannot be written, or would replace what it is made from."""
    if out is None:
        return
    real = Path(os.path.realpath(out))
    if any(Path(os.path.realpath(each)) in (real, *real.parents) for each in sources):
        raise DataError(f"{option} is {out}, which is or lies in what is read: name another file.")
    checkpoint.check_output(option, out)


def find_joins(
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


def trim_cache(cache: Path | None, limit: float | None) -> None:
    """Keeps the cache within --cache-limit; what is in use, as this command's data, stays."""
    if limit is not None:
        caching.evict(caching.cache_root(cache), limit)
