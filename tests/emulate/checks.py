"""The CUDA C++ kernels against the reference, on a GPU or emulated on the CPU.

test_cuda.py runs this file as a process of its own, because there the kernels are the backend:
the emulated library of STEM_FAST_EMULATED, or where that is not set STEM_FAST_BACKEND=cuda.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import to
from cases.adagrad import ADAGRADS, AdagradCase, check_adagrad_rows
from cases.adam import ADAMS, AdamCase, check_adam_rows
from cases.lookup import LOOKUPS, LookupCase
from cases.mixture import MIXTURES, MixtureCase, stem_masks
from cases.sgd import SGDS, SgdCase, check_sgd_rows
from torch import Tensor

from stem_fast import backends, reference
from stem_fast.ops.backends import CUDA

EMULATED = os.environ.get("STEM_FAST_EMULATED")
DEVICE = "cpu" if EMULATED else "cuda"
if EMULATED:
    torch.ops.load_library(EMULATED)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
lookups = pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
WIDE = {
    "512 wide": MixtureCase(10, 3, 70, 512, *stem_masks(2, 1, 8)),
    "256 wide": MixtureCase(6, 2, 40, 256, *stem_masks(1, 2, 4)),
    "64 wide": MixtureCase(9, 5, 35, 64, *stem_masks(4, 1, 5)),
    "66 wide": MixtureCase(5, 9, 4, 66, *stem_masks(8, 0, 5)),
    "one wide": MixtureCase(3, 3, 300, 1, *stem_masks(2, 1, 1)),
    "no width": MixtureCase(3, 3, 5, 0, *stem_masks(2, 1, 1)),
    "64 experts": MixtureCase(64, 16, 3, 96, (-1,) * 16, (-(1 << 63), *range(1, 16))),
}
mixtures = pytest.mark.parametrize("case", (MIXTURES | WIDE).values(), ids=(MIXTURES | WIDE).keys())
ops = torch.ops.stem_fast


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fills every new tensor with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def close(actual: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Within a rounding to ``dtype`` and sums in float32 (float64) of what float64 gives."""
    assert actual.dtype == dtype
    assert actual.shape == right.shape
    eps = torch.finfo(dtype).eps
    largest = right.abs().amax() if right.numel() else 0
    bound = eps * right.abs() + 64 * min(eps, 1.2e-7) * (1 + largest)
    assert ((actual.cpu().double() - right).abs() <= bound).all()


def strided(tensor: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, at an address that is no multiple of 16."""
    flat = tensor.new_empty(tensor.numel() + 1)[1:]
    assert not flat.numel() or flat.data_ptr() % 16
    return flat.view(tensor.shape).copy_(tensor)


def run(op: str, *arguments: Any, change: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    """The op on the device, twice; emulated, the second time with threads the other way round.

    ``change``, applied to every tensor, says how they lie in the device's memory.
    """

    def changed(a: Any) -> Any:
        if isinstance(a, list):
            return [changed(each) for each in a]
        return change(a) if isinstance(a, Tensor) else a

    moved = changed(to(DEVICE, arguments))
    first = getattr(ops, op)(*moved)
    os.environ["STEM_FAST_EMULATE"] = "downwards"
    second = getattr(ops, op)(*moved)
    del os.environ["STEM_FAST_EMULATE"]
    pairs = zip(*((t,) if isinstance(t, Tensor) else t for t in (first, second)), strict=True)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
    return first


def test_the_kernels_are_the_backend() -> None:
    if EMULATED:
        for op in CUDA:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"stem_fast::{op}", "CPU")
    else:
        assert backends()["cuda"] == "in use on cuda"


@lookups
@dtypes
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_lookup(case: LookupCase, dtype: torch.dtype, ids: torch.dtype) -> None:
    weight, *rest = case.arguments(dtype, ids)
    for actual, right in zip(
        run("lookup", weight, *rest), reference.lookup(weight.double(), *rest), strict=True
    ):
        close(actual, right, dtype)


@pytest.mark.parametrize("name", ["odd", "weighted sequences", "many rows"])
@pytest.mark.parametrize("change", [strided, misaligned])
def test_lookup_takes_any_memory(name: str, change: Any) -> None:
    weight, *rest, bags, mean = LOOKUPS[name].arguments(torch.float32)
    bags[2:] = [weights.float() for weights in bags[2:]]
    for actual, right in zip(
        run("lookup", weight, *rest, bags, mean, change=change),
        reference.lookup(weight.double(), *rest, bags, mean),
        strict=True,
    ):
        close(actual, right, torch.float32)


def test_lookup_stays_inside_the_arena_and_the_bags() -> None:
    weight, ids, offsets, spaces, sums, bags, mean = LOOKUPS["sequences"].arguments(torch.float32)
    ids[3, 1], ids[4, 0] = 1 << 40, -(1 << 40)
    bags[0][:2] = torch.tensor([1 << 40, -5])
    bags[1][0, 0], bags[1][-1, -1] = -(1 << 40), 1 << 40
    x, z = run("lookup", weight, ids, offsets, spaces, sums, bags, mean)
    rows = (ids + offsets).clamp(0, len(weight) - 1)
    bags = [bags[0].clamp(0, len(weight) - 1), bags[1].clamp(0, len(bags[0]))]
    right = reference.lookup(
        weight.double(), rows, torch.zeros_like(offsets), spaces, sums, bags, mean
    )
    close(x, right[0], torch.float32)
    close(z, right[1], torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spaces": 4}, r"weight must be \[R, G\*D\] with G = 4"),
        ({"offsets": torch.tensor([0])}, r"ids must be \[B, F\] and offsets \[F\]"),
        ({"offsets": torch.tensor([0, 1, 3]).int()}, "offsets must be int64"),
        ({"ids": torch.zeros(7, 3)}, "ids must be int32 or int64"),
        ({"sums": [32]}, "a sum must name some of the 5 spaces; it is 32"),
        ({"sums": [0]}, "a sum must name some of the 5 spaces; it is 0"),
        ({"bags": [torch.tensor([1])]}, "bags must be rows"),
        ({"weight": torch.zeros(20, 15).int()}, "the type must be float64"),
        ({"weight": torch.zeros(0, 15)}, "the arena has no rows"),
    ],
)
def test_lookup_refuses_other_shapes_and_types(change: dict[str, Any], message: str) -> None:
    names = ("weight", "ids", "offsets", "spaces", "sums", "bags", "mean")
    arguments = dict(zip(names, LOOKUPS["odd"].arguments(), strict=True)) | change
    with pytest.raises(RuntimeError, match=message):
        ops.lookup(*to(DEVICE, arguments.values()))


def gradients(case: LookupCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    width = (len(case.vocab) + len(case.pooling)) * case.dim
    shapes = [(n, case.batch, width) for n in (case.spaces, len(case.sums))]
    x, z = (torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes)
    return x, z


def check_row_gradients(
    grad_x: Tensor, grad_z: Tensor, sums: list[int], plan: list[Tensor], dim: int, **change: Any
) -> None:
    right = reference.row_gradients(grad_x.double(), grad_z.double(), sums, *plan, dim)
    # The error of a sum grows as its terms' sizes; the reference's also with their number.
    sizes = [t.double().abs() for t in (grad_x, grad_z, plan[2])]
    size = reference.row_gradients(*sizes[:2], sums, *plan[:2], sizes[2], dim)
    actual = run("row_gradients", grad_x, grad_z, sums, *plan, dim, **change)
    assert actual.dtype == grad_x.dtype
    assert actual.shape == right.shape
    eps = torch.finfo(grad_x.dtype).eps
    relative = 64 * min(eps, 1.2e-7) + len(plan[1]) * 2.2e-16
    bound = eps * right.abs() + relative * (1 + size)
    assert ((actual.cpu().double() - right).abs() <= bound).all()


@lookups
@dtypes
def test_row_gradients(case: LookupCase, dtype: torch.dtype) -> None:
    _, ids, offsets, _, sums, bags, mean = case.arguments(dtype)
    _, *plan = reference.row_plan(ids, offsets, bags, mean)
    plan[0] = torch.cat([plan[0], plan[0][-1:].expand(5)])  # as a plan on CUDA is
    check_row_gradients(*gradients(case, dtype), sums, plan, case.dim)


@dtypes
@pytest.mark.parametrize(("dim", "spaces"), [(16, 3), (3, 2), (8, 40), (1, 1)])
def test_row_gradients_of_rows_with_many_occurrences(
    dim: int, spaces: int, dtype: torch.dtype
) -> None:
    """Segments around every limit of the kernel, starting where a piece does and elsewhere."""
    draw = torch.Generator().manual_seed(dim)
    lengths = [5000, 1, 0, 32, 33, 255, 256, 257, 0, 511, 512, 513, 1200, 2, 30, 3, 0, 0]
    segments = torch.tensor([0, *lengths]).cumsum(0).int()
    m, slots = int(segments[-1]), 21
    sources = torch.randint(0, slots, (m,), generator=draw).int()
    sums = [1, (1 << spaces) - 1]
    x, z = (
        torch.randn(n, 7, 3 * dim, generator=draw, dtype=torch.float64).to(dtype)
        for n in (spaces, len(sums))
    )
    for scales in (torch.randn(m, generator=draw, dtype=torch.float64), torch.empty(0).double()):
        check_row_gradients(x, z, sums, [segments, sources, scales], dim)
    for change in (strided, misaligned):
        check_row_gradients(x, z, sums, [segments, sources, scales], dim, change=change)
    everything = torch.tensor([0, m]).int()
    check_row_gradients(x, z[:0], [], [everything, sources, scales], dim)


def test_row_gradients_of_nothing() -> None:
    none = torch.empty(0, dtype=torch.int32)
    for segments in (torch.zeros(1).int(), torch.zeros(4).int()):
        plan = [segments, none, torch.empty(0).double()]
        check_row_gradients(torch.empty(2, 0, 12), torch.empty(0, 0, 12), [], plan, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("batch", [0, 1, 9000])
def test_check_ids(dtype: torch.dtype, batch: int) -> None:
    draw = torch.Generator().manual_seed(5)
    sizes = torch.tensor([1, 5, 70000, 3])
    ids = (torch.rand(batch, 4, generator=draw) * sizes).to(dtype)
    top = (1 << 31) - 1 if dtype == torch.int32 else 1 << 45
    for i, wrong in enumerate([5, -1, top, -top, 70000]):
        ids[7 + i :: 13 + i, 1 + i % 2] = wrong
    never = torch.iinfo(torch.int64).max
    bad, expected = (torch.tensor([never, never, 12, never]) for _ in range(2))
    right = reference.check_ids(ids, sizes, expected)
    for change in (Tensor.clone, strided):
        found, counted = change(bad.to(DEVICE)), change(ids.to(DEVICE))
        actual = ops.check_ids(counted, sizes.to(DEVICE), found)
        assert actual.dtype == dtype
        assert torch.equal(actual.cpu(), right)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("case", ADAMS.values(), ids=ADAMS.keys())
@pytest.mark.parametrize("grads", [False, True])
@dtypes
def test_adam_rows(case: AdamCase, grads: bool, dtype: torch.dtype) -> None:
    check_adam_rows(ops.adam_rows, case, dtype, grads, DEVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(40, 6)}, "exp_avg and exp_avg_sq must be as weight"),
        ({3: torch.zeros(40)}, "last must be int32"),
        ({4: torch.zeros(3)}, "rows must be int64"),
        ({5: torch.zeros(4, 7)}, "grad must be"),
        ({6: torch.zeros(3, 7)}, "steps must be float64"),
    ],
)
def test_adam_rows_refuses_other_shapes_and_types(change: dict[int, Tensor], message: str) -> None:
    arguments = dict(enumerate(ADAMS["early"].arguments(grads=True))) | change
    with pytest.raises(RuntimeError, match=message):
        ops.adam_rows(*to(DEVICE, arguments.values()))


def changing(op: str, change: Callable[[Tensor], Tensor] = lambda t: t) -> Callable[..., None]:
    """An op that changes its arguments in place, for a check that calls it twice: emulated, the
    second time with threads the other way round. ``change`` says how tensors lie in memory."""
    ways = iter(("upwards", "downwards"))

    def call(*arguments: Any) -> None:
        os.environ["STEM_FAST_EMULATE"] = next(ways)
        moved = [change(a) if isinstance(a, Tensor) else a for a in arguments]
        getattr(ops, op)(*moved)
        del os.environ["STEM_FAST_EMULATE"]
        for given, changed in zip(arguments, moved, strict=True):
            if isinstance(given, Tensor):
                given.copy_(changed)

    return call


@pytest.mark.parametrize("case", SGDS.values(), ids=SGDS.keys())
@pytest.mark.parametrize("grads", [False, True])
@dtypes
def test_sgd_rows(case: SgdCase, grads: bool, dtype: torch.dtype) -> None:
    check_sgd_rows(changing("sgd_rows"), case, dtype, grads, DEVICE)


@pytest.mark.parametrize("case", ADAGRADS.values(), ids=ADAGRADS.keys())
@dtypes
def test_adagrad_rows(case: AdagradCase, dtype: torch.dtype) -> None:
    check_adagrad_rows(changing("adagrad_rows"), case, dtype, DEVICE)


def test_sgd_and_adagrad_rows_take_any_address() -> None:
    sgd, adagrad = changing("sgd_rows", misaligned), changing("adagrad_rows", misaligned)
    check_sgd_rows(sgd, SGDS["many steps"], torch.float32, True, DEVICE)
    check_adagrad_rows(adagrad, ADAGRADS["many, all sums"], torch.float32, DEVICE)


def test_sgd_and_adagrad_rows_stay_inside_the_table() -> None:
    for op, arguments, rows in (
        ("sgd_rows", SGDS["many steps"].arguments(torch.float32, grads=True), 3),
        ("adagrad_rows", ADAGRADS["many, a sum a row"].arguments(torch.float32), 2),
    ):
        arguments[rows][0], arguments[rows][1] = 1 << 40, -(1 << 40)
        device = to(DEVICE, arguments)
        getattr(ops, op)(*device)
        kept = arguments[rows].abs() < 1 << 40
        arguments[rows], arguments[rows + 1] = arguments[rows][kept], arguments[rows + 1][kept]
        getattr(reference, op)(*arguments)
        torch.testing.assert_close(device[0].cpu(), arguments[0])
        torch.testing.assert_close(device[1].cpu(), arguments[1])


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("sgd_rows", {0: torch.zeros(60)}, r"weight must be \[R, W\]"),
        ("sgd_rows", {1: torch.zeros(60, 6)}, "momentum_buffer must be as weight"),
        ("sgd_rows", {1: torch.zeros(60, 7)}, "momentum_buffer must be float32, of a float64"),
        ("sgd_rows", {2: torch.zeros(60)}, "last must be int32"),
        ("sgd_rows", {3: torch.zeros(3)}, "rows must be int64"),
        ("sgd_rows", {4: torch.zeros(4, 7)}, "grad must be"),
        ("sgd_rows", {5: torch.zeros(3, 7)}, "steps must be float64"),
        ("adagrad_rows", {0: torch.zeros(7, 40).T}, "what is changed in place must be contiguous"),
        ("adagrad_rows", {1: torch.zeros(40, 6)}, r"sum must be \[40\] or \[40, 7\]"),
        ("adagrad_rows", {1: torch.zeros(40)}, "sum must be float32, of a float64"),
        ("adagrad_rows", {3: torch.zeros(22, 7).int()}, "grad must be .* of weight's type"),
        ("adagrad_rows", {4: torch.zeros(2)}, r"options must be float64 \[2\]"),
    ],
)
def test_sgd_and_adagrad_rows_refuse_other_shapes_and_types(
    op: str, change: dict[int, Tensor], message: str
) -> None:
    arguments = {
        "sgd_rows": SGDS["momentum and l2"].arguments(grads=True),
        "adagrad_rows": ADAGRADS["narrow, all sums"].arguments(),
    }[op]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(*to(DEVICE, (dict(enumerate(arguments)) | change).values()))


@mixtures
@dtypes
def test_mixture_and_its_gradients(case: MixtureCase, dtype: torch.dtype) -> None:
    y, logits, see, learn = case.arguments(dtype)
    grad = torch.randn(case.gates, case.batch, case.width, dtype=torch.float64).to(dtype)
    exact = y.double(), logits.double(), see, learn
    close(run("mixture", y, logits, see, learn), reference.mixture(*exact), dtype)
    for relu in (False, True):
        left = y.relu() if relu else y
        for actual, right in zip(
            run("mixture_backward", grad, left, logits, see, learn, relu),
            reference.mixture_backward(grad.double(), left.double(), *exact[1:], relu),
            strict=True,
        ):
            close(actual, right, dtype)


@dtypes
def test_weights_of_unseen_experts_are_zero(dtype: torch.dtype) -> None:
    y, logits, _, _ = MIXTURES["seeing less than all"].arguments(dtype)
    see, learn = [0b1011, 0b1101], [0b1011, 0b1101]
    logits[0, :, 2] = logits[1, :, 1] = 6e4  # the largest by far, and seen by nobody
    out = run("mixture", y, logits, see, learn)
    close(out, reference.mixture(y.double(), logits.double(), see, learn), dtype)
    _, dlogits = run("mixture_backward", torch.ones_like(out).cpu(), y, logits, see, learn)
    assert not dlogits[0, :, 2].any()
    assert not dlogits[1, :, 1].any()


@pytest.mark.parametrize("name", ["stem", "512 wide", "64 wide"])
@pytest.mark.parametrize("change", [strided, misaligned])
def test_mixture_takes_any_memory(name: str, change: Any) -> None:
    case = (MIXTURES | WIDE)[name]
    y, logits, see, learn = case.arguments(torch.float32)
    grad = torch.randn(case.gates, case.batch, case.width)
    close(
        run("mixture", y, logits, see, learn, change=change),
        reference.mixture(y.double(), logits.double(), see, learn),
        torch.float32,
    )
    backward = (grad, y, logits)
    for actual, right in zip(
        run("mixture_backward", *backward, see, learn, change=change),
        reference.mixture_backward(*(t.double() for t in backward), see, learn),
        strict=True,
    ):
        close(actual, right, torch.float32)


def test_mixture_refuses_other_shapes_and_types() -> None:
    y, logits, see, learn = to(DEVICE, MIXTURES["stem"].arguments(torch.float32))
    for arguments, message in (
        ((y[0], logits, see, learn), r"y must be \[E, B, H\]"),
        ((y, logits[:, 1:], see, learn), r"y must be \[E, B, H\]"),
        ((y, logits.double(), see, learn), "the same type"),
        ((y.int(), logits.int(), see, learn), "the type must be float64"),
        ((y, logits, see[1:], learn), "a mask for each of 3 gates"),
        ((y[:, :2].repeat(7, 1, 1), logits[:, :2].repeat(1, 1, 7), see, learn), "at most 64"),
        ((y[:, :2], logits[:, :2].repeat(6, 1, 1), see * 6, learn * 6), "and 16 gates"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.mixture(*arguments)
    with pytest.raises(RuntimeError, match=r"the gradient must be \[K, B, H\]"):
        ops.mixture_backward(y[:2], y, logits, see, learn)


@pytest.mark.skipif(EMULATED is not None, reason="one device")
def test_tensors_on_other_devices_are_refused() -> None:
    for op, arguments, place in itertools.chain(
        (("lookup", LOOKUPS["sequences"].arguments(), i) for i in (1, 2)),
        (("mixture", MIXTURES["stem"].arguments(), i) for i in (1,)),
    ):
        moved = to(DEVICE, arguments)
        moved[place] = moved[place].cpu()
        with pytest.raises(RuntimeError, match="tensors on different devices"):
            getattr(ops, op)(*moved)
