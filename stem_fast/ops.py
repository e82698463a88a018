"""The custom ops on one page: schema, default, shape function, gradient and backend.

Calling an op takes three hops: the function here, PyTorch's dispatcher, the kernel. The default of
every op is :mod:`stem_fast.reference`; C++ overrides it on CPU, on CUDA Triton or C++, whichever is
faster.

``STEM_FAST_BACKEND``, read at import, chooses: ``auto`` (the fastest on each device), or
``reference``, ``cpp``, ``triton``, ``cuda`` (C++). A backend that is asked for and not there is an
ImportError, never a silent fallback. With ``TRITON_INTERPRET=1`` a chosen ``triton`` runs on CPU,
slowly.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stem_fast import reference

MAX_EXPERTS, MAX_GATES = 64, 16  # what every backend of the mixture takes
# What the CUDA C++ library has, and of that what an H100 has shown to be faster than Triton's, the
# forward mixture as fast (bench/results/gpu_nvidia_h100_80gb_hbm3_2026-11-27.json).
CUDA = (
    *("lookup", "row_gradients", "check_ids", "mixture", "mixture_backward"),
    *("adam_rows", "sgd_rows", "adagrad_rows"),
)
FASTER_IN_CUDA = ("lookup", "mixture", "mixture_backward")

_library = torch.library.Library("stem_fast", "DEF")
SCHEMAS = {
    "lookup": "(Tensor weight, Tensor ids, Tensor offsets, int spaces, int[] sums, Tensor[] bags,"
    " int mean) -> (Tensor, Tensor)",
    "lookup_backward": "(Tensor grad_x, Tensor grad_z, int[] sums, Tensor ids, Tensor offsets,"
    " Tensor[] bags, int mean, int rows) -> Tensor",
    "row_plan": "(Tensor ids, Tensor offsets, Tensor[] bags, int mean)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "row_gradients": "(Tensor grad_x, Tensor grad_z, int[] sums, Tensor segments, Tensor sources,"
    " Tensor scales, int dim) -> Tensor",
    "empty_kept": "(Tensor like, SymInt[] size) -> Tensor",
    "huge_pages": "(Tensor(a!) table) -> ()",
    "outside": "(Tensor ids, Tensor sizes) -> Tensor",
    "check_ids": "(Tensor ids, Tensor sizes, Tensor(a!) bad) -> Tensor",
    "checked": "(Tensor ids, Tensor sizes, str[] names, Tensor? offsets=None) -> Tensor",
    "mixture": "(Tensor y, Tensor logits, int[] see, int[] learn) -> Tensor",
    "mixture_backward": "(Tensor grad, Tensor y, Tensor logits, int[] see, int[] learn,"
    " bool relu=False)"
    " -> (Tensor, Tensor)",
    "mixture_expert_backward": "(Tensor[] grads, Tensor y, Tensor p, int[] learn, int e)"
    " -> (Tensor, Tensor)",
    "relu_backward": "(Tensor(a!) grad, Tensor y, Tensor(b!)? transposed=None) -> Tensor",
    "bias_relu": "(Tensor(a!) y, Tensor bias, bool relu) -> ()",
    "grouped_linear": "(Tensor x, int[] reads, Tensor weight, Tensor bias, bool relu) -> Tensor",
    "grouped_linear_backward": "(Tensor grad, Tensor weight, Tensor y) -> (Tensor, Tensor)",
    "expert_mixture_inference": "(Tensor x, int[] reads, Tensor weight, Tensor bias, Tensor logits,"
    " int[] see) -> Tensor",
    "task_losses": "(Tensor logits, Tensor labels, int[] regression, Tensor? mask,"
    " Tensor? sample_weights, Tensor? counts) -> (Tensor, Tensor)",
    "task_losses_backward": "(Tensor grad, Tensor logits, Tensor labels, int[] regression,"
    " Tensor? mask, Tensor? sample_weights, Tensor divisors) -> Tensor",
    "adam_rows": "(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) last,"
    " Tensor? rows, Tensor? grad, Tensor steps, Tensor clock, float beta1, float beta2,"
    " float eps, bool decoupled, bool l2) -> ()",
    "adam_schedule": "(Tensor(a!) steps, Tensor(b!) clock, Tensor options, float beta1,"
    " float beta2, float eps, bool decoupled, bool l2) -> ()",
    "sgd_rows": "(Tensor(a!) weight, Tensor(b!)? momentum_buffer, Tensor(c!) last, Tensor? rows,"
    " Tensor? grad, Tensor steps, Tensor clock) -> ()",
    "adagrad_rows": "(Tensor(a!) weight, Tensor(b!) sum, Tensor? rows, Tensor grad, Tensor options,"
    " float eps) -> ()",
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def step_by_step() -> bool:
    """Whether torch looks into what is called, and wants its own steps there: ``torch.compile``,
    ``torch.export``, and the transforms of ``torch.func``."""
    return torch.compiler.is_compiling() or transformed()


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is on. None knows a gradient that ``torch.library``
    registers, so that references stand in for the ops that have one."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class RowPlan(NamedTuple):
    """Which arena rows a batch reads, and where; see :func:`reference.row_plan`."""

    rows: Tensor  # int64 [U]
    segments: Tensor  # int32 [U+1]
    sources: Tensor  # int32 [m]
    scales: Tensor  # float64 [m] or [0]


def lookup(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    spaces: int,
    sums: Sequence[int] = (),
    bags: Sequence[Tensor] = (),
    mean: int = 0,
    plan: RowPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings of all fields in all spaces, and sums of spaces, in one pass.

    Arguments and results as in :func:`reference.lookup`. ``weight`` gets a dense gradient; with
    the batch's ``plan`` a sparse COO one (not under ``torch.compile``): its indices are the plan's
    rows, on CPU ascending and each once, its values :func:`reference.row_gradients`.

    Raises:
        ValueError: weights of bags that require a gradient (they are constants here).
        RuntimeError: sizes or types that don't fit; on CPU, a row outside the arena.
    """
    if any(part.requires_grad for part in bags):
        raise ValueError("the weights of bags get no gradient: detach them")
    arguments = (weight, ids, offsets, spaces, list(sums), list(bags), mean)
    if transformed():
        return reference.lookup(*arguments)
    if torch.compiler.is_exporting():  # AOTInductor makes None of an empty list
        none = [ids.new_empty(0), offsets.new_empty(0, ids.shape[0] + 1)]
        x, z = torch.ops.stem_fast.lookup(
            weight, ids, offsets, spaces, list(sums) or [1], list(bags) or none, mean
        )
        return x, z if sums else z[:0]
    if plan is None:
        return torch.ops.stem_fast.lookup(*arguments)
    return _SparseLookup.apply(plan, *arguments)


def row_plan(
    ids: Tensor, offsets: Tensor, bags: Sequence[Tensor] = (), mean: int = 0, rows: int = 2**63
) -> RowPlan:
    """Which arena rows a batch reads, and where; see :func:`reference.row_plan`.

    ``rows`` are the arena's; where it has fewer than 2^31, CUDA sorts half as many bits.
    """
    if ids.is_cuda:
        offsets = _narrow(offsets, rows)
    return RowPlan(*torch.ops.stem_fast.row_plan(ids, offsets, list(bags), mean))


def _narrow(offsets: Tensor, rows: int) -> Tensor:
    """Offsets as int32, if that holds every row and one number more."""
    return offsets.int() if rows < 2**31 else offsets


def check_ids(ids: Tensor, sizes: Tensor, bad: Tensor) -> Tensor:
    """Ids within their vocabularies, without waiting; see :func:`reference.check_ids`."""
    return torch.ops.stem_fast.check_ids(ids, sizes, bad)


def new_table(table: Tensor) -> Tensor:
    """A tensor that nothing was written to, in huge pages where there are such."""
    torch.ops.stem_fast.huge_pages(table)
    return table


def merge_rows(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n] that may repeat, with values [n, W], as each once with the sum of its values.

    The plan of a batch whose ids are the rows: on CUDA fixed in size, padded with row 0.
    """
    offsets = rows.new_zeros(1)
    plan = row_plan(rows[:, None], offsets)
    none = values.new_empty(0, *values.shape)
    sums = torch.ops.stem_fast.row_gradients(values[None], none, [], *plan[1:], values.shape[1])
    return plan.rows, sums


def _lookup_fake(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    spaces: int,
    sums: list[int],
    bags: list[Tensor],
    mean: int,
) -> tuple[Tensor, Tensor]:
    batch, fields = ids.shape
    width = (fields + (len(bags[1]) if bags else 0)) * (weight.shape[1] // spaces)
    return weight.new_empty(spaces, batch, width), weight.new_empty(len(sums), batch, width)


def _lookup_backward_fake(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: list[int],
    ids: Tensor,
    offsets: Tensor,
    bags: list[Tensor],
    mean: int,
    rows: int,
) -> Tensor:
    fields = ids.shape[1] + (len(bags[1]) if bags else 0)
    return grad_x.new_empty(rows, len(grad_x) * (grad_x.shape[2] // fields))


def _row_plan_fake(
    ids: Tensor, offsets: Tensor, bags: list[Tensor], mean: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    rows, read = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        ids.new_empty(rows, dtype=torch.int64),
        ids.new_empty(rows + 1, dtype=torch.int32),
        ids.new_empty(read, dtype=torch.int32),
        ids.new_empty(read if bags else 0, dtype=torch.float64),
    )


def _row_gradients_fake(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: list[int],
    segments: Tensor,
    sources: Tensor,
    scales: Tensor,
    dim: int,
) -> Tensor:
    return grad_x.new_empty(segments.shape[0] - 1, len(grad_x) * dim)


def _empty_kept_fake(like: Tensor, size: list[int]) -> Tensor:
    return like.new_empty(size)


def _huge_pages_fake(table: Tensor) -> None:
    """Nothing is written."""


def _outside_fake(ids: Tensor, sizes: Tensor) -> Tensor:
    return ids.new_empty((), dtype=torch.int64)


def _check_ids_fake(ids: Tensor, sizes: Tensor, bad: Tensor) -> Tensor:
    return ids.new_empty(ids.shape)


def _checked_fake(
    ids: Tensor, sizes: Tensor, names: list[str], offsets: Tensor | None = None
) -> Tensor:
    return ids.new_empty(ids.shape)


def _lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, ids, offsets, _, ctx.sums, bags, ctx.mean = inputs
    ctx.save_for_backward(ids, offsets, *bags)
    ctx.rows = weight.shape[0]


def _lookup_grad(ctx: Any, grad_x: Tensor, grad_z: Tensor) -> tuple[Any, ...]:
    ids, offsets, *bags = ctx.saved_tensors
    dense = torch.ops.stem_fast.lookup_backward(
        grad_x, grad_z, ctx.sums, ids, offsets, bags, ctx.mean, ctx.rows
    )
    # To torch.library every empty list is a list of tensors, and wants a list of gradients.
    return dense, None, None, None, None if ctx.sums else [], [None] * len(bags), None


torch.library.register_autograd("stem_fast::lookup", _lookup_grad, setup_context=_lookup_setup)


class _SparseLookup(torch.autograd.Function):
    """:func:`lookup` with a gradient of the plan's rows alone."""

    @staticmethod
    def forward(ctx: Any, plan: RowPlan, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*plan)
        ctx.shape, ctx.spaces, ctx.sums = weight.shape, rest[2], rest[3]
        return torch.ops.stem_fast.lookup(weight, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_z: Tensor) -> tuple[Any, ...]:
        rows, *plan = ctx.saved_tensors
        values = torch.ops.stem_fast.row_gradients(
            grad_x, grad_z, ctx.sums, *plan, ctx.shape[1] // ctx.spaces
        )
        return None, sparse_gradient(rows, values, ctx.shape), *(None,) * 6


def sparse_gradient(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a table as a sparse tensor, of the rows of a plan and their values."""
    # A CUDA plan repeats row 0, with zeros.
    once = not values.is_cuda
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=once, check_invariants=False
    )


def mixture(
    y: Tensor,
    logits: Tensor,
    see: Sequence[int | Sequence[int]],
    learn: Sequence[int | Sequence[int]],
    *,
    relu: bool = False,
) -> Tensor:
    """The AFTB gated mixture with its asymmetric backward; see :func:`reference.mixture`.

    A mask may be a list of a 0 or 1 for each expert, too.

    At most 64 experts and 16 gates. The logits are taken in y's type; softmax and sums are in
    float32 (float64 for float64). With ``relu``, y is what ReLUs have left, and its gradient is
    that before them: zero where they are off.

    Raises:
        ValueError: shapes or masks that don't fit; no expert, gate or output, or too many.
        RuntimeError: a mask too many or too few.
    """
    if y.dim() != 3 or logits.dim() != 3 or logits.shape[1:] != (y.shape[1], y.shape[0]):
        raise ValueError(
            "mixture: expected y [E, B, H] and logits [K, B, E], got y "
            f"{list(y.shape)} and logits {list(logits.shape)}"
        )
    if not (0 < len(y) <= MAX_EXPERTS and 0 < len(logits) <= MAX_GATES and y.shape[2]):
        raise ValueError(
            f"mixture: y [E, B, H] is {list(y.shape)} and logits [K, B, E] {list(logits.shape)}, "
            f"expected 1 to {MAX_EXPERTS} experts, 1 to {MAX_GATES} gates and a width above 0"
        )
    # Autocast can leave gates and experts in different types.
    arguments = y, logits.to(y.dtype), signed(see, len(y)), signed(learn, len(y))
    if transformed():
        assert not relu  # nobody runs step by step and asks for it
        return reference.mixture(*arguments)
    mixed: Tensor = (_ReLUMixture.apply if relu else torch.ops.stem_fast.mixture)(*arguments)
    return mixed


class _ReLUMixture(torch.autograd.Function):
    """:func:`mixture` with the gradient of what comes before the ReLUs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, logits: Tensor, see: list[int], learn: list[int]) -> Tensor:
        ctx.save_for_backward(y, logits)
        ctx.masks = see, learn
        return torch.ops.stem_fast.mixture(y, logits, see, learn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = torch.ops.stem_fast.mixture_backward
        return *back(grad, *ctx.saved_tensors, *ctx.masks, True), None, None


def signed(masks: Sequence[int | Sequence[int]], experts: int = MAX_EXPERTS) -> list[int]:
    """Masks, or lists of a 0 or 1 for each expert, as the int64 of the same bits: expert 63 is the
    sign. Raises ValueError for a list of another length or with other numbers."""
    found = []
    for k, mask in enumerate(masks):
        if not isinstance(mask, int):
            if len(mask) != experts or not all(bit in (0, 1) for bit in mask):
                raise ValueError(
                    f"the mask of gate {k} is {mask}, expected a 0 or 1 for each of {experts} "
                    "experts, or an int of such bits"
                )
            mask = sum(1 << e for e, bit in enumerate(mask) if bit)
        found.append(mask - (mask >> 63 << 64))
    return found


def _mixture_fake(y: Tensor, logits: Tensor, see: list[int], learn: list[int]) -> Tensor:
    return y.new_empty(logits.shape[0], *y.shape[1:])


def _mixture_backward_fake(
    grad: Tensor,
    y: Tensor,
    logits: Tensor,
    see: list[int],
    learn: list[int],
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), logits.new_empty(logits.shape)


def _mixture_expert_backward_fake(
    grads: list[Tensor], y: Tensor, p: Tensor, learn: list[int], e: int
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), p.new_empty(p.shape[:2])


def _relu_backward_fake(grad: Tensor, y: Tensor, transposed: Tensor | None = None) -> Tensor:
    size = [*y.shape[:-2], y.shape[-1]]
    return y.new_empty(size, dtype=torch.promote_types(y.dtype, torch.float32))


def _bias_relu_fake(y: Tensor, bias: Tensor, relu: bool) -> None:
    """y is changed in place."""


def _grouped_linear_fake(
    x: Tensor, reads: list[int], weight: Tensor, bias: Tensor, relu: bool
) -> Tensor:
    return x.new_empty(len(reads), x.shape[1], weight.shape[1])


def _grouped_linear_backward_fake(grad: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(y.shape), y.new_empty(y.shape[0], y.shape[2], dtype=wide)


def _expert_mixture_inference_fake(
    x: Tensor, reads: list[int], weight: Tensor, bias: Tensor, logits: Tensor, see: list[int]
) -> Tensor:
    return x.new_empty(len(see), x.shape[1], weight.shape[1])


def task_losses(
    logits: Tensor,
    labels: Tensor,
    regression: Sequence[int],
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Mean loss of each task over the rows that have its label, [T]; arguments as in
    :func:`reference.task_losses`.

    Raises:
        ValueError: an argument of another shape or type.
    """
    batch, tasks = logits.shape
    for name, given, shape, kind in (
        ("labels", labels, (batch, tasks), None),
        ("mask", mask, (batch, tasks), torch.bool),
        ("sample_weights", sample_weights, (batch,), None),
        ("counts", counts, (tasks,), torch.int64),
    ):
        if given is not None and (given.shape != shape or (kind or given.dtype) != given.dtype):
            found = f"{given.dtype} {list(given.shape)}"
            raise ValueError(f"{name} is {found}, {kind or 'a number'} {list(shape)} is due")
    if len(regression) != tasks:
        raise ValueError(f"regression has {len(regression)} tasks, the logits have {tasks}")
    arguments = logits, labels, list(regression), mask, sample_weights, counts
    own = (each is not None and each.requires_grad for each in (labels, sample_weights))
    if transformed() or any(own):
        return reference.task_losses(*arguments)[0]  # the op has a gradient of the logits alone
    return _TaskLosses.apply(*arguments)


class _TaskLosses(torch.autograd.Function):
    """:func:`task_losses` with a gradient of the logits. Registered with the op, as the mixture's
    is, it would take half as long again on CPU."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, regression: list[int], *rest: Tensor | None
    ) -> Tensor:
        means, divisors = torch.ops.stem_fast.task_losses(logits, labels, regression, *rest)
        ctx.save_for_backward(logits, labels, *rest[:2], divisors)
        ctx.regression = regression
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, *rest = ctx.saved_tensors
        back = torch.ops.stem_fast.task_losses_backward
        return back(grad, logits, labels, ctx.regression, *rest), *(None,) * 5


def _task_losses_fake(
    logits: Tensor, labels: Tensor, regression: list[int], *rest: Tensor | None
) -> tuple[Tensor, Tensor]:
    tasks, wide = logits.shape[1], torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(tasks, dtype=wide), logits.new_empty(tasks, dtype=torch.int64)


def _task_losses_backward_fake(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


def _adam_rows_fake(*arguments: Any) -> None:
    """Everything is changed in place."""


_adam_schedule_fake = _sgd_rows_fake = _adagrad_rows_fake = _adam_rows_fake


def _mixture_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, logits, ctx.see, ctx.learn = inputs
    ctx.save_for_backward(y, logits)


def _mixture_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dy, dlogits = torch.ops.stem_fast.mixture_backward(grad, *ctx.saved_tensors, ctx.see, ctx.learn)
    return dy, dlogits, None, None


torch.library.register_autograd("stem_fast::mixture", _mixture_grad, setup_context=_mixture_setup)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the ops of stem_fast have no second derivative (create_graph=True)")


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "torch.ops.stem_fast.grouped_linear, expert_mixture_inference and task_losses have no "
        "gradient: the first two are for inference, the last has one as stem_fast.ops.task_losses"
    )


for _name in ("grouped_linear", "expert_mixture_inference", "task_losses"):
    torch.library.register_autograd(f"stem_fast::{_name}", _no_gradient)

for _name in (
    "lookup_backward",
    "row_gradients",
    "mixture_backward",
    "mixture_expert_backward",
    "grouped_linear_backward",
    "task_losses_backward",
):
    torch.library.register_autograd(f"stem_fast::{_name}", _no_second_derivative)

for _name in SCHEMAS:
    torch.library.register_fake(f"stem_fast::{_name}", globals()[f"_{_name}_fake"])


def _lookup_backward(
    grad_x: Tensor,
    grad_z: Tensor,
    sums: list[int],
    ids: Tensor,
    offsets: Tensor,
    bags: list[Tensor],
    mean: int,
    rows: int,
) -> Tensor:
    """:func:`reference.lookup_backward` by the device's own plan and row gradients."""
    fields = ids.shape[1] + (len(bags[1]) if bags else 0)
    named, *plan = torch.ops.stem_fast.row_plan(ids, _narrow(offsets, rows), bags, mean)
    values = torch.ops.stem_fast.row_gradients(
        grad_x, grad_z, sums, *plan, grad_x.shape[2] // fields
    )
    return grad_x.new_zeros(rows, values.shape[1]).index_copy_(0, named, values)


def _load_cpp() -> str:
    """Load the C++ library, which overrides the defaults on CPU. Returns its state."""
    return _load_library("_cpp", "no C++ compiler was found at installation") or "in use on cpu"


def _load_library(name: str, missing: str) -> str:
    """Load a compiled library of this package. Returns why it is not loaded, or nothing."""
    files = (Path(__file__).parent / f"{name}.{ending}" for ending in ("so", "pyd"))
    libraries = [file for file in files if file.exists()]
    if not libraries:
        return f"not built ({missing})"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"built, but does not load: {error}"
    return ""


def _load_triton(without: Sequence[str] = ()) -> str:
    """Register the Triton kernels of all ops but some on CUDA (interpreted: on CPU). Returns their
    state."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        from stem_fast.kernels import adagrad, adam, linear, lookup, loss, mixture, row_plan, sgd
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "triton is not installed"
    device = "CPU" if interpreted else "CUDA"
    with warnings.catch_warnings():
        # Some ops are C++'s too, and this is the choice between the two.
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for module, names in (
            (lookup, ("lookup", "row_gradients", "check_ids")),
            (row_plan, ("row_plan",)),
            (mixture, ("mixture", "mixture_backward")),
            (linear, ("bias_relu", "relu_backward", "expert_mixture_inference")),
            (linear, ("grouped_linear", "grouped_linear_backward")),
            (loss, ("task_losses", "task_losses_backward")),
            (adam, ("adam_rows", "adam_schedule")),
            (sgd, ("sgd_rows",)),
            (adagrad, ("adagrad_rows",)),
        ):
            for name in names:
                if name not in without:
                    _library.impl(name, getattr(module, name), device)
    return f"in use on {device.lower()}"


def _load_cuda() -> str:
    """Load the CUDA C++ library, which overrides the defaults on CUDA. Returns its state."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _load_library("_cuda", "no nvcc was found at installation") or "in use on cuda"


def _load(choice: str) -> dict[str, str]:
    """Load what ``choice`` asks for. Returns every backend's state."""
    names = ("cpp", "cuda", "triton")
    if choice not in ("auto", "reference", *names):
        known = ", ".join(["auto", "reference", *names])
        raise ImportError(f"STEM_FAST_BACKEND={choice!r} is none of {known}")
    # The interpreter is for tests, which name triton.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    fastest = {"cpp"} if interpreted else set(names)
    wanted = fastest if choice == "auto" else {choice}
    off = f"off (STEM_FAST_BACKEND={choice}; set it to {{}} to have it, or to know why not)"
    states = {name: off.format(name) for name in names}
    if "cpp" in wanted:
        states["cpp"] = _load_cpp()
    if "cuda" in wanted:
        states["cuda"] = _load_cuda()
    cuda = states["cuda"] == "in use on cuda"
    if "triton" in wanted or (cuda and not interpreted):
        # C++ has not every op: Triton has the others.
        kept = FASTER_IN_CUDA if choice == "auto" else CUDA
        states["triton"] = _load_triton(kept if cuda else ())
    if cuda or states["triton"].startswith("in use"):
        device = "CPU" if states["triton"] == "in use on cpu" else "CUDA"
        _library.impl("lookup_backward", _lookup_backward, device)
    if choice in states and not states[choice].startswith("in use"):
        raise ImportError(f"STEM_FAST_BACKEND={choice}: {states[choice]}")
    return {"reference": "in use where no other is", **states}


_states = _load(os.environ.get("STEM_FAST_BACKEND", "auto"))


def backends() -> dict[str, str]:
    """State of every backend: "in use on cpu" or "in use on cuda", or why it is not."""
    return dict(_states)


def capturable() -> bool:
    """Whether a CUDA graph can hold the ops: references wait for the device, which it cannot."""
    return _states["triton"] == "in use on cuda"
