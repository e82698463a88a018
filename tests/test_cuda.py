"""The CUDA C++ kernels: emulated on the CPU, on a GPU where there is one, and what nvcc made.

Each way is a process of its own, in which the kernels are the backend; it runs emulate/checks.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import stem_fast

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++").split()[0]
LIBRARIES = sorted(Path(stem_fast.__file__).parent.glob("_cuda.*"))
KERNELS = (
    *("adagrad", "adam", "check", "lookup", "pieces", "rows", "mixture", "mixture_backward", "sgd"),
)

built = pytest.mark.skipif(not LIBRARIES, reason="stem_fast/_cuda was not built: no nvcc")


def run_tests(*arguments: str, **environment: str) -> None:
    variables = {
        key: value
        for key, value in os.environ.items()
        if key != "TRITON_INTERPRET" and not key.startswith("PYTEST_")
    }
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(COMPILER) is None, reason="no C++ compiler for Linux"
)
def test_emulated_on_the_cpu(tmp_path: Path) -> None:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-w"]
    flags += ["-DTORCH_TARGET_VERSION=0x020B000000000000", f"-I{ROOT / 'tests' / 'emulate'}"]
    flags += [f"-isystem{folder}" for folder in include_paths()]
    compilations = [
        subprocess.Popen([COMPILER, *flags, "-x", "c++", "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [each.wait() for each in compilations] == [0] * len(sources)
    library = tmp_path / "emulated.so"
    folders = [f"-L{folder}" for folder in library_paths()]
    link = [COMPILER, "-shared", *objects, *folders, "-Wl,--no-as-needed", "-ltorch"]
    subprocess.run([*link, "-o", library], check=True)
    run_tests(
        "tests/emulate/checks.py",
        STEM_FAST_BACKEND="reference",
        STEM_FAST_EMULATED=str(library),
        OMP_NUM_THREADS="1",  # waiting for other threads is all that more of them would do
    )


@built
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    run_tests("tests/emulate/checks.py", STEM_FAST_BACKEND="cuda", STEM_FAST_EMULATED="")
    if os.environ.get("STEM_FAST_BACKEND", "auto") == "auto":  # else they run as they are
        run_tests("tests/ops", "-k", "cuda", STEM_FAST_BACKEND="cuda")


def cuobjdump() -> str | None:
    """CUDA's, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return shutil.which("cuobjdump")
    brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(brought))


@built
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
def test_no_kernel_spills_registers() -> None:
    """To local memory, on any architecture that the library was built for."""
    report = subprocess.run(
        [str(cuobjdump()), "-res-usage", LIBRARIES[0]], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, set[str]] = {}
    spills = []
    for part in report.split("arch = ")[1:]:
        names = found.setdefault(part.split()[0], set())
        pattern = r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)"
        for function, stack, local in re.findall(pattern, part):
            names |= {k for k in KERNELS if f"{len(k) + 7}{k}_kernel" in function}
            if int(stack) + int(local):
                spills.append((part.split()[0], function))
    assert found
    assert all(names == set(KERNELS) for names in found.values()), found
    assert spills == []
