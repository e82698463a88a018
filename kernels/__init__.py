"""Triton kernels, one file an op, installed as ``stem_fast.kernels``."""

import os

import triton
import triton.language as tl
from torch import Tensor

if __name__ != "stem_fast.kernels":
    raise ImportError("the kernels are imported as stem_fast.kernels, never as " + __name__)

# Triton is changing this default; the results should not change with it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@triton.jit
def pick(index, VALUES: tl.constexpr):
    """VALUES[index] of an index or a tile of them, in its type, 0 past their end. Masks and the
    like are constants of a kernel: a step would wait for a tensor's copy to the device."""
    found = tl.zeros_like(index)
    for i in tl.static_range(len(VALUES)):
        if VALUES[i] != 0:
            found = tl.where(index == i, VALUES[i], found)
    return found


def require(fits: bool, message: str) -> None:
    """Raises RuntimeError, as the C++ does, for arguments that a kernel would follow elsewhere."""
    if not fits:
        raise RuntimeError(message)


def require_one_device(op: str, first: Tensor, *others: Tensor | None) -> None:
    """A kernel follows pointers on its own device only."""
    fits = all(each is None or each.device == first.device for each in others)
    require(fits, f"{op}: tensors on different devices")
