"""Lookup, row plan, row gradients and the check of ids, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, cpp, devices, dtypes, to
from cases.lookup import FIELDS, LOOKUPS, LookupCase, check_lookup, check_plan, plan_arguments
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_fast import ops, reference
from stem_fast.ops.row_plan import narrow

lookups = pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())


@devices
@lookups
@dtypes
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_lookup_and_its_gradients(
    case: LookupCase, dtype: torch.dtype, ids: torch.dtype, device: str
) -> None:
    check_lookup(case, dtype, ids, device)


@devices
@settings(max_examples=60)
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
@pytest.mark.parametrize("rows", FIELDS)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_row_plan_of_large_tables(rows: int, ids: torch.dtype, device: str) -> None:
    arguments = to(device, plan_arguments(rows, ids))
    check_plan(ops.row_plan(*arguments), reference.row_plan(*arguments))


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
    read = int(plan.segments[-1])  # on CUDA a plan goes on after it, which the reference knows not
    rest = plan.segments, plan.sources[:read], plan.scales[:read]
    torch.testing.assert_close(actual, reference.row_gradients(*grad, sums, *rest, 4))


@devices
def test_rows_that_repeat_are_merged(device: str) -> None:
    rows = torch.tensor([7, 3, 7, 0, 5, 3, 7], device=device)
    values = torch.randn(7, 6, dtype=torch.float64, device=device)
    values[3] = 0  # padding
    named, sums = ops.merge_rows(rows, values)
    dense = torch.zeros(9, 6, dtype=torch.float64, device=device)
    expected = dense.index_add(0, rows, values)
    torch.testing.assert_close(dense.index_add(0, named, sums), expected)
    assert len(named[named != 0]) == 3


def test_offsets_are_narrow_where_they_and_one_number_more_are() -> None:
    offsets = torch.tensor([0, 2**31 - 2])
    assert narrow(offsets, 2**31 - 1).dtype == torch.int32
    assert torch.equal(narrow(offsets, 2**31 - 1), offsets)
    assert narrow(offsets, 2**31) is offsets


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
            {"bags": [BAGS[0], torch.tensor([[0, 1, 2], [1, 2, 2]])]},
            r"bound 1 of bag field 1 at row 0 must be in 2\.\.2",
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
def test_bags_of_no_field_are_none(device: str) -> None:
    """Exported programs have them, because AOTInductor takes no empty list."""
    weight, ids, offsets, spaces, sums, _, mean = to(device, LOOKUPS["odd"].arguments())
    none = [ids.new_empty(0), offsets.new_empty(0, len(ids) + 1)]
    grads = []
    for bags in ([], none):
        leaf = weight.clone().requires_grad_()
        found = ops.lookup(leaf, ids, offsets, spaces, sums, bags, mean)
        grads.append((*found, *torch.autograd.grad([part.sin().sum() for part in found], leaf)))
    for without, with_none in zip(*grads, strict=True):
        assert torch.equal(without, with_none)


@devices
def test_ids_past_32_bits_are_outside(device: str) -> None:
    """The low half of each is an id inside."""
    sizes = torch.tensor([3, 5, 1], device=device)
    ids = torch.tensor([[1, 2, 0], [2**32, 2, -(2**32)], [1, 2**33 + 4, 0]], device=device)
    never = torch.iinfo(torch.int64).max
    bad = torch.full((3,), never, device=device)
    assert ops.check_ids(ids, sizes, bad).tolist() == [[1, 2, 0], [2, 2, 0], [1, 4, 0]]
    # What is noted is as near as 32 bits come.
    assert bad.tolist() == [1 << 32 | 2**31 - 1, 2 << 32 | 2**31 - 1, 1 << 32 | 2**31]
    for place in (3, 5, 7):
        one = torch.zeros(9, dtype=torch.int64, device=device)
        one[place] = ids.view(-1)[place]
        for op in (torch.ops.stem_fast.outside, reference.outside):
            assert op(one.view(3, 3), sizes).item() == place
