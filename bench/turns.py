"""The process in which a contender of bench/peers.py is checked, or timed:

    python -m bench.turns '{"what": "step", "contender": "official", ...}'

It prints one line of JSON. On CUDA ("device", "precision") one process does all that "what" lists,
because models are compiled and captured there before they are timed, and prints a line for each.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import cases, memory
from bench import run as bench_run
from bench.contenders import (
    CONTENDERS,
    OURS,
    REQUESTS,
    SETTINGS,
    Contender,
    NotAvailableError,
    Ours,
    Problem,
    Study,
    kuairand,
    synthetic,
)
from stem_fast import ops
from stem_fast.nn.grouped import GroupedMLP
from stem_fast.nn.precision import tf32

# Of a tensor's entries on average, each of which Adam's first step moves by 1e-3. Rounding decides
# whether a ReLU next to 0 is on, which turns the steps of a unit's weights: up to 5e-7 was seen, of
# the official code against float64 as of ours.
STEP_ERROR = 3e-6
CHECK_ROWS = 600_000  # a larger table is checked at this size: there are three copies of it
# Before the time starts a model is compiled and captured. So many batches are ready, each its own.
GPU_WARM_UP, GPU_ROUNDS = 10, 60

# Correctness


class Autocast(Ours):
    """Ours with PyTorch's own operations under its autocast: how far off bfloat16 is at best."""

    @property
    def answer(self) -> Callable[..., Tensor]:
        return self.model.predict

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        def unfused(experts: Any, inputs: Any, reads: Any, *rest: Any) -> Any:
            return ops.mixture(experts(inputs, reads), *rest).unbind()

        with (
            mock.patch("stem_fast.nn.experts.expert_mixture", unfused),
            mock.patch.object(GroupedMLP, "forward", GroupedMLP.step_by_step),
            torch.autocast(self.device, torch.bfloat16),
        ):
            yield

    def outputs(self, batch: Any) -> dict[str, Tensor]:
        with self.plain():
            return super().outputs(batch)

    def train_step(self, batch: Any) -> Tensor:
        with self.plain():
            return super().train_step(batch)


def check(name: str, problem: Problem, official: str | None, **where: Any) -> tuple[str, Contender]:
    """What ``name`` was compared with, and what it was then; AssertionError if it disagrees.
    ``where``: device and precision, if it isn't the CPU.

    From the same weights, outputs agree within 1e-5 of the largest, and the parameters after a
    training step within STEP_ERROR on average. (On a GPU that step is no replay of a graph yet;
    tests/test_step.py holds replays to it.) Ours is compared with the official code; where there is
    none, with itself in float64. A compiled peer is compared with the eager one. An eager peer has
    nothing to be compared with but its sizes: it must have as many weights in its experts as the
    setting has. In low precision everything is compared with float32, see ``agree``.
    """
    torch.manual_seed(1)
    entry = CONTENDERS[name]
    ids, labels = next(problem.draw(problem.config.batch_size))
    reference = entry.reference
    if reference is None and where.get("precision", "fp32") != "fp32":
        reference = name
    if reference is None:
        contender = entry.build(problem, None, official, **where)
        return sane(contender, problem, ids, labels), contender
    itself = reference == "official" and official is None
    build = Ours if itself else CONTENDERS[reference].build
    first = build(problem, None, official).state()
    # Tables as they are after some training: gates and gradients are far from uniform.
    start = {k: t * 1000 if "embed" in k else t for k, t in first.items()}
    contender = entry.build(problem, start, official, **where)
    against = {k: t.double() for k, t in start.items()} if itself else start
    exact: dict[str, Any] = {**where, "precision": "fp32"} if where else {}
    rounded: Contender | None = None
    if isinstance(contender, Ours) and contender.low:
        rounded = Autocast(problem, start, **exact)
    elif contender.low:
        rounded = build(problem, start, official, **{**where, "precision": "bf16"})
    agree(contender, build(problem, against, official, **exact), ids, labels, rounded)
    return f"{OURS} in float64" if itself else reference, contender


def sane(contender: Contender, problem: Problem, ids: Tensor, labels: Tensor) -> str:
    """Experts of the setting's sizes, probabilities, and a step that moves the weights."""
    batch = placed(contender, ids, labels)
    weights = contender.expert_weights
    if weights is not None:
        wanted = expert_weights(problem)
        assert weights == wanted, f"its experts have {weights} weights, not {wanted}"
    before = contender.state()
    for key, tensor in contender.outputs(batch).items():
        assert tensor.isfinite().all(), f"{key} are not finite"
    contender.train_step(batch)
    after = contender.state()
    assert all(tensor.isfinite().all() for tensor in after.values()), "weights are not finite"
    assert any((after[key] != before[key]).any() for key in after), "a step moves nothing"
    return "its own sizes"


def placed(contender: Contender, ids: Tensor, labels: Tensor) -> Any:
    """A batch on the contender's device."""
    return contender.batch(ids.to(contender.device), labels.to(contender.device))


def expert_weights(problem: Problem) -> int:
    """In the matrices of all experts of all layers."""
    n = problem.network
    experts = n["num_shared_experts"] + n["num_specific_experts"] * len(problem.tasks)
    units, total = n["expert_hidden_units"], 0
    inputs = n["embedding_dim"] * len(problem.fields)
    for _ in range(n["num_layers"]):
        for width in units:
            total += experts * inputs * width
            inputs = width
    return total


def agree(
    contender: Contender,
    reference: Contender,
    ids: Tensor,
    labels: Tensor,
    autocast: Contender | None = None,
) -> None:
    """``autocast``: the same model, for PyTorch's own error in bfloat16, of which a contender in
    low precision may make twice as much (of weights on average: the first step of Adam has a size,
    and rounding decides its sign where the gradient is next to 0)."""

    def results(model: Contender) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        batch = placed(model, ids, labels)
        outputs = model.outputs(batch)
        model.train_step(batch)
        return outputs, model.state()

    expected = results(reference)
    actual = results(contender)
    rounded = None if autocast is None else results(autocast)
    compared = actual[0].keys() & expected[0].keys()
    assert compared
    for key in sorted(compared):
        worst = distance(actual[0][key], expected[0][key])
        allowed = 1e-5 * float(expected[0][key].abs().max())
        if rounded is not None:
            allowed = 2 * distance(rounded[0][key], expected[0][key])
        assert worst <= allowed, f"{key} differ by {worst:.1e}, more than {allowed:.1e}"
    assert actual[1].keys() == expected[1].keys()
    if rounded is None:
        for key, tensor in expected[1].items():
            moved = distance(actual[1][key], tensor, mean=True)
            assert moved <= STEP_ERROR, f"after a step {key} differs by {moved:.1e}"
        return
    moved, own = (
        sum(distance(state[key], tensor, mean=True) for key, tensor in expected[1].items())
        for state in (actual[1], rounded[1])
    )
    assert moved <= 2 * own, f"after a step tensors differ by {moved:.1e}, autocast's by {own:.1e}"


def distance(actual: Tensor, expected: Tensor, mean: bool = False) -> float:
    """Largest, or mean, absolute difference; NaN is infinitely far."""
    if not actual.numel():
        return 0.0
    apart = (actual.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
    return float(apart.mean() if mean else apart.max())


# What is measured


def step(contender: Contender, problem: Problem, seconds: float) -> dict[str, Any]:
    """Seconds of each step, every one on a batch of its own."""
    contender.age(problem)
    batches = problem.draw(problem.config.batch_size)

    def once() -> float:
        batch = contender.batch(*next(batches))
        start = time.perf_counter()
        contender.train_step(batch)
        return time.perf_counter() - start

    return {"rounds": rounds(once, seconds, 3)}


def rounds(once: Callable[[], float], seconds: float, least: int) -> list[float]:
    """Repeats for ``seconds``, at least ``least`` times, after two that do not count."""
    once(), once()
    gc.collect()
    gc.disable()
    found: list[float] = []
    while len(found) < least or sum(found) < seconds:
        found.append(once())
    gc.enable()
    return found


def inference(contender: Contender, problem: Problem, seconds: float) -> dict[str, Any]:
    """Seconds of each request of each size, one after the other, every one of other rows."""
    found = {}
    for rows in REQUESTS:
        batches = problem.draw(rows)
        requests = [contender.request(next(batches)[0]) for _ in range(16)]

        def once(requests: list[Any] = requests) -> float:
            requests.append(requests.pop(0))
            start = time.perf_counter()
            contender.predict(requests[0])
            return time.perf_counter() - start

        found[str(rows)] = rounds(once, seconds / len(REQUESTS), 5)
    return {"rounds": found}


def peak_memory(build: Callable[[Problem], Contender], problem: Problem) -> dict[str, Any]:
    """Bytes that building and training add to a process that has trained a tiny one before."""

    def trained(of: Problem, steps: int) -> Contender:
        contender, batches = build(of), of.draw(of.config.batch_size)
        for _ in range(steps):
            contender.train_step(contender.batch(*next(batches)))
        return contender

    trained(synthetic(SETTINGS["tiny"]), 1)
    gc.collect()
    before = memory.status("VmRSS")
    memory.reset_peak()
    contender = trained(problem, memory.STEPS)
    parameters = sum(p.numel() * p.element_size() for p in contender.module.parameters())
    return {"peak": memory.status("VmHWM") - before, "parameters": parameters}


def epoch(contender: Contender, problem: Problem, study: Study, compiled: bool) -> dict[str, Any]:
    if compiled:  # for each size of batch, before the time starts
        size, works = problem.config.batch_size, (contender.train_step, contender.evaluation)
        for split, work in zip(study.splits, works, strict=True):
            for rows in {size, len(split) % size or size}:
                work(contender.batch(*next(problem.draw(rows))))
    # The first optimizer of a process imports it, for a second; the official code's is made before.
    importlib.import_module("torch._dynamo")
    return {**contender.epoch(study), "samples": len(study.splits[0])}


def ceilings(setting: cases.Setting, seconds: float) -> dict[str, Any]:
    """FLOP/s of products at the experts' shapes, into buffers that are there already, and bytes/s
    of a copy: of each the best way that PyTorch has."""
    s = setting
    shapes = [(s.fields * s.dim, s.width), (s.width, s.width), (s.width, s.width)]
    found: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        layers = [
            (
                torch.randn(s.batch, inputs, dtype=dtype),
                torch.randn(outputs, inputs, dtype=dtype),
                torch.randn(outputs, dtype=dtype),
                torch.empty(s.batch, outputs, dtype=dtype),
            )
            for inputs, outputs in shapes
        ]
        ways: list[Callable[..., object]] = [
            lambda x, w, b, y: torch.addmm(b, x, w.T, out=y),
            lambda x, w, b, y: F.linear(x, w, b),
        ]
        if torch.backends.mkldnn.is_available():
            ways.append(
                lambda x, w, b, y: torch.ops.mkldnn._linear_pointwise(x, w, b, "relu", [], "")
            )
        flops = 2 * s.batch * sum(i * o for i, o in shapes)
        found[name] = flops / min(timed(way, layers, seconds / 8) for way in ways)
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source), [()], seconds / 4)
    return {"rates": {**found, "copy": 2 * 4 * source.numel() / copied}}


def timed(work: Callable[..., object], layers: list[Any], seconds: float) -> float:
    """Median seconds of ``work`` on all layers."""

    def once() -> float:
        start = time.perf_counter()
        for layer in layers:
            work(*layer)
        return time.perf_counter() - start

    return float(np.median(rounds(once, seconds, 5)))


# On CUDA


def gpu_memory(contender: Contender, problem: Problem, _: float) -> dict[str, Any]:
    """Bytes of torch's allocator: weights, optimizer, gradients, and all that a step needs, its
    capture included; CUDA's own context is not in them. ``reserved``: with what is kept unused."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batches = problem.draw(problem.config.batch_size)
    for _ in range(GPU_WARM_UP):
        contender.train_step(placed(contender, *next(batches)))
    parameters = sum(p.numel() * p.element_size() for p in contender.module.parameters())
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "parameters": parameters,
    }


def gpu_step(contender: Contender, problem: Problem, seconds: float) -> dict[str, Any]:
    """Seconds of each step, one after the other without waiting, on batches that are there."""
    drawn = problem.draw(problem.config.batch_size)
    batches = itertools.cycle([placed(contender, *next(drawn)) for _ in range(GPU_ROUNDS)])
    for _ in range(GPU_WARM_UP):  # ours is captured, which brings every row up to date
        contender.train_step(next(batches))
    contender.age(problem)
    found = gpu_rounds(lambda: contender.train_step(next(batches)), seconds)
    return {"rounds": found, "gpu_state": bench_run.gpu_state()}


def gpu_inference(contender: Contender, problem: Problem, seconds: float) -> dict[str, Any]:
    """Seconds of each request of each size, from a GPU that has nothing to do to the answer."""
    found = {}
    for rows in REQUESTS:
        drawn = problem.draw(rows)
        ids = [next(drawn)[0].to(contender.device) for _ in range(16)]
        requests = itertools.cycle([contender.request(each) for each in ids])

        def once(requests: Iterator[Any] = requests) -> object:
            return contender.predict(next(requests))

        found[str(rows)] = gpu_rounds(once, seconds / len(REQUESTS), alone=True)
    return {"rounds": found}


def gpu_rounds(once: Callable[[], object], seconds: float, alone: bool = False) -> list[float]:
    """GPU_ROUNDS, and as many again until they have taken ``seconds``, after a warm-up. ``alone``:
    each waits for the one before, so that what the host does first is in its time."""
    event = functools.partial(torch.cuda.Event, enable_timing=True)
    for _ in range(GPU_WARM_UP):
        once()
    gc.collect()
    gc.disable()
    found: list[float] = []
    while not found or sum(found) < seconds:
        events = [(event(), event()) for _ in range(GPU_ROUNDS)]
        torch.cuda.synchronize()
        for start, end in events:
            start.record()
            once()
            end.record()
            if alone:
                end.synchronize()
        torch.cuda.synchronize()
        found += [start.elapsed_time(end) / 1000 for start, end in events]
    gc.enable()
    return found


def gpu_ceilings(seconds: float) -> dict[str, Any]:
    """FLOP/s of a large product in each precision, and bytes/s of a large copy."""
    size, work = 8192, {}
    for name, precision in (("float32", "fp32"), ("tf32", "tf32"), ("bfloat16", "bf16")):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        x, w, y = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(3))
        with tf32(precision):
            times = gpu_rounds(functools.partial(torch.mm, x, w, out=y), seconds / 4)
        work[name] = 2 * size**3 / float(np.median(times))
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    times = gpu_rounds(lambda: target.copy_(source), seconds / 4)
    return {"rates": {**work, "copy": 2 * 4 * source.numel() / float(np.median(times))}}


def on_gpu(options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The check, then all that is asked for, of one contender in one precision: (what, result)."""
    torch.set_num_threads(options["threads"])
    name, seconds, official = (options[key] for key in ("contender", "seconds", "official"))
    where = {key: options[key] for key in ("device", "precision")}
    problem, study = data_of(options)
    found: list[Contender] = []

    def checked() -> dict[str, Any]:
        compared_with, contender = check(name, problem, official, **where)
        found.append(contender)
        return {"compared_with": compared_with}

    verdict = attempt(checked)
    yield "check", verdict
    if verdict["status"] != "ok":
        return
    contender = found.pop()
    # After the check tables are large. To our optimizer that matters; to peers' steps it doesn't,
    # and they would have to be compiled again.
    if study is not None or isinstance(contender, Ours):
        torch.manual_seed(2)
        contender = CONTENDERS[name].build(problem, None, official, **where)
    works: dict[str, Callable[..., dict[str, Any]]] = {
        "memory": gpu_memory,
        "step": gpu_step,
        "inference": gpu_inference,
        "epoch": lambda *_: epoch(contender, problem, cast(Study, study), True),
    }
    for what in options["what"]:
        yield what, attempt(functools.partial(works[what], contender, problem, seconds))


# The process


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """What one process does: {"status", and what was measured or why nothing was}."""
    torch.set_num_threads(options["threads"])
    return attempt(functools.partial(measured, options))


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"status": "ok", **work()}
    except cases.NotInstalledError as missing:
        return {"status": "not installed", "note": str(missing)}
    except NotAvailableError as missing:
        return {"status": "not available", "note": str(missing)}
    except Exception as error:
        traceback.print_exc()
        wrong = isinstance(error, AssertionError)
        note = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return {"status": "wrong" if wrong else "failed", "note": note}


def measured(options: Mapping[str, Any]) -> dict[str, Any]:
    what, seconds = options["what"], options["seconds"]
    if what == "ceilings":
        if options.get("device") == "cuda":
            return gpu_ceilings(seconds)
        return ceilings(SETTINGS[options["setting"]], seconds)
    name, official = options["contender"], options["official"]
    problem, study = data_of(options)
    if what == "check":
        if study is None:
            setting = SETTINGS[options["setting"]]
            problem = synthetic(setting._replace(rows=min(setting.rows, CHECK_ROWS)))
        return {"compared_with": check(name, problem, official)[0]}
    torch.manual_seed(2)
    build = functools.partial(CONTENDERS[name].build, start=None, official=official)
    if what == "memory":
        return peak_memory(build, problem)
    contender = build(problem)
    if what == "epoch":
        assert study is not None
        return epoch(contender, problem, study, name.endswith(", compiled"))
    return {"step": step, "inference": inference}[what](contender, problem, seconds)


def data_of(options: Mapping[str, Any]) -> tuple[Problem, Study | None]:
    if options["setting"] == "kuairand":
        return kuairand((Path(options["train"]), Path(options["valid"])))
    return synthetic(SETTINGS[options["setting"]]), None


def main() -> None:
    options, out = json.loads(sys.argv[1]), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # the libraries print
        if isinstance(options["what"], str):
            print(json.dumps(run(options)), file=out)
        else:
            for what, result in on_gpu(options):
                print(json.dumps({what: result}), file=out, flush=True)


if __name__ == "__main__":
    main()
