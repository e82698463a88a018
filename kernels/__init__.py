"""Triton kernels, one file an op, installed as ``stem_fast.kernels``."""

import functools
import os

import torch
from torch import Tensor

if __name__ != "stem_fast.kernels":
    raise ImportError("the kernels are imported as stem_fast.kernels, never as " + __name__)

# Triton is changing this default; the results should not change with it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@functools.cache  # none may go: CUDA graphs read them
def bit_masks(device: torch.device, *masks: int) -> Tensor:
    """int64 on the device. Kept, because a copy to the device would make every step wait."""
    return torch.tensor(masks, dtype=torch.int64, device=device)


def require(fits: bool, message: str) -> None:
    """Raises RuntimeError, as the C++ does, for arguments that a kernel would follow elsewhere."""
    if not fits:
        raise RuntimeError(message)


def require_one_device(op: str, first: Tensor, *others: Tensor | None) -> None:
    """A kernel follows pointers on its own device only."""
    fits = all(each is None or each.device == first.device for each in others)
    require(fits, f"{op}: tensors on different devices")
