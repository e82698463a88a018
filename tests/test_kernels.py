"""Triton kernels against the reference, on a GPU or else interpreted; and compiled without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_within, to
from cases.adagrad import ADAGRADS, AdagradCase, check_adagrad_rows
from cases.adam import (
    ADAMS,
    DECAYS,
    SCHEDULES,
    AdamCase,
    DriftCase,
    ScheduleCase,
    check_adam_rows,
    check_adam_schedule,
    check_drift,
)
from cases.linear import (
    EXPERT_MIXTURES,
    GROUPS,
    LINEARS,
    check_bias_relu,
    check_expert_mixture_inference,
    check_grouped_linear,
    check_grouped_linear_backward,
    check_relu_backward,
)
from cases.lookup import FIELDS, LOOKUPS, LookupCase, check_plan, plan_arguments
from cases.loss import LOSSES, LossCase, check_losses_near_zero, check_task_losses
from cases.mixture import MIXTURES, MixtureCase, check_not_a_number
from cases.sgd import SGDS, SgdCase, check_sgd_rows

from stem_fast import reference

triton = pytest.importorskip("triton")

from stem_fast.kernels import (  # noqa: E402
    adagrad,
    adam,
    check_ids,
    linear,
    lookup,
    loss,
    mixture,
    row_plan,
    sgd,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)


def same(actual: Any, own: Any, exact: Any) -> None:
    for each in zip(actual, own, exact, strict=True):
        assert_within(*each)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that torch hands out is full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check_row_plan(*arguments: Any) -> tuple[Any, Any]:
    """The plan, and the reference's, which it begins with."""
    plan, expected = row_plan.row_plan(*arguments), reference.row_plan(*arguments)
    check_plan(plan, expected)
    ids, offsets, *rest = arguments
    narrow = row_plan.row_plan(ids, offsets.int(), *rest)
    torch.testing.assert_close(narrow, plan, rtol=0, atol=0, equal_nan=True)
    return plan, expected


@pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
@dtypes
def test_lookup_and_its_gradients(case: LookupCase, dtype: torch.dtype) -> None:
    ids = torch.int32 if dtype.itemsize == 4 else torch.int64
    weight, *rest = to(DEVICE, case.arguments(dtype, ids))
    exact = reference.lookup(weight.double(), *rest)
    same(lookup.lookup(weight, *rest), reference.lookup(weight, *rest), exact)

    ids, offsets, _, sums, bags, mean = rest
    plan, expected = check_row_plan(ids, offsets, bags, mean)
    unique = len(expected[0])

    grads = [torch.randn_like(part).to(dtype) for part in exact]
    actual = row_plan.row_gradients(*grads, sums, *plan[1:], case.dim)
    own = reference.row_gradients(*grads, sums, *expected[1:], case.dim)
    wide = [part.double() for part in grads]
    right = reference.row_gradients(*wide, sums, *expected[1:], case.dim)
    assert_within(actual[:unique], own, right)
    assert not actual[unique:].any()


@pytest.mark.parametrize("rows", FIELDS[:-1])  # of which offsets may be int32
def test_row_plan_of_large_tables(rows: int) -> None:
    check_row_plan(*to(DEVICE, plan_arguments(rows, torch.int32)))


@pytest.mark.parametrize("name", ["many rows", "sequences"])
def test_row_plan_of_many_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than a block has places: their counts are added up in several turns."""
    monkeypatch.setattr(row_plan, "BLOCK", 4)
    _, ids, offsets, _, _, bags, mean = to(DEVICE, LOOKUPS[name].arguments())
    check_row_plan(ids, offsets, bags, mean)


def test_padding_of_sequences_is_never_read() -> None:
    weight, ids, *rest = to(DEVICE, LOOKUPS["sequences"].arguments())
    ids += (ids == 0).long()  # a categorical field does read its padding row
    expected = lookup.lookup(weight, ids, *rest)
    weight[0] = torch.nan
    torch.testing.assert_close(lookup.lookup(weight, ids, *rest), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_check_ids(dtype: torch.dtype) -> None:
    sizes = torch.tensor([3, 5, 1], device=DEVICE)
    ids = torch.randint(-2, 7, (300, 3), dtype=dtype, device=DEVICE)
    ids[7, 1] = torch.iinfo(dtype).min
    if dtype == torch.int64:
        ids[5, 0], ids[9, 1] = 2**32 + 1, -(2**32) + 2  # the low half is an id inside
    results = []
    for implementation in (check_ids.check_ids, reference.check_ids):
        bad = torch.full((3,), torch.iinfo(torch.int64).max, device=DEVICE)
        results.append((implementation(ids, sizes, bad), bad))
    for actual, right in zip(*results, strict=True):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES.keys())
@dtypes
def test_mixture_and_its_gradients(case: MixtureCase, dtype: torch.dtype) -> None:
    y, logits, see, learn = to(DEVICE, case.arguments(dtype))
    see, learn = ([mask - (mask >> 63 << 64) for mask in masks] for masks in (see, learn))
    own, exact = (y, logits, see, learn), (y.double(), logits.double(), see, learn)
    assert_within(mixture.mixture(*own), reference.mixture(*own), reference.mixture(*exact))
    grad = torch.randn(case.gates, case.batch, case.width, dtype=torch.float64).to(y)
    for relu in (False, True):
        left = y.relu() if relu else y
        same(
            mixture.mixture_backward(grad, left, *own[1:], relu),
            reference.mixture_backward(grad, left, *own[1:], relu),
            reference.mixture_backward(grad.double(), left.double(), *exact[1:], relu),
        )


def test_a_logit_that_is_not_a_number_shows() -> None:
    check_not_a_number(mixture.mixture, mixture.mixture_backward, DEVICE)


@pytest.mark.parametrize("shape", GROUPS)
@dtypes
def test_relu_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_relu_backward(linear.relu_backward, shape, dtype, DEVICE)
    check_relu_backward(linear.relu_backward, shape[1:], dtype, DEVICE)


@pytest.mark.parametrize("shape", GROUPS)
@dtypes
def test_bias_relu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_bias_relu(linear.bias_relu, shape, dtype, DEVICE)


# Beyond the shared ones, tiles of which there are several, and rows that are a multiple of 64.
TILED = [((140, 64, 20), [0, 1]), ((5, 192, 300), [1]), ((1100, 96, 130), [0, 0])]


@pytest.mark.parametrize(("sizes", "reads"), [*LINEARS, *TILED])
@pytest.mark.parametrize("relu", [False, True])
@dtypes
def test_grouped_linear(
    sizes: tuple[int, int, int], reads: list[int], relu: bool, dtype: torch.dtype
) -> None:
    check_grouped_linear(linear.grouped_linear, sizes, reads, relu, dtype, DEVICE)


@pytest.mark.parametrize(("sizes", "reads"), [*LINEARS, *TILED, ((200, 256, 64), [0])])
@dtypes
def test_grouped_linear_backward(
    sizes: tuple[int, int, int], reads: list[int], dtype: torch.dtype
) -> None:
    run = linear.grouped_linear_backward
    check_grouped_linear_backward(run, sizes, len(reads), dtype, DEVICE)


@pytest.mark.parametrize(("sizes", "reads"), EXPERT_MIXTURES)
@dtypes
def test_expert_mixture_inference(
    sizes: tuple[int, int, int, int], reads: list[int], dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and sizes[3] > linear.GATES and DEVICE == "cpu":
        pytest.skip("the interpreter cuts bfloat16 off, here twice: out of a bound for rounding")
    check_expert_mixture_inference(linear.expert_mixture_inference, sizes, reads, dtype, DEVICE)


def test_not_a_number_shows_after_a_relu() -> None:
    y = torch.tensor([[[torch.nan, -1.0, 2.0]]], device=DEVICE)
    linear.bias_relu(y, torch.zeros(1, 3, device=DEVICE), True)
    torch.testing.assert_close(y.cpu(), torch.tensor([[[torch.nan, 0, 2]]]), equal_nan=True)


def test_what_is_changed_in_place_must_be_contiguous() -> None:
    y, bias = torch.zeros(2, 4, 3, device=DEVICE).mT, torch.zeros(2, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match="y is changed in place and must be contiguous"):
        linear.bias_relu(y, bias, True)
    with pytest.raises(RuntimeError, match="grad is changed in place and must be contiguous"):
        linear.relu_backward(y, y.contiguous())


OPTIMIZERS = [
    (adam.adam_rows, ADAMS["early"], {"grads": True}),
    (adam.adam_rows, ADAMS["caught up"], {"grads": True}),
    (sgd.sgd_rows, SGDS["momentum and l2"], {"grads": True}),
    (adagrad.adagrad_rows, ADAGRADS["narrow, all sums"], {}),
]


@pytest.mark.parametrize(("run", "case", "options"), OPTIMIZERS)
def test_a_row_outside_the_table_changes_nothing(run: Any, case: Any, options: Any) -> None:
    """Nor where it would be, if the table went on."""
    arguments = to(DEVICE, case.arguments(**options))
    place = next(i for i, a in enumerate(arguments) if a is not None and a.dtype == torch.int64)
    rows, size = arguments[place], len(arguments[0])
    # What is outside has made its last step when the last row did.
    fill = [a.max() if a.dtype == torch.int32 else 7 for a in arguments[:place]]
    wide = [
        a.new_empty(3 * size, *a.shape[1:]).fill_(value)
        for a, value in zip(arguments[:place], fill, strict=True)
    ]
    for i, each in enumerate(wide):
        each[size : 2 * size] = arguments[i]
        arguments[i] = each[size : 2 * size]
    before = [each.clone() for each in wide]
    rows[:] = torch.where(torch.arange(len(rows), device=DEVICE) % 2 == 0, size + 1, -2)
    run(*arguments)
    for each, as_it_was in zip(wide, before, strict=True):
        assert torch.equal(each, as_it_was)


X, PLAN = torch.zeros(2, 2, 3), (torch.tensor([0, 2]).int(), torch.tensor([0, 1]).int())
NONE = torch.empty(0, 2, 3)
LOOK = X[0], PLAN[0][None], PLAN[0].long(), 3, []
BAGS = PLAN[1], PLAN[1].long()[None]


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        (mixture.mixture, (X, torch.zeros(1, 3, 2), [3], [3]), "logits [K, B, E]"),
        (mixture.mixture, (X, torch.zeros(1, 2, 3), [3], [3]), "logits [K, B, E]"),
        (mixture.mixture, (X, torch.zeros(2, 2, 2), [3], [3, 3]), "a mask for each of 2 gates"),
        (mixture.mixture_backward, (X, X, torch.zeros(1, 2, 2), [3], [3]), "gradient must be"),
        (lookup.lookup, (X[0], PLAN[0][None], PLAN[0].long(), 2, [], [], 0), "G = 2"),
        (lookup.lookup, (X[0], PLAN[0][None], torch.zeros(3).long(), 3, [], [], 0), "offsets [F]"),
        (lookup.lookup, (X[0], PLAN[0][None], PLAN[0], 3, [], [], 0), "offsets must be int64"),
        (lookup.lookup, (X[0], PLAN[0][None], PLAN[0].long(), 3, [8], [], 0), "it is 8"),
        (
            lookup.lookup,
            (*LOOK, [PLAN[1], PLAN[1].long()], 0),
            "bags must be rows [n], int64",
        ),
        (lookup.lookup, (*LOOK, [PLAN[1], PLAN[1][None, :1]], 0), "bags must be rows [n], int64"),
        (lookup.lookup, (*LOOK, [*BAGS, torch.ones(3)], 0), "weights of bags must be [n], n = 2"),
        (lookup.lookup, (X[0, :0], PLAN[0][None], PLAN[0].long(), 3, [], [], 0), "has no rows"),
        (row_plan.row_gradients, (X, NONE, [1], *PLAN, NONE.double().ravel(), 3), "gradients must"),
        (row_plan.row_gradients, (X, NONE, [], *PLAN, torch.ones(1).double(), 3), "a row plan's"),
        (
            check_ids.check_ids,
            (PLAN[0][None], torch.ones(2).long(), torch.ones(2, 2).long()[:, 0]),
            "bad contiguous",
        ),
    ],
)
def test_what_does_not_fit_is_refused(run: Any, arguments: Any, message: str) -> None:
    """In the words of the C++, before a kernel reads elsewhere."""
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(*to(DEVICE, arguments))


@pytest.mark.parametrize(("run", "case", "options"), OPTIMIZERS)
@pytest.mark.parametrize("argument", range(9))
def test_what_does_not_fit_a_table_is_refused(
    run: Any, case: Any, options: Any, argument: int
) -> None:
    arguments = to(DEVICE, case.arguments(**options))
    given = arguments[argument] if argument < len(arguments) else 0.0
    if not isinstance(given, torch.Tensor):
        pytest.skip("a number, or beyond the last")
    if given.dim() == 1:
        changes = [given.half(), given[None]]
    elif argument > 4:  # of steps, of which fewer lines would do
        changes = [given[:, 1:], given.float()]
    else:
        changes = [given[:-1], given.mT.contiguous().mT if argument < 2 else given[:, 1:]]
    for change in changes:
        with pytest.raises(RuntimeError, match="must be"):
            run(*arguments[:argument], change, *arguments[argument + 1 :])


@pytest.mark.parametrize("case", ADAMS.values(), ids=ADAMS.keys())
@pytest.mark.parametrize("grads", [False, True])
@dtypes
def test_adam_rows(case: AdamCase, grads: bool, dtype: torch.dtype) -> None:
    check_adam_rows(adam.adam_rows, case, dtype, grads, DEVICE)


@pytest.mark.parametrize("how", DECAYS)
def test_rows_that_miss_steps_are_as_exact_as_dense_adam(how: str) -> None:
    case = DriftCase(missed=120, gradients=(0.0, 1e-10, 1e-8, 1e-6), weights=(1e-5, 1e-3))
    check_drift(adam.adam_rows, case, how, DEVICE)


@pytest.mark.parametrize("case", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_adam_schedule(case: ScheduleCase) -> None:
    check_adam_schedule(adam.adam_schedule, case, DEVICE)


def test_adam_schedule_that_is_full_says_so() -> None:
    steps = torch.zeros(3, 29, dtype=torch.float64, device=DEVICE)
    clock = torch.tensor([5, 5], device=DEVICE)
    options = torch.tensor([1e-3, 0.0], dtype=torch.float64, device=DEVICE)
    steps[0, 3].fill_(1)
    for _ in range(3):
        assert steps[0, 3] == 1
        before = steps.clone()
        adam.adam_schedule(steps, clock, options, 0.9, 0.999, 1e-8, False, False)
    before[0, 3].fill_(0)
    assert torch.equal(steps, before), "nothing else is written"


@pytest.mark.parametrize("case", SGDS.values(), ids=SGDS.keys())
@pytest.mark.parametrize("grads", [False, True])
@dtypes
def test_sgd_rows(case: SgdCase, grads: bool, dtype: torch.dtype) -> None:
    check_sgd_rows(sgd.sgd_rows, case, dtype, grads, DEVICE)


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES.keys())
@dtypes
def test_task_losses(case: LossCase, dtype: torch.dtype) -> None:
    check_task_losses(loss.task_losses, loss.task_losses_backward, case, dtype, DEVICE)


@dtypes
def test_losses_near_zero(dtype: torch.dtype) -> None:
    check_losses_near_zero(loss.task_losses, loss.task_losses_backward, dtype, DEVICE)


def test_losses_of_more_rows_than_programs_take_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "PROGRAMS", 4)
    run = loss.task_losses, loss.task_losses_backward
    check_task_losses(*run, LOSSES["many rows"], torch.float32, DEVICE)


@pytest.mark.parametrize("case", ADAGRADS.values(), ids=ADAGRADS.keys())
@dtypes
def test_adagrad_rows(case: AdagradCase, dtype: torch.dtype) -> None:
    check_adagrad_rows(adagrad.adagrad_rows, case, dtype, DEVICE)


@pytest.mark.skipif(DEVICE == "cuda", reason="there they run without the interpreter")
def test_networks_at_once_by_these_kernels() -> None:
    """Forward and backward pass of whole groups, interpreted; in bfloat16 it would not round."""
    folder = Path(__file__).parent
    arguments = ["-p", "no:cacheprovider", "-k", "outputs_and_gradients or both_ways"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, folder / "test_batched.py"],
        cwd=folder.parent,
        env={**os.environ, "STEM_FAST_BACKEND": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


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
    kernels = {
        name
        for module in (adagrad, adam, check_ids, linear, lookup, loss, mixture, row_plan, sgd)
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.interpreter.InterpretedFunction | triton.JITFunction)
    }
    parts = {"_alive", "_coast", "_column", "_load", "_make_step", "_read"}
    parts |= {"_extend", "_new_row", "_powers", "_product", "_value"}
    parts |= {"_first_of_row", "_tile_of_program"}
    parts |= {"_replay", "_row_of", "_weights", "_write"}
    parts |= {"_names", "_newest_step", "_row", "pick"}
    for kernel in kernels - parts:
        for arch in (80, 90, 100):
            assert any(
                title.startswith(f"{kernel} ") and title.endswith(f"sm_{arch}") for title in used
            )
    # Some releases of Triton (3.8 of 3.8 and 3.9) keep one address on the stack: 8 bytes.
    assert {title: use for title, use in used.items() if use["local_bytes"] > 8} == {}
