"""Groups of equal networks side by side: linear layers, batch norm, activations, MLPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stem_fast import ops, reference
from stem_fast.nn import batched
from stem_fast.nn.modules import parts_of

ACTIVATIONS = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "leakyrelu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}


class GroupedLinear(nn.Module):
    """Linear layers of E networks: ``weight`` [E, O, I], xavier_normal each, ``bias`` [E, O], 0."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(groups, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)
        for one in self.weight.detach():
            nn.init.xavier_normal_(one)

    def forward(self, x: Tensor | Sequence[Tensor], reads: Sequence[int]) -> Tensor:
        return reference.grouped_linear(x, reads, self.weight, self.bias)


class GroupedBatchNorm(nn.Module):
    """``nn.BatchNorm1d`` for each of E networks: [n, B, H] -> [n, B, H], n <= E the first ones."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        groups: int,
        units: int,
        *,
        affine: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(groups, units)) if affine else None
        self.bias = nn.Parameter(torch.empty(groups, units)) if affine else None
        self.register_buffer("running_mean", torch.empty(groups, units))
        self.register_buffer("running_var", torch.empty(groups, units))
        self.register_buffer("num_batches_tracked", torch.empty(groups, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Parameters and, as torch's batch norm does, running statistics."""
        for tensor in (self.bias, self.running_mean, self.num_batches_tracked):
            if tensor is not None:
                tensor.zero_()
        for tensor in (self.weight, self.running_var):
            if tensor is not None:
                tensor.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        groups, batch, units = x.shape
        if self.training:
            self.num_batches_tracked[:groups] += 1
        normed = F.batch_norm(
            x.transpose(0, 1).reshape(batch, groups * units),
            self.running_mean[:groups].view(-1),
            self.running_var[:groups].view(-1),
            None if self.weight is None else self.weight[:groups].flatten(),
            None if self.bias is None else self.bias[:groups].flatten(),
            self.training,
            self.momentum,
            self.eps,
        )
        return normed.view(batch, groups, units).transpose(0, 1)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether it looks at whole batches: by batch norm, or by Dice, which has one inside."""
    return any(isinstance(module, GroupedBatchNorm) for _, module in parts_of(model))


class GroupedPReLU(nn.Module):
    """``nn.PReLU(units, init=0.1)`` for each of E networks."""

    def __init__(self, groups: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, units))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.weight[: len(x), None] * x)


class GroupedDice(nn.Module):
    """DIN's Dice activation (Zhou et al., KDD 2018; FuxiCTR's form) for each of E networks."""

    def __init__(self, groups: int, units: int) -> None:
        super().__init__()
        self.bn = GroupedBatchNorm(groups, units, affine=False, eps=1e-9, momentum=0.01)
        self.alpha = nn.Parameter(torch.empty(groups, units))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.bn(x))
        return p * x + self.alpha[: len(x), None] * (1 - p) * x


def activation(name: str, groups: int, units: int) -> nn.Module:
    """An activation by name, whatever its case. Raises ValueError for an unknown one."""
    grouped = {"prelu": GroupedPReLU, "dice": GroupedDice}
    key = name.lower()
    if key in grouped:
        return grouped[key](groups, units)
    if key not in ACTIVATIONS:
        known = ", ".join(sorted([*ACTIVATIONS, *grouped]))
        raise ValueError(f"unknown activation {name!r}; known: {known}")
    return ACTIVATIONS[key]()


class GroupedMLP(nn.Module):
    """E MLPs of one shape side by side (FuxiCTR's MLP_Block, E times).

    Each hidden layer is linear, batch norm if asked, activation, dropout if above 0; ``outputs``
    adds a last linear layer with nothing after it, which autocast leaves in its own type.

    ``blocks`` is kept in the order of MLP_Block's ``nn.Sequential``, so that a block's index is the
    number in the official checkpoint's key.
    """

    def __init__(
        self,
        groups: int,
        inputs: int,
        hidden: Sequence[int],
        *,
        outputs: int | None = None,
        hidden_activations: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.groups = groups
        blocks: list[nn.Module] = []
        for units in hidden:
            blocks.append(GroupedLinear(groups, inputs, units))
            if batch_norm:
                blocks.append(GroupedBatchNorm(groups, units))
            blocks.append(activation(hidden_activations, groups, units))
            if dropout > 0:
                blocks.append(nn.Dropout(dropout))
            inputs = units
        if outputs is not None:
            blocks.append(GroupedLinear(groups, inputs, outputs))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor | Sequence[Tensor], reads: Sequence[int]) -> Tensor:
        """N inputs [B, I] -> [n, B, O]; the first n networks run, e reads ``x[reads[e]]``."""
        plain = self.plain()
        if plain and not ops.step_by_step():
            return batched.networks(x.unbind() if isinstance(x, Tensor) else x, reads, plain)
        return self.step_by_step(x, reads)

    def step_by_step(self, x: Tensor | Sequence[Tensor], reads: Sequence[int]) -> Tensor:
        """The call with any blocks, one after the other."""
        *blocks, last = self.blocks
        for block in blocks:
            if isinstance(block, GroupedLinear):
                x, reads = block(x, reads), range(len(reads))
            else:
                x = block(x)
        if not isinstance(last, GroupedLinear):
            return last(x)
        device = last.weight.device.type
        if not torch.is_autocast_enabled(device):
            return last(x, reads)
        with torch.autocast(device, enabled=False):
            return last([each.to(last.weight.dtype) for each in x], reads)

    def plain(self) -> list[batched.Layer]:
        """Its layers, where they are linear ones and ReLUs alone; else none."""
        layers = []
        for i in range(0, len(self.blocks), 2):
            linear, *after = self.blocks[i : i + 2]
            if not isinstance(linear, GroupedLinear) or not all(
                isinstance(a, nn.ReLU) for a in after
            ):
                return []
            layers.append(batched.Layer(linear.weight, linear.bias, len(after) > 0))
        return layers

    def official(self, group: int) -> Iterator[tuple[str, Tensor]]:
        """(key within MLP_Block, view of network ``group``'s tensor) of every parameter, buffer."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            yield name.replace("blocks.", "mlp.", 1), tensor.detach()[group]
