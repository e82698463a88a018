"""Adagrad's rows against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cpp, devices, dtypes
from cases.adagrad import ADAGRADS, AdagradCase, check_adagrad_rows


@devices
@pytest.mark.parametrize("case", ADAGRADS.values(), ids=ADAGRADS.keys())
@dtypes
def test_adagrad_rows(case: AdagradCase, dtype: torch.dtype, device: str) -> None:
    check_adagrad_rows(torch.ops.stem_fast.adagrad_rows, case, dtype, device)


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(40)}, r"weight must be \[R, W\]"),
        ({0: torch.zeros(7, 40).T}, "what is changed in place must be contiguous"),
        ({1: torch.zeros(40, 6)}, r"sum must be \[40\] or \[40, 7\]"),
        ({1: torch.tensor(0.0)}, r"sum must be \[40\] or \[40, 7\]"),
        ({1: torch.zeros(7, 40).T}, "what is changed in place must be contiguous"),
        ({2: torch.zeros(3)}, "rows must be int64"),
        (
            {2: torch.tensor([1, -1]), 3: torch.zeros(2, 7)},
            "row -1 at 1 is outside the table of 40",
        ),
        ({3: torch.zeros(4, 7)}, "grad must be"),
        ({4: torch.zeros(2)}, r"options must be float64 \[2\]"),
    ],
)
def test_adagrad_rows_refuses_other_shapes_and_types(change: dict[int, Any], message: str) -> None:
    arguments = dict(enumerate(ADAGRADS["narrow, all sums"].arguments())) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.adagrad_rows(*arguments.values())


@cpp
def test_adagrad_rows_are_the_same_with_one_thread() -> None:
    results: list[list[torch.Tensor]] = []
    threads = torch.get_num_threads()
    for count in (threads, 1):
        torch.set_num_threads(count)
        results.append([])
        for row_wise in (False, True):
            adagrad = AdagradCase(3000, 48, row_wise, 1e-3).arguments(torch.float32)
            torch.ops.stem_fast.adagrad_rows(*adagrad)
            results[-1] += adagrad[:2]
    torch.set_num_threads(threads)
    for many, alone in zip(*results, strict=True):
        assert torch.equal(many, alone)
