"""An extension of griffe: docstrings as Markdown, roles as code and aligned ``name  meaning`` lines
as a list."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring)
    return re.sub(r"(?:^\w+ {2,}\S.*\n?(?:^ {4,}\S.*\n?)*){2,}", _listed, text, flags=re.MULTILINE)


def _listed(found: re.Match[str]) -> str:
    joined = re.sub(r"\n {4,}", " ", found[0])
    return re.sub(r"^(\w+) {2,}", r"- `\1`: ", joined, flags=re.MULTILINE)
