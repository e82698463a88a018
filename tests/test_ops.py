"""Every op, on the backend in use, against the float64 reference, and as a citizen of PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    ADAGRADS,
    ADAMS,
    DEVICES,
    EXPERT_MIXTURES,
    GROUPS,
    LEAPS,
    LINEARS,
    LOOKUPS,
    MIXTURES,
    SCHEDULES,
    SGDS,
    AdagradCase,
    AdamCase,
    LookupCase,
    MixtureCase,
    ScheduleCase,
    SgdCase,
    assert_within,
    check_adagrad_rows,
    check_adam_leap,
    check_adam_rows,
    check_adam_schedule,
    check_bias_relu,
    check_expert_mixture_inference,
    check_grouped_linear,
    check_relu_backward,
    check_sgd_rows,
    to,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_fast import backends, ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
lookups = pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
cpp = pytest.mark.skipif(backends()["cpp"] != "in use on cpu", reason="no C++ library")
devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
mixtures = pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES.keys())


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that torch hands out is full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check_lookup(case: LookupCase, dtype: torch.dtype, ids: torch.dtype, device: str) -> None:
    """Both outputs, the plan, and the dense and the sparse gradient."""
    weight, *rest = to(device, case.arguments(dtype, ids))
    weights = [w.requires_grad_() for w in (weight, weight.clone().detach(), weight.double())]
    outputs = [ops.lookup(weights[0], *rest)]
    outputs += [reference.lookup(w, *rest) for w in weights[1:]]
    for actual, own, exact in zip(*outputs, strict=True):
        assert_within(actual, own, exact)
    draw = [torch.randn_like(exact).to(dtype) for exact in outputs[2]]
    grads = [
        torch.autograd.grad(out, w, [g.to(w.dtype) for g in draw])[0]
        for out, w in zip(outputs, weights, strict=True)
    ]
    assert_within(*grads)
    plan = ops.row_plan(rest[0], rest[1], *rest[4:])
    outputs = [ops.lookup(weights[0], *rest, plan=plan)]
    (sparse,) = torch.autograd.grad(outputs[0], weights[0], draw)
    assert sparse.layout == torch.sparse_coo
    assert_within(sparse.to_dense(), *grads[1:])
    expected = reference.row_plan(rest[0], rest[1], *rest[4:])
    unique, read = len(expected[0]), len(expected[2])
    assert torch.equal(plan.rows[:unique], expected[0])
    assert not plan.rows[unique:].any()
    assert torch.equal(plan.segments[: unique + 1], expected[1])
    assert torch.equal(plan.sources[:read], expected[2])
    torch.testing.assert_close(plan.scales[: len(expected[3])], expected[3])


@devices
@lookups
@dtypes
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_lookup_and_its_gradients(
    case: LookupCase, dtype: torch.dtype, ids: torch.dtype, device: str
) -> None:
    check_lookup(case, dtype, ids, device)


@devices
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_lookup_of_any_shape(data: st.DataObject, device: str) -> None:
    spaces = data.draw(st.integers(1, 6))
    case = LookupCase(
        vocab=tuple(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))),
        batch=data.draw(st.integers(0, 40)),
        dim=data.draw(st.integers(1, 40)),
        spaces=spaces,
        sums=tuple(data.draw(st.lists(st.integers(1, (1 << spaces) - 1), max_size=4))),
        pooling=tuple(data.draw(st.lists(st.sampled_from(["mean", "sum"]), max_size=3))),
        length=data.draw(st.integers(0, 9)),
        weighted=data.draw(st.booleans()),
    )
    dtype, ids = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([32, 64]))
    check_lookup(case, dtype, {32: torch.int32, 64: torch.int64}[ids], device)


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
def test_padding_of_sequences_is_never_read(device: str) -> None:
    weight, ids, *rest = to(device, LOOKUPS["sequences"].arguments())
    ids += (ids == 0).long()  # a categorical field does read its padding row
    expected = ops.lookup(weight, ids, *rest)
    weight[0] = torch.nan
    torch.testing.assert_close(ops.lookup(weight, ids, *rest), expected)


@devices
def test_lookup_copies_bit_for_bit(device: str) -> None:
    for dtype in DTYPES:
        weight, ids, offsets, spaces, *_ = to(device, LOOKUPS["odd"].arguments(dtype))
        x, z = ops.lookup(weight, ids, offsets, spaces)
        assert torch.equal(x, reference.lookup(weight, ids, offsets, spaces)[0])
        assert z.shape == (0, *x.shape[1:])


@devices
def test_lookup_takes_what_is_not_contiguous(device: str) -> None:
    weight, ids, offsets, spaces, sums, bags, mean = to(device, LOOKUPS["sequences"].arguments())
    expected = reference.lookup(weight, ids, offsets, spaces, sums, bags, mean)
    strided = [t.T.contiguous().T for t in (weight, ids, bags[1])]
    assert not any(t.is_contiguous() for t in strided)
    bags = [torch.stack([bags[0], bags[0]], 1)[:, 0], strided[2]]
    actual = ops.lookup(*strided[:2], offsets, spaces, sums, bags, mean)
    torch.testing.assert_close(actual, expected)
    plan = ops.row_plan(ids, offsets, bags, mean)
    torch.testing.assert_close(tuple(ops.row_plan(strided[1], offsets, bags, mean)), tuple(plan))
    grad = [torch.randn_like(part.mT.contiguous()).mT for part in expected]
    actual = torch.ops.stem_fast.row_gradients(*grad, sums, *plan[1:], 4)
    torch.testing.assert_close(actual, reference.row_gradients(*grad, sums, *plan[1:], 4))


def test_weights_of_bags_that_want_a_gradient_are_refused() -> None:
    *rest, bags, mean = LOOKUPS["weighted sequences"].arguments()
    bags[2].requires_grad_()
    with pytest.raises(ValueError, match="the weights of bags get no gradient"):
        ops.lookup(*rest, bags, mean)


@cpp
@pytest.mark.parametrize("bad", [-1, 17])
def test_lookup_never_reads_outside_the_arena(bad: int) -> None:
    """The model names the field before; the op keeps memory safe whoever calls it."""
    weight, ids, offsets, spaces, *_ = LOOKUPS["odd"].arguments()
    ids[5, 2] = bad * 100
    message = f"id {bad * 100} of field 2 at row 5 is outside the arena of 20 rows"
    with pytest.raises(RuntimeError, match=message):
        ops.lookup(weight, ids, offsets, spaces)
    *rest, bags, mean = LOOKUPS["sequences"].arguments()
    bags[0][4] = bad * 100
    message = f"row {bad * 100} at 4 of the bags is outside the arena of 18 rows"
    with pytest.raises(RuntimeError, match=message):
        ops.lookup(*rest, bags, mean)


IDS = torch.zeros(2, 1, dtype=torch.int64)
BAGS = [torch.tensor([1, 2]), torch.tensor([[0, 1, 2]])]


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spaces": 4}, r"weight must be \[R, G\*D\] with G = 4"),
        ({"offsets": torch.tensor([0, 1])}, r"ids must be \[B, F\] and offsets \[F\]"),
        ({"offsets": torch.tensor([0]).int()}, "offsets must be int64"),
        ({"ids": IDS.float(), "bags": []}, "ids must be int32 or int64"),
        ({"weight": torch.zeros(5, 6).int()}, "a float64, float32, bfloat16 or float16 tensor"),
        ({"sums": [0]}, "a sum must name some of the 2 spaces; it is 0"),
        ({"sums": [3, 4]}, "a sum must name some of the 2 spaces; it is 4"),
        ({"bags": [BAGS[0], torch.tensor([[0, 2]])]}, "bags must be rows"),
        ({"bags": [BAGS[0].int(), BAGS[1]]}, "rows of bags must have the type of ids"),
        ({"bags": [*BAGS, torch.ones(3)]}, r"weights of bags must be \[n\], n = 2"),
        (
            {"bags": [BAGS[0], torch.tensor([[0, 2, 1]])]},
            r"bound 1 of bag field 0 at row 2 must be in 2\.\.2",
        ),
        (
            {"bags": [BAGS[0], torch.tensor([[0, 1, 3]])]},
            r"bound 3 of bag field 0 at row 2 must be in 1\.\.2",
        ),
    ],
)
def test_lookup_refuses_other_shapes_and_types(change: dict[str, Any], message: str) -> None:
    arguments = {
        "weight": torch.zeros(5, 6),
        "ids": IDS,
        "offsets": torch.tensor([0]),
        "spaces": 2,
        "bags": BAGS,
    }
    ops.lookup(**arguments)
    with pytest.raises(RuntimeError, match=message):
        ops.lookup(**(arguments | change))


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": torch.tensor([0, 2]).int()}, "the plan is of another batch"),
        ({"sources": torch.tensor([0, -1]).int()}, "the plan is of another batch"),
        ({"segments": torch.tensor([0, 3]).int()}, "the plan is of another batch"),
        ({"segments": torch.tensor([0, 2])}, "must be a row plan's"),
        ({"scales": torch.ones(1).double()}, "must be a row plan's"),
        ({"dim": 2}, r"gradients must be \[G, B, C\*D\]"),
        ({"grad_z": torch.zeros(1, 2, 3)}, r"gradients must be \[G, B, C\*D\]"),
    ],
)
def test_row_gradients_refuse_another_plan(change: dict[str, Any], message: str) -> None:
    arguments = {
        "grad_x": torch.zeros(2, 2, 3),
        "grad_z": torch.zeros(0, 2, 3),
        "sums": [],
        "segments": torch.tensor([0, 2]).int(),
        "sources": torch.tensor([0, 1]).int(),
        "scales": torch.empty(0).double(),
        "dim": 3,
    }
    torch.ops.stem_fast.row_gradients(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.row_gradients(**(arguments | change))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_outside_names_the_first_wrong_id(dtype: torch.dtype) -> None:
    sizes = torch.tensor([4, 9, 6])
    ids = torch.stack([torch.randint(0, n, (50,)) for n in (4, 9, 6)], 1).to(dtype)
    for right in (ids, ids[:0], ids.T.contiguous().T):
        found = torch.ops.stem_fast.outside(right, sizes)
        assert (found.item(), found.dtype) == (-1, torch.int64)
    for place, wrong in ((149, 6), (40, 9), (33, -1), (0, torch.iinfo(dtype).min)):
        ids.view(-1)[place] = wrong
        for op in (torch.ops.stem_fast.outside, reference.outside):
            assert op(ids, sizes).item() == place
            assert op(ids.T.contiguous().T, sizes).item() == place
    ids[0, 0] = torch.iinfo(dtype).max
    assert torch.ops.stem_fast.outside(ids, sizes).item() == 0


@devices
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_check_ids_replaces_and_notes(dtype: torch.dtype, device: str) -> None:
    sizes = torch.tensor([3, 5, 1], device=device)
    ids = torch.tensor([[0, 4, 0], [2, 5, 0], [3, -1, 0], [-7, 0, 0]], dtype=dtype, device=device)
    never = torch.iinfo(torch.int64).max
    bad = torch.full((3,), never, device=device)
    actual = ops.check_ids(ids, sizes, bad)
    assert actual.dtype == dtype
    assert actual.tolist() == [[0, 4, 0], [2, 4, 0], [2, 4, 0], [2, 0, 0]]
    assert bad.tolist() == [2 << 32 | 3, 1 << 32 | 5, never]
    ops.check_ids(ids[3:], sizes, bad)
    assert bad.tolist() == [0 << 32 | (2**32 - 7), 1 << 32 | 5, never]


@devices
@pytest.mark.parametrize("case", ADAMS.values(), ids=ADAMS.keys())
@pytest.mark.parametrize("grads", [False, True])
@dtypes
def test_adam_rows(case: AdamCase, grads: bool, dtype: torch.dtype, device: str) -> None:
    check_adam_rows(torch.ops.stem_fast.adam_rows, case, dtype, grads, device)


@devices
@pytest.mark.parametrize("case", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_adam_schedule(case: ScheduleCase, device: str) -> None:
    check_adam_schedule(torch.ops.stem_fast.adam_schedule, case, device)


@devices
@pytest.mark.parametrize("case", LEAPS.values(), ids=LEAPS.keys())
def test_adam_leap(case: ScheduleCase, device: str) -> None:
    check_adam_leap(torch.ops.stem_fast.adam_leap, case, device)


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(9, 11)}, "steps must be contiguous float64"),
        ({1: torch.zeros(2)}, "clock must be contiguous int64"),
        ({1: torch.tensor([0, 8])}, "line 9 of a table of 9"),
        ({2: torch.zeros(2)}, "options must be contiguous float64"),
    ],
)
def test_adam_schedule_refuses_other_shapes_and_types(change: dict[int, Any], message: str) -> None:
    steps, options = torch.zeros(9, 17, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    arguments = {0: steps, 1: torch.tensor([0, 0]), 2: options} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.adam_schedule(*arguments.values(), 0.9, 0.999, 1e-8, False, False)


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(40, 6)}, "exp_avg and exp_avg_sq must be as weight"),
        ({2: torch.zeros(7, 40).T}, "what is changed in place must be contiguous"),
        ({3: torch.zeros(40)}, "last must be int32"),
        ({4: torch.zeros(3)}, "rows must be int64"),
        ({4: torch.tensor([1, 2, 40]), 5: None}, "row 40 at 2 is outside the table of 40 rows"),
        ({5: torch.zeros(4, 7)}, "grad must be"),
        ({6: torch.zeros(3, 7)}, "steps must be float64"),
        ({7: torch.zeros(3, 22)}, "leaps must be float64"),
        ({8: torch.tensor([0, 5000])}, "lines for steps 0 to 5000"),
    ],
)
def test_adam_rows_refuses_other_shapes_and_types(change: dict[int, Any], message: str) -> None:
    arguments = dict(enumerate(ADAMS["early"].arguments(grads=True))) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.adam_rows(*arguments.values())


@cpp
def test_adam_rows_is_the_same_with_one_thread() -> None:
    results = []
    threads = torch.get_num_threads()
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        arguments = AdamCase(3000, 48, 40, base=400).arguments(torch.float32)
        torch.ops.stem_fast.adam_rows(*arguments)
        results.append(arguments[:4])
    torch.set_num_threads(threads)
    for first, second, alone in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, alone)


@devices
@pytest.mark.parametrize("case", SGDS.values(), ids=SGDS.keys())
@pytest.mark.parametrize("grads", [False, True])
@dtypes
def test_sgd_rows(case: SgdCase, grads: bool, dtype: torch.dtype, device: str) -> None:
    check_sgd_rows(torch.ops.stem_fast.sgd_rows, case, dtype, grads, device)


@devices
@pytest.mark.parametrize("case", ADAGRADS.values(), ids=ADAGRADS.keys())
@dtypes
def test_adagrad_rows(case: AdagradCase, dtype: torch.dtype, device: str) -> None:
    check_adagrad_rows(torch.ops.stem_fast.adagrad_rows, case, dtype, device)


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(60)}, r"weight must be \[R, W\]"),
        ({0: torch.zeros(7, 60).T}, "what is changed in place must be contiguous"),
        ({0: torch.zeros(60, 7).int()}, "a float64, float32, bfloat16 or float16 tensor"),
        ({1: torch.zeros(60, 6)}, "momentum_buffer must be as weight"),
        ({1: torch.zeros(7, 60).T}, "what is changed in place must be contiguous"),
        ({2: torch.zeros(60)}, "last must be int32"),
        ({3: torch.zeros(3)}, "rows must be int64"),
        ({3: torch.tensor([1, 2, 60]), 4: None}, "row 60 at 2 is outside the table of 60 rows"),
        ({4: torch.zeros(4, 7)}, "grad must be"),
        ({5: torch.zeros(3, 7)}, "steps must be float64"),
        ({6: torch.tensor([0, 5000])}, "lines for steps 0 to 5000"),
    ],
)
def test_sgd_rows_refuses_other_shapes_and_types(change: dict[int, Any], message: str) -> None:
    arguments = dict(enumerate(SGDS["momentum and l2"].arguments(grads=True))) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.sgd_rows(*arguments.values())


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(40)}, r"weight must be \[R, W\]"),
        ({0: torch.zeros(7, 40).T}, "what is changed in place must be contiguous"),
        ({1: torch.zeros(40, 6)}, r"sum must be \[40\] or \[40, 7\]"),
        ({1: torch.tensor(0.0)}, r"sum must be \[40\] or \[40, 7\]"),
        ({1: torch.zeros(7, 40).T}, "what is changed in place must be contiguous"),
        ({2: torch.zeros(3)}, "rows must be int64"),
        (
            {2: torch.tensor([1, -1]), 3: torch.zeros(2, 7)},
            "row -1 at 1 is outside the table of 40",
        ),
        ({3: torch.zeros(4, 7)}, "grad must be"),
        ({4: torch.zeros(2)}, r"options must be float64 \[2\]"),
    ],
)
def test_adagrad_rows_refuses_other_shapes_and_types(change: dict[int, Any], message: str) -> None:
    arguments = dict(enumerate(ADAGRADS["narrow, all sums"].arguments())) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.adagrad_rows(*arguments.values())


@cpp
def test_sgd_and_adagrad_rows_are_the_same_with_one_thread() -> None:
    results = []
    threads = torch.get_num_threads()
    for count in (threads, 1):
        torch.set_num_threads(count)
        sgd = SgdCase(3000, 48, 40, decay=1e-3).arguments(torch.float32, grads=True)
        torch.ops.stem_fast.sgd_rows(*sgd)
        results.append(sgd[:3])
        for row_wise in (False, True):
            adagrad = AdagradCase(3000, 48, row_wise, 1e-3).arguments(torch.float32)
            torch.ops.stem_fast.adagrad_rows(*adagrad)
            results[-1] += adagrad[:2]
    torch.set_num_threads(threads)
    for many, alone in zip(*results, strict=True):
        assert torch.equal(many, alone)


@devices
@dtypes
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 20), (131, 37), (276, 30), (300, 512)])
def test_relu_backward(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_relu_backward(torch.ops.stem_fast.relu_backward, shape, dtype, device)


@pytest.mark.parametrize("device", DEVICES[1:])
@dtypes
@pytest.mark.parametrize("shape", GROUPS)
def test_relu_backward_of_groups(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check_relu_backward(torch.ops.stem_fast.relu_backward, shape, dtype, device)


@devices
@dtypes
@pytest.mark.parametrize("shape", GROUPS)
def test_bias_relu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check_bias_relu(torch.ops.stem_fast.bias_relu, shape, dtype, device)


@cpp
def test_relu_backward_is_the_same_with_one_thread() -> None:
    y, grad = torch.randn(3000, 40), torch.randn(3000, 40)
    threads = torch.get_num_threads()
    results = []
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        results.append(torch.ops.stem_fast.relu_backward(grad.clone(), y))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@cpp
@pytest.mark.parametrize(
    ("grad", "transposed", "message"),
    [
        (torch.zeros(3, 2), None, "must be .B, H. of one type"),
        (torch.zeros(2, 3).double(), None, "must be .B, H. of one type"),
        (torch.zeros(3, 2).T, None, "must be contiguous"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "transposed must be contiguous, .H, B."),
        (torch.zeros(2, 3), torch.zeros(2, 3).T, "transposed must be contiguous, .H, B."),
        (torch.zeros(2, 3), torch.zeros(3, 2).double(), "of the gradient's type"),
    ],
)
def test_relu_backward_refuses_other_shapes_and_types(
    grad: torch.Tensor, transposed: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.relu_backward(grad, torch.zeros(2, 3), transposed)


@devices
@dtypes
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("sizes", "reads"), LINEARS)
def test_grouped_linear(
    sizes: tuple[int, int, int], reads: list[int], relu: bool, dtype: torch.dtype, device: str
) -> None:
    check_grouped_linear(torch.ops.stem_fast.grouped_linear, sizes, reads, relu, dtype, device)


@cpp
def test_grouped_linear_is_the_same_with_one_thread() -> None:
    x, weight, bias = torch.randn(1, 9, 300), torch.randn(3, 200, 300), torch.randn(3, 200)
    threads = torch.get_num_threads()
    results = []
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        results.append(torch.ops.stem_fast.grouped_linear(x, [0, 0, 0], weight, bias, True))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 4, 5)}, r"x must be \[N, B, I\], weight"),
        ({1: [0] * 4}, "at most E reads"),
        ({1: [2]}, "must name one of the 2 inputs; one is 2"),
        ({1: [-1]}, "must name one of the 2 inputs; one is -1"),
        ({3: torch.zeros(3, 2)}, r"weight \[E, O, I\] and bias \[E, O\]"),
        ({2: torch.zeros(3, 7, 6).double()}, "must have one type"),
    ],
)
def test_grouped_linear_refuses_other_shapes_and_types(
    change: dict[int, Any], message: str
) -> None:
    arguments = [torch.zeros(2, 4, 6), [0, 1], torch.zeros(3, 7, 6), torch.zeros(3, 7), True]
    torch.ops.stem_fast.grouped_linear(*arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stem_fast.grouped_linear(*(dict(enumerate(arguments)) | change).values())


@devices
@pytest.mark.parametrize(("sizes", "reads"), EXPERT_MIXTURES)
@dtypes
def test_expert_mixture_inference(
    sizes: tuple[int, int, int, int], reads: list[int], dtype: torch.dtype, device: str
) -> None:
    check_expert_mixture_inference(
        torch.ops.stem_fast.expert_mixture_inference, sizes, reads, dtype, device
    )


def test_what_is_for_inference_has_no_gradient() -> None:
    x = torch.zeros(1, 4, 6, requires_grad=True)
    y = torch.ops.stem_fast.grouped_linear(x, [0], torch.zeros(3, 7, 6), torch.zeros(3, 7), True)
    with pytest.raises(RuntimeError, match="have no gradient"):
        y.sum().backward()
    logits = torch.zeros(1, 4, 1)
    mixed = torch.ops.stem_fast.expert_mixture_inference(
        x, [0], torch.zeros(1, 7, 6), torch.zeros(1, 7), logits, [1]
    )
    with pytest.raises(RuntimeError, match="have no gradient"):
        mixed.sum().backward()


@cpp
def test_bfloat16_rounds_as_torch_does() -> None:
    # One expert of weight 1 gives back every number, NaN and infinity.
    y = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    y = y.view(1, -1, 16)
    one = torch.zeros(1, y.shape[1], 1, dtype=torch.bfloat16)
    torch.testing.assert_close(ops.mixture(y, one, [1], [1]), y, rtol=0, atol=0, equal_nan=True)
    # Two experts of weight 1/2: their exact mean is a tie or not, and is rounded to even.
    a, b = torch.rand(2, 5000, 16).bfloat16()
    mean = ((a.float() + b.float()) / 2).bfloat16()
    half = torch.zeros(1, 5000, 2, dtype=torch.bfloat16)
    assert torch.equal(ops.mixture(torch.stack([a, b]), half, [3], [3])[0], mean)


def check_mixture(case: MixtureCase, dtype: torch.dtype, device: str) -> None:
    y, logits, see, learn = to(device, case.arguments(dtype))
    inputs = [(y, logits), (y.clone(), logits.clone()), (y.double(), logits.double())]
    draw = torch.randn(case.gates, case.batch, case.width, dtype=torch.float64, device=device)
    results = []
    for op, pair in zip((ops.mixture, *[reference.mixture] * 2), inputs, strict=True):
        pair = tuple(t.detach().requires_grad_() for t in pair)
        out = op(*pair, see, learn)
        grads = torch.autograd.grad(
            out, pair, draw.to(dtype).to(out.dtype), allow_unused=True, materialize_grads=True
        )
        results.append((out, *grads))
    for actual, own, exact in zip(*results, strict=True):
        assert_within(actual, own, exact)


@devices
@mixtures
@dtypes
def test_mixture_and_its_gradients(case: MixtureCase, dtype: torch.dtype, device: str) -> None:
    check_mixture(case, dtype, device)


@devices
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_mixture_of_any_shape(data: st.DataObject, device: str) -> None:
    experts, gates = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 16))
    see = [data.draw(st.integers(1, (1 << experts) - 1)) for _ in range(gates)]
    learn = [mask & data.draw(st.integers(0, (1 << experts) - 1)) for mask in see]
    case = MixtureCase(
        experts,
        gates,
        batch=data.draw(st.integers(0, 9)),
        width=data.draw(st.integers(1, 70)),
        see=tuple(see),
        learn=tuple(learn),
        scale=data.draw(st.sampled_from([1.0, 1e4])),
    )
    check_mixture(case, data.draw(st.sampled_from(DTYPES)), device)


@devices
@mixtures
@dtypes
def test_mixture_expert_backward(case: MixtureCase, dtype: torch.dtype, device: str) -> None:
    y, logits, _, learn = to(device, case.arguments(dtype))
    learn = ops.signed(learn)
    draw = torch.randn(case.gates, case.batch, case.width, device=device).to(dtype)
    p = logits.to(torch.promote_types(dtype, torch.float32)).softmax(-1)
    for e in range(case.experts):
        results = [
            torch.ops.stem_fast.mixture_expert_backward(list(draw), y[e], p, learn, e),
            reference.mixture_expert_backward(draw, y[e], p, learn, e),
            reference.mixture_expert_backward(draw.double(), y[e].double(), p.double(), learn, e),
        ]
        for actual, own, exact in zip(*results, strict=True):
            assert_within(actual, own, exact)


@pytest.mark.parametrize(
    ("experts", "gates", "width"), [(0, 2, 3), (2, 0, 3), (2, 2, 0), (65, 2, 3), (2, 17, 3)]
)
def test_mixture_refuses_other_sizes(experts: int, gates: int, width: int) -> None:
    y, logits = torch.zeros(experts, 4, width), torch.zeros(gates, 4, experts)
    with pytest.raises(ValueError, match="1 to 64 experts, 1 to 16 gates and a width above 0"):
        ops.mixture(y, logits, [1] * gates, [1] * gates)


@devices
def test_a_second_derivative_is_refused(device: str) -> None:
    y, logits, see, learn = to(device, MIXTURES["odd"].arguments())
    weight, *rest = to(device, LOOKUPS["odd"].arguments())
    y.requires_grad_(), weight.requires_grad_()
    outputs = [
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
def test_mixture_takes_what_is_not_contiguous(device: str) -> None:
    y, logits, see, learn = to(device, MIXTURES["odd"].arguments())
    out = reference.mixture(y, logits, see, learn)
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (y, logits, out.detach())]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(ops.mixture(*strided[:2], see, learn), out)
    torch.testing.assert_close(
        torch.ops.stem_fast.mixture_backward(strided[2], *strided[:2], see, learn),
        reference.mixture_backward(out, y, logits, see, learn),
    )


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
    assert torch.autograd.gradcheck(lambda w: ops.lookup(w, ids, *rest), weight.requires_grad_())


@devices
@pytest.mark.parametrize("name", ["odd", "empty batch", "weighted sequences"])
def test_opcheck(name: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)  # it compares uninitialised outputs of fakes
    weight, ids, offsets, spaces, sums, bags, mean = to(device, LOOKUPS[name].arguments())
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
    mixed = (*arguments[:4], logits[:, :, :2].contiguous(), [3, 1, *[2] * (len(logits) - 2)])
    torch.library.opcheck(library.expert_mixture_inference.default, mixed)
    for grads in (False, True):
        adam = to(device, ADAMS["early"].arguments(grads=grads))
        torch.library.opcheck(library.adam_rows.default, adam)
        options = torch.tensor([1e-3, 1e-6], dtype=torch.float64, device=device)
        schedule = (adam[6], adam[8], options, 0.9, 0.999, 1e-8, False, grads)
        torch.library.opcheck(library.adam_schedule.default, schedule)
        torch.library.opcheck(library.adam_leap.default, (*adam[6:9], 0.9, 0.999))
        for case in ("momentum and l2", "l2 alone"):
            sgd = to(device, SGDS[case].arguments(grads=grads))
            torch.library.opcheck(library.sgd_rows.default, sgd)
    for case in ("narrow, all sums", "all rows, a sum a row"):
        torch.library.opcheck(library.adagrad_rows.default, to(device, ADAGRADS[case].arguments()))
    torch.library.opcheck(library.empty_kept.default, (y, [3, 4]), test_utils="test_schema")
    torch.library.opcheck(library.huge_pages.default, (y.detach(),))


# Larger than what malloc keeps: their outputs come from buffers that are used again.
LARGE = LookupCase((500, 7), 1500, 24, 3, (0b101, 0b110), ("mean", "sum"), length=9, weighted=True)
LARGE_MIXTURE = MixtureCase(10, 2, 700, 96, (1023, 1023), (1021, 1022))


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
