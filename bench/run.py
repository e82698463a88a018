"""Benchmarks of the ops against the official formulation and other libraries.

    python -m bench.run --json bench/results/kernels_cpu.json [--official PATH]
    python -m bench.run --table bench/results/kernels_cpu.json
    python -m bench.run --json bench/results/steps_cpu.json --settings tiktok tall \\
        --ops embedding_step embedding_step_l2 adam_rows catch_up_l2 \\
        --runs 'default allocator' --blocks 3

Each case of bench/ops/ is timed by pytest-benchmark (bench/test_ops.py). On the CPU everything
runs twice, each time in a process of its own: with the allocator as it comes, and with glibc's kept
warm, because page faults of fresh buffers are a large part of what PyTorch's ops cost, and freeing
peers of them is no merit of a kernel. (Once ours has run, glibc keeps up to 256 MiB of what is
freed, for all in that process: see csrc/cpu/buffers.cpp.) On CUDA it runs once with each of our
backends. With --official, a checkout of the official code, the peak memory of a training step is
compared too.

A time is the median of all rounds, with the least and the largest median of a block beside it;
GB/s are the bytes that an ideal implementation moves over that time; a contender whose result is
wrong has no time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench import cases, memory
from bench import official as adapter
from bench.ops import KERNELS, OPS
from bench.parity import processor, write

ROOT = Path(__file__).parents[1]
WARM = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
# Name of a run -> what its process has in its environment.
RUNS: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {"default allocator": {}, "warm allocator": WARM},
    "cuda": {
        "default": {},
        "triton": {"STEM_FAST_BACKEND": "triton"},
        "cuda": {"STEM_FAST_BACKEND": "cuda"},
    },
}
KEY = ("setting", "op", "contender")  # what tells a result
PACKAGES = ("stem_fast", "torch", "triton", "numpy", "fbgemm-gpu-cpu", "pytest-benchmark")


def measure(environment: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    """One process of bench/test_ops.py: its results, and its exit status (pytest's)."""
    kept = {k: v for k, v in os.environ.items() if k not in WARM}
    with tempfile.TemporaryDirectory() as folder:
        times, outcomes = Path(folder, "times.json"), Path(folder, "outcomes.xml")
        command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "-q", "--tb=short"]
        command += ["-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=ignore"]
        command += ["--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={times}"]
        if options["device"] == "cuda":
            command.append("--benchmark-timer=bench.test_ops.CudaMoment")
        start, busy = time.perf_counter(), others_seconds()
        finished = subprocess.run(
            [*command, f"--junitxml={outcomes}"],
            cwd=ROOT,
            env={
                **kept,
                **environment,
                "OMP_NUM_THREADS": str(options["threads"]),
                "STEM_FAST_BENCH": json.dumps(options),
            },
            stdout=sys.stderr,
            check=False,
        )
        others = (others_seconds() - busy) / (time.perf_counter() - start)
        # Neither is written by a process that did not come to its end.
        benchmarks = json.loads(times.read_text("utf-8"))["benchmarks"] if times.exists() else []
        tests = list(ElementTree.parse(outcomes).iter("testcase")) if outcomes.exists() else []
    results = gather(benchmarks, tests)
    for result in results:
        compare(result, results)
    return {
        "environment": dict(environment),
        "exit": finished.returncode,
        # Cores that other programs kept busy meanwhile. Well above 0, the times say little: a
        # thread that waits for one without a core waits for the scheduler's next turn, 8 ms.
        "others_cores": round(max(others, 0.0), 2),
        "results": results,
    }


def others_seconds() -> float:
    """CPU seconds since the start of the machine that were not of this program's children."""
    try:
        busy = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=4)[1:4]
    except OSError:  # only Linux has it
        return 0.0
    children = os.times()
    ours = children.children_user + children.children_system
    return sum(map(int, busy)) / os.sysconf("SC_CLK_TCK") - ours


def gather(
    benchmarks: Sequence[Mapping[str, Any]], tests: Sequence[ElementTree.Element]
) -> list[dict[str, Any]]:
    """One result a contender, from pytest-benchmark's times and pytest's report of each block."""
    blocks: dict[tuple[str, ...], list[ElementTree.Element]] = {}
    for test in tests:
        properties = {p.attrib["name"]: p.attrib["value"] for p in test.iter("property")}
        key = tuple(properties[name] for name in KEY)
        blocks.setdefault(key, []).append(test)
    results = []
    for key, reports in blocks.items():
        result: dict[str, Any] = dict(zip(KEY, key, strict=True))
        parts = [part for report in reports for part in report]
        bad = [part for part in parts if part.tag in ("failure", "error")]
        skipped = [part for part in parts if part.tag == "skipped"]
        mine = [b for b in benchmarks if key == tuple(b["extra_info"][name] for name in KEY)]
        if bad:
            note = " ".join(bad[0].attrib["message"].split())[:500]
            wrong = note.startswith("AssertionError")
            result |= {"status": "wrong" if wrong else "failed", "note": note}
        elif skipped:
            result |= {"status": "not installed", "note": skipped[0].attrib["message"]}
        else:
            medians = [b["stats"]["median"] for b in mine]
            rounds = [seconds for b in mine for seconds in b["stats"]["data"]]
            result |= {
                "status": "ok",
                **mine[-1]["extra_info"],
                "seconds": statistics.median(rounds),
                "block_seconds": [min(medians), max(medians)],
                "rounds": len(rounds),
            }
            result["gb_per_s"] = result["bytes"] / result["seconds"] / 1e9
        results.append(result)
    return results


def compare(result: dict[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Add the fraction of the ceiling, and how many times faster ours is, where both are known."""
    if result["status"] != "ok" or result["contender"] in result["ceilings"]:
        return
    case = result["setting"], result["op"]
    others = {
        r["contender"]: r
        for r in results
        if r["status"] == "ok" and (r["setting"], r["op"]) == case
    }
    ceilings = [others[name]["gb_per_s"] for name in result["ceilings"] if name in others]
    if ceilings:
        result["of_ceiling"] = result["gb_per_s"] / max(ceilings)
    if result["contender"] != cases.OURS and cases.OURS in others:
        result["ours_faster"] = result["seconds"] / others[cases.OURS]["seconds"]


def gpu_state() -> dict[str, Any]:
    """Power, clocks and memory of torch's current GPU now, or why they are not known."""
    if importlib.util.find_spec("pynvml") is None:
        return {"note": "nvidia-ml-py is not installed"}
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        # CUDA's numbers are not NVML's where CUDA_VISIBLE_DEVICES is set.
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        return {
            "power_w": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "sm_max_mhz": nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            "memory_used_bytes": nvml.nvmlDeviceGetMemoryInfo(gpu).used,
            "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(gpu).total,
            "temperature_c": nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            "driver": nvml.nvmlSystemGetDriverVersion(),
        }
    except nvml.NVMLError as error:
        return {"note": f"NVML: {error}"}


def machine(device: str, threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
        found["gpu_state"] = gpu_state()
    return found


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if "torch" in found:
        found["torch"] = torch.__version__  # which says for what CUDA it was built
    return found


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A table of a report: one row a contender, three columns a run."""
    names = list(report["runs"])
    header = list(KEY)
    for name in names:
        header += [f"ms, {name}", "GB/s (of ceiling)", "ours is faster"]
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for name in names:
        for result in report["runs"][name]["results"]:
            key = tuple(result[part] for part in KEY)
            found.setdefault(key, {})[name] = result
    table = [header]
    for key, by_run in found.items():
        row = list(key)
        for name in names:
            row += cells(by_run.get(name))
        table.append(row)
    return table


def cells(result: Mapping[str, Any] | None) -> list[str]:
    """Time, rate and ratio of a result; where there is no time, why."""
    if result is None:
        return ["", "", ""]
    if result["status"] != "ok":
        note = result["note"] if result["status"] == "not installed" else result["status"]
        return [note, "", ""]
    rate = f"{result['gb_per_s']:.1f}"
    if "of_ceiling" in result:
        rate += f" ({result['of_ceiling']:.0%})"
    faster = f"{result['ours_faster']:.2f}x" if "ours_faster" in result else ""
    return [f"{result['seconds'] * 1000:.3g}", rate, faster]


def memory_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A table of the peak memory of a training step."""
    table = [["peak MB of a step", *memory.CODES]]
    codes = report["memory"]["codes"]
    for name in ("activations", "forward", "backward", "update", "gradients"):
        table.append([name, *(f"{codes[code][name] / 1e6:.0f}" for code in memory.CODES)])
    return table


def tables(report: Mapping[str, Any]) -> list[list[list[str]]]:
    return [rows(report)] + ([memory_rows(report)] if "memory" in report else [])


def markdown(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |"
        for row in [head, ["---"] * len(head), *body]
    )


def text(report: Mapping[str, Any]) -> str:
    """A report in Markdown."""
    return "\n\n".join([title(report, others(report)), *map(markdown, tables(report)), ""])


def others(report: Mapping[str, Any]) -> float:
    return max(run["others_cores"] for run in report["runs"].values())


def title(report: Mapping[str, Any], others: float) -> str:
    about, found = report["machine"], report["versions"]
    where = about.get("gpu") or f"{about['processor']}, {about['threads']} threads"
    return (
        f"{where}, torch {found['torch']}, commit {report['commit']}, {report['date']}; "
        f"other programs kept {others} cores busy"
    )


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # A log gets whole rows, however long.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(title(report, others(report)))
    for head, *body in tables(report):
        table = Table(*head)
        for row in body:
            table.add_row(*row)
        console.print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", type=Path, help="run, and write results to this file")
    what.add_argument("--table", type=Path, nargs="+", help="print Markdown from result files")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(KERNELS))
    parser.add_argument(
        "--settings", nargs="+", choices=cases.SETTINGS, default=list(cases.DEFAULT_SETTINGS)
    )
    parser.add_argument("--contenders", nargs="+", default=[], help="beside ours; default: all")
    parser.add_argument("--device", choices=RUNS, default="cpu")
    parser.add_argument("--runs", nargs="+", help="allocators or backends; default: both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=3, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=0.5, help="of rounds in each turn")
    parser.add_argument(
        "--official",
        type=adapter.checkout,
        help="a checkout of the official code: compare memory too",
    )
    options = parser.parse_args(arguments)
    known = RUNS[options.device]
    options.runs = options.runs or list(known)
    if not set(options.runs) <= set(known):
        parser.error(f"--runs on {options.device} are {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def stored(path: Path, *keys: str) -> Any:
    """Results with these keys. Ends the program with one line if the file has none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"--table {path}: {error}")
    for key in keys:
        if not isinstance(report, dict) or key not in report:
            sys.exit(f"--table {path}: no results of this benchmark, there is no {key!r}")
    return report


def command(module: str, arguments: Sequence[str], options: argparse.Namespace) -> str:
    """The command line, without the paths of this machine."""
    names = {"json": "FILE", "plot": "FILE.svg", "official": "PATH", "train": "A", "valid": "B"}
    paths = {str(getattr(options, name, None)): short for name, short in names.items()}
    quoted = (paths.get(a) or shlex.quote(a) for a in arguments)
    return " ".join([f"python -m {module}", *quoted])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a result was wrong or a contender or a process failed."""
    options = parse(arguments)
    if options.table:
        for path in options.table:
            print(text(stored(path, "versions", "runs")))
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    report: dict[str, Any] = {
        "command": command("bench.run", given, options),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": adapter.commit(ROOT),
        "machine": machine(options.device, options.threads),
        "versions": versions(),
        "settings": {name: cases.SETTINGS[name]._asdict() for name in options.settings},
        "runs": {},
    }
    chosen = ("settings", "ops", "contenders", "device", "threads", "blocks", "seconds")
    passed = {name: getattr(options, name) for name in chosen}
    for name in options.runs:
        # A run may take minutes: what there is is kept.
        report["runs"][name] = measure(RUNS[options.device][name], passed)
        write(options.json, report)
    if options.official:
        report["memory"] = memory.compare(options.official, options.threads)
        write(options.json, report)
    show(report)
    statuses = [r["status"] for run in report["runs"].values() for r in run["results"]]
    exits = [run["exit"] for run in report["runs"].values()]
    return int(any(exits) or not statuses or bool({"wrong", "failed"} & set(statuses)))


if __name__ == "__main__":
    sys.exit(main())
