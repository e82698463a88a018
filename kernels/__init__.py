"""Triton kernels, one file an op, installed as ``stem_fast.kernels``."""

import functools
import os

import torch

if __name__ != "stem_fast.kernels":
    raise ImportError("the kernels are imported as stem_fast.kernels, never as " + __name__)

# Triton is changing this default; the results should not change with it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@functools.cache  # none may go: CUDA graphs read them
def bit_masks(device: torch.device, *masks: int) -> torch.Tensor:
    """int64 on the device. Kept, because a copy to the device would make every step wait."""
    return torch.tensor(masks, dtype=torch.int64, device=device)
