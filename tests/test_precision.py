"""The switch to TF32. (What products in each precision are is in test_batched and test_train.)"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stem_fast.nn.precision import tf32

products = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    """As torch starts, before and after."""
    assert (products.allow_tf32, products.fp32_precision) == (False, "none")
    yield
    products.allow_tf32 = False
    products.fp32_precision = "none"


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_tf32_is_on_within_and_as_before_after(before: str) -> None:
    """Of torch's two switches, users of the newer one cannot read the older."""
    products.fp32_precision = before
    for precision, within in (("fp32", before), ("bf16", before), ("tf32", "tf32")):
        with tf32(precision):
            assert products.fp32_precision == within
        assert products.fp32_precision == before


@pytest.mark.parametrize("before", [False, True])
def test_users_of_the_older_switch_can_go_on_reading_it(before: bool) -> None:
    products.allow_tf32 = before
    with tf32("tf32"):
        assert products.allow_tf32
    assert products.allow_tf32 == before


def test_requests_side_by_side_share_the_switch() -> None:
    """The first to end leaves it on for the other."""
    one, other = tf32("tf32"), tf32("tf32")
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert products.fp32_precision == "tf32"
    other.__exit__(None, None, None)
    assert products.fp32_precision == "none"


def test_an_error_within_switches_back() -> None:
    with pytest.raises(ValueError, match="within"), tf32("tf32"):
        raise ValueError("within")
    assert products.fp32_precision == "none"
    assert not products.allow_tf32
