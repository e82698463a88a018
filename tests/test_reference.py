"""The reference against the paper's sums written element by element, and its explicit backwards
against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from cases import LOOKUPS, MIXTURES, LookupCase, MixtureCase
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stem_fast import reference


@pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
def test_lookup_reads_each_value(case: LookupCase) -> None:
    weight, ids, offsets, spaces = case.arguments()
    x = reference.lookup(weight, ids, offsets, spaces)
    assert x.shape == (case.spaces, case.batch, len(case.vocab) * case.dim)
    for g in range(case.spaces):
        for b in range(min(case.batch, 5)):
            row = [
                weight[offsets[f] + ids[b, f], g * case.dim + d].item()
                for f in range(len(case.vocab))
                for d in range(case.dim)
            ]
            assert x[g, b].tolist() == row


@pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
def test_lookup_backward_is_its_gradient_without_padding(case: LookupCase) -> None:
    weight, ids, offsets, spaces = case.arguments()
    weight.requires_grad_()
    x = reference.lookup(weight, ids, offsets, spaces)
    grad = torch.randn(x.shape, dtype=x.dtype)
    (expected,) = torch.autograd.grad(x, weight, grad)
    actual = reference.lookup_backward(grad, ids, offsets, len(weight))
    torch.testing.assert_close(actual, expected)
    assert not actual[offsets].any()


def test_bag_pools_what_is_not_padding() -> None:
    weight = torch.randn(9, 6, dtype=torch.float64)
    values = torch.tensor([2, 0, 3, 3, 0, 0, 1])
    offsets = torch.tensor([0, 4, 4, 6, 7])  # [2 0 3 3], [], [0 0], [1]
    row = weight[4:]
    total = torch.stack([row[2] + 2 * row[3], row[0] * 0, row[0] * 0, row[1]])
    summed = reference.bag(weight, values, offsets, 4, 2, "sum")
    torch.testing.assert_close(summed, total.view(4, 2, 3).transpose(0, 1))
    total[0] /= 3
    mean = reference.bag(weight, values, offsets, 4, 2, "mean")
    torch.testing.assert_close(mean, total.view(4, 2, 3).transpose(0, 1))


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_bag_gradient(pooling: str) -> None:
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    values, offsets = torch.tensor([1, 4, 0, 4]), torch.tensor([0, 2, 2, 4])
    assert torch.autograd.gradcheck(
        lambda w: reference.bag(w, values, offsets, 1, 2, pooling), weight
    )
    (grad,) = torch.autograd.grad(
        reference.bag(weight, values, offsets, 1, 2, pooling).sum(), weight
    )
    assert not grad[1].any(), "padding, id 0 of a field that starts at row 1, learns nothing"


def test_grouped_linear_is_one_linear_each() -> None:
    x, reads = torch.randn(3, 4, 5), [2, 0, 2]
    weight, bias = torch.randn(3, 6, 5), torch.randn(3, 6)
    y = reference.grouped_linear(x, reads, weight, bias)
    for e, n in enumerate(reads):
        torch.testing.assert_close(y[e], x[n] @ weight[e].T + bias[e])


def test_gate_inputs_add_what_each_gate_names() -> None:
    x = torch.randn(3, 4, 5)
    out = reference.gate_inputs(x, [(0, 2), (1, 2), (2,)])
    torch.testing.assert_close(out, torch.stack([x[0] + x[2], x[1] + x[2], x[2]]))


@pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES.keys())
def test_mixture_is_the_sum_of_what_a_gate_sees(case: MixtureCase) -> None:
    y, logits, see, learn = case.arguments()
    out = reference.mixture(y, logits, see, learn)
    assert out.shape == (case.gates, case.batch, case.width)
    for k in range(case.gates):
        seen = [e for e in range(case.experts) if see[k] >> e & 1]
        for b in range(min(case.batch, 3)):
            top = max(logits[k, b, e].item() for e in seen)
            p = {e: math.exp(logits[k, b, e].item() - top) for e in seen}
            expected = sum(p[e] / sum(p.values()) * y[e, b] for e in seen)
            torch.testing.assert_close(out[k, b], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES.keys())
def test_mixture_backward_is_its_gradient(case: MixtureCase) -> None:
    y, logits, see, learn = case.arguments()
    y.requires_grad_(), logits.requires_grad_()
    out = reference.mixture(y, logits, see, learn)
    grad = torch.randn(out.shape, dtype=out.dtype)
    expected = torch.autograd.grad(
        out, (y, logits), grad, allow_unused=True, materialize_grads=True
    )
    actual = reference.mixture_backward(grad, y.detach(), logits.detach(), see, learn)
    torch.testing.assert_close(actual, expected)


def test_mixture_gradcheck_with_live_and_frozen_experts_apart() -> None:
    """A plain gradcheck fails by design: forward sees what backward does not teach."""
    y, logits, see, learn = MIXTURES["odd"].arguments()
    y, logits = y[:, :2, :3], logits[:, :2]
    for k in range(len(see)):
        teaches = [e for e in range(len(y)) if learn[k] >> e & 1]

        def out(live: Tensor, gate: Tensor, k: int = k, teaches: list[int] = teaches) -> Tensor:
            frozen = y.clone()
            frozen[teaches] = live
            return reference.mixture(frozen, gate, see[k : k + 1], learn[k : k + 1])

        live = y[teaches].clone().requires_grad_()
        assert torch.autograd.gradcheck(out, (live, logits[k : k + 1].clone().requires_grad_()))
    y.requires_grad_()
    (grad,) = torch.autograd.grad(reference.mixture(y, logits, see, learn)[0].sum(), y)
    taught = [e for e in range(len(y)) if learn[0] >> e & 1]
    assert [e for e in range(len(y)) if grad[e].any()] == taught


@given(experts=st.integers(1, 63), gates=st.integers(1, 16), data=st.data())
def test_gate_weights_sum_to_one_over_what_is_seen(
    experts: int, gates: int, data: st.DataObject
) -> None:
    mask = st.integers(1, (1 << experts) - 1)
    see = data.draw(st.lists(mask, min_size=gates, max_size=gates))
    logits = torch.linspace(-1e4, 1e4, gates * 2 * experts).view(gates, 2, experts)
    p = reference.gate_weights(logits, see)
    torch.testing.assert_close(p.sum(-1), torch.ones(gates, 2))
    hidden = torch.tensor([[not m >> e & 1 for e in range(experts)] for m in see])
    assert not p[hidden[:, None].expand_as(p)].any()
