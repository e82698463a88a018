"""Columns of a table as they stand there, row for row beside its encoded form: what ``predict``
copies to its output, and what ``evaluate`` picks and groups rows by."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from stem_fast.common import DataError
from stem_fast.data.blocks import Block
from stem_fast.data.joins import Join, read_blocks
from stem_fast.data.schema import Schema
from stem_fast.data.tables import Table
from stem_fast.data.texts import MISSING, TEXT, canonical, joined

_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


class Where(NamedTuple):
    """A condition on a column: "tab=1", "date>=20220501", "city!=Oslo".

    Where the value is a number, numbers are compared, else texts in one spelling (``canonical``).
    Nothing after = or !=, or a spelling of a missing value such as NULL, means a missing value; a
    missing value fulfils != alone.
    """

    column: str
    test: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Where:
        """Raises DataError for a text without a column or an operator."""
        # Surrogates stand for bytes that are not UTF-8, which no column has.
        value = r"([^\n\ud800-\udfff]*?)"
        found = re.fullmatch(rf"\s*([^=!<>]+?)\s*(!=|<=|>=|==?|<|>)\s*{value}\s*", text)
        missing = found is not None and found[3] in MISSING.to_pylist()
        if found is None or (missing and found[2] not in ("=", "==", "!=")):
            raise DataError(
                f"--where is {text!r}: give COLUMN=VALUE, or one of !=, <, <=, >, >= between them."
            )
        return cls(found[1], found[2].replace("==", "="), "" if missing else found[3])

    def __str__(self) -> str:
        return f"{self.column}{self.test}{self.value}"

    def holds(self, block: Block) -> np.ndarray:
        """bool [rows of the block]. Raises DataError for text where numbers are to be ordered."""
        texts, codes, _ = block.distinct(self.column, block.column(self.column))
        values = texts.to_pylist()
        given = canonical(pa.array([self.value], TEXT))[0].as_py()
        test, bound = _TESTS[self.test], _number(given)
        if not self.value:
            kept = [test(value is None, True) for value in values]
        elif bound is None:
            kept = [value is not None and test(value, given) for value in values]
        elif self.test in ("=", "!="):
            kept = [value is not None and test(_number(value), bound) for value in values]
        else:
            numbers = [None if value is None else _number(value) for value in values]
            wrong = [v is not None and n is None for v, n in zip(values, numbers, strict=True)]
            rows = np.append(wrong, False)[codes.fill_null(-1).to_numpy()]
            block.refuse(self.column, rows, f"is no number, which --where {self} compares.")
            kept = [number is not None and test(number, bound) for number in numbers]
        missing = (self.test == "!=") == bool(self.value)
        kept = [missing if v is None else k for v, k in zip(values, kept, strict=True)]
        # Missing rows have code -1, which picks the last element.
        return np.append(kept, missing).astype(bool)[codes.fill_null(-1).to_numpy()]


def _number(text: str) -> int | float | None:
    """Exact for whole numbers of any size; None for text."""
    if "_" in text:  # Python takes 1_000
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def matching(
    path: str | Path, schema: Schema, conditions: Sequence[Where], *, joins: Sequence[Join] = ()
) -> np.ndarray:
    """The numbers, int64, of the rows that fulfil every condition. DataError where none does."""
    found, start = [], 0
    for block in _blocks(path, schema, [each.column for each in conditions], joins):
        holds = np.all([each.holds(block) for each in conditions], axis=0)
        found.append(start + np.flatnonzero(holds))
        start += len(block)
    rows = np.concatenate(found)
    if not len(rows):
        shown = " and ".join(map(str, conditions))
        raise DataError(f"{path}: none of its {start:,} rows has {shown}.")
    return rows


def read_columns(
    path: str | Path,
    schema: Schema,
    names: Sequence[str],
    *,
    joins: Sequence[Join] = (),
    texts: bool = False,
) -> pa.Table:
    """Columns of all rows, in order and as they stand there, or as the texts of their values, null
    for missing. (Text cells are text; files that differ in a column's type make it text too.)"""
    parts: dict[str, list[pa.Array]] = {name: [] for name in names}
    for block in _blocks(path, schema, names, joins):
        for name, arrays in parts.items():
            values = block.column(name)
            if texts:
                distinct = block.distinct(name, values)
                values = distinct.texts.take(distinct.codes).cast(TEXT)
            elif pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            arrays.append(values)
    return pa.table({name: joined(arrays) for name, arrays in parts.items()})


def _blocks(path: str | Path, schema: Schema, names: Sequence[str], joins: Sequence[Join]) -> Any:
    return read_blocks(Table(path, schema.header, schema.delimiter), names, joins)
