"""One set of shapes and tensors for every test of the ops (values, gradients, opcheck, compile),
and one bound on errors."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stem_fast import backends, ops, reference
from stem_fast.optim import Products, Schedule

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
# So large that in float32 its outputs come from buffers that are used again.
LARGE = LookupCase((500, 7), 2000, 24, 3, (0b101, 0b110), ("mean", "sum"), length=9, weighted=True)


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


class MixtureCase(NamedTuple):
    experts: int
    gates: int
    batch: int
    width: int
    see: tuple[int, ...]
    learn: tuple[int, ...]
    scale: float = 1.0  # of the logits
    ties: bool = False  # logits of that size, up to their sign

    def arguments(self, dtype: torch.dtype = torch.float64) -> Any:
        """(y, logits, see, learn)."""
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        y = torch.randn(self.experts, self.batch, self.width, generator=draw, dtype=torch.float64)
        logits = torch.randn(
            self.gates, self.batch, self.experts, generator=draw, dtype=torch.float64
        )
        logits = logits.sign() if self.ties else logits
        return y.to(dtype), (logits * self.scale).to(dtype), list(self.see), list(self.learn)


def stem_masks(tasks: int, specific: int, shared: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """see and learn of STEM, with its shared gate, from the definition bit by bit."""
    experts = [t for t in range(tasks) for _ in range(specific)] + [tasks] * shared
    everything = (1 << len(experts)) - 1
    learn = tuple(
        sum(1 << e for e, owner in enumerate(experts) if owner in (task, tasks))
        for task in range(tasks)
    )
    return (everything,) * (tasks + 1), (*learn, everything)


MIXTURES = {
    "one": MixtureCase(1, 1, 1, 1, (1,), (1,)),
    "empty batch": MixtureCase(3, 2, 0, 4, (7, 7), (5, 6)),
    "stem": MixtureCase(10, 3, 33, 20, *stem_masks(2, 1, 8)),
    "odd": MixtureCase(7, 4, 5, 13, *stem_masks(3, 2, 1)),
    "seeing less than all": MixtureCase(4, 2, 9, 6, (0b1011, 0b1101), (0b1001, 0b0100)),
    "teaching nobody": MixtureCase(3, 2, 4, 5, (7, 7), (0, 2)),
    "16 gates": MixtureCase(17, 16, 3, 8, *stem_masks(15, 1, 2)),
    "64 experts": MixtureCase(64, 2, 3, 5, ((1 << 64) - 1,) * 2, (1 << 63, (1 << 63) - 1)),
    "extreme logits": MixtureCase(5, 3, 11, 7, *stem_masks(2, 2, 1), scale=1e4),
    "extreme ties": MixtureCase(5, 3, 11, 7, *stem_masks(2, 2, 1), scale=1e4, ties=True),
}
# So large that its gradient does.
LARGE_MIXTURE = MixtureCase(10, 2, 700, 96, (1023, 1023), (1021, 1022))


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
    # Before ReLUs, too, which leave zeros.
    left = y.relu()
    grads = []
    for relu in (False, True):
        pair = tuple(t.detach().requires_grad_() for t in (left, logits))
        out = ops.mixture(*pair, see, learn, relu=relu)
        grads += torch.autograd.grad(
            out, pair, draw.to(dtype), allow_unused=True, materialize_grads=True
        )
    torch.testing.assert_close(grads[2:], [torch.where(left == 0, 0, grads[0]), grads[1]])


def check_relu_backward(run: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """An implementation's relu_backward against the reference's."""
    torch.manual_seed(4)
    y = torch.randn(shape, dtype=torch.float64, device=device).clamp(min=0).to(dtype)
    grad = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
    actual, again, own, exact = grad.clone(), grad.clone(), grad.clone(), grad.double()
    sums = (
        run(actual, y),
        reference.relu_backward(own, y),
        reference.relu_backward(exact, y.double()),
    )
    assert torch.equal(actual, own)
    columns = torch.empty_like(grad.mT, memory_format=torch.contiguous_format)
    assert torch.equal(run(again, y, columns), sums[0]), "other bits on a second run"
    assert torch.equal(again, own)
    assert torch.equal(columns, own.mT)
    assert_within(*sums)
    x = torch.where(y > 0, y, -1).double().requires_grad_()
    (right,) = torch.autograd.grad(x.relu(), x, grad.double())
    assert torch.equal(exact, right)


def check_bias_relu(run: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """An implementation's bias_relu against the reference's."""
    torch.manual_seed(4)
    y = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
    bias = torch.randn(shape[2], shape[0], dtype=torch.float64, device=device).to(dtype).T
    for relu in (False, True):
        actual, own, exact = y.clone(), y.clone(), y.double()
        run(actual, bias, relu)
        reference.bias_relu(own, bias, relu)
        reference.bias_relu(exact, bias.double(), relu)
        assert_within(actual, own, exact)


# Batch, inputs and outputs of five networks, and which of two inputs they read.
LINEARS = [
    ((0, 3, 2), [0]),
    ((1, 1, 1), [1, 0]),
    ((3, 5, 0), [0]),
    ((2, 0, 3), [1]),
    pytest.param((7, 77, 19), [1, 1, 0, 1], id="odd"),
]


def check_grouped_linear(
    run: Any,
    sizes: tuple[int, int, int],
    reads: list[int],
    relu: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    """An implementation's grouped_linear against the reference's, of what is not contiguous."""
    torch.manual_seed(5)
    batch, inputs, outputs = sizes
    shapes = (2, batch, inputs), (5, outputs, inputs), (5, outputs)
    x, weight, bias = (torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes)
    own = reference.grouped_linear(x, reads, weight, bias, relu)
    exact = reference.grouped_linear(x.double(), reads, weight.double(), bias.double(), relu)
    strided = x.mT.contiguous().mT, weight.mT.contiguous().mT, bias.T.contiguous().T
    assert_within(run(strided[0], reads, *strided[1:], relu), own, exact)
    rows = x.transpose(0, 1).contiguous().transpose(0, 1)  # as the parts of a wider tensor
    assert_within(run(rows, reads, weight, bias, relu), own, exact)


def check_grouped_linear_backward(
    run: Any, sizes: tuple[int, int, int], networks: int, dtype: torch.dtype, device: str
) -> None:
    """An implementation's grouped_linear_backward against the reference's."""
    torch.manual_seed(6)
    batch, inputs, outputs = sizes
    shapes = (networks, batch, outputs), (networks + 1, outputs, inputs), (networks, batch, inputs)
    grad, weight, y = (torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes)
    y.relu_()
    results = [
        run(grad.mT.contiguous().mT, weight.mT.contiguous().mT, y.mT.contiguous().mT),
        reference.grouped_linear_backward(grad, weight, y),
        reference.grouped_linear_backward(grad.double(), weight.double(), y.double()),
    ]
    assert not results[0][0][y <= 0].any()
    for actual, own, exact in zip(*results, strict=True):
        assert_within(actual, own, exact)


# Batch, inputs, outputs and gates of as many experts as there are reads.
EXPERT_MIXTURES = [
    ((0, 3, 2, 1), [0]),
    ((1, 1, 1, 1), [1]),
    ((3, 0, 2, 2), [0, 1]),
    ((3, 2, 0, 2), [0, 1]),
    ((7, 77, 19, 2), [1, 1, 0, 1]),
    ((130, 64, 70, 3), [0, 1, 1]),
    ((9, 128, 33, 4), [1] * 64),
    ((33, 20, 8, 5), [0, 0, 1]),
]


def check_expert_mixture_inference(
    run: Any,
    sizes: tuple[int, int, int, int],
    reads: list[int],
    dtype: torch.dtype,
    device: str,
) -> None:
    """An implementation's expert_mixture_inference against the reference's, of gates that see all
    or some experts, with logits in either type, and of what is not contiguous."""
    torch.manual_seed(5)
    batch, inputs, outputs, gates = sizes
    experts = len(reads)
    shapes = (2, batch, inputs), (experts, outputs, inputs), (experts, outputs)
    x, weight, bias = (torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes)
    logits = torch.randn(gates, batch, experts, dtype=torch.float64).to(device, dtype)
    everything = (1 << experts) - 1
    see = [everything, *(1 << k % experts | everything >> 1 for k in range(1, gates))]
    see = [mask - (mask >> 63 << 64) for mask in see]
    strided = x.mT.contiguous().mT, reads, weight.mT.contiguous().mT, bias.T.contiguous().T
    exact = reference.expert_mixture_inference(
        x.double(), reads, weight.double(), bias.double(), logits.double(), see
    )
    for gate in (logits, logits.to(torch.promote_types(dtype, torch.float32))):
        own = reference.expert_mixture_inference(x, reads, weight, bias, gate, see)
        turned = gate.mT.contiguous().mT
        actual = run(*strided, turned, see)
        assert_within(actual, own, exact)
        assert torch.equal(run(*strided, turned, see), actual), "other bits on a second run"


GROUPS = [(1, 1, 1), (2, 0, 3), (3, 5, 20), (2, 131, 37), (1, 300, 512), (2, 2100, 1), (4, 33, 300)]


class AdamCase(NamedTuple):
    rows: int
    width: int
    steps: int  # that the schedule has
    base: int = 0  # steps made before it
    decay: float = 0.0
    decoupled: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    named: bool = True  # rows, in no order, with padding between; else all
    rates: int = 7  # learning rates in turn
    scale: float = 1.0  # of the weights
    new: bool = False  # whether no row was ever trained

    def arguments(self, dtype: torch.dtype = torch.float64, grads: bool = False) -> list[Any]:
        """Of adam_rows: rows of every age, with m and v of many sizes, some of them zero."""
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64)

        schedule = Schedule(self.betas, self.base, torch.device("cpu"))
        for step in range(self.steps):
            lr = 1e-3 * (1 + step % self.rates)
            schedule.advance(lr, self.decay * (1 + step % 2), 1e-8, decoupled=self.decoupled)
        size = 10 ** (normal(self.rows, 1) - 5)
        never = slice(None, None, 1 if self.new else 5)  # trained
        size[never] = 0
        weight = normal(self.rows, self.width) * self.scale
        m = normal(self.rows, self.width) * size
        v = normal(self.rows, self.width).square() * size.square()
        v = torch.maximum(v, m.square() / 10)  # as large as Adam's is
        if self.new:
            weight[:, 0], v[:, 0] = 0, 1e-12  # stays, whatever v is
        age = torch.randint(0, self.steps + 1, (self.rows,), generator=draw)
        if self.decay > 0 and not self.decoupled:
            age[never] = 0  # L2 would have moved them
        last = (self.base + age).int()
        rows = torch.randperm(self.rows, generator=draw)[: max(self.rows // 2, 1)]
        if self.named:
            rows = torch.cat([rows[rows != 0], rows.new_zeros(3)])
        count = len(rows) if self.named else self.rows
        grad = normal(count, self.width) * 1e-4 if grads else None
        return [
            *(table.to(dtype) for table in (weight, m, v)),
            *(last, rows if self.named else None, None if grad is None else grad.to(dtype)),
            *(schedule.steps, schedule.leaps, schedule.clock, *self.betas, 1e-8, self.decoupled),
            self.decay > 0 and not self.decoupled,
        ]


ADAMS = {
    "one row": AdamCase(1, 1, 3, named=False),
    "early": AdamCase(40, 7, 60),
    "late": AdamCase(30, 48, 450, base=5000),
    "all rows": AdamCase(33, 5, 30, base=300, named=False),
    "of more ages than CPU remembers": AdamCase(40, 6, 1200, base=100, named=False),
    "l2": AdamCase(40, 9, 70, base=10, decay=1e-4),
    "l2 in leaps": AdamCase(14, 11, 400, base=1000, decay=1e-6, rates=1, scale=1e-2),
    "new rows": AdamCase(12, 50, 90, base=300, decay=1e-6, scale=3e-5, new=True),
    "new rows, as large as may be": AdamCase(
        12, 20, 150, decay=1e-6, scale=1e-4, rates=1, new=True
    ),
    "new rows, strong l2": AdamCase(
        12, 20, 150, base=300, decay=3e-5, scale=5e-7, rates=1, new=True
    ),
    "strong l2 for long": AdamCase(9, 7, 200, base=700, decay=1e-3),
    "decoupled": AdamCase(30, 33, 200, base=900, decay=0.1, decoupled=True),
    "no momentum": AdamCase(20, 4, 20, betas=(0.0, 0.9)),
    "wide": AdamCase(6, 600, 5, base=400),
}


def check_adam_rows(run: Any, case: AdamCase, dtype: torch.dtype, grads: bool, device: str) -> None:
    """An implementation's adam_rows against the reference's, in its type and in float64; and that
    it leaps, or makes a new row's steps at once, where the case is for that."""
    own = to(device, case.arguments(dtype, grads))
    actual, exact = ([a.clone() if isinstance(a, torch.Tensor) else a for a in own] for _ in "ab")
    for i in (0, 1, 2, *([5] if grads else [])):
        exact[i] = exact[i].double()
    run(*actual)
    reference.adam_rows(*own)
    reference.adam_rows(*exact)
    assert torch.equal(actual[3], exact[3])
    if (case is ADAMS["l2 in leaps"] or case.new) and dtype != torch.float64:
        steps = to(device, case.arguments(dtype, grads))
        largest = [table.abs().amax() for table in steps[:3]]
        # The m of a new row has been as large as its first gradients.
        largest[1] = torch.maximum(largest[1], case.decay * largest[0])
        steps[6][:, 16] = 2.0**100  # as if the series of new rows were not known
        steps[7][3:, 14] = 1e9  # as uneven as no leap may be
        run(*steps)
        if dtype == torch.float32 and not (case.new and grads):
            leapt = (steps[0] != actual[0]).any(1).sum() >= 2
            assert leapt or torch.equal(actual[0], own[0]), "neither at once nor the reference"
        # Element by element, steps are made at once up to errors of 1e-5 of the largest there is.
        for most, after, mine, right in zip(largest, actual[:3], own[:3], exact[:3], strict=True):
            most = torch.maximum(most, right.abs().amax())
            rounding = torch.finfo(dtype).eps * right.abs().amax()
            error, theirs = ((each.double() - right).abs().amax() for each in (after, mine))
            assert error <= 1e-5 * most + 2 * theirs + rounding
        return
    for values in zip(actual[:3], own[:3], exact[:3], strict=True):
        # v and m are small beside the 1 that bounds set as the least scale.
        scale = values[2].abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        if dtype == torch.float64:  # the series is cut where its terms are as small as this
            assert (values[0] - values[2]).abs().amax() <= 1e-12 * scale
        else:
            assert_within(*((value.double() / scale).to(value.dtype) for value in values))


class LossCase(NamedTuple):
    batch: int
    regression: tuple[int, ...]
    masked: bool = False
    weighted: bool = False
    counted: bool = False
    scale: float = 3.0  # of the logits
    missing: float = 0.2  # part of the labels
    turned: bool = True  # logits as the towers leave them, task by task
    sliced: bool = False  # everything a part of something larger

    def arguments(self, dtype: torch.dtype = torch.float64) -> Any:
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        tasks = len(self.regression)
        logits = torch.randn(tasks, self.batch, generator=draw, dtype=torch.float64) * self.scale
        logits = logits.to(dtype).T if self.turned else logits.T.contiguous().to(dtype)
        chance = torch.rand(4, self.batch, tasks, generator=draw)
        labels = torch.where(
            torch.tensor(self.regression) != 0, 4 * chance[0], (chance[0] > 0.5) * 1.0
        )
        labels[chance[1] < self.missing] = torch.nan
        mask = chance[2] > 0.3 if self.masked else None
        weights = chance[3, :, 0].to(dtype) if self.weighted else None
        counts = torch.arange(tasks) * 7 if self.counted else None
        labels = labels.to(torch.float32)
        if self.sliced:
            logits = torch.cat([logits.T, logits.T], 1).T[: self.batch]  # as of a larger batch
            labels = torch.stack([labels, labels], 2)[:, :, 0]
            mask = None if mask is None else torch.cat([mask, mask], 1)[:, :tasks]
            weights = None if weights is None else torch.stack([weights, weights], 1)[:, 0]
        return logits, labels, list(self.regression), mask, weights, counts


LOSSES = {
    "binary": LossCase(33, (0, 0)),
    "one": LossCase(1, (0,), missing=0.0),
    "empty batch": LossCase(0, (0, 1)),
    "all labels missing": LossCase(5, (0, 1, 0), missing=1.1),
    "odd": LossCase(71, (0, 1, 0), True, True, True, turned=False),
    "odd parts": LossCase(71, (0, 1, 0), True, True, True, sliced=True),
    "many rows": LossCase(5000, (1, 0, 1, 0, 0), weighted=True),
    "extreme logits": LossCase(40, (0, 0, 0), scale=300.0),
}


def check_task_losses(
    forward: Any, backward: Any, case: LossCase, dtype: torch.dtype, device: str
) -> None:
    logits, labels, regression, *rest = to(device, case.arguments(dtype))
    tasks = len(regression)
    grad = torch.arange(1.0, tasks + 1, dtype=torch.float64, device=device)
    results = []
    for run, back, kind in (
        (forward, backward, dtype),
        (reference.task_losses, reference.task_losses_backward, dtype),
        (reference.task_losses, reference.task_losses_backward, torch.float64),
    ):
        mask, weights, counts = rest
        weights = None if weights is None else weights.to(kind)
        x = logits.to(kind)
        means, divisors = run(x, labels, regression, mask, weights, counts)
        slope = back(grad.to(means), x, labels, regression, mask, weights, divisors)
        assert slope.stride() == torch.empty_like(x).stride() or min(x.shape) < 2
        results.append((means, slope, divisors))
    for actual, own, exact in zip(*results, strict=True):
        if actual.dtype == torch.int64:
            assert torch.equal(actual, exact)
        else:
            assert_within(actual, own, exact)


class ScheduleCase(NamedTuple):
    steps: int
    base: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.0
    decoupled: bool = False
    l2_from: int = 0  # the first step that has L2, where decay is above 0
    eps: float = 1e-8
    rate: float = 1e-3


SCHEDULES = {
    "plain": ScheduleCase(30),
    "longer than momentum lives": ScheduleCase(90, 500, (0.5, 0.99)),
    "no momentum": ScheduleCase(6, 0, (0.0, 0.9)),
    "decoupled": ScheduleCase(40, 20, decay=0.1, decoupled=True),
    "l2": ScheduleCase(40, decay=1e-6),
    "strong l2": ScheduleCase(40, 700, decay=1e-2),
    "l2 begins late": ScheduleCase(12, decay=1e-6, l2_from=5),
    "tiny epsilon": ScheduleCase(5, decay=1e-6, eps=1e-30),
    "no epsilon": ScheduleCase(5, decay=1e-6, eps=0.0),
}


def check_adam_schedule(run: Any, case: ScheduleCase, device: str) -> None:
    """An implementation's adam_schedule against the reference's: the table after all steps, made
    twice with a flush between."""
    tables = []
    for make in (run, reference.adam_schedule):
        steps = torch.zeros(100, 17, dtype=torch.float64, device=device)
        clock = torch.tensor([case.base, case.base], device=device)
        for step in [*range(case.steps), *range(case.steps)]:
            if step == 0:
                clock[0], steps[0], steps[0, 3] = clock[1], 0, 1
            l2 = case.decay > 0 and not case.decoupled and step >= case.l2_from
            decay = case.decay * (1 + step % 2) if l2 or case.decoupled else 0.0
            options = torch.tensor([case.rate * (1 + step % 3), decay], dtype=torch.float64)
            with np.errstate(all="ignore"):  # Triton's interpreter has numpy divide by 0
                make(steps, clock, options.to(device), *case.betas, case.eps, case.decoupled, l2)
        assert clock.tolist() == [case.base + case.steps, case.base + 2 * case.steps]
        tables.append(steps.cpu())
    actual, expected = tables
    scale = expected.abs().amax(0).clamp(min=1e-200)
    assert ((actual - expected) / scale).abs().max() <= 1e-11
    torch.testing.assert_close(actual[:, 16], expected[:, 16], rtol=1e-11, atol=0)


LEAPS = {
    "plain": ScheduleCase(40, decay=1e-6),
    "late": ScheduleCase(35, 3000, decay=1e-2),
    "no momentum": ScheduleCase(33, 5, (0.0, 0.9), decay=1e-3),
    "momentum lives long": ScheduleCase(50, 20, (0.99, 0.9), decay=1e-3),
    "no rate": ScheduleCase(16, 20, decay=1e-3, rate=0.0),
    "too short": ScheduleCase(15, decay=1e-3),
}


def check_adam_leap(run: Any, case: ScheduleCase, device: str) -> None:
    """An implementation's adam_leap against the reference's: called after every step, it writes the
    lines of whole leaps alone."""
    steps = torch.zeros(64, 17, dtype=torch.float64, device=device)
    clock = torch.tensor([case.base, case.base], device=device)
    tables = [torch.full((3 + 64 // 16, 22), 7.0, dtype=torch.float64, device=device) for _ in "ab"]
    for step in range(case.steps):
        rate, decay = case.rate * (1 + step % 3), case.decay * (1 + step % 5)
        options = torch.tensor([rate, decay], dtype=torch.float64, device=device)
        reference.adam_schedule(steps, clock, options, *case.betas, case.eps, False, True)
        for make, leaps in zip((run, reference.adam_leap), tables, strict=True):
            make(steps, leaps, clock, *case.betas)
    actual, expected = (leaps.cpu() for leaps in tables)
    whole = torch.arange(len(expected)) - 3
    whole = (whole >= 0) & (whole < case.steps // 16)
    assert (expected[whole] != 7).all()
    for leaps in (actual, expected):
        assert (leaps[~whole] == 7).all()
    # Differences are as exact as what they are made of.
    mean, l2 = 16 * expected[whole, 1], 16 * expected[whole, 11]
    scale = expected[whole].abs()
    scale[:, 2:7] += mean[:, None]
    scale[:, 7:11] += (mean * l2)[:, None]
    scale[:, 12] += l2
    scale[:, 14:18] += 1
    scale[:, 18:20] += (l2 * l2)[:, None]
    scale[:, 20:] += l2[:, None]
    assert ((actual - expected)[whole].abs() <= 1e-13 * scale).all()


class SgdCase(NamedTuple):
    rows: int
    width: int
    steps: int
    base: int = 0  # steps made before the flush
    momentum: tuple[float, ...] = (0.9,)  # of the steps in turn
    decay: float = 0.0
    rate: float = 0.1
    named: bool = True  # rows, in no order, with padding between; else all

    def arguments(self, dtype: torch.dtype = torch.float64, grads: bool = False) -> list[Any]:
        """Of sgd_rows: rows of every age, with options that change at every step."""
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64)

        products = Products(torch.device("cpu"))
        for step in range(self.base + self.steps):
            if step == self.base:
                products.flushed()
            momentum = self.momentum[step % len(self.momentum)]
            lr, decay = self.rate * (1 + step % 7), self.decay * (1 + step % 2)
            products.advance(lr, momentum, torch.tensor(decay))
        weight = normal(self.rows, self.width)
        state = torch.promote_types(dtype, torch.float32)
        buffer = normal(self.rows, self.width).to(state) if any(self.momentum) else None
        last = torch.randint(0, self.base + self.steps + 1, (self.rows,), generator=draw).int()
        rows = torch.randperm(self.rows, generator=draw)[: max(self.rows // 2, 1)]
        if self.named:
            rows = torch.cat([rows[rows != 0], rows.new_zeros(3)])
        count = len(rows) if self.named else self.rows
        grad = normal(count, self.width).to(dtype) if grads else None
        rows = rows if self.named else None
        return [weight.to(dtype), buffer, last, rows, grad, products.steps, products.clock]


SGDS = {
    "one row": SgdCase(1, 1, 3, named=False),
    "momentum and l2": SgdCase(60, 7, 70, base=30, decay=1e-2),
    "many steps": SgdCase(50, 48, 1300, base=10, decay=1e-3),
    "all rows": SgdCase(33, 5, 30, named=False),
    "l2 alone": SgdCase(40, 9, 70, momentum=(0.0,), decay=1e-2),
    "momentum comes and goes": SgdCase(40, 9, 40, momentum=(0.0, 0.5, 0.9), decay=1e-2),
    "steps to zero": SgdCase(40, 4, 20, momentum=(0.0,), decay=1.0, rate=0.5),
    "wide": SgdCase(6, 600, 5, base=3, decay=1e-4),
}


def check_sgd_rows(run: Any, case: SgdCase, dtype: torch.dtype, grads: bool, device: str) -> None:
    """An implementation's sgd_rows against the reference's, in its type and in float64."""
    own = to(device, case.arguments(dtype, grads))
    check_rows(run, reference.sgd_rows, own, changed=(0, 1, 2), wide=(0, 1, 4))


class AdagradCase(NamedTuple):
    rows: int
    width: int
    row_wise: bool
    decay: float = 0.0
    named: bool = True  # rows, in no order, with padding between; else all

    def arguments(self, dtype: torch.dtype = torch.float64) -> list[Any]:
        """Of adagrad_rows: rows with and without gradients before this step."""
        draw = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64)

        weight = normal(self.rows, self.width)
        sums = normal(self.rows, *(() if self.row_wise else (self.width,))).square()
        sums[::3] = 0
        rows = torch.randperm(self.rows, generator=draw)[: max(self.rows // 2, 1)]
        if self.named:
            rows = torch.cat([rows[rows != 0], rows.new_zeros(3)])
        count = len(rows) if self.named else self.rows
        grad = normal(count, self.width) * 10 ** normal(count, 1)
        options = torch.tensor([0.1, self.decay], dtype=torch.float64)
        state = torch.promote_types(dtype, torch.float32)
        rows = rows if self.named else None
        return [weight.to(dtype), sums.to(state), rows, grad.to(dtype), options, 1e-8]


ADAGRADS = {
    f"{name}, {'a sum a row' if row_wise else 'all sums'}": AdagradCase(
        *sizes, row_wise, decay, named
    )
    for row_wise in (False, True)
    for name, sizes, decay, named in (
        ("one row", (1, 1), 0.0, False),
        ("narrow", (40, 7), 0.0, True),
        ("many", (300, 48), 1e-2, True),
        ("all rows", (33, 5), 0.1, False),
        ("wide", (6, 1300), 1e-3, True),
    )
}


def check_adagrad_rows(run: Any, case: AdagradCase, dtype: torch.dtype, device: str) -> None:
    """An implementation's adagrad_rows against the reference's, in its type and in float64."""
    own = to(device, case.arguments(dtype))
    check_rows(run, reference.adagrad_rows, own, changed=(0, 1), wide=(0, 1, 3))


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
