"""The fused layer of experts against its steps one by one."""

from __future__ import annotations

import pytest
import torch
from cases import Ops, assert_within
from cases.mixture import stem_masks
from torch import Tensor, nn

from stem_fast import ops
from stem_fast.nn import batched
from stem_fast.nn import experts as module
from stem_fast.nn.experts import expert_mixture
from stem_fast.nn.grouped import GroupedMLP

SEE, LEARN = stem_masks(2, 1, 2)
READS = (0, 1, 2, 2)
# What CPU and what CUDA runs; both take tensors of either.
WAYS = {False: "_ExpertMixture", True: "Unbind"}
ways = pytest.mark.parametrize("together", WAYS)


def everything(
    together: bool | None,
    hidden: tuple[int, ...],
    batch: int,
    gates: int,
    dtype: torch.dtype = torch.float64,
    *,
    autocast: bool = False,
) -> list[Tensor]:
    """Outputs and every gradient; of inputs that are the same bfloat16 numbers in every type."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size).bfloat16().to(dtype).requires_grad_()

    torch.manual_seed(3)
    group = GroupedMLP(4, 5, hidden)
    nn.init.normal_(group.blocks[0].bias)
    group = group.bfloat16().to(dtype)
    inputs = [normal(batch, 5) for _ in range(3)]
    logits = normal(gates, batch, 4)
    masks = SEE[:gates], LEARN[:gates]
    grads = [normal(batch, hidden[-1]).detach() for _ in range(gates)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if together is None:  # torch's own steps
            outputs = ops.mixture(group.step_by_step(inputs, READS), logits, *masks).unbind()
        else:
            outputs = expert_mixture(group, inputs, READS, logits, *masks, together=together)
            assert WAYS[together] in type(outputs[0].grad_fn).__name__
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    wanted = [*inputs, logits, *group.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


@ways
@pytest.mark.parametrize("hidden", [(6,), (7, 3), (6, 6, 6)])
@pytest.mark.parametrize(("batch", "gates"), [(0, 3), (1, 2), (33, 3), (33, 2)])
def test_outputs_and_gradients(
    together: bool, hidden: tuple[int, ...], batch: int, gates: int
) -> None:
    for actual, right in zip(
        everything(together, hidden, batch, gates),
        everything(None, hidden, batch, gates),
        strict=True,
    ):
        torch.testing.assert_close(actual, right)


@ways
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("hidden", [(16,), (40, 24, 8)])
@pytest.mark.parametrize("batch", [0, 1, 300])
def test_float32_and_bfloat16_within_bounds(
    together: bool, autocast: bool, hidden: tuple[int, ...], batch: int
) -> None:
    """Errors of outputs and gradients against those of torch's own steps in the same type."""
    shape = hidden, batch, 2
    for results in zip(
        everything(together, *shape, torch.float32, autocast=autocast),
        everything(None, *shape, torch.float32, autocast=autocast),
        everything(None, *shape),
        strict=True,
    ):
        assert_within(*results)


@ways
def test_a_graph_that_is_kept_can_be_walked_again(together: bool) -> None:
    """Multi-task methods that compare gradients (PCGrad, CAGrad) go back once a task."""
    group = GroupedMLP(4, 5, (6, 6))
    x = torch.randn(3, 9, 5, requires_grad=True)
    arguments = batched.unbind(x), READS, torch.randn(2, 9, 4), SEE[:2], LEARN[:2]
    first, second = expert_mixture(group, *arguments, together=together)
    loss = first.sum(), second.square().sum()
    for source in (group.blocks[0].weight, x):
        alone = [torch.autograd.grad(each, source, retain_graph=True)[0] for each in loss]
        again = [torch.autograd.grad(each, source, retain_graph=True)[0] for each in loss]
        (both,) = torch.autograd.grad(loss[0] + loss[1], source, retain_graph=True)
        assert torch.equal(alone[0], again[0])
        torch.testing.assert_close(alone[0] + alone[1], both)


@ways
@pytest.mark.usefixtures("poisoned")
def test_inputs_that_no_expert_reads_and_that_are_given_twice(together: bool) -> None:
    group = GroupedMLP(4, 5, (6, 6)).double()
    x, unread, y = (torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    arguments = [x, unread, x, y], (0, 0, 2, 3)
    masks = torch.randn(2, 9, 4, dtype=torch.float64), SEE[:2], LEARN[:2]
    outputs = expert_mixture(group, *arguments, *masks, together=together)
    expected = ops.mixture(group.step_by_step(*arguments), *masks).unbind()
    gradients = [
        torch.autograd.grad(
            sum(o.sin().sum() for o in found),
            [x, unread, y],
            allow_unused=True,
            materialize_grads=True,
        )
        for found in (outputs, expected)
    ]
    torch.testing.assert_close(*gradients)


@ways
def test_inputs_and_parameters_that_want_no_gradient(together: bool) -> None:
    group = GroupedMLP(4, 5, (6, 6))
    group.blocks[0].requires_grad_(False)
    inputs = [torch.randn(9, 5, requires_grad=n == 1) for n in range(3)]
    arguments = group, inputs, READS, torch.randn(2, 9, 4), SEE[:2], LEARN[:2]
    out = expert_mixture(*arguments, together=together)
    (out[0].sum() + out[1].sum()).backward()
    assert inputs[0].grad is None
    assert inputs[1].grad is not None
    assert group.blocks[0].weight.grad is None
    assert group.blocks[2].weight.grad is not None
    with torch.no_grad():
        quiet = expert_mixture(*arguments, together=together)
    assert not quiet[0].requires_grad
    quiet_inputs = [x.detach() for x in inputs]
    alone = expert_mixture(group, quiet_inputs, *arguments[2:], together=together)
    sum(out.sum() for out in alone).backward()  # none of the inputs wants one


def test_layers_are_kept_for_a_backward_pass_alone() -> None:
    group = GroupedMLP(4, 5, (6, 6, 6))
    inputs = [torch.randn(9, 5) for _ in range(3)]
    arguments = group, inputs, READS, torch.randn(2, 9, 4), SEE[:2], LEARN[:2]
    with Ops() as trained:
        right = expert_mixture(*arguments, together=False)
    with Ops() as quiet, torch.no_grad():
        without = expert_mixture(*arguments, together=False)
    group.requires_grad_(False)
    with Ops() as frozen:
        expert_mixture(*arguments, together=False)
    kept = [
        sum("empty_kept" in name for name, *_ in each.seen) for each in (trained, quiet, frozen)
    ]
    assert kept == [3, 1, 1]
    assert torch.equal(torch.stack(right), torch.stack(without))


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"batch_norm": True}, {"hidden_activations": "gelu"}]
)
def test_other_networks_go_step_by_step(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, "_ExpertMixture")
    monkeypatch.delattr(module.batched, "networks")
    group = GroupedMLP(4, 5, (6, 6), **options).eval()
    inputs = [torch.randn(9, 5) for _ in range(3)]
    logits = torch.randn(2, 9, 4)
    out = expert_mixture(group, inputs, READS, logits, SEE[:2], LEARN[:2])
    expected = ops.mixture(group(inputs, READS), logits, SEE[:2], LEARN[:2])
    torch.testing.assert_close(torch.stack(out), expected)


def test_autocast_keeps_its_type() -> None:
    group = GroupedMLP(4, 5, (6, 6))
    inputs = [torch.randn(9, 5) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = expert_mixture(group, inputs, READS, torch.randn(2, 9, 4), SEE[:2], LEARN[:2])
    assert out[0].dtype == torch.bfloat16
