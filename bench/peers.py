"""Training steps, epochs, requests and memory of whole models: the official code, two libraries
with the nearest public models, and ours, side by side.

    python -m bench.peers --official PATH --json FILE [--train A --valid B]
    python -m bench.peers --table FILE
    python -m bench.peers --plot FILE.png --table FILE

Everything runs on the same data, batches and sizes, on the CPU. First every contender is checked
(bench/turns.py); one that is wrong has no time. Then contenders take turns, each turn in a
process of its own, and the order rotates, so that a machine that slows down slows all. Each runs
with the allocator as it comes and with a warm one (bench/run.py), eager and compiled. Memory is
measured once, with an allocator that gives back what is freed (bench/memory.py). An epoch is one of
KuaiRand (bench/parity.py), from loading encoded data to AUC and gAUC; the libraries know no gAUC.

A time is the median of all rounds, with the least and the largest median of a turn beside it. The
roofline is the time that the products, or the bytes, of an ideal implementation take at the best
rate that this machine reached in the same run. `others_cores` are the cores that other programs
kept busy, in the whole run and in the worst turn of each result.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import cases, contenders, memory, parity, run
from bench import official as adapter
from bench.contenders import CONTENDERS, GATES, OURS, REQUESTS, SETTINGS, TOWERS

WHAT = ("step", "inference", "memory", "epoch")
DEFAULT_SETTINGS = ("tiktok", "2m_rows", "10m_rows", "4_tasks", "2_layers")
ALLOCATORS: dict[str, dict[str, str]] = run.RUNS["cpu"]
MEMORY = {"gives back": memory.ALLOCATOR}
PACKAGES = (*run.PACKAGES, "torch-rechub", "deepctr-torch", "pandas", "h5py", "scikit-learn")
KEY = ("setting", "what", "contender", "allocator")


class Cost(NamedTuple):
    """What an ideal implementation does at least: nothing read or written twice."""

    flops: int  # of matrix products; all else is below 1 % and bound by memory
    bytes: int

    def seconds(self, rates: Mapping[str, float], dtype: str) -> float:
        return max(self.flops / rates[dtype], self.bytes / rates["copy"])


def cost(
    setting: cases.Setting,
    rows: int,
    network: str = "stem",
    train: bool = False,
    dtype: str = "float32",
) -> Cost:
    """Of a forward pass of ``rows`` rows, or of a whole training step.

    ``network`` is "stem" (an embedding space for each task and a shared one), "ple" or "mmoe" (one
    space). All have the experts and towers of the setting, and the official code's gates; a shared
    gate only where a further layer reads it.

    FLOPs: 2 for each weight and row forward; twice that again backward, for the gradients of
    weights and inputs. Bytes, forward: every weight and every row of the tables that the batch
    reads once, ids in, probabilities out; what lies between never leaves the chip. In a step
    weights are read forward and backward, their gradients written and read, and Adam reads and
    writes weight, m and v; of the tables it does so for the batch's rows alone; the outputs of
    every layer are written by the forward and read by the backward pass. All are float32; with
    ``dtype`` "bfloat16" weights are read, and outputs written and read, in two bytes.
    """
    item = 2 if dtype == "bfloat16" else 4
    s = setting
    widths: list[tuple[int, int]] = []  # (inputs, outputs) of every linear layer

    def mlp(inputs: int, units: Sequence[int], count: int) -> None:
        for outputs in units:
            widths.extend([(inputs, outputs)] * count)
            inputs = outputs

    inputs = s.fields * s.dim
    for layer in range(s.layers):
        mlp(inputs, [s.width] * 3, s.experts)
        own = s.experts if network != "ple" else s.specific + s.shared
        mlp(inputs, [*GATES, own], s.tasks)
        if network != "mmoe" and layer < s.layers - 1:
            mlp(inputs, [*GATES, s.experts if network == "stem" else s.shared], 1)
        inputs = s.width
    mlp(inputs, [*TOWERS, 1], s.tasks)
    weights = sum(i * o for i, o in widths)
    numbers = weights + sum(o for _, o in widths)  # with biases
    table = distinct_rows(s, rows) * s.dim * (s.spaces if network == "stem" else 1)
    ends = 8 * rows * s.fields + 4 * rows * s.tasks
    if not train:
        return Cost(2 * rows * weights, item * numbers + 4 * table + ends)
    outputs = rows * sum(o for _, o in widths)
    read = item * 2 * (numbers + outputs)
    return Cost(6 * rows * weights, read + 4 * (8 * numbers + 7 * table) + ends)


def distinct_rows(setting: cases.Setting, rows: int) -> int:
    """How many rows of the tables ``rows`` samples are expected to read (cases.zipf)."""
    odds = torch.arange(1, setting.rows // setting.fields, dtype=torch.float64) ** -1.1
    read = 1 - (1 - odds / odds.sum()) ** rows
    return round(setting.fields * float(read.sum()))


class Turns:
    """Runs processes one at a time, and knows how much of the machine others had meanwhile."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.common = {
            "official": options.official and str(Path(options.official).resolve()),
            "train": options.train and str(options.train.resolve()),
            "valid": options.valid and str(options.valid.resolve()),
            "threads": options.threads,
            "seconds": options.seconds,
        }
        self.wall = self.others = 0.0

    def take(self, environment: Mapping[str, str], **what: Any) -> dict[str, Any]:
        """The result of one process; {"status": "failed", "note"} if it did not come to its end."""
        start, busy = time.perf_counter(), run.others_seconds()
        finished = subprocess.run(
            [sys.executable, "-m", "bench.turns", json.dumps({**self.common, **what})],
            cwd=run.ROOT,
            env={
                **{k: v for k, v in os.environ.items() if k not in run.WARM},
                **environment,
                "OMP_NUM_THREADS": str(self.common["threads"]),
                "TQDM_DISABLE": "1",  # no progress bars in the time
            },
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        wall, others = time.perf_counter() - start, run.others_seconds() - busy
        self.wall, self.others = self.wall + wall, self.others + others
        lines = finished.stdout.splitlines()
        if finished.returncode or not lines:
            return {"status": "failed", "note": f"its process ended with {finished.returncode}"}
        return {**json.loads(lines[-1]), "others_cores": round(max(others / wall, 0.0), 2)}


def rotated(items: Sequence[Any], block: int) -> list[Any]:
    turn = block % len(items) if items else 0
    return [*items[turn:], *items[:turn]]


def measure(options: argparse.Namespace, report: dict[str, Any]) -> Iterator[None]:
    """Fills the report; yields whenever there is more in it."""
    turns, checked, results = Turns(options), report["checks"], report["results"]
    settings = list(options.settings) if set(options.what) != {"epoch"} else []
    settings += ["kuairand"] if "epoch" in options.what else []
    for setting in settings:
        checks = checked.setdefault(setting, {})
        for name in options.contenders:
            checks[name] = turns.take({}, what="check", contender=name, setting=setting)
            yield
        ceilings = report["ceilings"].setdefault(setting, {})
        for what in options.what:
            if (what == "epoch") != (setting == "kuairand"):
                continue
            found = entries(options, setting, what, checks)
            results += found
            for block in range(1 if what == "memory" else options.blocks):
                if what in ("step", "inference"):
                    turn = turns.take(run.WARM, what="ceilings", setting=setting)
                    if turn["status"] != "ok":
                        sys.exit(f"no ceilings: {turn['note']}")
                    for key, rate in turn["rates"].items():
                        ceilings[key] = max(rate, ceilings.get(key, 0.0))
                for result in rotated(found, block):
                    if result["status"] != "ok":
                        continue
                    allocator = {**ALLOCATORS, **MEMORY}[result["allocator"]]
                    chosen = {key: result[key] for key in ("setting", "what", "contender")}
                    add(result, turns.take(allocator, **chosen))
                    for each in results:
                        summarise(each, report)
                    report["others_cores"] = round(max(turns.others / turns.wall, 0.0), 2)
                    yield


def entries(
    options: argparse.Namespace, setting: str, what: str, checks: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A result to be filled for each contender and allocator."""
    found = []
    for name in options.contenders:
        if what not in CONTENDERS[name].what:
            continue
        for allocator in MEMORY if what == "memory" else options.runs:
            key = dict(zip(KEY, (setting, what, name, allocator), strict=True))
            verdict = {k: checks[name][k] for k in ("status", "note") if k in checks[name]}
            found.append({**key, **verdict, "turns": []})
    return found


def without_rounds(report: Mapping[str, Any]) -> dict[str, Any]:
    results = [{k: v for k, v in r.items() if k != "turns"} for r in report["results"]]
    return {**report, "results": results}


def describe(*files: Path) -> dict[str, Any]:
    """The data of an epoch, the network and its training."""
    problem, study = contenders.kuairand((files[0], files[1]))
    return {
        "train": parity.describe(files[0], study.splits[0]),
        "valid": parity.describe(files[1], study.splits[1]),
        "network": problem.network,
        "training": dataclasses.asdict(problem.config),
    }


def add(result: dict[str, Any], turn: Mapping[str, Any]) -> None:
    """One turn of a contender; what fails once has no result."""
    if turn["status"] != "ok":
        result |= turn
        return
    result["turns"].append({key: value for key, value in turn.items() if key != "status"})


def summarise(result: dict[str, Any], report: Mapping[str, Any]) -> None:
    """What the turns so far say, and the roofline beside it."""
    turns = result["turns"]
    if result["status"] != "ok" or not turns:
        return
    setting = SETTINGS.get(result["setting"])
    result["others_cores"] = max(turn["others_cores"] for turn in turns)
    if result["what"] == "memory":
        result |= {key: turns[0][key] for key in ("peak", "parameters")}
    elif result["what"] == "epoch":
        result |= spread([[turn["seconds"]] for turn in turns])
        result["samples_per_s"] = turns[0]["samples"] / result["seconds"]
        for metric in ("auc", "gauc"):
            if metric in turns[0]:
                result[metric] = statistics.fmean(turn[metric] for turn in turns)
    else:
        assert setting is not None
        rates = report["ceilings"][result["setting"]]
        network = CONTENDERS[result["contender"]].network
        dtype = "bfloat16" if "bf16" in result["contender"] else "float32"
        if result["what"] == "step":
            ideal = cost(setting, setting.batch, network, True, dtype)
            result |= spread([turn["rounds"] for turn in turns])
            result |= roofline(ideal, rates, dtype, result["seconds"])
            result["samples_per_s"] = setting.batch / result["seconds"]
        else:
            result["requests"] = {}
            for rows in REQUESTS:
                each = spread([turn["rounds"][str(rows)] for turn in turns])
                ideal = cost(setting, rows, network, dtype=dtype)
                each |= roofline(ideal, rates, dtype, each["seconds"])
                result["requests"][str(rows)] = each


def spread(turns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Seconds: the median and the 99th percentile of all rounds, and the turns' medians' range."""
    every = [seconds for turn in turns for seconds in turn]
    medians = [statistics.median(turn) for turn in turns]
    return {
        "seconds": statistics.median(every),
        "p99_seconds": statistics.quantiles(every, n=100, method="inclusive")[98]
        if len(every) > 1
        else every[0],
        "block_seconds": [min(medians), max(medians)],
        "blocks": len(turns),
        "rounds": len(every),
    }


def roofline(ideal: Cost, rates: Mapping[str, float], dtype: str, seconds: float) -> dict[str, Any]:
    least = ideal.seconds(rates, dtype)
    return {**ideal._asdict(), "roofline_seconds": least, "of_roofline": least / seconds}


# Tables


def tables(report: Mapping[str, Any]) -> list[list[list[str]]]:
    """One table for each thing measured: a row a contender (and request), columns of allocators."""
    found = []
    for what in WHAT:
        results = [r for r in report["results"] if r["what"] == what]
        if results:
            found.append({"memory": memory_rows, "epoch": epoch_rows}.get(what, time_rows)(results))
    found.append(ceiling_rows(report["ceilings"]))
    return [table for table in found if len(table) > 1]


def grouped(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """(setting, contender) -> allocator -> result."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        key = result["setting"], result["contender"]
        found.setdefault(key, {})[result["allocator"]] = result
    return found


def time_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of steps, or of requests of each size."""
    allocators = list(dict.fromkeys(r["allocator"] for r in results))
    inference = results[0]["what"] == "inference"
    head = ["setting", *(["rows of a request"] if inference else []), "contender"]
    for allocator in allocators:
        unit = "p50 / p99 ms" if inference else "ms of a step"
        head += [f"{unit}, {allocator}", "of the roofline", "ours is faster"]
    table = [head]
    by_contender = grouped(results)
    for rows in REQUESTS if inference else (None,):
        for (setting, name), found in by_contender.items():
            line = [setting, *([str(rows)] if inference else []), name]
            for allocator in allocators:
                result = times(found.get(allocator), rows)
                ours = times(by_contender.get((setting, OURS), {}).get(allocator), rows)
                line += time_cells(result, None if name == OURS else ours, inference)
            table.append(line)
    # All of a setting together.
    order = list(dict.fromkeys(r["setting"] for r in results))
    return [head, *sorted(table[1:], key=lambda line: order.index(line[0]))]


def times(result: Mapping[str, Any] | None, rows: int | None) -> Mapping[str, Any] | None:
    """The part of a result that is of requests of ``rows`` rows, None for a step."""
    if result is None or rows is None or "requests" not in result:
        return result
    return {"status": result["status"], **result["requests"][str(rows)]}


def time_cells(
    result: Mapping[str, Any] | None, ours: Mapping[str, Any] | None, percentiles: bool
) -> list[str]:
    if result is None or "seconds" not in result or result["status"] != "ok":
        return [status(result), "", ""]
    text = f"{result['seconds'] * 1000:.3g}"
    if percentiles:
        text += f" / {result['p99_seconds'] * 1000:.3g}"
    faster = ""
    if ours is not None and ours["status"] == "ok" and "seconds" in ours:
        faster = f"{result['seconds'] / ours['seconds']:.2f}x"
    return [text, f"{result['of_roofline']:.0%}", faster]


def status(result: Mapping[str, Any] | None) -> str:
    """Why there is no time."""
    if result is None or result["status"] == "ok":
        return ""
    if result["status"].startswith("not "):
        return f"{result['status']}: {result['note']}"
    return str(result["status"])


def memory_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    table = [["setting", "contender", "peak MB of training", "MB of parameters", "of ours"]]
    for (setting, name), found in grouped(results).items():
        (result,) = found.values()
        ours: Mapping[str, Any] = next(iter(grouped(results).get((setting, OURS), {}).values()), {})
        cells = [status(result), "", ""]
        if "peak" in result:
            cells = [f"{result['peak'] / 1e6:.0f}", f"{result['parameters'] / 1e6:.0f}", ""]
            if name != OURS and "peak" in ours:
                cells[2] = f"{result['peak'] / ours['peak']:.2f}x"
        table.append([setting, name, *cells])
    return table


def epoch_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    allocators = list(dict.fromkeys(r["allocator"] for r in results))
    head = ["setting", "contender"]
    for allocator in allocators:
        head += [f"samples/s of an epoch, {allocator}", "ours is faster"]
    table = [[*head, "AUC", "gAUC"]]
    by_contender = grouped(results)
    for (setting, name), found in by_contender.items():
        line = [setting, name]
        for allocator in allocators:
            result = found.get(allocator)
            ours = by_contender.get((setting, OURS), {}).get(allocator, {})
            if result is None or "samples_per_s" not in result:
                line += [status(result), ""]
                continue
            faster = ours.get("samples_per_s", 0.0) / result["samples_per_s"]
            shown = f"{faster:.2f}x" if faster and name != OURS else ""
            line += [f"{result['samples_per_s']:,.0f}", shown]
        last = found[allocators[-1]]
        table.append([*line, *(f"{last[m]:.4f}" if m in last else "" for m in ("auc", "gauc"))])
    return table


def ceiling_rows(ceilings: Mapping[str, Any]) -> list[list[str]]:
    table = [["setting", "GFLOP/s, float32", "GFLOP/s, bfloat16", "GB/s of a copy"]]
    for setting, found in ceilings.items():
        if found:
            rates = [found[name] / 1e9 for name in ("float32", "bfloat16", "copy")]
            table.append([setting, *(f"{rate:.0f}" for rate in rates)])
    return table


def text(report: Mapping[str, Any]) -> str:
    """A report in Markdown."""
    title = run.title(report, report["others_cores"])
    return "\n\n".join([title, *map(run.markdown, tables(report)), ""])


# Plot


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Bars of a step and of a request for each contender and setting, and the rooflines."""
    try:
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    panels: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for result in report["results"]:
        if result["what"] in ("step", "inference"):
            for rows in REQUESTS if result["what"] == "inference" else (None,):
                panels.setdefault((result["setting"], rows), []).append(result)
    panels = dict(sorted(panels.items(), key=lambda item: item[0][1] is not None))
    if not panels:
        sys.exit("--plot: the file has no steps and no requests")
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    names = [name for name in CONTENDERS if any(timed(r, name) for r in report["results"])]
    figure, axes = pyplot.subplots(
        down, across, figsize=(5.5 * across, (0.32 * len(names) + 1.3) * down), squeeze=False
    )
    allocators = list(dict.fromkeys(r["allocator"] for p in panels.values() for r in p))
    height = 0.8 / len(allocators)
    for axis, ((setting, rows), results) in zip(axes.flat, panels.items(), strict=False):
        longest = 0.0
        for result in results:
            found = times(result, rows)
            if found is None or found["status"] != "ok" or "seconds" not in found:
                continue
            name, turn = result["contender"], allocators.index(result["allocator"])
            milliseconds = 1000 * found["seconds"]
            longest = max(longest, milliseconds)
            place = names.index(name) + height * turn
            colour = "#c44e52" if name.startswith(OURS) else "#7f8fa6"
            axis.barh(place, milliseconds, height, color=colour, alpha=0.5 + 0.5 * (turn > 0))
            axis.text(milliseconds, place, f" {milliseconds:.3g}", va="center", fontsize=6)
            if result["contender"] in (OURS, "official"):
                axis.axvline(1000 * found["roofline_seconds"], color="black", ls="--", lw=1)
        axis.set_yticks([i + height * (len(allocators) - 1) / 2 for i in range(len(names))], names)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, longest * 1.15 or 1)
        what = "a training step" if rows is None else f"a request of {rows:,} row(s), median"
        axis.set_title(f"{setting}: ms of {what}", fontsize=9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    shades = " ".join(f"{'dark' if turn else 'light'}: {a}." for turn, a in enumerate(allocators))
    figure.suptitle(
        f"{run.title(report, report['others_cores'])}\n{shades} Dashed: STEM's roofline.",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def timed(result: Mapping[str, Any], name: str) -> bool:
    return result["contender"] == name and ("seconds" in result or "requests" in result)


# Command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="run, and write results to this file")
    parser.add_argument("--table", type=Path, help="print Markdown from a result file")
    parser.add_argument("--plot", type=Path, help="draw the --json or --table file to this .png")
    parser.add_argument("--official", help="a checkout of the official code")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(DEFAULT_SETTINGS))
    parser.add_argument("--what", nargs="+", choices=WHAT, help="default: all there is data for")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"of {'; '.join(CONTENDERS)}",
    )
    parser.add_argument("--runs", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=3, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds in each turn")
    parser.add_argument("--train", type=Path, help="KuaiRand's training Parquet file, for epochs")
    parser.add_argument("--valid", type=Path, help="and its validation file")
    options = parser.parse_args(arguments)
    if (options.json is None) == (options.table is None):
        parser.error("give --json to run or --table to print")
    files = options.train is not None and options.valid is not None
    if options.what is None:
        options.what = [what for what in WHAT if files or what != "epoch"]
    if "epoch" in options.what and not files:
        parser.error("--what epoch needs --train and --valid")
    if options.blocks < 1:
        parser.error(f"--blocks is {options.blocks}, must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a contender was wrong or failed."""
    options = parse(arguments)
    if options.table:
        report = json.loads(options.table.read_text(encoding="utf-8"))
        print(text(report))
    else:
        given = list(sys.argv[1:] if arguments is None else arguments)
        report = {
            "command": run.command("bench.peers", given, options),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": adapter.commit(run.ROOT),
            "official": {
                "repository": adapter.REPOSITORY,
                "commit": options.official and adapter.commit(Path(options.official)),
            },
            "machine": run.machine("cpu", options.threads),
            "versions": run.versions(PACKAGES),
            "shims": contenders.SHIMS,
            "settings": {name: SETTINGS[name]._asdict() for name in options.settings},
            "environments": {**ALLOCATORS, **MEMORY},
            "others_cores": 0.0,
            "ceilings": {},
            "checks": {},
            "results": [],
        }
        if "epoch" in options.what:
            report["settings"]["kuairand"] = describe(options.train, options.valid)
        for _ in measure(options, report):
            parity.write(options.json, without_rounds(report))
        print(text(report))
    if options.plot:
        plot(report, options.plot)
    found = [*report["results"], *(c for s in report["checks"].values() for c in s.values())]
    return int(bool({"wrong", "failed"} & {each["status"] for each in found}))


if __name__ == "__main__":
    sys.exit(main())
