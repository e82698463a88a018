"""What every room may use: the error of bad input, the kinds of tasks, words for messages, and the
description of an option."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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


DATA, COLUMNS, NETWORK, TRAINING = "Data", "Columns", "Network", "Training"  # panels of options


class Option(NamedTuple):
    """All that is told of an option of ``fit``: it makes the flag, the key of a configuration file,
    the refusal of a wrong value and the reference page."""

    panel: str  # under which the help lists it
    help: str
    kind: type = str  # of one value: str, int, float or bool
    many: bool = False  # a comma-separated list, which may be given several times
    check: Callable[[str, Any], Any] | None = None  # (name, value) -> typed value, or DataError
    shown: Any = None  # the default, as the help shows it
    flags: tuple[str, ...] = ()  # other than --NAME
    metavar: str | None = None


def described(default: Any, panel: str, text: str, **option: Any) -> Any:
    """A dataclass field that is an option too."""
    shown = {} if default in (None, dataclasses.MISSING, ()) else {"shown": default}
    metadata = {"option": Option(panel, text, **{**shown, **option})}
    return dataclasses.field(default=default, metadata=metadata)


def options_of(cls: type) -> dict[str, Option]:
    """The options among a dataclass's fields, by name."""
    fields = ((field.name, field.metadata.get("option")) for field in dataclasses.fields(cls))
    return {name: option for name, option in fields if option is not None}
