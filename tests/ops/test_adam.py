"""Adam's rows and step table against the float64 reference."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cpp, devices, dtypes
from cases.adam import (
    ADAMS,
    ADAMS_ON_CPU,
    DECAYS,
    DRIFTS,
    SCHEDULES,
    AdamCase,
    DriftCase,
    ScheduleCase,
    check_adam_rows,
    check_adam_schedule,
    check_drift,
)

from stem_fast.reference import adam as table


@devices
@pytest.mark.parametrize("case", ADAMS_ON_CPU.values(), ids=ADAMS_ON_CPU.keys())
@pytest.mark.parametrize("grads", [False, True])
@dtypes
def test_adam_rows(case: AdamCase, grads: bool, dtype: torch.dtype, device: str) -> None:
    check_adam_rows(torch.ops.stem_fast.adam_rows, case, dtype, grads, device)


@devices
@pytest.mark.parametrize("how", DECAYS)
@pytest.mark.parametrize("case", DRIFTS.values(), ids=DRIFTS.keys())
def test_rows_that_miss_steps_are_as_exact_as_dense_adam(
    case: DriftCase, how: str, device: str
) -> None:
    check_drift(torch.ops.stem_fast.adam_rows, case, how, device)


@devices
@pytest.mark.parametrize("case", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_adam_schedule(case: ScheduleCase, device: str) -> None:
    check_adam_schedule(torch.ops.stem_fast.adam_schedule, case, device)


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(9, 11)}, "steps must be contiguous float64"),
        ({1: torch.zeros(2)}, "clock must be contiguous int64"),
        ({1: torch.tensor([0, 8])}, "line 9 of a table of 9"),
        ({2: torch.zeros(2)}, "options must be contiguous float64"),
    ],
)
def test_adam_schedule_refuses_other_shapes_and_types(change: dict[int, Any], message: str) -> None:
    steps, options = torch.zeros(9, 29, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    arguments = {0: steps, 1: torch.tensor([0, 0]), 2: options} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.adam_schedule(*arguments.values(), 0.9, 0.999, 1e-8, False, False)


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(40, 6)}, "exp_avg and exp_avg_sq must be as weight"),
        ({2: torch.zeros(7, 40).T}, "what is changed in place must be contiguous"),
        ({3: torch.zeros(40)}, "last must be int32"),
        ({4: torch.zeros(3)}, "rows must be int64"),
        ({4: torch.tensor([1, 2, 40]), 5: None}, "row 40 at 2 is outside the table of 40 rows"),
        ({5: torch.zeros(4, 7)}, "grad must be"),
        ({6: torch.zeros(3, 7)}, "steps must be float64"),
        ({7: torch.tensor([0, 5000])}, "lines for steps 0 to 5000"),
    ],
)
def test_adam_rows_refuses_other_shapes_and_types(change: dict[int, Any], message: str) -> None:
    arguments = dict(enumerate(ADAMS["early"].arguments(grads=True))) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.adam_rows(*arguments.values())


@cpp
def test_adam_rows_is_the_same_with_one_thread() -> None:
    results = []
    threads = torch.get_num_threads()
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        arguments = AdamCase(3000, 48, 40, base=400).arguments(torch.float32)
        torch.ops.stem_fast.adam_rows(*arguments)
        results.append(arguments[:4])
    torch.set_num_threads(threads)
    for first, second, alone in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, alone)


def test_the_header_has_the_same_table_as_the_reference() -> None:
    text = (Path(__file__).parents[2] / "csrc" / "adam_table.h").read_text(encoding="utf-8")
    text = re.sub(r"//.*|int64_t", "", text)
    found: dict[str, float] = {}
    for name, value in re.findall(r"\b(k[A-Za-z]+) = ([^,;}]+)", text):
        parts = [part.split("*") for part in value.split("+")]
        found[name] = sum(
            math.prod(found[f] if f in found else number(f) for f in map(str.strip, part))
            for part in parts
        )
    names = {re.sub("(?<=[a-z])(?=[A-Z])", "_", name[1:]).upper(): name for name in found}
    assert len(names) == 15
    assert {n: getattr(table, n) for n in names} == {n: found[k] for n, k in names.items()}


def number(text: str) -> float:
    return float.fromhex(text) if text.startswith("0x") else float(text)
