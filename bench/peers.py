"""Training steps, epochs, requests and memory of whole models: the official code, two libraries
with the nearest public models, and ours, side by side.

    python -m bench.peers --official PATH --json FILE [--train A --valid B]
    python -m bench.peers --table FILE
    python -m bench.peers --plot FILE.svg --table FILE
    python -m bench.peers --device cuda --official PATH --json FILE [--runs fp32 tf32 bf16]

Everything runs on the same data, batches and sizes. First every contender is checked
(bench/turns.py); one that is wrong has no time. Then contenders take turns, each turn in a
process of its own, and the order rotates, so that a machine that slows down slows all. Each runs
with the allocator as it comes and with a warm one (bench/run.py), eager and compiled. Memory is
measured once, with an allocator that gives back what is freed (bench/memory.py). An epoch is one of
KuaiRand (bench/parity.py), from loading encoded data to AUC and gAUC; the libraries know no gAUC.

On CUDA the official code and ours run, each in fp32, tf32 and bf16, in one process for each that
checks, warms up and times it by CUDA's events, on batches that lie on the GPU; an epoch is timed by
the clock. Memory is what torch's allocator gave out at the most.

A time is the median of all rounds, with the least and the largest median of a turn beside it. The
roofline is the time that the products, or the bytes, of an ideal implementation take at the best
rate that this machine reached in the same run. `others_cores` are the cores that other programs
kept busy, in the whole run and in the worst turn of each result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import cases, contenders, parity, run
from bench import official as adapter
from bench.contenders import CONTENDERS, GATES, ON_GPU, REQUESTS, SETTINGS, TOWERS
from bench.peers_report import MEMORY, PRECISIONS, WHAT, plot, text

DEFAULT_SETTINGS = ("tiktok", "2m_rows", "10m_rows", "4_tasks", "2_layers")
ALLOCATORS: dict[str, dict[str, str]] = run.RUNS["cpu"]
NOT_RUN = {"status": "not run", "note": "the run ended before"}
# What depends on the device, where it isn't given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "settings": list(DEFAULT_SETTINGS),
        "contenders": list(CONTENDERS),
        "runs": list(ALLOCATORS),
        "threads": 2,
        "blocks": 3,
        "seconds": 4.0,
        "limit": None,
    },
    "cuda": {
        "settings": ["tiktok"],
        "contenders": list(ON_GPU[:4]),
        "runs": list(PRECISIONS),
        "threads": os.cpu_count(),
        "blocks": 1,
        "seconds": 1.0,
        "limit": 150.0,
    },
}
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
            **({"device": "cuda"} if options.device == "cuda" else {}),
        }
        self.limit = options.limit
        self.wall = self.others = 0.0

    def take(self, environment: Mapping[str, str], **what: Any) -> dict[str, Any]:
        """The result of one process; {"status": "failed", "note"} if it did not come to its end."""
        lines, end, others = self.process(environment, what)
        if end or not lines:
            return {"status": "failed", "note": end or "its process ended with 0"}
        return {**json.loads(lines[-1]), "others_cores": others}

    def parts(self, wanted: Sequence[str], **what: Any) -> dict[str, dict[str, Any]]:
        """The result of each part of one process on the GPU, the check and those ``wanted``; as
        "failed" those that it did not come to."""
        lines, end, others = self.process({}, {"what": wanted, **what})
        found: dict[str, dict[str, Any]] = {}
        for line in lines:
            found |= json.loads(line)
        for name in ("check", *wanted):
            lost = {"status": "failed", "note": end or "its process ended without it"}
            found[name] = {**found.get(name, lost), "others_cores": others}
        return found

    def process(
        self, environment: Mapping[str, str], what: Mapping[str, Any]
    ) -> tuple[list[str], str, float]:
        """(what it printed, how it ended if not well, the cores that others kept busy)."""
        start, busy = time.perf_counter(), run.others_seconds()
        command = [sys.executable, "-m", "bench.turns", json.dumps({**self.common, **what})]
        variables = {
            **{k: v for k, v in os.environ.items() if k not in run.WARM},
            **environment,
            "OMP_NUM_THREADS": str(self.common["threads"]),
            "TQDM_DISABLE": "1",  # no progress bars in the time
        }
        end = ""
        with tempfile.TemporaryFile("w+") as output:  # what came before a timeout is in it too
            try:
                code = subprocess.run(
                    command, cwd=run.ROOT, env=variables, stdout=output, timeout=self.limit
                ).returncode
                end = f"its process ended with {code}" if code else ""
            except subprocess.TimeoutExpired:
                end = f"its process took more than {self.limit:g} s"
            output.seek(0)
            lines = output.read().splitlines()
        wall, others = time.perf_counter() - start, run.others_seconds() - busy
        self.wall, self.others = self.wall + wall, self.others + others
        return lines, end, round(max(others / wall, 0.0), 2)


def rotated(items: Sequence[Any], block: int) -> list[Any]:
    turn = block % len(items) if items else 0
    return [*items[turn:], *items[:turn]]


def measure(options: argparse.Namespace, report: dict[str, Any]) -> Iterator[None]:
    """Fills the report; yields whenever there is more in it."""
    turns, checked, results = Turns(options), report["checks"], report["results"]
    for setting in settings(options):
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


def settings(options: argparse.Namespace) -> list[str]:
    found = list(options.settings) if set(options.what) != {"epoch"} else []
    return found + (["kuairand"] if "epoch" in options.what else [])


def measure_on_gpu(options: argparse.Namespace, report: dict[str, Any]) -> Iterator[None]:
    """As ``measure``, in a process for each contender and precision."""
    turns, results = Turns(options), report["results"]
    for setting in settings(options):
        # Memory comes before there is anything else of a model on the GPU.
        order = ("epoch",) if setting == "kuairand" else ("memory", "step", "inference")
        found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for name in options.contenders:
            wanted = [w for w in order if w in options.what and w in CONTENDERS[name].what]
            for precision in options.runs if wanted else ():
                key = {"setting": setting, "contender": name, "precision": precision}
                found[name, precision] = {
                    what: {**key, "what": what, **NOT_RUN, "turns": []} for what in wanted
                }
        results += [result for each in found.values() for result in each.values()]
        checks, ceilings = (report[key].setdefault(setting, {}) for key in ("checks", "ceilings"))
        for block in range(options.blocks):
            if setting != "kuairand":
                turn = turns.take({}, what="ceilings", setting=setting)
                if turn["status"] != "ok":
                    sys.exit(f"no ceilings: {turn['note']}")
                ceilings |= {k: max(v, ceilings.get(k, 0.0)) for k, v in turn["rates"].items()}
            for (name, precision), own in rotated(list(found.items()), block):
                unfinished = ("ok", NOT_RUN["status"])
                going = [what for what, result in own.items() if result["status"] in unfinished]
                if not going:
                    continue
                where = {"contender": name, "precision": precision}
                parts = turns.parts(going, setting=setting, **where)
                check = checks[f"{name}, {precision}"] = parts["check"]
                verdict: dict[str, Any] = {k: check[k] for k in ("status", "note") if k in check}
                for what in going:
                    add(own[what], parts[what] if check["status"] == "ok" else verdict)
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
    result.pop("note", None)  # that it had not run
    result["status"] = "ok"
    result["turns"].append({key: value for key, value in turn.items() if key != "status"})


def summarise(result: dict[str, Any], report: Mapping[str, Any]) -> None:
    """What the turns so far say, and the roofline beside it."""
    turns = result["turns"]
    if result["status"] != "ok" or not turns:
        return
    setting = SETTINGS.get(result["setting"])
    result["others_cores"] = max(turn["others_cores"] for turn in turns)
    if result["what"] == "memory":
        memories = ("peak", "reserved", "parameters")
        result |= {key: turns[0][key] for key in memories if key in turns[0]}
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
        dtype = PRECISIONS[result["precision"]] if "precision" in result else dtype
        if result["what"] == "step":
            ideal = cost(setting, setting.batch, network, True, dtype)
            result |= spread([turn["rounds"] for turn in turns])
            result |= roofline(ideal, rates, dtype, result["seconds"])
            result["samples_per_s"] = setting.batch / result["seconds"]
            if "gpu_state" in turns[-1]:
                result["gpu_state"] = turns[-1]["gpu_state"]
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


# Command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="run, and write results to this file")
    parser.add_argument("--table", type=Path, help="print Markdown from a result file")
    parser.add_argument(
        "--plot", type=Path, help="draw the --json or --table file to this .svg or .png"
    )
    parser.add_argument("--official", type=adapter.checkout, help="a checkout of the official code")
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--what", nargs="+", choices=WHAT, help="default: all there is data for")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        metavar="NAME",
        help=f"of {'; '.join(CONTENDERS)}; on CUDA of {'; '.join(ON_GPU)}",
    )
    parser.add_argument("--runs", nargs="+", help="allocators, or on CUDA precisions; default: all")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--blocks", type=int, help="turns of each contender")
    parser.add_argument("--seconds", type=float, help="of rounds in each turn")
    parser.add_argument("--limit", type=float, help="seconds after which a process is ended")
    parser.add_argument("--train", type=Path, help="KuaiRand's training Parquet file, for epochs")
    parser.add_argument("--valid", type=Path, help="and its validation file")
    options = parser.parse_args(arguments)
    if (options.json is None) == (options.table is None):
        parser.error("give --json to run or --table to print")
    for name, default in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    gpu = options.device == "cuda"
    names, runs = list(ON_GPU if gpu else CONTENDERS), list(PRECISIONS if gpu else ALLOCATORS)
    for name, known in (("contenders", names), ("runs", runs)):
        if not set(getattr(options, name)) <= set(known):
            parser.error(f"--{name} on {options.device} are {'; '.join(known)}")
    if gpu and options.json and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
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
        report = run.stored(options.table, "ceilings", "results")
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
            "machine": run.machine(options.device, options.threads),
            "versions": run.versions(PACKAGES),
            "shims": contenders.SHIMS,
            "settings": {name: SETTINGS[name]._asdict() for name in options.settings},
            "environments": {**ALLOCATORS, **MEMORY} if options.device == "cpu" else {},
            "others_cores": 0.0,
            "ceilings": {},
            "checks": {},
            "results": [],
        }
        if "epoch" in options.what:
            report["settings"]["kuairand"] = describe(options.train, options.valid)
        for _ in (measure if options.device == "cpu" else measure_on_gpu)(options, report):
            parity.write(options.json, without_rounds(report))
        print(text(report))
    if options.plot:
        plot(report, options.plot)
    found = [*report["results"], *(c for s in report["checks"].values() for c in s.values())]
    return int(bool({"wrong", "failed"} & {each["status"] for each in found}))


if __name__ == "__main__":
    sys.exit(main())
