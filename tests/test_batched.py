"""Groups of networks all at once, as on CUDA, against the group's own steps."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICES, DTYPES, assert_within
from torch import Tensor, nn

from stem_fast import reference
from stem_fast.nn import batched
from stem_fast.nn.grouped import GroupedMLP
from stem_fast.nn.precision import tf32


def normal(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers that are the same in bfloat16."""
    return torch.randn(*size).bfloat16().to(dtype)


def everything(
    together: bool | None,
    hidden: tuple[int, ...],
    outputs: int | None,
    reads: tuple[int, ...],
    batch: int,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    device: str = "cpu",
) -> list[Tensor]:
    """Outputs and every gradient of five networks on three inputs; None: by torch's own steps."""
    torch.manual_seed(6)
    group = GroupedMLP(5, 7, hidden, outputs=outputs)
    for layer in group.plain():
        nn.init.normal_(layer.bias)
    group = group.bfloat16().to(device, dtype)
    inputs = [normal(batch, 7, dtype=dtype).to(device).requires_grad_() for _ in range(3)]
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = (
            batched.networks(inputs, reads, group.plain(), together=together)
            if together is not None
            else group.step_by_step(inputs, reads)
        )
    grad = normal(*out.shape).to(out)
    kept = grad.clone()
    got = torch.autograd.grad(
        out, [*inputs, *group.parameters()], grad, allow_unused=True, materialize_grads=True
    )
    assert torch.equal(grad, kept), "the gradient is another's"
    return [out, *got]


READS = [(0,), (2, 1, 0, 1, 1), (0, 1, 2), (1, 1, 1, 2), (0, 0, 1, 2, 0)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [0, 1, 33])
@pytest.mark.parametrize(("hidden", "outputs"), [((6, 4), None), ((6, 4), 3), ((), 1), ((3,), 1)])
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("together", [True, False])
def test_outputs_and_gradients(
    together: bool,
    hidden: tuple[int, ...],
    outputs: int | None,
    reads: tuple[int, ...],
    batch: int,
    device: str,
) -> None:
    shape = hidden, outputs, reads, batch, torch.float64, False, device
    for actual, right in zip(everything(together, *shape), everything(None, *shape), strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("hidden", "outputs"), [((40, 24), None), ((40, 24), 3)])
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("together", [True, False])
def test_float32_and_bfloat16_within_bounds(
    together: bool,
    autocast: bool,
    hidden: tuple[int, ...],
    outputs: int | None,
    reads: tuple[int, ...],
    device: str,
) -> None:
    """Errors of outputs and gradients against those of torch's own steps in the same type."""
    shape = hidden, outputs, reads, 300
    for results in zip(
        everything(together, *shape, torch.float32, autocast, device),
        everything(None, *shape, torch.float32, autocast, device),
        everything(None, *shape, device=device),
        strict=True,
    ):
        assert_within(*results)


@pytest.mark.parametrize("reads", READS)
def test_both_ways_of_a_layer(reads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = normal(3, 33, 7), normal(5, 4, 7), normal(5, 4)
    for fused in (False, True):
        monkeypatch.setattr(batched, "fused", lambda dtype, fused=fused: fused)
        for relu in (False, True):
            expected = reference.grouped_linear(x, reads, weight, bias, relu)
            actual = batched.linear(x, reads, weight, bias, relu)
            torch.testing.assert_close(actual, expected)


def test_our_products_are_for_short_numbers() -> None:
    with tf32("tf32"):  # which Triton would cut off
        found = {dtype for dtype in DTYPES if batched.fused(dtype)}
    assert found == {torch.bfloat16, torch.float16}


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_can_be_captured(autocast: bool, device: str) -> None:
    group = GroupedMLP(5, 7, (40, 24), outputs=3).to(device)
    inputs = [torch.randn(300, 7, device=device, requires_grad=True) for _ in range(3)]
    wanted = [*inputs, *group.parameters()]

    def step() -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = group(inputs, (0, 1, 2, 0))
        assert "_Networks" in type(out.grad_fn).__name__
        return [out, *torch.autograd.grad(out.square().sum(), wanted)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        right = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for actual, expected in zip(captured, right, strict=True):
        assert torch.equal(actual, expected)


def test_types_under_autocast() -> None:
    inputs = [torch.randn(9, 7)]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = batched.networks(inputs, (0,), GroupedMLP(1, 7, (6,)).plain())
        last = batched.networks(inputs, (0,), GroupedMLP(1, 7, (6,), outputs=2).plain())
    assert (hidden.dtype, last.dtype) == (torch.bfloat16, torch.float32)


def test_parts_of_one_tensor_are_stacked_without_a_copy() -> None:
    whole = torch.randn(4, 9, 5)
    for parts in (whole.unbind(), whole[1:, 2:5].unbind(), whole[::2].unbind(), [whole[1]] * 3):
        x = batched.stacked(parts)
        assert x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert torch.equal(x, torch.stack(list(parts)))


def test_other_tensors_are_stacked() -> None:
    whole = torch.randn(4, 9, 5)
    for parts in (
        [whole[0], whole[1], whole[3]],
        [whole[2], whole[1]],
        [whole[0], whole[1].clone()],
        [whole[0, :5, :5], whole[0, :5, :5].T],
        [torch.randn(9, 5)[None][0], torch.randn(9, 5)],
    ):
        assert torch.equal(batched.stacked(parts), torch.stack(list(parts)))


def test_unbind_copies_no_gradient_that_lies_side_by_side() -> None:
    x = torch.randn(3, 9, 5, requires_grad=True)
    parts = batched.unbind(x)
    assert torch.equal(torch.stack(parts), x)
    whole = torch.randn(3, 9, 5)
    (grad,) = torch.autograd.grad(parts, x, whole.unbind(), retain_graph=True)
    assert grad.data_ptr() == whole.data_ptr()
    assert torch.equal(grad, whole)
    apart = [torch.randn(9, 5) for _ in range(3)]
    (grad,) = torch.autograd.grad(parts, x, apart, retain_graph=True)
    assert torch.equal(grad, torch.stack(apart))
    (grad,) = torch.autograd.grad(parts[1], x, apart[1])
    assert torch.equal(grad, torch.stack([torch.zeros(9, 5), apart[1], torch.zeros(9, 5)]))
    x = x.detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: torch.stack(batched.unbind(x)) ** 3, x)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"batch_norm": True}, {"hidden_activations": "gelu"}]
)
def test_other_networks_are_not_plain(options: dict[str, object]) -> None:
    assert not GroupedMLP(2, 5, (6, 6), **options).plain()
    assert not GroupedMLP(2, 5, (6,), outputs=1, **options).plain()
    assert [layer.relu for layer in GroupedMLP(2, 5, (6,), outputs=1).plain()] == [True, False]
