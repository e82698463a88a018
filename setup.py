"""Builds the C++ library ``stem_fast/_cpp`` where there is a compiler; the rest is pyproject.toml.

The library uses PyTorch's stable ABI and no Python API at all, so one binary serves every
torch >= 2.11 and Python >= 3.10. Without a compiler the package installs and runs on the
reference ops (``stem-fast doctor`` says so).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension


def extensions() -> list[Extension]:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(f"stem_fast: no C++ compiler ({compiler}): installing without the C++ library")
        return []
    return [
        CppExtension(
            "stem_fast._cpp",
            sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
            define_macros=[("TORCH_TARGET_VERSION", "0x020B000000000000")],
            extra_compile_args=["-std=c++20", "-O3", "-Wall", "-Wextra"],
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
