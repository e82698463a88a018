"""The mixture and its gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, assert_within, cpp, devices, dtypes, to
from cases.linear import EXPERT_MIXTURES, check_expert_mixture_inference
from cases.mixture import MIXTURES, MixtureCase, check_mixture, check_not_a_number
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_fast import ops, reference

mixtures = pytest.mark.parametrize("case", MIXTURES.values(), ids=MIXTURES.keys())


@devices
@pytest.mark.parametrize(("sizes", "reads"), EXPERT_MIXTURES)
@dtypes
def test_expert_mixture_inference(
    sizes: tuple[int, int, int, int], reads: list[int], dtype: torch.dtype, device: str
) -> None:
    check_expert_mixture_inference(
        torch.ops.stem_fast.expert_mixture_inference, sizes, reads, dtype, device
    )


def test_what_is_for_inference_has_no_gradient() -> None:
    x = torch.zeros(1, 4, 6, requires_grad=True)
    y = torch.ops.stem_fast.grouped_linear(x, [0], torch.zeros(3, 7, 6), torch.zeros(3, 7), True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        y.sum().backward()
    logits = torch.zeros(1, 4, 1)
    mixed = torch.ops.stem_fast.expert_mixture_inference(
        x, [0], torch.zeros(1, 7, 6), torch.zeros(1, 7), logits, [1]
    )
    with pytest.raises(RuntimeError, match="has no gradient"):
        mixed.sum().backward()


@cpp
def test_bfloat16_rounds_as_torch_does() -> None:
    # One expert of weight 1 gives back every number, NaN and infinity.
    y = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    y = y.view(1, -1, 16)
    one = torch.zeros(1, y.shape[1], 1, dtype=torch.bfloat16)
    torch.testing.assert_close(ops.mixture(y, one, [1], [1]), y, rtol=0, atol=0, equal_nan=True)
    # Two experts of weight 1/2: their exact mean is a tie or not, and is rounded to even.
    a, b = torch.rand(2, 5000, 16).bfloat16()
    mean = ((a.float() + b.float()) / 2).bfloat16()
    half = torch.zeros(1, 5000, 2, dtype=torch.bfloat16)
    assert torch.equal(ops.mixture(torch.stack([a, b]), half, [3], [3])[0], mean)


@devices
@mixtures
@dtypes
def test_mixture_and_its_gradients(case: MixtureCase, dtype: torch.dtype, device: str) -> None:
    check_mixture(case, dtype, device)


@devices
@settings(max_examples=60)
@given(data=st.data())
def test_mixture_of_any_shape(data: st.DataObject, device: str) -> None:
    experts, gates = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 16))
    see = [data.draw(st.integers(1, (1 << experts) - 1)) for _ in range(gates)]
    learn = [mask & data.draw(st.integers(0, (1 << experts) - 1)) for mask in see]
    case = MixtureCase(
        experts,
        gates,
        batch=data.draw(st.integers(0, 9)),
        width=data.draw(st.integers(1, 70)),
        see=tuple(see),
        learn=tuple(learn),
        scale=data.draw(st.sampled_from([1.0, 1e4])),
    )
    check_mixture(case, data.draw(st.sampled_from(DTYPES)), device)


@devices
@mixtures
@dtypes
def test_mixture_expert_backward(case: MixtureCase, dtype: torch.dtype, device: str) -> None:
    y, logits, _, learn = to(device, case.arguments(dtype))
    learn = ops.signed(learn)
    draw = torch.randn(case.gates, case.batch, case.width, device=device).to(dtype)
    p = logits.to(torch.promote_types(dtype, torch.float32)).softmax(-1)
    for e in range(case.experts):
        results = [
            torch.ops.stem_fast.mixture_expert_backward(list(draw), y[e], p, learn, e),
            reference.mixture_expert_backward(draw, y[e], p, learn, e),
            reference.mixture_expert_backward(draw.double(), y[e].double(), p.double(), learn, e),
        ]
        for actual, own, exact in zip(*results, strict=True):
            assert_within(actual, own, exact)


@pytest.mark.parametrize(
    ("experts", "gates", "width"), [(0, 2, 3), (2, 0, 3), (2, 2, 0), (65, 2, 3), (2, 17, 3)]
)
def test_mixture_refuses_other_sizes(experts: int, gates: int, width: int) -> None:
    y, logits = torch.zeros(experts, 4, width), torch.zeros(gates, 4, experts)
    with pytest.raises(ValueError, match="1 to 64 experts, 1 to 16 gates and a width above 0"):
        ops.mixture(y, logits, [1] * gates, [1] * gates)


def test_mixture_names_its_shapes() -> None:
    y, logits = torch.zeros(3, 4, 2), torch.zeros(2, 5, 3)
    message = r"y \[E, B, H\] and logits \[K, B, E\], got y \[3, 4, 2\] and logits \[2, 5, 3\]"
    for wrong in (logits, logits[0]):
        with pytest.raises(ValueError, match=message if wrong is logits else "got y"):
            ops.mixture(y, wrong, [7, 7], [7, 7])


def test_masks_may_be_lists() -> None:
    y, logits = torch.randn(3, 4, 2, requires_grad=True), torch.randn(2, 4, 3)
    lists, numbers = [[1, 1, 0], [True, False, True]], [0b011, 0b101]
    learn = [[0, 1, 0], [1, 0, 1]], [0b010, 0b101]
    found = [ops.mixture(y, logits, *masks) for masks in ((lists, learn[0]), (numbers, learn[1]))]
    grads = [torch.autograd.grad(out.square().sum(), y)[0] for out in found]
    assert torch.equal(*found)
    assert torch.equal(*grads)
    for wrong in ([1, 0], [1, 0, 2]):
        with pytest.raises(ValueError, match="expected a 0 or 1 for each of 3 experts"):
            ops.mixture(y, logits, [wrong, wrong], numbers)


@devices
def test_a_logit_that_is_not_a_number_shows(device: str) -> None:
    op = torch.ops.stem_fast
    check_not_a_number(op.mixture, op.mixture_backward, device)


@devices
def test_mixture_takes_what_is_not_contiguous(device: str) -> None:
    y, logits, see, learn = to(device, MIXTURES["odd"].arguments())
    out = reference.mixture(y, logits, see, learn)
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (y, logits, out.detach())]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(ops.mixture(*strided[:2], see, learn), out)
    torch.testing.assert_close(
        torch.ops.stem_fast.mixture_backward(strided[2], *strided[:2], see, learn),
        reference.mixture_backward(out, y, logits, see, learn),
    )
