"""The gated mixture: cases, and what is checked of an implementation."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch

from cases import assert_within, to
from stem_fast import ops, reference


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


def check_not_a_number(forward: Any, backward: Any, device: str) -> None:
    """A logit that is none makes all of its gate's row none, as in the reference."""
    y, grad = torch.ones(3, 2, 4, device=device), torch.ones(1, 2, 4, device=device)
    logits = torch.tensor([[[0.0, torch.nan, 1.0], [0.0, 2.0, 1.0]]], device=device)
    out = forward(y, logits, [7], [5])
    dy, dlogits = backward(grad, y, logits, [7], [5])
    for lost, sound in (out[0], dlogits[0], dy[0], dy[2]):
        assert lost.isnan().all()
        assert sound.isfinite().all()
    assert not dy[1].any()
