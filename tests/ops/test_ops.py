"""What all ops have in common: as citizens of PyTorch, their bits, their memory, their backends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import cpp, devices, dtypes, to
from cases.adagrad import ADAGRADS
from cases.adam import ADAMS
from cases.lookup import LARGE, LOOKUPS, check_lookup
from cases.loss import LOSSES
from cases.mixture import LARGE_MIXTURE, MIXTURES, check_mixture
from cases.sgd import SGDS

from stem_fast import ops, reference

# The function backends takes the name of its module.
loading = importlib.import_module("stem_fast.ops.backends")


@devices
def test_a_second_derivative_is_refused(device: str) -> None:
    y, logits, see, learn = to(device, MIXTURES["odd"].arguments())
    weight, *rest = to(device, LOOKUPS["odd"].arguments())
    logits_of_tasks, *rest_of_loss = to(device, LOSSES["binary"].arguments())
    y.requires_grad_(), weight.requires_grad_(), logits_of_tasks.requires_grad_()
    outputs = [
        (ops.task_losses(logits_of_tasks, *rest_of_loss), logits_of_tasks),
        (ops.mixture(y, logits, see, learn), y),
        (ops.lookup(weight, *rest)[0], weight),
        (ops.lookup(weight, *rest, plan=ops.row_plan(rest[0], rest[1]))[0], weight),
    ]
    for out, source in outputs:
        (first,) = torch.autograd.grad(out.square().sum(), source, create_graph=True)
        first = first.to_dense() if first.layout == torch.sparse_coo else first
        with pytest.raises(
            RuntimeError, match=r"no second derivative|once_differentiable|not have been used"
        ):
            torch.autograd.grad(first.square().sum(), source)


@devices
def test_gradcheck_with_live_and_frozen_experts_apart(device: str) -> None:
    """A plain gradcheck fails by design: forward sees what backward does not teach."""
    y, logits, see, learn = to(device, MIXTURES["odd"].arguments())
    y, logits = y[:, :2, :3], logits[:, :2]
    for k in range(len(see)):
        teaches = [e for e in range(len(y)) if learn[k] >> e & 1]

        def out(live: torch.Tensor, gate: torch.Tensor, k: int = k, at: Any = teaches) -> Any:
            frozen = y.clone()
            frozen[at] = live
            return ops.mixture(frozen, gate, see[k : k + 1], learn[k : k + 1])

        live = y[teaches].clone().requires_grad_()
        assert torch.autograd.gradcheck(out, (live, logits[k : k + 1].clone().requires_grad_()))
    weight, ids, *rest = to(device, LOOKUPS["weighted sequences"].arguments())
    ids += (ids == 0).long()  # padding learns nothing, which gradcheck would call wrong
    rest[3][0] += (rest[3][0] == 0).long()
    rest[3][2].nan_to_num_()
    assert torch.autograd.gradcheck(lambda w: ops.lookup(w, ids, *rest), weight.requires_grad_())


# torch 2.14's opcheck asks for it itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@devices
@pytest.mark.parametrize("name", ["odd", "empty batch", "weighted sequences"])
def test_opcheck(name: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)  # it compares uninitialised outputs of fakes
    weight, ids, offsets, spaces, sums, bags, mean = to(device, LOOKUPS[name].arguments())
    if len(bags) > 2:
        bags[2].nan_to_num_()  # opcheck takes no NaN for another
    library = torch.ops.stem_fast
    arguments = (weight.requires_grad_(), ids, offsets, spaces, sums, bags, mean)
    torch.library.opcheck(library.lookup.default, arguments)
    x, z = (part.detach() for part in ops.lookup(*arguments))
    plan = ops.row_plan(ids, offsets, bags, mean)
    torch.library.opcheck(library.row_plan.default, (ids, offsets, bags, mean))
    dim = weight.shape[1] // spaces
    torch.library.opcheck(library.row_gradients.default, (x, z, sums, *plan[1:], dim))
    dense = (x, z, sums, ids, offsets, bags, mean, len(weight))
    torch.library.opcheck(library.lookup_backward.default, dense)
    sizes = torch.full((ids.shape[1],), 2, device=device)
    bad = torch.zeros_like(sizes)
    torch.library.opcheck(library.check_ids.default, (ids, sizes, bad))
    torch.library.opcheck(library.outside.default, (ids, sizes))
    names = [f"field {f}" for f in range(ids.shape[1])]
    torch.library.opcheck(library.checked.default, (ids.clamp(0, 1), sizes, names))
    y, logits, see, learn = to(device, MIXTURES.get(name, MIXTURES["stem"]).arguments())
    arguments = (y.mT.contiguous().mT.requires_grad_(), logits.requires_grad_(), see, learn)
    torch.library.opcheck(library.mixture.default, arguments)
    y, logits, grad = y.detach(), logits.detach(), ops.mixture(*arguments).detach()
    strided = y.mT.contiguous().mT
    torch.library.opcheck(library.mixture_backward.default, (grad, strided, logits, see, learn))
    one = (list(grad), y[0], reference.gate_weights(logits, see), learn, 0)
    torch.library.opcheck(library.mixture_expert_backward.default, one)
    one = grad[0].contiguous(), y[0].contiguous()
    torch.library.opcheck(library.relu_backward.default, one)
    torch.library.opcheck(library.relu_backward.default, (*one, one[0].new_empty(y[0].T.shape)))
    if device == "cuda":
        torch.library.opcheck(library.relu_backward.default, (torch.randn_like(y), y))
    bias = y.new_ones(len(y), y.shape[2])
    torch.library.opcheck(library.bias_relu.default, (y.clone(), bias, True))
    arguments = (y, [1, 0], grad[:, :3].contiguous(), grad[:, :3, 0].contiguous(), True)
    torch.library.opcheck(library.grouped_linear.default, arguments)
    through = (y, y.new_ones(len(y), y.shape[2], 3), y.new_ones(*y.shape[:2], 3))
    torch.library.opcheck(library.grouped_linear_backward.default, through)
    mixed = (*arguments[:4], logits[:, :, :2].contiguous(), [3, 1, *[2] * (len(logits) - 2)])
    torch.library.opcheck(library.expert_mixture_inference.default, mixed)
    for grads in (False, True):
        adam = to(device, ADAMS["early"].arguments(grads=grads))
        torch.library.opcheck(library.adam_rows.default, adam)
        options = torch.tensor([1e-3, 1e-6], dtype=torch.float64, device=device)
        schedule = (adam[6], adam[7], options, 0.9, 0.999, 1e-8, False, grads)
        torch.library.opcheck(library.adam_schedule.default, schedule)
        for case in ("momentum and l2", "l2 alone"):
            sgd = to(device, SGDS[case].arguments(grads=grads))
            torch.library.opcheck(library.sgd_rows.default, sgd)
    for case in ("narrow, all sums", "all rows, a sum a row"):
        torch.library.opcheck(library.adagrad_rows.default, to(device, ADAGRADS[case].arguments()))
    for case in ("binary", "empty batch", "odd parts"):
        logits, *rest = to(device, LOSSES[case].arguments())
        torch.library.opcheck(library.task_losses.default, (logits, *rest))
        means, divisors = library.task_losses(logits, *rest)
        back = (torch.ones_like(means), logits, *rest[:4], divisors)
        torch.library.opcheck(library.task_losses_backward.default, back)
    torch.library.opcheck(library.empty_kept.default, (y, [3, 4]), test_utils="test_schema")
    torch.library.opcheck(library.huge_pages.default, (y.detach(),))


@devices
@dtypes
def test_memory_that_is_used_again_is_written_whole(dtype: torch.dtype, device: str) -> None:
    """Large buffers come from a pool, which torch does not fill with NaN."""
    sizes = [1500 * 1100, 6000 * 1100, 40 * 2**20]
    like = torch.zeros(1, device=device)
    used = [torch.ops.stem_fast.empty_kept(like, [n]).fill_(torch.nan) for n in sizes * 3]
    del used
    check_lookup(LARGE, dtype, torch.int64, device)
    check_mixture(LARGE_MIXTURE, dtype, device)


@devices
def test_same_bits_again_and_with_one_thread(device: str) -> None:
    weight, *rest = to(device, LARGE.arguments(torch.float32))
    mixture = to(device, LARGE_MIXTURE.arguments(torch.float32))

    def everything() -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in (weight, *mixture[:2])]
        outputs = [*ops.lookup(inputs[0], *rest), ops.mixture(*inputs[1:], *mixture[2:])]
        loss = sum(o.sin().sum() for o in outputs)
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        results = [t.detach().clone() for t in (*outputs, *gradients)]
        for t in (*outputs, *gradients):
            t.detach().fill_(torch.nan)  # the next call gets this memory
        return results

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


@cpp
def test_buffers_are_used_again_but_never_while_in_use() -> None:
    like = torch.zeros(1)

    def take() -> torch.Tensor:
        return torch.ops.stem_fast.empty_kept(like, [700, 1000])

    first = take()
    place = first.data_ptr()
    assert take().data_ptr() != place
    view = first[0]
    del first
    assert take().data_ptr() != place, "a view holds the buffer"
    del view
    assert take().data_ptr() == place


@cpp
def test_errors_begin_with_the_op() -> None:
    """Not with a path of the machine that built the library."""
    op, table = torch.ops.stem_fast, torch.zeros(3, 2)
    options = torch.zeros(2, dtype=torch.float64)
    for call, message in (
        (lambda: op.empty_kept(table, [2**62 + 2**24]), "empty_kept: not enough memory"),
        (lambda: op.empty_kept(table, [2**40, 2**40]), "empty_kept: not enough memory"),
        (lambda: op.empty_kept(table, [2**45]), "empty_kept: not enough memory"),
        (lambda: op.empty_kept(table, [3, -1]), "empty_kept: size 1 is -1, must not be negative"),
        (
            lambda: op.adagrad_rows(table, table, torch.tensor([5]), table[:1], options, 1e-8),
            "adagrad_rows: row 5 at 0 is outside the table of 3 rows",
        ),
        (
            lambda: op.adagrad_rows(table.int(), table, None, table, options, 1e-8),
            "adagrad_rows: a float64, float32, bfloat16 or float16 tensor is due",
        ),
        (lambda: op.mixture(table, table, [1], [1]), r"mixture: expected y \[E, B, H\]"),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}"):
            call()


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
    for name in ("cpp", "triton", "cuda"):
        assert states[name].startswith(f"off (STEM_FAST_BACKEND=reference; set it to {name} ")


def test_triton_can_be_chosen_with_the_interpreter() -> None:
    result = backends_in_a_process(STEM_FAST_BACKEND="triton", TRITON_INTERPRET="1")
    states = json.loads(result.stdout)
    assert states["triton"] == "in use on cpu"
    assert states["cpp"].startswith("off")


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({"cpp": "in use on cpu", "triton": "no CUDA device"}, False),
        ({"triton": "in use on cuda", "cuda": "off"}, True),
        ({"triton": "triton is not installed", "cuda": "in use on cuda"}, False),
    ],
)
def test_graphs_need_a_backend_that_does_not_wait(
    states: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not ops.capturable() or torch.cuda.is_available()
    monkeypatch.setattr(loading, "_states", states)
    assert ops.capturable() == expected


@pytest.mark.parametrize(
    ("choice", "built", "left"),
    [
        ("auto", True, set(loading.FASTER_IN_CUDA)),
        ("auto", False, set()),
        ("cuda", True, set(loading.CUDA)),
        ("triton", True, set()),
    ],
)
def test_triton_has_on_cuda_what_is_not_left_to_cpp(
    choice: str, built: bool, left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    registered: set[str] = set()

    class Library:
        @staticmethod
        def impl(name: str, function: Any, device: str) -> None:
            assert device == "CUDA"
            assert name not in registered, "torch 2.11 refuses it"
            registered.add(name)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "library", Library)
    state = "" if built else "not built"
    monkeypatch.setattr(loading, "_load_library", lambda name, missing: state)
    states = loading._load(choice)
    assert states["triton"] == "in use on cuda"
    assert (states["cuda"] == "in use on cuda") == (built and choice != "triton")
    assert set(loading.CUDA) - registered == left
    assert {"row_plan", "lookup_backward"} <= registered


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_the_cuda_library_works_without_triton(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = []
    library = SimpleNamespace(impl=lambda *arguments: registered.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "library", library)
    monkeypatch.setattr(loading, "_load_library", lambda name, missing: "")
    monkeypatch.setattr(loading, "_load_triton", lambda kept: "triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    states = loading._load(choice)
    assert states["cuda"] == "in use on cuda"
    assert states["triton"] == "triton is not installed"
    assert registered == [("lookup_backward", loading.lookup_backward, "CUDA")]


def test_an_unknown_backend_is_refused() -> None:
    result = backends_in_a_process(STEM_FAST_BACKEND="cuda9")
    assert "STEM_FAST_BACKEND='cuda9' is none of" in result.stderr


def test_a_backend_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "ops" / "backends.py"))
    with pytest.raises(ImportError, match=r"STEM_FAST_BACKEND=cpp: not built \(no C\+\+ compiler"):
        loading._load("cpp")
    assert loading._load("auto")["cpp"].startswith("not built")
    with pytest.raises(ImportError, match="STEM_FAST_BACKEND=triton: no CUDA device"):
        loading._load("triton")


def test_a_damaged_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_cpp.so").write_bytes(b"not a library")
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "ops" / "backends.py"))
    assert loading._load_cpp().startswith("built, but does not load:")
