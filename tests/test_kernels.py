"""Triton kernels: run under the interpreter against the reference, and compiled without a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from cases import LOOKUPS, MIXTURES, LookupCase, MixtureCase

from stem_fast import reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":  # set by conftest.py where there is no GPU
    pytest.skip("the interpreter is off", allow_module_level=True)

from stem_fast.kernels import lookup, mixture


@pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_lookup_copies_exactly(case: LookupCase, dtype: torch.dtype) -> None:
    for ids in (torch.int32, torch.int64):
        arguments = case.arguments(dtype, ids)
        assert torch.equal(lookup.lookup(*arguments), reference.lookup(*arguments))


@pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixture_and_its_gradients(case: MixtureCase, dtype: torch.dtype) -> None:
    y, logits, see, learn = case.arguments(dtype)
    grad = torch.randn(case.gates, case.batch, case.width, dtype=torch.float64).to(dtype)
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
