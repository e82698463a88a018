"""What the tests of the ops share."""

import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    """In all of them."""
