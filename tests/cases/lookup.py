"""The lookup: cases, and what is checked of an implementation."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch

from cases import assert_within, to
from stem_fast import ops, reference


class LookupCase(NamedTuple):
    vocab: tuple[int, ...]
    batch: int
    dim: int
    spaces: int
    sums: tuple[int, ...] = ()
    pooling: tuple[str, ...] = ()  # of sequence fields, which share the rows of all fields
    length: int = 3  # of the longest sequence
    weighted: bool = False

    def arguments(self, dtype: torch.dtype = torch.float64, ids: torch.dtype = torch.int64) -> Any:
        """(weight, ids, offsets, spaces, sums, bags, mean); ids repeat, and some are padding."""
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        sizes = torch.tensor(self.vocab)
        offsets = sizes.cumsum(0) - sizes
        total = int(sizes.sum())
        width = self.spaces * self.dim
        weight = torch.randn(total, width, generator=draw, dtype=torch.float64)
        weight[offsets] = 0
        uniform = torch.rand(self.batch, len(self.vocab), generator=draw, dtype=torch.float64)
        drawn = (uniform * sizes).to(ids)
        bags: list[torch.Tensor] = []
        if self.pooling:
            shape = (len(self.pooling), self.batch)
            lengths = torch.randint(0, self.length + 1, shape, generator=draw)
            ends = torch.nn.functional.pad(lengths.cumsum(1), (1, 0))
            before = lengths.sum(1).cumsum(0) - lengths.sum(1)
            n = int(lengths.sum())
            bags = [torch.randint(0, total, (n,), generator=draw).to(ids), before[:, None] + ends]
            if self.weighted:
                bags.append(torch.randn(n, generator=draw, dtype=torch.float64))
                bags[2][bags[0] == 0] = torch.nan  # as 1 / count makes of nothing
        mean = sum(1 << s for s, name in enumerate(self.pooling) if name == "mean")
        return weight.to(dtype), drawn, offsets, self.spaces, list(self.sums), bags, mean


LOOKUPS = {
    "one": LookupCase((3,), 1, 1, 1),
    "empty batch": LookupCase((3, 5), 0, 4, 2, (3,), ("sum",)),
    "odd": LookupCase((1, 2, 17), 7, 3, 5, (0b10001, 0b01110, 0b00100)),
    "many rows": LookupCase((300, 10), 101, 16, 3, (0b101, 0b110)),
    "all equal": LookupCase((2, 2), 700, 5, 2, (0b11,)),
    "sequences": LookupCase((7, 11), 29, 4, 3, (0b101, 0b110), ("mean", "sum", "mean")),
    "weighted sequences": LookupCase((9,), 17, 16, 2, (0b11,), ("sum", "mean"), weighted=True),
    "empty sequences": LookupCase((9,), 5, 3, 2, (), ("sum", "mean"), length=0),
    "wide": LookupCase((7, 5), 40, 150, 2, (0b11,)),
    "long sequences": LookupCase((50, 3), 11, 20, 2, (0b11,), ("mean",), length=200),
}
# Rows of a field, two of which make a table: C++ sorts it in one pass, in two or in three.
FIELDS = [900, 3000, 2**17, 2**23, 2**31 - 1]
# So large that in float32 its outputs come from buffers that are used again.
LARGE = LookupCase((500, 7), 2000, 24, 3, (0b101, 0b110), ("mean", "sum"), length=9, weighted=True)


def plan_arguments(rows: int, ids: torch.dtype) -> Any:
    """(ids, offsets, bags, mean) of 2,700 ids, many of which differ in one bit alone or not at all,
    and as many sequences, from all over two fields."""
    draw = torch.Generator().manual_seed(rows)
    drawn = torch.randint(1, rows, (1350, 1), generator=draw)
    bits = torch.randint(0, rows.bit_length(), (1350, 1), generator=draw)
    near = drawn ^ (1 << bits)
    drawn = torch.cat([drawn, torch.where(near < rows, near, 0)], 1).to(ids)
    drawn[:2] = torch.tensor([[1, rows - 1], [rows - 1, 1]])
    bounds = torch.arange(1351)[None] * 2
    return drawn, torch.tensor([0, rows]), [drawn.flip(0).flatten(), bounds], 1


def check_plan(plan: Any, expected: Any) -> None:
    """That a plan begins with the reference's, and goes on with padding."""
    unique, read = len(expected[0]), len(expected[2])
    assert torch.equal(plan[0][:unique], expected[0])
    assert torch.equal(plan[1][: unique + 1], expected[1])
    assert torch.equal(plan[2][:read], expected[2])
    torch.testing.assert_close(plan[3][: len(expected[3])], expected[3])
    assert not plan[0][unique:].any(), "rows past the last are padding"
    assert (plan[1][unique:] == read).all()


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
    check_plan(plan, reference.row_plan(rest[0], rest[1], *rest[4:]))
