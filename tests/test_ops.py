"""Every op against the float64 reference, and as a citizen of PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEVICES, LOOKUPS, MIXTURES, LookupCase, MixtureCase, to

from stem_fast import backends, ops, reference

lookups = pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
cpp = pytest.mark.skipif(backends()["cpp"] != "in use on cpu", reason="no C++ library")
devices = pytest.mark.parametrize("device", DEVICES)
mixtures = pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES.keys())


@devices
@lookups
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_lookup_copies_exactly(
    case: LookupCase, dtype: torch.dtype, ids: torch.dtype, device: str
) -> None:
    arguments = to(device, case.arguments(dtype, ids))
    assert torch.equal(ops.lookup(*arguments), reference.lookup(*arguments))


@devices
@lookups
def test_lookup_gradient(case: LookupCase, device: str) -> None:
    weight, *rest = to(device, case.arguments())
    weight.requires_grad_()
    out = ops.lookup(weight, *rest)
    grad = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, weight, grad)
    (expected,) = torch.autograd.grad(reference.lookup(weight, *rest), weight, grad)
    torch.testing.assert_close(actual, expected)


def test_lookup_takes_what_is_not_contiguous() -> None:
    weight, ids, offsets, spaces = LOOKUPS["odd"].arguments()
    expected = reference.lookup(weight, ids, offsets, spaces)
    strided = weight.T.contiguous().T, ids.T.contiguous().T
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(ops.lookup(*strided, offsets, spaces), expected)


@cpp
@pytest.mark.parametrize("bad", [-1, 17])
def test_lookup_never_reads_outside_the_arena(bad: int) -> None:
    """The model names the field before; the op keeps memory safe whoever calls it."""
    weight, ids, offsets, spaces = LOOKUPS["odd"].arguments()
    ids[5, 2] = bad * 100
    message = f"id {bad * 100} of field 2 at row 5 is outside the arena of 20 rows"
    with pytest.raises(RuntimeError, match=message):
        ops.lookup(weight, ids, offsets, spaces)


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spaces": 4}, r"weight must be \[R, G\*D\] with G = 4"),
        ({"offsets": torch.tensor([0])}, r"ids must be \[B, F\] and offsets \[F\]"),
        ({"offsets": torch.tensor([0, 1, 3]).int()}, "offsets must be int64"),
        ({"ids": torch.zeros(7, 3)}, "ids must be int32 or int64"),
    ],
)
def test_lookup_refuses_other_shapes_and_types(change: dict[str, Any], message: str) -> None:
    names = ("weight", "ids", "offsets", "spaces")
    arguments = dict(zip(names, LOOKUPS["odd"].arguments(), strict=True)) | change
    with pytest.raises(RuntimeError, match=message):
        ops.lookup(**arguments)


@devices
@mixtures
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixture_and_its_gradients(case: MixtureCase, dtype: torch.dtype, device: str) -> None:
    y, logits, see, learn = to(device, case.arguments(dtype))
    grad = torch.randn(case.gates, case.batch, case.width, dtype=torch.float64, device=device)
    y.requires_grad_(), logits.requires_grad_()
    out = ops.mixture(y, logits, see, learn)
    gradients = torch.autograd.grad(out, (y, logits), grad.to(dtype))
    exact = [t.detach().double().requires_grad_() for t in (y, logits)]
    expected = reference.mixture(*exact, see, learn)
    wanted = torch.autograd.grad(
        expected, exact, grad.to(dtype).double(), allow_unused=True, materialize_grads=True
    )
    # A sum of E (forward) or H (dlogits) rounded products: 64 ulp cover it with room.
    bound = 64 * torch.finfo(dtype).eps
    for actual, right in zip((out, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=bound, atol=bound * 8)


@pytest.mark.parametrize("name", ["odd", "empty batch"])
def test_opcheck(name: str) -> None:
    weight, *rest = LOOKUPS[name].arguments()
    torch.library.opcheck(torch.ops.stem_fast.lookup.default, (weight.requires_grad_(), *rest))
    y, logits, see, learn = MIXTURES[name].arguments()
    arguments = (y.requires_grad_(), logits.requires_grad_(), see, learn)
    torch.library.opcheck(torch.ops.stem_fast.mixture.default, arguments)


def test_same_bits_again_and_with_one_thread() -> None:
    weight, *rest = LOOKUPS["many rows"].arguments(torch.float32)
    mixture = MIXTURES["stem"].arguments(torch.float32)

    def everything() -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in (weight, *mixture[:2])]
        outputs = [ops.lookup(inputs[0], *rest), ops.mixture(*inputs[1:], *mixture[2:])]
        loss = sum(o.sin().sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(loss, inputs)]

    first, second = everything(), everything()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = everything()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def backends_in_a_process(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import stem_fast, json; print(json.dumps(stem_fast.backends()))"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_reference_can_be_chosen() -> None:
    states = json.loads(backends_in_a_process(STEM_FAST_BACKEND="reference").stdout)
    assert states["cpp"] == states["triton"] == "off (STEM_FAST_BACKEND=reference)"


def test_triton_can_be_chosen_with_the_interpreter() -> None:
    result = backends_in_a_process(STEM_FAST_BACKEND="triton", TRITON_INTERPRET="1")
    states = json.loads(result.stdout)
    assert states["triton"] == "in use on cpu"
    assert states["cpp"].startswith("off")


def test_an_unknown_backend_is_refused() -> None:
    result = backends_in_a_process(STEM_FAST_BACKEND="cuda9")
    assert "STEM_FAST_BACKEND='cuda9' is none of" in result.stderr


def test_a_backend_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    with pytest.raises(ImportError, match=r"STEM_FAST_BACKEND=cpp: not built \(no C\+\+ compiler"):
        ops._load("cpp")
    assert ops._load("auto")["cpp"].startswith("not built")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="STEM_FAST_BACKEND=triton: no CUDA device"):
        ops._load("triton")


def test_a_damaged_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_cpp.so").write_bytes(b"not a library")
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    assert ops._load_cpp().startswith("built, but does not load:")
