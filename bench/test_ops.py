"""One pytest-benchmark test a contender and block: checked first, then timed with cold caches.

``python -m bench.run`` runs this file in processes of its own and gathers what they find.
Contenders take turns: every one is timed in each of a few blocks, whose order rotates, so that a
machine that slows down slows all of them. $STEM_FAST_BENCH, a JSON object of :class:`Options`, says
what to run.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from bench import cases, run


class Options(NamedTuple):
    settings: tuple[str, ...] = cases.DEFAULT_SETTINGS
    ops: tuple[str, ...] = tuple(run.OPS)
    contenders: tuple[str, ...] = ()  # empty: all
    device: str = "cpu"
    threads: int = 2
    blocks: int = 3
    seconds: float = 0.5  # of rounds for a contender in a block


OPTIONS = Options(**json.loads(os.environ.get("STEM_FAST_BENCH", "{}")))
# Read before every round: larger than any last-level cache. On CUDA it also keeps the device busy
# while the host puts the round's kernels in its queue, so that their launch is not in the time.
FLUSHED = (1 << 29) if OPTIONS.device == "cuda" else (1 << 27)  # bytes


@dataclass
class Entry:
    """A case, its contenders that were built, and those that have passed their check."""

    case: cases.Case
    built: dict[str, cases.Contender]
    right: set[str]


class CudaMoment:
    """A point in the device's queue; the difference of two is the seconds between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: CudaMoment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


@functools.lru_cache(maxsize=1)  # the tests come case by case
def entry(setting: str, op: str) -> Entry:
    return Entry(run.OPS[op](cases.SETTINGS[setting], OPTIONS.device), {}, set())


@functools.cache
def flushed() -> torch.Tensor:
    torch.set_num_threads(OPTIONS.threads)
    return torch.ones(FLUSHED // 4, device=OPTIONS.device)


def pytest_generate_tests(metafunc: Any) -> None:
    found = []
    for setting in OPTIONS.settings:
        for op in OPTIONS.ops:
            # Names are needed before any input is made: those of the smallest setting.
            tiny = run.OPS[op](cases.SETTINGS["tiny"], "cpu")
            chosen = {cases.OURS, *tiny.ceilings, *(OPTIONS.contenders or tiny.contenders)}
            names = [name for name in tiny.contenders if name in chosen]
            for block in range(OPTIONS.blocks):
                turn = block % len(names)
                order = names[turn:] + names[:turn]
                found += [(setting, op, name, block) for name in order]
    metafunc.parametrize(("setting", "op", "contender", "block"), found)


def test_op(
    benchmark: Any,
    record_property: Callable[[str, object], None],
    setting: str,
    op: str,
    contender: str,
    block: int,
) -> None:
    for name, value in (("setting", setting), ("op", op), ("contender", contender)):
        record_property(name, value)
    measure(benchmark, entry(setting, op), contender)
    case = entry(setting, op).case
    benchmark.extra_info.update(
        setting=setting,
        op=op,
        contender=contender,
        ceilings=case.ceilings,
        bytes=case.ceiling_moved if contender in case.ceilings else case.moved,
    )
    if OPTIONS.device == "cuda":
        benchmark.extra_info["gpu"] = run.gpu_state()


def measure(benchmark: Any, entry: Entry, name: str) -> None:
    """Check the contender (once), then time it. Raises AssertionError instead of a time."""
    flush = flushed()
    if name not in entry.built:
        gc.collect()  # tables of the case before, in cycles of arena and optimizer
        try:
            entry.built[name] = entry.case.contenders[name]()
        except cases.NotInstalledError as missing:
            pytest.skip(f"not installed: {missing}")
    work, prepare = entry.built[name]
    if name not in entry.right:
        result = work(*prepare())
        if name not in entry.case.ceilings:
            entry.case.check(result)
        entry.right.add(name)
        del result

    def ready() -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = prepare()
        flush.sum()
        return arguments, {}

    trial = statistics.median(once(work, ready) for _ in range(3))
    rounds = min(max(int(OPTIONS.seconds / trial), 3), 200)
    benchmark.pedantic(work, setup=ready, rounds=rounds)


def once(work: Callable[..., Any], ready: Callable[[], Any]) -> float:
    """Seconds of one round, flushing included, which decides how many rounds there are."""
    start = time.perf_counter()
    arguments, _ = ready()
    work(*arguments)
    if OPTIONS.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
