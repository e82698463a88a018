"""Read tables (CSV, TSV, Parquet; files or folders) as blocks of Arrow columns, with side tables.

Values of every type are compared by their text, in one spelling (``canonical``), so that a value is
the same in a CSV and a Parquet file, and whatever type a program gave the column.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from stem_fast.schema import DataError, SequenceField, nearest

# Rows handled at once, and bytes of them: whichever is reached first bounds the memory of a pass.
BLOCK_ROWS = 1 << 19
BLOCK_BYTES = 1 << 27
PARQUET_ROWS = 1 << 13  # decoded at once: Arrow cannot decode 2 GB of a list's text together
CSV_BYTES = 1 << 22  # bytes parsed at once; no line may be longer
DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
SUFFIXES = (*DELIMITERS, *(f"{suffix}.gz" for suffix in DELIMITERS), ".parquet")
TEXT = pa.large_string()
# Text that means "missing", in CSV cells, Parquet strings and list elements alike.
MISSING = pa.array(["", "NULL", "\\N", "NaN", "nan"], TEXT)
END = rb"\r\n|\r|\n"  # of a line
INVALID_UTF8 = re.compile(r"column #(\d+): Row #(\d+): .*invalid UTF8")  # pyarrow's words
TYPO = 0.85  # likeness of a name of seven letters to itself with one of them wrong
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # in the name of a folder: the column is missing
HINTS = 10  # absent columns that are named and looked for among the others
# Whole numbers as programs write them that hold the column as floats: because of a gap, as a rule.
# Without leading zeros, which numbers don't have ("007.0"), and with nothing but zeros behind the
# point: "1.50" may be a version, and another one than "1.5".
WHOLE = r"^(?:-?(0)|(-?[1-9][0-9]*))\.0+$"
LARGE = r"^-?[1-9](?:\.[0-9]+)?e\+1[0-9]$"  # above, there are no integers of 64 bits
DAY, CLOCK = "[0-9]{4}-[0-9]{2}-[0-9]{2}", "[0-9]{2}:[0-9]{2}:[0-9]{2}"
TIMES = (
    (rf"^({DAY}[T ]{CLOCK}(?:\.[0-9]+)?)\+00:?00$", r"\1Z"),
    (rf"^({DAY})T({CLOCK}(?:\.[0-9]+)?Z?)$", r"\1 \2"),
    (rf"^((?:{DAY} )?{CLOCK})(?:(\.[0-9]*[1-9])0*|\.0+)(Z?)$", r"\1\2\3"),
    (rf"^({DAY}) 00:00:00$", r"\1"),
)
TRUTHS = pa.array(["True", "TRUE", "False", "FALSE"], TEXT)  # as pandas and R write them
BRACKETS = r"(?s)^\s*[\[({].*[\])}]\s*$"  # a list's text: [1, 2, 3]
SEVERAL = r"^\s*[^\s,;|]+(?:[\s,;|]+[^\s,;|]+)+\s*$"  # words with something between them
NUMBERS = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_boolean,
    pa.types.is_null,
)


class Join(NamedTuple):
    """A side table (user or item features), left-joined on a key that is unique there."""

    path: str | Path
    key: str


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

    side: _Side
    key: Values
    found: pa.Array


class Table:
    """The files of one table: a file, or a folder of files of one kind, read in name order.

    A folder inside it that is named ``column=value`` (Hive's form, ``%xx`` decoded) gives its files
    that column, as text. Files without a row (of 0 bytes, or of a header alone) are left out.

    header     column names of CSV files without a header line
    delimiter  of CSV cells; None: by suffix
    Raises DataError for no such file, an unknown suffix or a mixed folder.
    """

    def __init__(
        self, path: str | Path, header: Sequence[str] | None = None, delimiter: str | None = None
    ) -> None:
        self.path = Path(path)
        self.header = header
        self.partitions = _files(self.path)
        self.files = list(self.partitions)
        self.kind = _kind(self.files[0])
        self.delimiter = delimiter

    def content(self) -> list[str]:
        """How the files are read and the hash of each file's bytes."""
        digests = [self.kind, self.delimiter or "", *(self.header or ())]
        for file, partition in self.partitions.items():
            digests += [f"{column}={value}" for column, value in partition.items()]
            digest = hashlib.blake2b(digest_size=20)
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            digests.append(digest.hexdigest())
        return digests

    def names(self, file: Path | None = None) -> list[str]:
        """The column names of one file, by default the first that holds a row; [] where it holds
        none. Raises DataError where no file does."""
        if file is not None:
            own = self._names(file)
            return own and [*own, *(key for key in self.partitions[file] if key not in own)]
        names = next(filter(None, map(self.names, self.files)), None)
        if names is None:
            raise DataError(f"{self.path}: no rows.")
        return names

    def _names(self, file: Path) -> list[str]:
        """The columns that stand in a file, [] if no row does."""
        with _reading(file):
            if not file.stat().st_size:
                return []
            if self.kind == ".parquet":
                metadata = pa.parquet.read_metadata(file)
                return metadata.schema.to_arrow_schema().names if metadata.num_rows else []
            names = list(self.header or ())
            start = self._start(file)
            _, line, rest = self._header(start)
            if not names and line:
                try:  # not by a stream of rows, whose thread would go on reading
                    header = pa.csv.read_csv(pa.BufferReader(line + b"\n"), *self._options(None))
                except pa.ArrowInvalid as error:
                    if b'"' not in line:
                        raise
                    raise DataError(
                        f"{file}: a quote in its header {line[:80].decode(errors='replace')!r} is "
                        "never closed: close or remove it."
                    ) from error
                names = header.column_names
            if self.header is not None:
                rest = start
            # An empty line is a value where there is one column.
            return names if (rest if len(names) == 1 else rest.strip(b"\r\n")) else []

    def blocks(
        self, columns: Sequence[str], row_bytes: int = 0
    ) -> Iterator[tuple[Path, int, pa.Table]]:
        """(file, its first row in the file, rows) of about BLOCK_ROWS rows or BLOCK_BYTES bytes.

        Text, lists and dictionaries have types with 64-bit offsets there. ``row_bytes`` are what
        the caller adds to each row.
        """
        for file in self.files:
            names = self.names(file)
            if not names:
                continue
            require(file, columns, names)
            counts = Counter(names)
            for column in columns:
                if counts[column] > 1:
                    raise DataError(f"{file}: column '{column}' stands there twice: rename one.")
            start = 0
            for table in _regroup(self._batches(file, names, columns), row_bytes):
                yield file, start, table
                start += len(table)

    def _batches(
        self, file: Path, names: Sequence[str], columns: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        """The rows of a file, with the columns that its folders are named by."""
        partition = {
            column: value for column, value in self.partitions[file].items() if column in columns
        }
        own = self._names(file) if partition else names
        stored = dict.fromkeys(c for c in columns if c not in partition or c in own)
        start = 0
        for batch in self._stored(file, own, list(stored) or own[:1]):
            batch = pa.record_batch([_wide(each) for each in batch.columns], batch.schema.names)
            for column, value in partition.items():
                if column in stored:
                    _refuse_other(file, start, column, batch[column], value)
            arrays = [
                batch[column]
                if column in stored
                else pa.repeat(pa.scalar(partition[column], TEXT), len(batch))
                for column in columns
            ]
            start += len(batch)
            yield pa.record_batch(arrays, list(columns))

    def _stored(
        self, file: Path, names: Sequence[str], columns: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        """Columns as they are stored."""
        ragged: list[pa.csv.InvalidRow] = []

        def refuse(row: pa.csv.InvalidRow) -> str:
            ragged.append(row)
            return "error"

        with _reading(file):
            try:
                if self.kind == ".parquet":
                    with pa.parquet.ParquetFile(file) as parquet:
                        # Each row group has dictionaries of its own, which Arrow does not join
                        # where they are in lists.
                        for group in range(parquet.num_row_groups):
                            yield from parquet.iter_batches(PARQUET_ROWS, [group], list(columns))
                else:
                    options = self._options(columns, refuse)
                    if len(names) == 1:  # an empty line is a value, but before the name
                        before, _, _ = self._header(self._start(file))
                        options[0].skip_rows = 0 if self.header else before
                        options[1].ignore_empty_lines = False
                    with pa.csv.open_csv(file, *options) as reader:
                        yield from reader
            except pa.ArrowInvalid as error:
                # The reader numbers rows from 1, and the header line is one of them.
                first = 1 if self.header is not None else 2
                if invalid := INVALID_UTF8.search(str(error)):
                    column, row = names[int(invalid[1])], int(invalid[2]) - first
                    raise DataError(
                        f"{file}: column '{column}', row {row}: is not valid UTF-8: save the file "
                        "as UTF-8."
                    ) from error
                if not ragged:
                    raise
                row = ragged[0].number - first
                raise DataError(
                    f"{file}: row {row}: expected {ragged[0].expected_columns} columns, found "
                    f"{ragged[0].actual_columns}: {ragged[0].text[:200]!r}."
                ) from error

    @property
    def between(self) -> str:
        """What is between the cells of a line."""
        return self.delimiter or DELIMITERS[self.kind]

    @property
    def quotes(self) -> bool:
        """Whether a cell may stand in quotes. Between tabs a quote is a character: one that is
        alone would swallow lines."""
        return self.between != "\t"

    def _start(self, file: Path) -> bytes:
        """The first CSV_BYTES of a CSV file."""
        with pa.input_stream(str(file), compression="detect") as stream:
            return stream.read(CSV_BYTES).removeprefix(codecs.BOM_UTF8)

    def _header(self, start: bytes) -> tuple[int, bytes, bytes]:
        """(empty lines before it, the first line, what follows) of a CSV file's start; names in
        quotes may be of several lines."""
        between = re.escape(self.between.encode())
        cell = b"[^" + between + b"\r\n]*"
        if self.quotes:
            cell = b'(?:"(?:[^"]|"")*"' + cell + b"|" + cell + b")"
        line = cell + b"(?:" + between + cell + b")*"
        found = re.match(b"((?:" + END + b")*)(" + line + b"(?:" + END + b")?)", start)
        assert found is not None  # all of it may be empty
        return len(re.findall(END, found[1])), found[2], start[found.end() :]

    def _options(
        self,
        columns: Sequence[str] | None,
        ragged: Callable[[pa.csv.InvalidRow], str] | None = None,
    ) -> tuple[pa.csv.ReadOptions, pa.csv.ParseOptions, pa.csv.ConvertOptions]:
        """Of a CSV reader."""
        header = None if self.header is None else list(self.header)
        texts = {} if columns is None else dict.fromkeys(columns, TEXT)
        return (
            # With threads the reader does not know the number of a ragged row.
            pa.csv.ReadOptions(use_threads=False, block_size=CSV_BYTES, column_names=header),
            pa.csv.ParseOptions(
                delimiter=self.between,
                quote_char='"' if self.quotes else False,
                newlines_in_values=self.quotes,
                invalid_row_handler=ragged,
            ),
            pa.csv.ConvertOptions(
                include_columns=list(texts), column_types=texts, strings_can_be_null=False
            ),
        )


class Block:
    """Consecutive rows of one file, with the columns of the side tables joined to them."""

    def __init__(self, file: Path, start: int, table: pa.Table, sides: Sequence[_Side]) -> None:
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
            spelled = _spelled(encoded.dictionary)
            return Values(_one_spelling(encoded.dictionary, spelled), encoded.indices, spelled)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            lists = "; a column of lists belongs under sequences"
            hint = lists if pa.types.is_nested(values.type) else ""
            raise DataError(
                f"{self.file}: column '{name}' holds {_said(values)}, which has no text form{hint} "
                f"({error})."
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
                f"{self.file}: column '{name}' holds {_said(values)}, not lists of values."
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
            values = _missing_to_null(pc.utf8_trim_whitespace(values.cast(TEXT)))
        elif not any(is_kind(kind) for is_kind in NUMBERS):
            raise DataError(f"{self.file}: column '{name}' holds {_said(values)}, not numbers.")
        advice = "correct it or leave it empty."
        try:
            numbers = _as_numbers(values)
        except pa.ArrowInvalid:
            values = _true_to_one(values)
            try:
                numbers = _as_numbers(values)
            except pa.ArrowInvalid:
                self.refuse(name, _first_failure(values), f"is not a number: {advice}")
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


class _Side:
    """A side table in memory: ``keys`` (unique texts) and the columns wanted from it."""

    def __init__(self, table: Table, key: str, columns: Sequence[str]) -> None:
        parts = [part for _, _, part in table.blocks((key, *columns))]
        if not parts:
            raise DataError(f"{table.path}: no rows.")
        names = (key, *columns)
        with _reading(table.path):
            columns_of = {n: [part[n].combine_chunks() for part in parts] for n in names}
            whole = {name: joined(found) for name, found in columns_of.items()}
            block = Block(table.path, 0, pa.table(whole), ())
        self.key = key
        texts, codes, _ = block.distinct(key, block.column(key))
        self.keys = texts.take(codes)
        present = self.keys.drop_null()
        self.example = present[0].as_py() if len(present) else None
        self.columns = {name: block.column(name) for name in columns}
        first = pc.index_in(self.keys, value_set=self.keys, skip_nulls=True)
        first = first.fill_null(-1).to_numpy()
        repeated = np.flatnonzero((first >= 0) & (first != np.arange(len(first))))
        if len(repeated):
            row = int(repeated[0])
            raise DataError(
                f"{table.path}: key '{key}' must be unique, but {self.keys[row].as_py()!r} stands "
                f"on rows {first[row]} and {row}."
            )


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
    sides = [_Side(*parts) for parts in plan]
    # Of the side tables one column at a time is gathered.
    joined = [column.nbytes // len(column) for side in sides for column in side.columns.values()]
    rows = 0
    stored = [name for name in wanted if name in own_names]
    for file, start, part in table.blocks(stored, max(joined, default=0)):
        rows += len(part)
        yield Block(file, start, part, sides)
    if not rows:
        raise DataError(f"{table.path}: no rows.")


def signatures(*paths: str | Path) -> dict[str | Path, list[tuple[str, int, int]]]:
    """Of each table what changes when its files are written to, for ``refuse_changed``."""
    found = {path: [(file, file.stat()) for file in _files(Path(path))] for path in paths}
    return {
        path: [(str(file), info.st_size, info.st_mtime_ns) for file, info in files]
        for path, files in found.items()
    }


def refuse_changed(before: Mapping[str | Path, list[tuple[str, int, int]]]) -> None:
    """Raise DataError for a table that was written to since ``signatures`` looked at it."""
    for path, signature in signatures(*before).items():
        if signature != before[path]:
            raise DataError(f"{path}: the data changed while it was read: try again.")


def require(
    where: str | Path, columns: Iterable[str], names: Iterable[str], advice: str = ""
) -> None:
    """Raise DataError that names every absent column and the names most like them, and ends with
    ``advice`` if one is like none."""
    known, columns = dict.fromkeys(names), dict.fromkeys(columns)
    absent = [name for name in columns if name not in known]
    if absent:
        quoted = ", ".join(f"'{name}'" for name in absent[:HINTS])
        quoted += f" and {len(absent) - HINTS} more" if len(absent) > HINTS else ""
        unused = [name for name in known if name not in columns]
        # A name in use is not what is meant, unless a letter or so makes the difference.
        hints = [nearest(name, known, TYPO) or nearest(name, unused) for name in absent[:HINTS]]
        advice = "" if all(hints) else advice
        if len(absent) > 1:
            pairs = zip(hints, absent, strict=False)
            hints = [hint and f"{hint[:-1]} for '{name}'?" for hint, name in pairs]
        raise DataError(f"{where}: no column {quoted}.{''.join(hints)}{advice}")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what pyarrow and the file system raise into a DataError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: the names of its columns are not valid UTF-8: save the file as UTF-8."
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read: {str(error).rstrip('.')}.") from error


def _files(path: Path) -> dict[Path, dict[str, str | None]]:
    """The files of a table in order, each with the columns that its folders are named by."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file or folder.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{str(path)[:200]!r} cannot be read: {why}.") from error
    if not stat.S_ISDIR(mode):
        files: dict[Path, dict[str, str | None]] = {path: {}}
    else:
        with _reading(path):
            files = dict(_walk(path, {}))
        if not files:
            raise DataError(f"{path}: an empty folder.")
    first = next(iter(files))
    for file in files:
        if _suffix(file) not in SUFFIXES or file.is_dir():
            advice = ""
            if file.is_dir():
                advice = " A folder inside it is read if it is named as in date=2024-01-01."
            raise DataError(
                f"{file}: unknown kind of file, supported: {', '.join(SUFFIXES)}.{advice}"
            )
        if not file.is_file():  # reading a FIFO would wait for ever
            raise DataError(f"{file}: is no regular file: copy what it gives to one.")
        if _kind(file) != _kind(first):
            raise DataError(f"{path}: holds {first.name} and {file.name}: use files of one kind.")
    return files


def _walk(
    folder: Path, partition: dict[str, str | None]
) -> Iterator[tuple[Path, dict[str, str | None]]]:
    """All that is in a folder in name order, but what programs leave there as marks, such as
    _SUCCESS and .part.crc."""
    for path in sorted(folder.iterdir()):
        column, equals, value = map(unquote, path.name.partition("="))
        if path.name[0] == "." or (path.name[0] == "_" and not equals):
            continue
        if not (equals and column and path.is_dir()):
            yield path, partition
            continue
        if column in partition:
            raise DataError(
                f"{path}: column '{column}' is named by two of its folders: rename one."
            )
        yield from _walk(path, {**partition, column: None if value == NO_VALUE else value})


def _suffix(file: Path) -> str:
    return "".join(part.lower() for part in file.suffixes[-2 if file.suffix == ".gz" else -1 :])


def _kind(file: Path) -> str:
    return _suffix(file).removesuffix(".gz")


def _regroup(batches: Iterable[pa.RecordBatch], row_bytes: int = 0) -> Iterator[pa.Table]:
    """Rows in groups of BLOCK_BYTES bytes, or of at least BLOCK_ROWS rows (the last one smaller):
    files may hold tiny ones."""
    waiting: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        whole = batch.nbytes + row_bytes * len(batch)
        step = max(1, min(BLOCK_ROWS, len(batch) * BLOCK_BYTES // max(1, whole)))
        for start in range(0, len(batch), step):
            part = batch.slice(start, step)
            more = part.nbytes + row_bytes * len(part)
            if waiting and size + more > BLOCK_BYTES:
                yield pa.Table.from_batches(waiting)
                waiting, rows, size = [], 0, 0
            waiting.append(part)
            rows, size = rows + len(part), size + more
            if rows >= BLOCK_ROWS:
                yield pa.Table.from_batches(waiting)
                waiting, rows, size = [], 0, 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def joined(parts: Sequence[pa.Array]) -> pa.ChunkedArray:
    """Arrays one after the other, as text where files differ in type."""
    types = {part.type for part in parts}
    if any(pa.types.is_nested(each) for each in types):
        whole = pa.concat_tables([pa.table({"": p}) for p in parts], promote_options="permissive")
        return whole[""]
    return pa.chunked_array(
        [_one_spelling(p, _spelled(p)) for p in parts] if len(types) > 1 else parts
    )


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _wide(array: pa.Array) -> pa.Array:
    """The same values with 64-bit offsets and without dictionaries: a block's 2 GB of text, or what
    its dictionary stands for, would be too much for Arrow's smaller types."""
    kind = _wide_type(array.type)
    return array if kind == array.type else array.cast(kind)


def _wide_type(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_dictionary(kind):
        return _wide_type(kind.value_type)
    if types.is_string(kind) or types.is_string_view(kind):
        return TEXT
    if types.is_binary(kind) or types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pa.large_list(kind.value_field.with_type(_wide_type(kind.value_type)))
    return kind


def _said(values: pa.Array) -> str:
    """A type as its file has it, as far as that matters to who reads a message."""
    return str(values.type).replace("large_", "")


def _refuse_other(
    file: Path, start: int, column: str, values: pa.Array, wanted: str | None
) -> None:
    """Raise DataError where a column of a file is not what the file's folder says."""
    texts = Block(file, start, pa.table({column: values}), ())
    found, codes, _ = texts.distinct(column, values)
    (expected,) = canonical(_missing_to_null(pa.array([wanted], TEXT)))
    same = pc.is_null(found) if not expected.is_valid else pc.equal(found, expected)
    kept = same.fill_null(False).take(codes).fill_null(not expected.is_valid)
    texts.refuse(
        column,
        ~kept.to_numpy(zero_copy_only=False),
        f"is not {wanted!r}, which the file's folder is named by: rename or drop one of them.",
    )


def _spelled(values: pa.Array) -> pa.Array:
    """The text of each value as it stands or as Arrow writes it, null where it means "missing"."""
    texts = values.cast(TEXT)
    if pa.types.is_floating(values.type):
        texts = _float_texts(values, texts)
    return _missing_to_null(texts)


def _one_spelling(values: pa.Array, spelled: pa.Array) -> pa.Array:
    """The text that each value is compared by; ``spelled`` is its ``_spelled``."""
    kind = values.type
    if pa.types.is_decimal(kind):
        return _decimal_texts(spelled)
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        spelled = values.cast(pa.timestamp(kind.unit, "UTC")).cast(TEXT)
    return (
        spelled if pa.types.is_integer(kind) or pa.types.is_floating(kind) else canonical(spelled)
    )


def canonical(texts: pa.Array) -> pa.Array:
    """The one spelling of each text that a program may have written in another way.

    Whole numbers of floats are integers ("1170.0", "1.17e+15"); times have no zeros at the end of
    their fraction, a space before the clock and "Z" for UTC, and are dates at midnight; truths are
    "true" and "false". All else stays as it is: "007", "1.50", "1e3", " 1".
    """
    if _holds(texts, "."):
        texts = pc.replace_substring_regex(texts, WHOLE, r"\1\2")
    if _holds(texts, "+"):
        large = pc.match_substring_regex(texts, LARGE).fill_null(False)
        written = texts.filter(large)
        texts = pc.replace_with_mask(
            texts, large, _float_texts(written.cast(pa.float64()), written)
        )
    if _holds(texts, ":"):
        for pattern, replacement in TIMES:
            texts = pc.replace_substring_regex(texts, pattern, replacement)
    if _holds(texts, "T") or _holds(texts, "F"):
        truths = pc.is_in(texts, value_set=TRUTHS)
        texts = pc.if_else(truths, pc.ascii_lower(texts), texts)
    return texts


def _holds(texts: pa.Array, character: str) -> bool:
    """Whether a character may be in a text: a look at all bytes at once is a hundred times faster
    than a regular expression, and most columns are done with it."""
    data = texts.buffers()[2]
    return data is not None and bool((np.frombuffer(data, np.uint8) == ord(character)).any())


def _float_texts(values: pa.Array, others: pa.Array) -> pa.Array:
    """Texts of whole numbers as integers of 64 bits, which a column's type turns to floats where it
    has gaps; ``others`` of all else."""
    wide = values.cast(pa.float64())
    whole = pc.equal(pc.floor(wide), wide)
    whole = pc.and_(whole, pc.and_(pc.greater_equal(wide, -(2.0**63)), pc.less(wide, 2.0**64)))
    signed = pc.and_(whole, pc.less(wide, 2.0**63))
    texts = pc.if_else(signed, wide.cast(pa.int64(), safe=False).cast(TEXT), others)
    unsigned = pc.and_(whole, pc.invert(signed))
    if pc.any(unsigned).as_py():
        texts = pc.if_else(unsigned, wide.cast(pa.uint64(), safe=False).cast(TEXT), texts)
    return texts


def _decimal_texts(texts: pa.Array) -> pa.Array:
    """Decimals of any scale without zeros at their end or exponents."""
    exponents = pc.match_substring(texts, "E").fill_null(False)
    if pc.any(exponents).as_py():
        written = [f"{Decimal(text):f}" for text in texts.filter(exponents).to_pylist()]
        texts = pc.replace_with_mask(texts, exponents, pa.array(written, TEXT))
    texts = pc.replace_substring_regex(texts, r"(\.[0-9]*?)0+$", r"\1")
    return pc.replace_substring_regex(texts, r"\.$", "")


def _missing_to_null(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_in(texts, value_set=MISSING), pa.scalar(None, TEXT), texts)


def _as_numbers(values: pa.Array) -> np.ndarray:
    return values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _true_to_one(texts: pa.Array) -> pa.Array:
    """1 and 0 for true and false, however they are written."""
    small = pc.utf8_lower(texts)
    texts = pc.if_else(pc.equal(small, "true"), "1", texts)
    return pc.if_else(pc.equal(small, "false"), "0", texts)


def _first_failure(texts: pa.Array) -> np.ndarray:
    """True at the first text that is no number, when there is one: halve the range that fails."""
    low, high = 0, len(texts)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            texts.slice(low, middle - low).cast(pa.float64())
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return np.arange(len(texts)) == low
