"""Where there is no GPU, Triton kernels run under the interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
os.environ.pop("PYTEST_XDIST_WORKER", None)  # the benchmarks that a test starts are no worker


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers in every run."""
    torch.manual_seed(0)
