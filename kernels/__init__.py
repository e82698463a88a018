"""Triton kernels, one file an op, installed as ``stem_fast.kernels``."""

if __name__ != "stem_fast.kernels":
    raise ImportError("the kernels are imported as stem_fast.kernels, never as " + __name__)
