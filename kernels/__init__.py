"""Triton kernels, one file an op, installed as ``stem_fast.kernels``."""

import os

if __name__ != "stem_fast.kernels":
    raise ImportError("the kernels are imported as stem_fast.kernels, never as " + __name__)

# Triton is changing this default; the results should not change with it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
