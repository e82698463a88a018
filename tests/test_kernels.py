"""Triton kernels against the reference, on a GPU or else interpreted; and compiled without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import LOOKUPS, MIXTURES, LookupCase, MixtureCase, to

from stem_fast import reference

pytest.importorskip("triton")

from stem_fast.kernels import lookup, mixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_lookup_copies_exactly(case: LookupCase, dtype: torch.dtype) -> None:
    for ids in (torch.int32, torch.int64):
        arguments = to(DEVICE, case.arguments(dtype, ids))
        assert torch.equal(lookup.lookup(*arguments), reference.lookup(*arguments))


@pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixture_and_its_gradients(case: MixtureCase, dtype: torch.dtype) -> None:
    y, logits, see, learn = to(DEVICE, case.arguments(dtype))
    grad = torch.randn(case.gates, case.batch, case.width, dtype=torch.float64).to(y)
    exact = y.double(), logits.double(), see, learn
    pairs = [(mixture.mixture(y, logits, see, learn), reference.mixture(*exact))]
    pairs += zip(
        mixture.mixture_backward(grad, y, logits, see, learn),
        reference.mixture_backward(grad.double(), *exact),
        strict=True,
    )
    # Sums are kept in float32 or better; a 16-bit result is rounded once.
    eps = torch.finfo(dtype).eps
    for actual, right in pairs:
        assert actual.dtype == dtype
        largest = right.abs().amax() if right.numel() else 0
        bound = eps * right.abs() + 64 * min(eps, 1.2e-7) * (1 + largest)
        assert ((actual.double() - right).abs() <= bound).all()


def test_every_kernel_compiles_and_none_spills(tmp_path: Path) -> None:
    """For sm_80, sm_90 and sm_100, in a process without the interpreter."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / "compiled.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    used = json.loads(result.stdout)
    for kernel in ("_lookup", "_mixture", "_mixture_backward"):
        for arch in (80, 90, 100):
            assert any(
                title.startswith(f"{kernel} ") and title.endswith(f"sm_{arch}") for title in used
            )
    assert {title: use for title, use in used.items() if use["local_bytes"]} == {}
