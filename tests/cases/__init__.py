"""One set of shapes and tensors for every test of the ops (values, gradients, opcheck, compile),
and one bound on errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stem_fast import backends

# Tests of the ops run on every device there is.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
    ),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
cpp = pytest.mark.skipif(backends()["cpp"] != "in use on cpu", reason="no C++ library")
devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def to(device: str, arguments: Any) -> list[Any]:
    """The arguments with every tensor on the device."""

    def move(a: Any) -> Any:
        if isinstance(a, list):
            return [move(each) for each in a]
        return a.to(device) if isinstance(a, torch.Tensor) else a

    return [move(a) for a in arguments]


def assert_within(actual: torch.Tensor, own: torch.Tensor, exact: torch.Tensor) -> None:
    """Errors at most twice torch's own.

    Args:
        actual: the result under test.
        own: the reference's result in the same type.
        exact: the reference's result in float64.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == own.dtype
    if not exact.numel():
        return
    # Where torch happens to be exact, a few roundings of the largest result are no error either;
    # in float64 many, because there "exact" is no better than ours.
    roundings = {torch.float64: 64, torch.float32: 8}.get(actual.dtype, 1)
    eps = torch.finfo(actual.dtype).eps * roundings
    scale = exact.abs().amax().clamp(min=1.0)
    bound = torch.maximum(2 * (own.double() - exact).abs().amax(), eps * scale)
    error = (actual.double() - exact).abs().amax()
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"  # false for NaN


def check_rows(
    run: Any, right: Any, own: list[Any], changed: tuple[int, ...], wide: tuple[int, ...]
) -> None:
    """Runs an op twice, the second time on a copy, and the reference in its type and in float64.

    Args:
        run: the implementation.
        right: the reference.
        own: the arguments.
        changed: places of those that are changed in place.
        wide: places of those that are in float64 for the exact result.
    """
    actual, again, exact = (
        [a.clone() if isinstance(a, torch.Tensor) else a for a in own] for _ in range(3)
    )
    for i in wide:
        exact[i] = None if exact[i] is None else exact[i].double()
    for call, arguments in ((run, actual), (run, again), (right, own), (right, exact)):
        call(*arguments)
    for i in changed:
        if actual[i] is None:
            continue
        assert torch.equal(actual[i], again[i]), "other bits on a second run"
        if actual[i].is_floating_point():
            assert_within(actual[i], own[i], exact[i])
        else:
            assert torch.equal(actual[i], exact[i])


class Ops(TorchDispatchMode):
    """Notes the ops of ours that run: the name, and of which arguments there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "stem_fast":
            self.seen.append((str(func), *(arg is None for arg in args)))
        return func(*args, **(kwargs or {}))
