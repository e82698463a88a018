"""The tables and figures of README and docs, each made from its file in bench/results.

A page asks for a table with ``<!-- table: NAME -->`` and for a figure with ``{{ NAME }}``;
docs/hooks.py puts them in. README is not built, so tests/test_docs.py compares what it says.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import peers_report, run

RESULTS = Path(__file__).parents[1] / "bench" / "results"
ALLOCATORS = ("default allocator", "warm allocator")
Rows = list[list[str]]


READ: dict[str, dict[str, Any]] = {}  # results files by name, each read once


def report(name: str) -> dict[str, Any]:
    """What a results file holds."""
    if name not in READ:
        READ[name] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return READ[name]


def full(name: str) -> str:
    """All tables of a file, as ``python -m bench.run --table`` or ``bench.peers`` prints them."""
    found = report(name)
    return peers_report.text(found) if "results" in found else run.text(found)


# Whole models


def measured(name: str, setting: str, what: str, contender: str) -> dict[str, dict[str, Any]]:
    """Column (allocator or precision) -> result, of one thing measured of one contender."""
    return {
        peers_report.column(result): result
        for result in report(name)["results"]
        if (result["setting"], result["what"], result["contender"]) == (setting, what, contender)
        and result["status"] == "ok"
    }


def milliseconds(seconds: float) -> str:
    """Two digits below 10 ms, whole milliseconds from there on."""
    return f"{1000 * seconds:.1f}" if seconds < 0.01 else f"{1000 * seconds:.0f}"


def pair(values: Sequence[float]) -> str:
    """Milliseconds with the default allocator / the warm one."""
    return " / ".join(map(milliseconds, values))


def step(name: str, setting: str, contender: str) -> str:
    found = measured(name, setting, "step", contender)
    return pair([found[each]["seconds"] for each in ALLOCATORS]) if found else ""


def request(contender: str, rows: int) -> str:
    found = measured("peers_cpu", "tiktok", "inference", contender)
    return pair([found[each]["requests"][str(rows)]["seconds"] for each in ALLOCATORS])


def models() -> Rows:
    """Steps, requests and memory of whole models at the TikTok setting."""
    columns = {  # title -> contender of steps and memory, contender of requests
        "stem_fast": ("stem_fast", "stem_fast, compiled"),
        "stem_fast, bf16": ("stem_fast, bf16", "stem_fast, compiled bf16"),
        "official": ("official", "official"),
        "official, compiled": ("official, compiled", "official, compiled"),
        "official PLE": ("official PLE", "official PLE"),
    }
    table = [["", *columns]]
    steps = [step("peers_cpu", "tiktok", each) for each, _ in columns.values()]
    table.append(["training step, ms", *steps])
    for rows in (1, 64, 512, 4096):
        title = f"request of {rows} row{'s' if rows > 1 else ''}, median ms"
        table.append([title, *(request(each, rows) for _, each in columns.values())])
    peaks = [
        measured("peers_cpu", "tiktok", "memory", each)["gives back"]["peak"]
        for each, _ in columns.values()
    ]
    table.append(["peak of a training process, MB", *(f"{peak / 1e6:.0f}" for peak in peaks)])
    return table


def other_settings() -> Rows:
    """Training steps of other sizes of table and network."""
    columns = ("stem_fast", "stem_fast, bf16", "official", "official PLE")
    table = [["ms of a training step", *columns]]
    for title, name, setting in (
        ("2 M rows", "peers_rows_cpu", "2m_rows"),
        ("10 M rows", "peers_rows_cpu", "10m_rows"),
        ("4 tasks", "peers_shapes_cpu", "4_tasks"),
        ("2 layers of experts", "peers_shapes_cpu", "2_layers"),
    ):
        table.append([title, *(step(name, setting, each) for each in columns)])
    return table


def epoch() -> Rows:
    """Samples a second of an epoch of KuaiRand-Pure, from encoded data to AUC and gAUC."""
    return peers_report.epoch_rows(report("peers_epoch_cpu")["results"])


# Ops


def timed(name: str, setting: str, op: str, contender: str, column: str) -> dict[str, Any] | None:
    """A result of an op that has a time."""
    for result in report(name)["runs"][column]["results"]:
        key = result["setting"], result["op"], result["contender"]
        if key == (setting, op, contender) and result["status"] == "ok":
            return dict(result)
    return None


def faster(name: str, setting: str, op: str, contender: str) -> str:
    """How many times faster ours is, with the default allocator / the warm one."""
    results = [timed(name, setting, op, contender, each) for each in ALLOCATORS]
    ratios = [result["ours_faster"] for result in results if result]
    return " / ".join(f"{r:.0f}x" if r >= 9.95 else f"{r:.1f}x" for r in ratios)


def ops() -> Rows:
    """How many times faster each op is than what others offer."""
    columns = {
        "official, eager": ("official", "official, sparse"),
        "official, compiled": ("official, compiled",),
        "FBGEMM TBE": ("FBGEMM TBE",),
        "`nn.EmbeddingBag`": ("nn.EmbeddingBag",),
    }
    lookup = "lookup, forward"
    mixture = "mixture, forward and backward"
    table = [["stem_fast is faster than", *columns]]
    for title, name, setting, op in (
        (lookup, "kernels_cpu_zen4", "tiktok", "lookup_forward"),
        ("lookup, dense gradient", "kernels_cpu_zen4", "tiktok", "lookup_backward"),
        (
            "lookup, gradient of the batch's rows",
            "kernels_cpu_zen4",
            "tiktok",
            "lookup_backward_rows",
        ),
        (mixture, "kernels_cpu_zen4", "tiktok", "mixture_forward_backward"),
        ("task losses, forward and backward", "kernels_cpu_zen4", "tiktok", "task_losses"),
        (f"*large*: {lookup}", "kernels_cpu", "large", "lookup_forward"),
        (f"*large*: {mixture}", "kernels_cpu", "large", "mixture_forward_backward"),
    ):
        cells = [
            "".join(faster(name, setting, op, contender) for contender in contenders)
            for contenders in columns.values()
        ]
        table.append([title, *cells])
    return table


def op_time(name: str, setting: str, op: str, contender: str = "stem_fast") -> float:
    """Seconds in the first run of a file; on CPU that is the default allocator's."""
    column = next(iter(report(name)["runs"]))
    found = timed(name, setting, op, contender, column)
    if found is None:
        raise KeyError(f"{name}: {contender} has no time for {op} at {setting}")
    return float(found["seconds"])


def digits(seconds: float) -> str:
    """Milliseconds with three digits, whole ones from 100 on."""
    ms = 1000 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def table_steps() -> Rows:
    """Milliseconds of a step of the embedding tables on CPU."""
    columns = {
        "0.6 M rows": ("tiktok", "embedding_step"),
        "10 M rows": ("tall", "embedding_step"),
        "0.6 M rows, L2": ("tiktok", "embedding_step_l2"),
        "10 M rows, L2": ("tall", "embedding_step_l2"),
    }
    table = [["ms of a step of the tables", *columns]]
    for title, contender in (
        ("`ExactAdam`", "stem_fast"),
        ("`nn.Embedding`, `torch.optim.Adam(fused=True)`", "nn.Embedding, fused dense Adam"),
        ("`nn.Embedding(sparse=True)`, `SparseAdam`", "nn.Embedding, SparseAdam"),
        ("FBGEMM TBE, row-wise Adagrad", "FBGEMM TBE, row-wise Adagrad"),
    ):
        found = [
            timed("steps_cpu", setting, op, contender, "default allocator")
            for setting, op in columns.values()
        ]
        table.append([title, *(digits(each["seconds"]) if each else "" for each in found)])
    return table


def gpu_table_steps() -> Rows:
    """Milliseconds of a step of tables with 10 M rows on a GPU."""
    table = [
        ["ms of a step, 10 M rows", "`ExactAdam`", "with L2", "torch's fused dense Adam", "with L2"]
    ]
    for name in ("steps_h200", "steps_h100"):
        found = [
            op_time(name, "tall", op, contender)
            for contender in ("stem_fast", "nn.Embedding, fused dense Adam")
            for op in ("embedding_step", "embedding_step_l2")
        ]
        table.append([report(name)["machine"]["gpu"], *map(digits, found)])
    return table


def gpu_requests() -> Rows:
    """Median milliseconds of a bf16 request on an H200."""
    table = [["rows of a request, bf16", "stem_fast, ms", "official, ms"]]
    ours, official = (
        measured("peers_h200", "tiktok", "inference", each)["bf16"]["requests"]
        for each in ("stem_fast", "official")
    )
    for rows in ours:
        table.append([rows, *(digits(each[rows]["seconds"]) for each in (ours, official))])
    return table


GPU_OPS = "gpu_nvidia_h100_80gb_hbm3_2026-11-27"


def gpu_ops() -> Rows:
    """Share of the copy's bandwidth that the mixture reaches on an H100."""
    table = [["mixture, of a copy's bandwidth", "Triton", "CUDA C++"]]
    for setting in ("tiktok", "large"):
        for op in ("mixture_forward", "mixture_forward_backward"):
            found = [timed(GPU_OPS, setting, op, "stem_fast", each) for each in ("triton", "cuda")]
            title = f"{setting}, {op.removeprefix('mixture_').replace('_', ' and ')}"
            table.append([title, *(f"{each['of_ceiling']:.0%}" for each in found if each)])
    return table


# Quality of trained models


def parity() -> Rows:
    """AUC of independently trained models: the official code's and ours."""
    table = [
        [
            "validation AUC, mean of 3 seeds",
            "official, own seed",
            "stem_fast, own seed",
            "official, same start",
            "stem_fast, same start",
        ]
    ]
    for title, name in (("KuaiRand-Pure", "parity_kuairand"), ("Census-Income", "parity_census")):
        own, paired = report(name)["summary"], report(f"{name}_paired")["summary"]
        for task in own["official"]["tasks"]:
            cells = []
            for code in ("official", "stem_fast"):
                found = own[code]["tasks"][task]
                cells.append(f"{found['auc']:.4f} ± {found['auc_std']:.4f}")
            cells += [f"{paired[c]['tasks'][task]['auc']:.4f}" for c in ("official", "stem_fast")]
            table.append([f"{title}, {task}", *cells])
    return table


def auc(name: str, of: str, task: str) -> float:
    return float(report(name)["runs"][of]["metrics"]["tasks"][task]["auc"])


def demo() -> Rows:
    """What `make demo` prints."""
    columns = {"STEM-Net": "stem", "single-task": "single", "shared bottom": "shared_bottom"}
    table = [["validation AUC", *columns]]
    for task in ("click", "like", "follow"):
        table.append([task, *(f"{auc('demo', of, task):.4f}" for of in columns.values())])
    return table


def embedding_optimizers() -> Rows:
    """AUC on KuaiRand-Pure with each optimizer of the tables."""
    name = "optimizers_kuairand"
    columns = ("adam", "dense_adam", "lazy_adam", "sgd", "adagrad", "rowwise_adagrad")
    table = [["validation AUC", *(f"`{column}`" for column in columns)]]
    for task in ("finish", "is_like"):
        table.append([task, *(f"{auc(name, column, task):.5f}" for column in columns)])
    for task in ("finish", "is_like"):
        exact = [f"{auc(name, f'{column}_fp64', task):.6f}" for column in columns[:2]]
        table.append([f"{task}, `--precision fp64`", *exact, *[""] * (len(columns) - 2)])
    return table


def precision() -> Rows:
    """AUC in float32 and bfloat16 over several seeds."""
    head = ["validation AUC", "seeds", "fp32, mean", "bf16, mean"]
    table = [[*head, "largest difference of one seed's two runs", "range of fp32 over seeds"]]
    for title, name in (
        ("KuaiRand-Pure", "precision_kuairand"),
        ("Census-Income", "precision_census"),
    ):
        runs = report(name)["runs"]
        seeds = sorted(int(key.split("_")[1]) for key in runs if key.startswith("fp32_"))
        for task in runs["fp32_1"]["metrics"]["tasks"]:
            wide, low = (
                [auc(name, f"{each}_{seed}", task) for seed in seeds] for each in ("fp32", "bf16")
            )
            apart = max(abs(a - b) for a, b in zip(wide, low, strict=True))
            means = [f"{statistics.fmean(each):.4f}" for each in (wide, low)]
            spread = f"{max(wide) - min(wide):.4f}"
            line = [f"{title}, {task}", str(len(seeds)), *means, f"{apart:.4f}", spread]
            table.append(line)
    return table


TABLES: dict[str, Callable[[], Rows]] = {
    "models": models,
    "other settings": other_settings,
    "epoch": epoch,
    "ops": ops,
    "table steps": table_steps,
    "gpu table steps": gpu_table_steps,
    "gpu requests": gpu_requests,
    "gpu ops": gpu_ops,
    "parity": parity,
    "demo": demo,
    "embedding optimizers": embedding_optimizers,
    "precision": precision,
}


def markdown(name: str) -> str:
    """A table by its name, or by the name of a results file all tables of it."""
    return run.markdown(TABLES[name]()) if name in TABLES else full(name)


# Figures in sentences


def ratio(name: str, setting: str, column: str) -> float:
    """Official step time over ours."""
    ours, official = (
        measured(name, setting, "step", each)[column]["seconds"]
        for each in ("stem_fast", "official")
    )
    return float(official / ours)


def activations(code: str) -> str:
    return f"{report('kernels_cpu_zen4')['memory']['codes'][code]['activations'] / 1e6:.0f}"


def rows_growth(op: str) -> str:
    """Time with 10 M rows over that with a twentieth of them, in turns."""
    few = op_time("steps_cpu", "tall", op, "stem_fast, a twentieth of the rows")
    return f"{op_time('steps_cpu', 'tall', op) / few:.2f}"


def auc_drop(task: str) -> str:
    """What lazy_adam loses to adam."""
    name = "optimizers_kuairand"
    return f"{auc(name, 'adam', task) - auc(name, 'lazy_adam', task):.3f}"


def float32_distance() -> str:
    """How far either Adam in float32 ends from its AUC in float64, at most."""
    name = "optimizers_kuairand"
    return format(
        max(
            abs(auc(name, of, task) - auc(name, f"{of}_fp64", task))
            for of in ("adam", "dense_adam")
            for task in ("finish", "is_like")
        ),
        ".5f",
    )


def mixture_share() -> str:
    found = [
        timed("kernels_cpu_zen4", "tiktok", "mixture_forward_backward", "stem_fast", each)
        for each in ALLOCATORS
    ]
    return " / ".join(f"{each['of_ceiling']:.0%}" for each in found if each)


def micro(what: str) -> str:
    found = measured("peers_cpu", "tiktok", what, "stem_fast, micro-batches")
    if what == "memory":
        return f"{found['gives back']['peak'] / 1e6:.0f}"
    return pair([found[each]["seconds"] for each in ALLOCATORS])


def peak() -> str:
    return (
        f"{measured('peers_cpu', 'tiktok', 'memory', 'stem_fast')['gives back']['peak'] / 1e6:.0f}"
    )


FIGURES: dict[str, Callable[[], str]] = {
    "adam 10M ms": lambda: digits(op_time("steps_cpu", "tall", "embedding_step")),
    "dense adam 10M ms": lambda: digits(
        op_time("steps_cpu", "tall", "embedding_step", "nn.Embedding, fused dense Adam")
    ),
    "adam rows growth": lambda: rows_growth("embedding_step"),
    "adam rows growth, L2": lambda: rows_growth("embedding_step_l2"),
    "update ms": lambda: digits(op_time("steps_cpu", "tiktok", "adam_rows")),
    "update 10M ms": lambda: digits(op_time("steps_cpu", "tall", "adam_rows")),
    "dense update ms": lambda: digits(
        op_time("steps_cpu", "tiktok", "adam_rows", "torch's fused Adam, those rows side by side")
    ),
    "dense update 10M ms": lambda: digits(
        op_time("steps_cpu", "tall", "adam_rows", "torch's fused Adam, those rows side by side")
    ),
    "catch-up s": lambda: f"{op_time('steps_cpu', 'tiktok', 'catch_up_l2'):.2f}",
    "catch-up 10M s": lambda: f"{op_time('steps_cpu', 'tall', 'catch_up_l2'):.2f}",
    "step ratio": lambda: f"{ratio('peers_cpu', 'tiktok', ALLOCATORS[0]):.1f}",
    "step ratio, warm": lambda: f"{ratio('peers_cpu', 'tiktok', ALLOCATORS[1]):.1f}",
    "step ratio 10M": lambda: f"{ratio('peers_rows_cpu', '10m_rows', ALLOCATORS[0]):.1f}",
    "step ratio 10M, warm": lambda: f"{ratio('peers_rows_cpu', '10m_rows', ALLOCATORS[1]):.1f}",
    "official finish AUC": lambda: parity()[1][1],
    "finish AUC": lambda: parity()[1][2],
    "official activations MB": lambda: activations("official"),
    "activations MB": lambda: activations("stem_fast"),
    "mixture share": mixture_share,
    "lazy drop finish": lambda: auc_drop("finish"),
    "lazy drop is_like": lambda: auc_drop("is_like"),
    "float32 distance": float32_distance,
    "micro-batch MB": lambda: micro("memory"),
    "micro-batch ms": lambda: micro("step"),
    "peak MB": peak,
    "loss ms": lambda: digits(op_time("kernels_cpu_zen4", "tiktok", "task_losses")),
    "gpu mixture backward": lambda: gpu_speedup("mixture_forward_backward"),
    "gpu lookup": lambda: gpu_speedup("lookup_forward"),
}


def gpu_speedup(op: str) -> str:
    """Triton's time over CUDA C++'s on an H100, at both settings."""
    found = []
    for setting in ("tiktok", "large"):
        times = [timed(GPU_OPS, setting, op, "stem_fast", each) for each in ("triton", "cuda")]
        slow, fast = (each["seconds"] for each in times if each)
        found.append(f"{slow / fast:.1f}")
    return " to ".join(sorted({*found}, key=float))
