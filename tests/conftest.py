"""What all tests share. Where there is no GPU, Triton kernels run under the interpreter."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
# pytest-benchmark, in a process that a test starts, would take itself for a worker.
os.environ.pop("PYTEST_XDIST_WORKER", None)
pytest.register_assert_rewrite("cases")
hypothesis.settings.register_profile("any time", deadline=None)
hypothesis.settings.load_profile("any time")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out is full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
