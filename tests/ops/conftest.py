"""What the tests of the ops share."""

import os

import pytest

import stem_fast

if os.environ.get("STEM_FAST_SANITIZE") == "1":  # else `make sanitize` would test another library
    assert "sanitize" in stem_fast.__file__


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    """In all of them."""
