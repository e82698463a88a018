"""The installation: with and without a compiler, and where the kernels live."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_with_a_compiler_the_library_is_built_and_loads() -> None:
    result = python("-c", "import stem_fast", STEM_FAST_BACKEND="cpp")
    assert result.returncode == 0, result.stderr


def test_kernels_are_part_of_the_package_and_nothing_else() -> None:
    assert python("-c", "import stem_fast.kernels").returncode == 0
    alone = python("-c", "import kernels", PYTHONPATH=str(ROOT))
    assert "imported as stem_fast.kernels, never as kernels" in alone.stderr
