"""What the commands print: progress, epochs, results; plain lines where there is no terminal."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from stem_fast.data.cache import Entry
from stem_fast.data.dataset import Known
from stem_fast.training.fit import EpochRecord

PIPED_WIDTH = 200  # of tables in a pipe or file, which has no width of its own


def console(*, stderr: bool = False) -> Console:
    """A console on today's stdout or stderr, wide enough for a table where there is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPED_WIDTH
    # Names of columns and folders are printed as they are, brackets and colons included.
    return Console(
        file=stream,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=not stream.isatty(),
    )


def error(message: str) -> None:
    """One line on stderr: a red "error:" and the message."""
    _line(message, ("error:", "bold red"))


def warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line on stderr: a yellow "warning:" and the message; takes the place of
    ``warnings.showwarning``."""
    _line(str(message), ("warning:", "bold yellow"))


def _line(message: str, head: tuple[str, str]) -> None:
    line = " ".join(message.split())
    console(stderr=True).print(Text.assemble(head, " ", line), soft_wrap=True)


class FitReport:
    """Shows ``fit`` at work: on a terminal a bar with samples/s under a growing table of epochs,
    elsewhere a line an epoch. A context manager whose methods are ``fit``'s callbacks.
    """

    def __init__(self, rows: int, epochs: int, monitor: str) -> None:
        self._console = console()
        self._monitor = monitor
        self._table: Table | None = None
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TaskProgressColumn(),
            _Speed(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._epochs = epochs
        self._bar = self._progress.add_task("", total=rows, epoch=f"1/{epochs}")
        self._live = Live(self._progress, console=self._console, refresh_per_second=4)

    def __enter__(self) -> FitReport:
        if self._console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            # Whatever is shown last stays on the screen: the epochs, without the bar.
            self._live.update(self._table or "", refresh=True)
            self._live.stop()

    def step(self, rows: int) -> None:
        """``rows`` more rows of this epoch are trained."""
        if self._console.is_terminal:
            self._progress.advance(self._bar, rows)

    def epoch(self, record: EpochRecord) -> None:
        """An epoch and its evaluation are over."""
        tasks = record.metrics["tasks"]
        shown = {self._monitor}
        if len(tasks) == 1:  # whose mean is its own
            shown.add(f"{next(iter(tasks))}.{self._monitor}")
        cells = {
            "epoch": str(record.epoch),
            "loss": number(record.loss),
            self._monitor: number(record.monitor),
            **{
                f"{task} {metric}": number(value)
                for task, values in tasks.items()
                for metric, value in values.items()
                if metric in ("auc", "rmse") and f"{task}.{metric}" not in shown
            },
            "lr": f"{record.learning_rate:g}",
            "samples/s": f"{record.samples_per_second:,.0f}",
            "": "best" if record.best else "",
        }
        if not self._console.is_terminal:
            # One line, whole words, made for grep.
            self._console.print("  ".join(f"{k} {v}".strip() for k, v in cells.items() if v))
            sys.stdout.flush()
            return
        if self._table is None:
            self._table = Table(*cells, box=box.SIMPLE_HEAD)
            for column in self._table.columns:
                column.justify = "right"
        self._table.add_row(*cells.values(), style="bold" if record.best else "")
        self._progress.reset(self._bar, epoch=f"{record.epoch + 1}/{self._epochs}")
        self._live.update(Group(self._table, self._progress))


class _Speed(ProgressColumn):
    """Training speed over the last seconds."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} samples/s", style="cyan")


def print_metrics(result: Mapping[str, Any], title: str) -> None:
    """The table of one ``metrics.json``: a row a task, a column a metric."""
    tasks: Mapping[str, Mapping[str, float | None]] = result["tasks"]
    metrics = list(dict.fromkeys(metric for values in tasks.values() for metric in values))
    table = Table("task", box=box.SIMPLE_HEAD)
    for metric in metrics:
        table.add_column(metric, justify="right")
    for task, values in tasks.items():
        table.add_row(task, *(number(values[m]) if m in values else "" for m in metrics))
    out = console()
    out.print(f"{title}, {result['rows']:,} rows")  # a table's own title breaks at its width
    out.print(table)


def print_unknown(known: Mapping[str, Known], which: str = "") -> None:
    """A line of the columns with the most values that the model has not learned."""
    shares = {name: each.unknown_share for name, each in known.items()}
    most = sorted((name for name in shares if shares[name]), key=lambda name: -shares[name])
    parts = [f"{name} {100 * shares[name]:.1f} %" for name in most[:5]]
    parts += [f"less in {len(most) - 5} more"] * (len(most) > 5)
    console().print(f"unknown values{which}: {', '.join(parts) or 'none'}")


def print_scores(result: dict[str, Any], title: str, group: str | None) -> None:
    """:func:`print_metrics`, and why some tasks have no gAUC."""
    print_metrics(result, title)
    reasons: dict[str, list[str]] = {}
    for task, values in result["tasks"].items():
        if values.get("gauc", 0) is None:
            why = "the run has no --group" if group is None else f"no {group} has both classes"
            why = "no row has the label" if values["logloss"] is None else why
            reasons.setdefault(why, []).append(task)
    for why, tasks in reasons.items():
        console().print(f"no gauc for {', '.join(tasks)}: {why}")


def print_by(result: Mapping[str, Any]) -> None:
    """The table of what ``train.score_by`` gave, under "column": a row a value."""
    entries = [(e["value"], e) for e in result["values"]]
    if result["rest"] is not None:
        entries.append((f"{result['rest']['values']:,} other values", result["rest"]))
    shown = [
        (task, metric)
        for task, values in entries[0][1]["tasks"].items()
        for metric in values
        if metric in ("auc", "pcoc", "rmse", "mae")
    ]
    table = Table(result["column"], box=box.SIMPLE_HEAD)
    for name in ("rows", *(f"{task} {metric}" for task, metric in shown)):
        table.add_column(name, justify="right")
    for value, entry in entries:
        cells = (number(entry["tasks"][task][metric]) for task, metric in shown)
        table.add_row("(missing)" if value is None else value, f"{entry['rows']:,}", *cells)
    console().print(table)


def print_comparison(columns: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Runs side by side, from name -> (model, each seed's metrics.json): a column a run, or the
    mean ± standard deviation of one run's seeds; a row a task's metric.

    The best values of each row are marked with a star, judged by the digits that are shown, where
    at least two columns have the metric; with them those that are no further away than the larger
    deviation of the two, one run's being taken for as large as the largest of the row.
    """
    results = [result for _, each in columns.values() for result in each]
    seeds = any(len(each) > 1 for _, each in columns.values())
    caption = "* best of the row" + (", or a standard deviation from it" if seeds else "")
    table = Table("task", "metric", box=box.SIMPLE_HEAD, caption=caption)
    for name, (model, each) in columns.items():
        about = [] if name == model else [model]
        about += [f"{len(each)} seeds"] if len(each) > 1 else []
        table.add_column(f"{name}\n({', '.join(about)})" if about else name, justify="right")
    for task in dict.fromkeys(task for result in results for task in result["tasks"]):
        for metric in dict.fromkeys(m for result in results for m in result["tasks"].get(task, {})):
            cells = [_spread(task, metric, each) for _, each in columns.values()]
            table.add_row(task, metric, *_starred(metric, cells))
        table.add_section()
    out = console()
    out.print(table)
    sizes = sorted({result["rows"] for result in results})
    if len(sizes) > 1:
        counts = ", ".join(f"{size:,}" for size in sizes)
        out.print(f"note: the runs were validated on different data ({counts} rows).")


Spread = tuple[float | None, float | None]


def spreads(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Task -> metric -> "mean" and "std" over runs, None where one of them lacks it."""
    return {
        task: {
            metric: dict(zip(("mean", "std"), _spread(task, metric, results), strict=True))
            for metric in values
        }
        for task, values in results[0]["tasks"].items()
    }


def _spread(task: str, metric: str, results: Sequence[Mapping[str, Any]]) -> Spread:
    """Mean and standard deviation (of a sample; None of one) of a metric over runs; None where one
    of them lacks it."""
    values = [result["tasks"].get(task, {}).get(metric) for result in results]
    if None in values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _starred(metric: str, cells: Sequence[Spread]) -> list[Text]:
    """Each cell as text; of two or more defined ones the best, and what is as good within its
    spread, in bold and with a star."""
    texts = [number(mean) for mean, _ in cells]
    # Judged as printed, so that of two equal numbers never one alone is marked.
    costs = [
        math.inf if mean is None else _cost(metric, float(text))
        for (mean, _), text in zip(cells, texts, strict=True)
    ]
    widest = max((std for _, std in cells if std is not None), default=0.0)
    widths = [widest if std is None else std for _, std in cells]
    best = costs.index(min(costs))
    several = sum(map(math.isfinite, costs)) > 1
    found = []
    for (mean, std), text, cost, width in zip(cells, texts, costs, widths, strict=True):
        star = several and mean is not None and cost - costs[best] <= max(width, widths[best])
        text = text if std is None else f"{text} ± {number(std)}"
        found.append(Text(f"{text} *", style="bold") if star else Text(f"{text}  "))
    return found


def _cost(metric: str, value: float) -> float:
    """What the best run has least of."""
    if metric == "pcoc":
        return abs(value - 1)
    return -value if metric in ("auc", "gauc") else value


def print_cache(root: str, entries: Sequence[Entry]) -> None:
    """A row a data set of the cache, that longest unused first, and the whole."""
    table = Table("data set", box=box.SIMPLE_HEAD)
    for name in ("MB", "last used"):
        table.add_column(name, justify="right")
    for path, size, used in entries:
        when = datetime.fromtimestamp(used).isoformat(" ", "minutes")
        table.add_row(path.name, f"{size / 1e6:,.1f}", when)
    out = console()
    if entries:
        out.print(table)
    out.print(f"{root} holds {data_sets(entries)}")


def data_sets(entries: Sequence[Entry]) -> str:
    """Their number and size: "2 data sets, 31.4 MB"."""
    size = sum(entry.size for entry in entries) / 1e6
    return f"{len(entries)} data set{'' if len(entries) == 1 else 's'}, {size:,.1f} MB"


def print_pairs(rows: Mapping[str, str]) -> None:
    """Names and values in two columns."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    console().print(table)


def number(value: float | None) -> str:
    """Five decimals, of large numbers fewer; "-" for what is undefined."""
    if value is None:
        return "-"
    return f"{value:.5f}" if abs(value) < 1000 else f"{value:.7g}"
