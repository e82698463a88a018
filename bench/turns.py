"""The process in which a contender of bench/peers.py is checked, or timed:

    python -m bench.turns '{"what": "step", "contender": "official", ...}'

It prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import cases, memory
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

# Of a parameter, whose first step with Adam is 1e-3: 4 times what was seen where gradients agree to
# float32's rounding.
STEP_ERROR = 2e-6
CHECK_ROWS = 600_000  # a larger table is checked at this size: there are three copies of it

# Correctness


def check(name: str, problem: Problem, official: str | None) -> str:
    """What ``name`` was compared with; AssertionError if it disagrees.

    From the same weights, outputs agree within 1e-5 of the largest, and the parameters after a
    training step within STEP_ERROR. Ours is compared with the official code; where there is none,
    with itself in float64. A compiled peer is compared with the eager one. An eager peer has
    nothing to be compared with but its sizes: it must have as many weights in its experts as the
    setting has.
    """
    torch.manual_seed(1)
    entry = CONTENDERS[name]
    ids, labels = next(problem.draw(problem.config.batch_size))
    reference = entry.reference
    if reference is None:
        contender = entry.build(problem, None, official)
        return sane(contender, problem, ids, labels)
    itself = reference == "official" and official is None
    build = Ours if itself else CONTENDERS[reference].build
    first = build(problem, None, official).state()
    # Tables as they are after some training: gates and gradients are far from uniform.
    start = {k: t * 1000 if "embed" in k else t for k, t in first.items()}
    contender = entry.build(problem, start, official)
    against = {k: t.double() for k, t in start.items()} if itself else start
    agree(
        contender,
        build(problem, against, official),
        ids,
        labels,
        Ours(problem, start) if contender.low else None,
    )
    return f"{OURS} in float64" if itself else reference


def sane(contender: Contender, problem: Problem, ids: Tensor, labels: Tensor) -> str:
    """Experts of the setting's sizes, probabilities, and a step that moves the weights."""
    batch = contender.batch(ids, labels)
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

    def unfused(experts: Any, inputs: Any, reads: Any, *rest: Any) -> Any:
        return ops.mixture(experts(inputs, reads), *rest).unbind()

    def results(model: Contender) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        batch = model.batch(ids, labels)
        outputs = model.outputs(batch)
        model.train_step(batch)
        return outputs, model.state()

    expected = results(reference)
    actual = results(contender)
    rounded = None
    if autocast is not None:
        plain = mock.patch("stem_fast.model.expert_mixture", unfused)
        with torch.autocast("cpu", torch.bfloat16), plain:
            rounded = results(autocast)
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
            worst = distance(actual[1][key], tensor)
            assert worst <= STEP_ERROR, f"after a step {key} differs by {worst:.1e}"
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
        size = problem.config.batch_size
        for split in study.splits:
            for rows in {size, len(split) % size or size}:
                batch = contender.batch(*next(problem.draw(rows)))
                contender.train_step(batch)
                contender.outputs(batch)
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


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """What one process does: {"status", and what was measured or why nothing was}."""
    torch.set_num_threads(options["threads"])
    try:
        return {"status": "ok", **measured(options)}
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
        return ceilings(SETTINGS[options["setting"]], seconds)
    name, official, study = options["contender"], options["official"], None
    if options["setting"] == "kuairand":
        problem, study = kuairand((Path(options["train"]), Path(options["valid"])))
    else:
        problem = synthetic(SETTINGS[options["setting"]])
    if what == "check":
        if study is None:
            setting = SETTINGS[options["setting"]]
            problem = synthetic(setting._replace(rows=min(setting.rows, CHECK_ROWS)))
        return {"compared_with": check(name, problem, official)}
    torch.manual_seed(2)
    build = functools.partial(CONTENDERS[name].build, start=None, official=official)
    if what == "memory":
        return peak_memory(build, problem)
    contender = build(problem)
    if what == "epoch":
        assert study is not None
        return epoch(contender, problem, study, name.endswith(", compiled"))
    return {"step": step, "inference": inference}[what](contender, problem, seconds)


def main() -> None:
    options = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):  # the libraries print
        result = run(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
