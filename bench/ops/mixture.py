"""What is measured of the gated mixture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cases import (
    OURS,
    Case,
    Contender,
    Setting,
    compiled,
    copy_ceiling,
    size,
)
from stem_fast import ops, reference
from stem_fast.models.network import STEMNet


class MixtureInputs(NamedTuple):
    y: Tensor  # [E, B, H]
    logits: Tensor  # [K, B, E]
    grad: Tensor  # [K, B, H]
    see: list[int]
    learn: list[int]


@functools.lru_cache(maxsize=1)
def mixture_inputs(setting: Setting, device: str) -> MixtureInputs:
    """Of a last layer: the gates of the tasks, without the shared one that nobody reads."""
    draw = torch.Generator().manual_seed(2)
    s = setting
    wiring = STEMNet.wire(s.tasks, s.specific, s.shared)
    y = torch.randn(s.experts, s.batch, s.width, generator=draw)
    logits = torch.randn(s.tasks, s.batch, s.experts, generator=draw)
    grad = torch.randn(s.tasks, s.batch, s.width, generator=draw)
    y, logits, grad = (part.to(device) for part in (y, logits, grad))
    return MixtureInputs(
        y, logits, grad, list(wiring.see[: s.tasks]), list(wiring.learn[: s.tasks])
    )


def official_mixture(
    y: Sequence[Tensor], logits: Sequence[Tensor], learn: Sequence[int]
) -> list[Tensor]:
    """STEM_Layer.forward from the experts' outputs on."""
    outputs = []
    for gate, mask in zip(logits, learn, strict=True):
        experts = [expert if mask >> e & 1 else expert.detach() for e, expert in enumerate(y)]
        outputs.append(torch.sum(gate.softmax(-1).unsqueeze(-1) * torch.stack(experts, 1), 1))
    return outputs


def check_mixture(inputs: MixtureInputs, out: Tensor, *gradients: Tensor) -> None:
    """Against float64, in parts of the batch that fit in memory.

    A sum of E (forward) or H (dlogits) rounded products: 64 ulp cover it with room.
    """
    bound = 64 * torch.finfo(torch.float32).eps
    for part in torch.arange(inputs.y.shape[1]).split(1024):
        here = slice(int(part[0]), int(part[-1]) + 1)
        y, logits, grad = (t[:, here].double() for t in (inputs.y, inputs.logits, inputs.grad))
        expected = [reference.mixture(y, logits, inputs.see, inputs.learn)]
        if gradients:
            expected += reference.mixture_backward(grad, y, logits, inputs.see, inputs.learn)
        for a, b in zip((out, *gradients), expected, strict=True):
            torch.testing.assert_close(a[:, here].double(), b, rtol=bound, atol=8 * bound)


def mixture_forward(setting: Setting, device: str) -> Case:
    inputs = mixture_inputs(setting, device)
    y, logits, grad, see, learn = inputs
    experts, gates = y.unbind(), logits.unbind()

    def check(actual: Any) -> None:
        check_mixture(inputs, actual if isinstance(actual, Tensor) else torch.stack(actual))

    def compiled_official() -> Contender:
        function = compiled(official_mixture, device)
        return Contender(lambda: function(experts, gates, learn))

    moved = size(y, logits, grad)  # the output is as large as its gradient
    return Case(
        moved=moved,
        ceilings=("copy",),
        ceiling_moved=moved,
        contenders={
            OURS: lambda: Contender(lambda: ops.mixture(y, logits, see, learn)),
            "official": lambda: Contender(lambda: official_mixture(experts, gates, learn)),
            "official, compiled": compiled_official,
            "copy": lambda: copy_ceiling(moved, device),
        },
        check=check,
    )


def mixture_forward_backward(setting: Setting, device: str) -> Case:
    inputs = mixture_inputs(setting, device)
    y, logits, grad, see, learn = inputs

    def ours() -> Contender:
        leaves = y.detach().requires_grad_(), logits.detach().requires_grad_()

        def run() -> tuple[Any, ...]:
            out = ops.mixture(*leaves, see, learn)
            return out, *torch.autograd.grad(out, leaves, grad)

        return Contender(run)

    def official(function: Callable[..., list[Tensor]]) -> Contender:
        experts = [each.detach().requires_grad_() for each in y]
        gates = [each.detach().requires_grad_() for each in logits]

        def run() -> tuple[Any, ...]:
            out = function(experts, gates, learn)
            return out, *torch.autograd.grad(out, [*experts, *gates], grad.unbind())

        return Contender(run)

    def check(actual: Any) -> None:
        out, *gradients = actual
        if isinstance(out, list):
            parts = out, gradients[: len(y)], gradients[len(y) :]
            out, *gradients = (torch.stack(part) for part in parts)
        check_mixture(inputs, out, *gradients)

    # Forward: y and logits read, the output written. Backward: both and its gradient read, theirs
    # written.
    moved = 3 * size(y, logits) + 2 * size(grad)
    return Case(
        moved=moved,
        ceilings=("copy",),
        ceiling_moved=moved,
        contenders={
            OURS: ours,
            "official": lambda: official(official_mixture),
            "official, compiled": lambda: official(compiled(official_mixture, device)),
            "copy": lambda: copy_ceiling(moved, device),
        },
        check=check,
    )


OPS = {
    "mixture_forward": mixture_forward,
    "mixture_forward_backward": mixture_forward_backward,
}
