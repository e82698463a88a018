"""What is measured of layers of several networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import (
    OURS,
    Case,
    Contender,
    NotInstalledError,
    Setting,
    compiled,
    copy_ceiling,
    size,
)
from stem_fast import reference
from stem_fast.serving.inference import FEW


def grouped_linear(setting: Setting, device: str) -> Case:
    """A hidden layer of all experts for a small request, which is the reading of their weights: on
    CPU in float32, on CUDA in bfloat16."""
    s, few = setting, min(setting.batch, FEW)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(s.experts, few, s.width, generator=draw)
    weight = torch.randn(s.experts, s.width, s.width, generator=draw) / s.width**0.5
    bias = torch.randn(s.experts, s.width, generator=draw)
    x, weight, bias = (part.to(device, dtype) for part in (x, weight, bias))
    reads = list(range(s.experts))
    networks = list(zip(x.unbind(), weight.unbind(), bias.unbind(), strict=True))

    def official(networks: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        return [F.linear(*each).relu() for each in networks]

    def compiled_official() -> Contender:
        function = compiled(official, device)
        return Contender(lambda: function(networks))

    def check(actual: Any) -> None:
        found = actual if isinstance(actual, Tensor) else torch.stack(actual)
        exact = reference.grouped_linear(x.double(), reads, weight.double(), bias.double(), True)
        bound = (64 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=bound, atol=bound)

    moved = size(weight, bias) + 2 * size(x)  # the output is as large as the input
    op = torch.ops.stem_fast.grouped_linear
    return Case(
        moved=moved,
        ceilings=("copy",),
        ceiling_moved=moved,
        contenders={
            OURS: lambda: Contender(lambda: op(x, reads, weight, bias, True)),
            "official": lambda: Contender(lambda: official(networks)),
            "official, compiled": compiled_official,
            "copy": lambda: copy_ceiling(moved, device),
        },
        check=check,
    )


def grouped_linear_backward(setting: Setting, device: str) -> Case:
    """The gradient of a training batch in bfloat16 through a hidden layer of all experts, the ReLU
    below it and to that one's bias. Its ceiling is the product alone."""
    s, dtype = setting, torch.bfloat16

    @functools.cache  # made for a contender that runs: 0.8 GB in the setting "large"
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(7)
        grad = torch.randn(s.experts, s.batch, s.width, generator=draw)
        weight = torch.randn(s.experts, s.width, s.width, generator=draw) / s.width**0.5
        y = torch.randn(s.experts, s.batch, s.width, generator=draw).relu()
        return grad.to(device, dtype), weight.to(device, dtype), y.to(device, dtype)

    def torchs(grad: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        d = torch.where(y > 0, torch.bmm(grad, weight), 0)
        return d, d.sum(1, dtype=torch.float32)

    def contender(run: Callable[[Tensor, Tensor, Tensor], Any]) -> Contender:
        if device != "cuda":
            raise NotInstalledError("a CUDA device (on CPU experts train one by one)")
        given = inputs()
        return Contender(lambda: run(*given))

    def check(actual: Any) -> None:
        if not isinstance(actual, tuple):  # the product alone
            return
        exact = reference.grouped_linear_backward(*(t.float() for t in inputs()))
        for found, right, scale in zip(actual, exact, (1, s.batch**0.5), strict=True):
            torch.testing.assert_close(found.float(), right, rtol=0.02, atol=0.02 * scale)

    # The gradient, the weights and y are read, the new gradient is written.
    moved = dtype.itemsize * s.experts * s.width * (3 * s.batch + s.width)
    op = torch.ops.stem_fast.grouped_linear_backward
    return Case(
        moved=moved,
        ceilings=("product alone",),
        ceiling_moved=moved,
        contenders={
            OURS: lambda: contender(op),
            "torch": lambda: contender(torchs),
            "torch, compiled": lambda: contender(compiled(torchs, device)),
            "product alone": lambda: contender(lambda grad, weight, y: torch.bmm(grad, weight)),
        },
        check=check,
    )


OPS = {
    "grouped_linear": grouped_linear,
    "grouped_linear_backward": grouped_linear_backward,
}
