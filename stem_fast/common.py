"""What every room may use: the error of bad input, the kinds of tasks, and words for messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

KINDS = ("binary", "regression", "regression:log1p")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 10


class DataError(ValueError):
    """Bad configuration or bad data; the message is complete for the user."""


def shown(value: Any) -> str:
    """A value in a message: its ``repr``, cut short whatever a file holds."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python makes no text of more than 4,300 digits
        return "a number of thousands of digits"


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """``" Did you mean 'x'?"`` for the known name most like ``name`` in any case, or ``""``."""
    spelled = {each.lower(): each for each in known}
    name = str(name)[:100].lower()
    found = difflib.get_close_matches(name, list(spelled), n=1, cutoff=likeness)
    return f" Did you mean '{spelled[found[0]]}'?" if found else ""
