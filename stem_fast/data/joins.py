"""Side tables joined to the blocks of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stem_fast.common import DataError
from stem_fast.data.blocks import Block, Side
from stem_fast.data.tables import Table, reading, require
from stem_fast.data.texts import joined


class Join(NamedTuple):
    """A side table (user or item features), left-joined on a key that is unique there."""

    path: str | Path
    key: str


def _read_side(table: Table, key: str, columns: Sequence[str]) -> Side:
    """Raises DataError for a table without rows, or a key that stands there twice."""
    parts = [part for _, _, part in table.blocks((key, *columns))]
    if not parts:
        raise DataError(f"{table.path}: no rows.")
    with reading(table.path):
        columns_of = {n: [part[n].combine_chunks() for part in parts] for n in (key, *columns)}
        whole = {name: joined(found) for name, found in columns_of.items()}
        block = Block(table.path, 0, pa.table(whole), ())
    texts, codes, _ = block.distinct(key, block.column(key))
    keys = texts.take(codes)
    first = pc.index_in(keys, value_set=keys, skip_nulls=True).fill_null(-1).to_numpy()
    repeated = np.flatnonzero((first >= 0) & (first != np.arange(len(first))))
    if len(repeated):
        row = int(repeated[0])
        raise DataError(
            f"{table.path}: key '{key}' must be unique, but {keys[row].as_py()!r} stands on rows "
            f"{first[row]} and {row}."
        )
    present = keys.drop_null()
    example = present[0].as_py() if len(present) else None
    return Side(key, keys, example, {name: block.column(name) for name in columns})


def read_blocks(table: Table, columns: Iterable[str], joins: Sequence[Join]) -> Iterator[Block]:
    """Stream a table with ``columns``, taken from it or from the side tables joined to it.

    Joins apply in order, so a key may come from an earlier side table. Keys are compared by
    their text; a row whose key is missing or unknown gets nulls.
    Raises DataError for absent or ambiguous columns, repeated keys, and a table without rows.
    """
    wanted = list(dict.fromkeys((*columns, *(join.key for join in joins))))
    own = table.names()
    available = set(own)
    own_names = frozenset(own)
    plan: list[tuple[Table, str, list[str]]] = []
    where = str(table.path)
    for join in joins:
        # A side table's own header line names its columns; the delimiter is the user's for all.
        other = Table(join.path, None, table.delimiter)
        names = other.names()
        require(other.files[0], [join.key], names)
        require(where, [join.key], available)
        known = frozenset(names)
        taken = [name for name in wanted if name in known and name != join.key]
        both = [name for name in taken if name in available]
        if both:
            raise DataError(
                f"{other.path}: column '{both[0]}' is in {where} too: rename or drop one of them."
            )
        plan.append((other, join.key, taken))
        available.update(names)
        where += f" joined with {other.path}"
    advice = " A side table's columns need its --join FILE:KEY in every command."
    if available.isdisjoint(wanted) and table.kind != ".parquet" and table.header is None:
        advice = (
            f" Its first line, read as names, is {table.between.join(own)[:200]!r}: fit takes a "
            f"--delimiter if something else than {table.between!r} is between them, a --header if "
            "it holds values."
        )
    require(where, wanted, available, advice)
    sides = [_read_side(*parts) for parts in plan]
    # Of the side tables one column at a time is gathered.
    joined = [column.nbytes // len(column) for side in sides for column in side.columns.values()]
    rows = 0
    stored = [name for name in wanted if name in own_names]
    for file, start, part in table.blocks(stored, max(joined, default=0)):
        rows += len(part)
        yield Block(file, start, part, sides)
    if not rows:
        raise DataError(f"{table.path}: no rows.")
