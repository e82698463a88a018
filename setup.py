"""Builds the C++ library ``stem_fast/_cpp`` where there is a compiler, and ``stem_fast/_cuda``
where there is nvcc too; the rest is pyproject.toml.

``STEM_FAST_SANITIZE=1`` builds the C++ library alone, for `make sanitize`: with gcc's sanitizers of
addresses and of undefined behaviour, which end the process at the first error.

The libraries use PyTorch's stable ABI and no Python API at all, so one binary serves every
torch >= 2.11 and Python >= 3.10. Without a compiler the package installs and runs on what there is
(``stem-fast doctor`` says what).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.errors import CompileError
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

TARGET = ("TORCH_TARGET_VERSION", "0x020B000000000000")  # 2.11
# Without TORCH_CUDA_ARCH_LIST: A100, H100 and H200, B200, and by PTX what comes later.
ARCHITECTURES = ("8.0", "9.0", "10.0")
SANITIZE = os.environ.get("STEM_FAST_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Errors that torch's headers raise name their file: not by where it lies on this machine.
NO_PATHS = tuple(f"-fmacro-prefix-map={each}/=" for each in (Path.cwd(), *include_paths()))


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or else of the PATH."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def architecture_flags(nvcc: str) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, or for those of the default that nvcc knows."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not listed:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
        if known.returncode:
            raise CompileError(
                f"{nvcc} --list-gpu-arch failed: {known.stderr.strip()} (STEM_FAST_CUDA=0 installs "
                "without the CUDA library)"
            )
        names = known.stdout.split()
        listed = ";".join(a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in names)
        listed += "+PTX"
    flags = []
    for name in re.split(r"[;,\s]+", listed):
        parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if parts is None:
            raise CompileError(
                f"TORCH_CUDA_ARCH_LIST: {name!r} is not an architecture like 8.0, 9.0a or 10.0+PTX"
            )
        number = parts[1] + parts[2]
        code = f"[sm_{number},compute_{number}]" if parts[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


class Build(BuildExtension.with_options(no_python_abi_suffix=True)):  # type: ignore[misc]
    """Calls nvcc itself: CUDAExtension wants a torch that was built with CUDA."""

    def build_extensions(self) -> None:
        every = self.extensions
        for extension in every:
            if extension.name == "stem_fast._cuda":
                self.build_cuda(extension, Path(self.get_ext_fullpath(extension.name)))
        self.extensions = [e for e in every if e.name != "stem_fast._cuda"]
        super().build_extensions()
        self.extensions = every

    def build_cuda(self, extension: Extension, path: Path) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None
        # libtorch brings libtorch_cuda with it, where there is one, and so what this library uses
        # of it; nothing of it is needed to build.
        command = [
            *(nvcc, "-shared", "-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"),
            *("-Xcompiler=-Wall,-Wextra", f"--threads={min(4, os.cpu_count() or 1)}"),
            *(f"-D{name}={value}" for name, value in extension.define_macros),
            *(f"-isystem={folder}" for folder in include_paths()),
            *(f"-Xcompiler={flag}" for flag in NO_PATHS),
            *architecture_flags(nvcc),
            *extension.sources,
            *(f"-L{folder}" for folder in library_paths()),
            *("-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"),
            *("-cudart=static", "-Xlinker=--exclude-libs=ALL"),
        ]
        # It takes minutes, so a library is kept beside what it was made from.
        version = subprocess.run([nvcc, "--version"], capture_output=True).stdout
        made_from = [version, torch.__version__.encode(), *(part.encode() for part in command)]
        made_from += [Path(file).read_bytes() for file in extension.sources + extension.depends]
        kept = Path("build/cuda") / f"{hashlib.sha256(b'|'.join(made_from)).hexdigest()[:16]}.so"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}")
            print(" ".join(command), flush=True)
            if subprocess.run([*command, "-o", str(partial)]).returncode:
                raise CompileError("nvcc could not build the CUDA library; its message is above")
            partial.replace(kept)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        shutil.copyfile(kept, partial)
        partial.replace(path)


def sources(folder: str, *endings: str) -> list[str]:
    return sorted(str(path) for end in endings for path in Path("csrc", folder).glob(f"*.{end}"))


def extensions() -> list[Extension]:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(f"stem_fast: no C++ compiler ({compiler}): installing without the C++ library")
        return []
    found = [
        CppExtension(
            "stem_fast._cpp",
            sources("cpu", "cpp"),
            depends=[*sources("", "h"), *sources("cpu", "h")],
            define_macros=[TARGET],
            extra_compile_args=[
                *("-std=c++20", "-O3", "-fno-math-errno", "-Wall", "-Wextra"),
                *NO_PATHS,
                *(["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS] if SANITIZE else []),
            ],
            extra_link_args=SANITIZERS if SANITIZE else [],
            py_limited_api=True,
        )
    ]
    if SANITIZE:
        return found
    if os.environ.get("STEM_FAST_CUDA") == "0":
        print("stem_fast: STEM_FAST_CUDA=0: installing without the CUDA library")
        return found
    if sys.platform != "linux" or find_nvcc() is None:
        print("stem_fast: no nvcc (CUDA_HOME, PATH): installing without the CUDA library")
        return found
    cuda = Extension(
        "stem_fast._cuda",
        sources("cuda", "cu"),
        depends=[*sources("", "h"), *sources("cuda", "cuh")],
        define_macros=[TARGET, ("USE_CUDA", "1")],
        py_limited_api=True,
    )
    return [*found, cuda]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
