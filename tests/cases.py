"""One set of shapes and tensors for every test of the ops (values, gradients, opcheck, compile),
and one bound on errors."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import pytest
import torch

# Tests of the ops run on every device there is.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
    ),
]


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
    "long sequences": LookupCase((50, 3), 11, 20, 2, (0b11,), ("mean",), length=200),
}


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
