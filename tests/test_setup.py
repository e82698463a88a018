"""The installation: with and without compilers, and where the kernels live."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

with_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA library is built on Linux")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_the_installation_goes_on(tmp_path: Path) -> None:
    result = python("setup.py", "build_ext", "--build-lib", str(tmp_path), CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler (no-such-compiler): installing without the C++ library" in result.stdout
    assert not list(tmp_path.rglob("_cpp*"))


def fake_nvcc(folder: Path, script: str) -> dict[str, str]:
    """An environment with an nvcc that does what ``script`` says."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(folder)}


@with_compiler
def test_without_nvcc_the_installation_goes_on(tmp_path: Path) -> None:
    (tmp_path / "c++").symlink_to(str(shutil.which("c++")))
    result = python("setup.py", "--version", PATH=str(tmp_path), CUDA_HOME="")
    assert result.returncode == 0, result.stderr
    assert "no nvcc (CUDA_HOME, PATH): installing without the CUDA library" in result.stdout


@with_compiler
@linux
def test_a_failing_nvcc_fails_the_installation(tmp_path: Path) -> None:
    environment = fake_nvcc(tmp_path, 'echo "called with $*" >&2; exit 1')
    environment["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0a 10.0+PTX"
    result = python("setup.py", "build_ext", "--build-lib", str(tmp_path), **environment)
    assert result.returncode != 0
    assert "nvcc could not build the CUDA library" in result.stderr
    for flag in (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=[sm_100,compute_100]",
        "csrc/cuda/lookup.cu csrc/cuda/mixture.cu",
    ):
        assert flag in result.stderr
    assert not list(tmp_path.rglob("*.so"))


@with_compiler
@linux
def test_the_default_is_what_nvcc_knows(tmp_path: Path) -> None:
    """An older nvcc builds for the GPUs of its time, and by PTX for later ones."""
    script = "case $1 in --list-gpu-arch) echo compute_80 compute_90;; *) echo $*; exit 1;; esac"
    environment = fake_nvcc(tmp_path, script) | {"TORCH_CUDA_ARCH_LIST": ""}
    result = python("setup.py", "build_ext", "--build-lib", str(tmp_path), **environment)
    flags = "code=sm_80 -gencode=arch=compute_90,code=[sm_90,compute_90] csrc"
    assert flags in result.stdout


@with_compiler
@linux
def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    environment = fake_nvcc(tmp_path, "exit 1") | {"TORCH_CUDA_ARCH_LIST": "Hopper"}
    result = python("setup.py", "build_ext", "--build-lib", str(tmp_path), **environment)
    assert result.returncode != 0
    message = "'Hopper' is not an architecture like 8.0, 9.0a or 10.0+PTX"
    assert f"TORCH_CUDA_ARCH_LIST: {message}" in result.stderr


@with_compiler
def test_with_a_compiler_the_library_is_built_and_loads() -> None:
    result = python("-c", "import stem_fast", STEM_FAST_BACKEND="cpp")
    assert result.returncode == 0, result.stderr


def test_kernels_are_part_of_the_package_and_nothing_else() -> None:
    assert python("-c", "import stem_fast.kernels").returncode == 0
    alone = python("-c", "import kernels", PYTHONPATH=str(ROOT))
    assert "imported as stem_fast.kernels, never as kernels" in alone.stderr
