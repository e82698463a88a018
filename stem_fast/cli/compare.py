"""``stem-fast compare``."""

from __future__ import annotations

import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from stem_fast.cli import report
from stem_fast.cli.arguments import refuse_output
from stem_fast.cli.doctor import machine
from stem_fast.training import checkpoint


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")],
    json: Annotated[Path | None, typer.Option(help="write them, and the machine, here too")] = None,
) -> None:
    """Show the validation metrics of several runs side by side; those that differ in their seed
    alone as one, by mean and standard deviation."""
    refuse_output("--json", json)
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
            "machine": machine(),
        }
        means = {
            title: {"runs": group, "tasks": report.spreads(columns[title][1])}
            for title, group in seeds.items()
        }
        checkpoint.save_json(json, {**made, "runs": results, "seeds": means})
