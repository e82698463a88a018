"""Blocks of a table's rows, with the columns of side tables joined to them, as texts, numbers and
lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stem_fast.common import DataError
from stem_fast.data.schema import SequenceField
from stem_fast.data.texts import (
    NUMBERS,
    TEXT,
    as_numbers,
    file_spelling,
    first_failure,
    is_text,
    missing_to_null,
    one_spelling,
    true_to_one,
)

BRACKETS = r"(?s)^\s*[\[({].*[\])}]\s*$"  # a list's text: [1, 2, 3]
SEVERAL = r"^\s*[^\s,;|]+(?:[\s,;|]+[^\s,;|]+)+\s*$"  # words with something between them


class Values(NamedTuple):
    """The distinct values of a column.

    texts    large_string, as ``canonical`` spells them (two may be equal); null = missing
    codes    int32 [rows], index into the texts; null = missing
    spelled  as the file spells them, or Arrow their type: what runs of older releases have learned
    """

    texts: pa.Array
    codes: pa.Array
    spelled: pa.Array


class Match(NamedTuple):
    """A side table's key in a block: its values, and the row of the side table for each or null."""

    side: Side
    key: Values
    found: pa.Array


class Block:
    """Consecutive rows of one file, with the columns of the side tables joined to them."""

    def __init__(self, file: Path, start: int, table: pa.Table, sides: Sequence[Side]) -> None:
        self.file = file
        self.start = start
        self.table = table
        self.own = frozenset(table.column_names)
        self.matches: list[Match] = []
        for side in sides:
            key = self.distinct(side.key, self.column(side.key))
            found = pc.index_in(key.texts, value_set=side.keys, skip_nulls=True)
            self.matches.append(Match(side, key, found))

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> pa.Array:
        """A column of the block; rows that a side table doesn't know are null."""
        if name in self.own:
            return self.table[name].combine_chunks()
        # Rows of a side table are gathered only now, one column at a time, to spare memory.
        side, key, found = next(match for match in self.matches if name in match.side.columns)
        return side.columns[name].take(found.take(key.codes))

    def refuse(self, name: str, wrong: np.ndarray, problem: str) -> None:
        """Raise DataError for the first row that is ``wrong`` (bool); its value is the subject."""
        if wrong.any():
            raise DataError(f"{self.cell(name, int(wrong.argmax()))} {problem}")

    def cell(self, name: str, row: int) -> str:
        """A cell and where it stands, for messages."""
        value = self.column(name)[row].as_py()
        return f"{self.file}: column '{name}', row {self.start + row}: {value!r}"

    def distinct(self, name: str, values: pa.Array) -> Values:
        """The distinct ones of values of the column ``name``."""
        try:
            encoded = pc.dictionary_encode(values)
            self._refuse_bytes(
                name, encoded.dictionary, lambda place: pc.index(encoded.indices, place).as_py()
            )
            spelled = file_spelling(encoded.dictionary)
            return Values(one_spelling(encoded.dictionary, spelled), encoded.indices, spelled)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            lists = "; a column of lists belongs under sequences"
            hint = lists if pa.types.is_nested(values.type) else ""
            raise DataError(
                f"{self.file}: column '{name}' holds {type_name(values)}, which has no text "
                f"form{hint} ({error})."
            ) from error

    def lists(self, name: str, delimiter: str) -> tuple[pa.Array, np.ndarray]:
        """(all elements of a column of lists, row after row; int64 number of them in each row).

        Text is split at ``delimiter``; a single value is a list of one; a missing list is empty.
        """
        values = self.column(name)
        if not pa.types.is_nested(values.type):
            cells = self.distinct(name, values)
            values = pc.split_pattern(cells.spelled.take(cells.codes), delimiter)
        try:
            lengths = pc.list_value_length(values).fill_null(0).to_numpy().astype(np.int64)
            elements = pc.list_flatten(values)
        except pa.ArrowNotImplementedError as error:
            raise DataError(
                f"{self.file}: column '{name}' holds {type_name(values)}, not lists of values."
            ) from error
        self._refuse_bytes(
            name, elements, lambda place: int(np.cumsum(lengths).searchsorted(place, "right"))
        )
        return elements, lengths

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64, missing = NaN. Raises DataError for text and infinite numbers."""
        values = self.column(name)
        kind = values.type
        if is_text(kind):
            self._refuse_bytes(name, values, lambda row: row)
            values = missing_to_null(pc.utf8_trim_whitespace(values.cast(TEXT)))
        elif not any(is_kind(kind) for is_kind in NUMBERS):
            raise DataError(f"{self.file}: column '{name}' holds {type_name(values)}, not numbers.")
        advice = "correct it or leave it empty."
        try:
            numbers = as_numbers(values)
        except pa.ArrowInvalid:
            values = true_to_one(values)
            try:
                numbers = as_numbers(values)
            except pa.ArrowInvalid:
                self.refuse(name, first_failure(values), f"is not a number: {advice}")
                raise
        self.refuse(name, np.isinf(numbers), f"is not finite: {advice}")
        return numbers

    def _refuse_bytes(self, name: str, texts: pa.Array, row_of: Callable[[int], int]) -> None:
        """Raise DataError for text that is not UTF-8: Parquet's readers don't look at it.
        ``row_of`` gives the row of a text's place."""
        if not is_text(texts.type):
            return
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid as error:
            for place, value in enumerate(texts.cast(pa.large_binary()).to_pylist()):
                try:
                    value is None or value.decode()
                except UnicodeDecodeError:
                    raise DataError(
                        f"{self.file}: column '{name}', row {self.start + row_of(place)}: "
                        f"{value[:60]!r} is not valid UTF-8: write the file's text as UTF-8."
                    ) from error
            raise


class ListTexts:
    """What the texts of a sequence look like in all blocks of a table."""

    def __init__(self, name: str, delimiter: str) -> None:
        self.name, self.delimiter = name, delimiter
        self.cells = 0  # distinct in their block, as all counts are
        self.divided = False  # whether one of them has the delimiter
        self.counts = dict.fromkeys((BRACKETS, SEVERAL), 0)
        self.first: dict[str, str] = {}  # cell of each form

    def add(self, block: Block) -> None:
        values = block.column(self.name)
        if not is_text(values.type):
            return
        _, codes, cells = block.distinct(self.name, values)
        self.cells += len(cells) - cells.null_count
        self.divided = self.divided or bool(
            pc.any(pc.match_substring(cells, self.delimiter)).as_py()
        )
        for form in (BRACKETS,) if self.divided else (BRACKETS, SEVERAL):
            found = pc.match_substring_regex(cells, form)
            count = pc.sum(found).as_py() or 0
            if count and form not in self.first:
                row = pc.index(found.take(codes), True).as_py()
                self.first[form] = block.cell(self.name, row)
            self.counts[form] += count

    def judge(self) -> str | None:
        """What to warn of: most texts are of several words, and none has the delimiter.

        Raises DataError where most are lists in brackets.
        """
        remedy = f"write {self.delimiter.join('123')}, or save lists in Parquet."
        if 2 * self.counts[BRACKETS] > self.cells:
            raise DataError(
                f"{self.first[BRACKETS]} is a list's text, whose brackets would be in its values: "
                + remedy
            )
        # A delimiter other than the default is one that somebody has chosen.
        if self.delimiter != SequenceField.delimiter or self.divided:
            return None
        if 2 * self.counts[SEVERAL] <= self.cells:
            return None
        return (
            f"{self.first[SEVERAL]} is one value, for no row has a {self.delimiter!r}: if it is "
            f"several, name what divides them (in YAML, sequences: {{{self.name}: {{delimiter: "
            f"...}}}}), {remedy}"
        )


class Side(NamedTuple):
    """A side table in memory: its keys (unique texts) and the columns wanted from it."""

    key: str
    keys: pa.Array
    example: str | None  # a key; None: every one is missing
    columns: dict[str, pa.Array]


def type_name(values: pa.Array) -> str:
    """A type as its file has it, as far as that matters to who reads a message."""
    return str(values.type).replace("large_", "")
