"""One set of shapes and tensors for every test of the ops: values, gradients, opcheck, compile."""

from __future__ import annotations

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
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]


class LookupCase(NamedTuple):
    vocab: tuple[int, ...]
    batch: int
    dim: int
    spaces: int

    def arguments(self, dtype: torch.dtype = torch.float64, ids: torch.dtype = torch.int64) -> Any:
        """(weight, ids, offsets, spaces); ids repeat, and some are padding."""
        draw = torch.Generator().manual_seed(hash(self) % 2**31)
        sizes = torch.tensor(self.vocab)
        offsets = sizes.cumsum(0) - sizes
        width = self.spaces * self.dim
        weight = torch.randn(int(sizes.sum()), width, generator=draw, dtype=torch.float64)
        weight[offsets] = 0
        uniform = torch.rand(self.batch, len(self.vocab), generator=draw, dtype=torch.float64)
        return weight.to(dtype), (uniform * sizes).to(ids), offsets, self.spaces


LOOKUPS = {
    "one": LookupCase((3,), 1, 1, 1),
    "empty batch": LookupCase((3, 5), 0, 4, 2),
    "odd": LookupCase((1, 2, 17), 7, 3, 5),
    "many rows": LookupCase((1000, 10), 513, 16, 3),
    "all equal": LookupCase((2, 2), 300, 5, 2),
}


class MixtureCase(NamedTuple):
    experts: int
    gates: int
    batch: int
    width: int
    see: tuple[int, ...]
    learn: tuple[int, ...]
    scale: float = 1.0  # of the logits

    def arguments(self, dtype: torch.dtype = torch.float64) -> Any:
        """(y, logits, see, learn)."""
        draw = torch.Generator().manual_seed(hash(self) % 2**31)
        y = torch.randn(self.experts, self.batch, self.width, generator=draw, dtype=torch.float64)
        logits = torch.randn(
            self.gates, self.batch, self.experts, generator=draw, dtype=torch.float64
        )
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
    "63 experts": MixtureCase(63, 2, 3, 5, ((1 << 63) - 1,) * 2, (1 << 62, (1 << 62) - 1)),
    "extreme logits": MixtureCase(5, 3, 11, 7, *stem_masks(2, 2, 1), scale=1e4),
}
