"""SGD's rows against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import cpp, devices, dtypes
from cases.sgd import SGDS, SgdCase, check_sgd_rows


@devices
@pytest.mark.parametrize("case", SGDS.values(), ids=SGDS.keys())
@pytest.mark.parametrize("grads", [False, True])
@dtypes
def test_sgd_rows(case: SgdCase, grads: bool, dtype: torch.dtype, device: str) -> None:
    check_sgd_rows(torch.ops.stem_fast.sgd_rows, case, dtype, grads, device)


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(60)}, r"weight must be \[R, W\]"),
        ({0: torch.zeros(7, 60).T}, "what is changed in place must be contiguous"),
        ({0: torch.zeros(60, 7).int()}, "a float64, float32, bfloat16 or float16 tensor"),
        ({1: torch.zeros(60, 6)}, "momentum_buffer must be as weight"),
        ({1: torch.zeros(7, 60).T}, "what is changed in place must be contiguous"),
        ({2: torch.zeros(60)}, "last must be int32"),
        ({3: torch.zeros(3)}, "rows must be int64"),
        ({3: torch.tensor([1, 2, 60]), 4: None}, "row 60 at 2 is outside the table of 60 rows"),
        ({4: torch.zeros(4, 7)}, "grad must be"),
        ({5: torch.zeros(3, 7)}, "steps must be float64"),
        ({6: torch.tensor([0, 5000])}, "lines for steps 0 to 5000"),
    ],
)
def test_sgd_rows_refuses_other_shapes_and_types(change: dict[int, Any], message: str) -> None:
    arguments = dict(enumerate(SGDS["momentum and l2"].arguments(grads=True))) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.sgd_rows(*arguments.values())


@cpp
def test_sgd_rows_are_the_same_with_one_thread() -> None:
    results = []
    threads = torch.get_num_threads()
    for count in (threads, 1):
        torch.set_num_threads(count)
        sgd = SgdCase(3000, 48, 40, decay=1e-3).arguments(torch.float32, grads=True)
        torch.ops.stem_fast.sgd_rows(*sgd)
        results.append(sgd[:3])
    torch.set_num_threads(threads)
    for many, alone in zip(*results, strict=True):
        assert torch.equal(many, alone)
