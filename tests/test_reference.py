"""The reference against the paper's sums written element by element, and its explicit backwards
against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from cases.lookup import LOOKUPS, LookupCase
from cases.mixture import MIXTURES, MixtureCase
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stem_fast import reference


@pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
def test_lookup_reads_and_pools_each_value(case: LookupCase) -> None:
    weight, ids, offsets, spaces, sums, bags, mean = case.arguments()
    x, z = reference.lookup(weight, ids, offsets, spaces, sums, bags, mean)
    fields = len(case.vocab) + len(case.pooling)
    assert x.shape == (case.spaces, case.batch, fields * case.dim)
    assert z.shape == (len(case.sums), case.batch, fields * case.dim)
    rows = weight.view(-1, case.spaces, case.dim)
    for b in range(min(case.batch, 5)):
        parts = [rows[offsets[f] + ids[b, f]] for f in range(len(case.vocab))]
        for s, pooling in enumerate(case.pooling):
            places = range(bags[1][s, b], bags[1][s, b + 1])
            real = [j for j in places if bags[0][j] != 0]
            pooled = torch.zeros(case.spaces, case.dim, dtype=torch.float64)
            for j in real:
                pooled += rows[bags[0][j]] * (bags[2][j] if case.weighted else 1)
            parts.append(pooled / max(len(real), 1) if pooling == "mean" else pooled)
        expected = torch.cat(parts, 1)
        torch.testing.assert_close(x[:, b], expected)
        for k, mask in enumerate(case.sums):
            named = [g for g in range(case.spaces) if mask >> g & 1]
            torch.testing.assert_close(z[k, b], expected[named].sum(0))


@pytest.mark.parametrize("case", LOOKUPS.values(), ids=LOOKUPS.keys())
def test_lookup_backward_is_its_gradient_without_padding(case: LookupCase) -> None:
    weight, *rest = case.arguments()
    ids, offsets, _, sums, bags, mean = rest
    weight.requires_grad_()
    outputs = reference.lookup(weight, *rest)
    grads = [torch.randn_like(part) for part in outputs]
    (expected,) = torch.autograd.grad(outputs, weight, grads)
    actual = reference.lookup_backward(*grads, sums, ids, offsets, bags, mean, len(weight))
    torch.testing.assert_close(actual, expected)
    assert not actual[0].any()
    if not bags:
        assert not actual[offsets].any()


def test_row_plan_names_every_row_once_and_where_it_is_read() -> None:
    ids = torch.tensor([[1, 2], [0, 2], [1, 0]])
    bags = [torch.tensor([4, 0, 5, 4, 1]), torch.tensor([[0, 3, 3, 5]])]
    plan = reference.row_plan(ids, torch.tensor([0, 3]), bags, 1)
    rows, segments, sources, scales = (part.tolist() for part in plan)
    assert rows == [1, 4, 5]
    assert segments == [0, 3, 5, 8]
    # Slots are 3 a sample: two fields and the bag.
    assert sources == [0, 6, 8, 2, 8, 1, 4, 2]
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1, 0.5]


def test_grouped_linear_is_one_linear_each() -> None:
    x, reads = torch.randn(3, 4, 5), [2, 0, 2]
    weight, bias = torch.randn(3, 6, 5), torch.randn(3, 6)
    y = reference.grouped_linear(x, reads, weight, bias)
    for e, n in enumerate(reads):
        torch.testing.assert_close(y[e], x[n] @ weight[e].T + bias[e])


def test_space_sums_add_what_each_mask_names() -> None:
    x = torch.randn(3, 4, 5)
    out = reference.space_sums(x, [0b101, 0b110, 0b100])
    assert reference.space_sums(x, []).shape == (0, 4, 5)
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


@given(experts=st.integers(1, 64), gates=st.integers(1, 16), data=st.data())
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
