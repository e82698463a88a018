"""Where there is no GPU, Triton kernels run under the interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers in every run."""
    torch.manual_seed(0)
