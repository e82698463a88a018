"""``stem-fast synth``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stem_fast.cli import report
from stem_fast.data import synth


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
