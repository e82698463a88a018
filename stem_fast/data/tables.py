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
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from stem_fast.common import DataError, nearest
from stem_fast.data.blocks import Block
from stem_fast.data.texts import TEXT, canonical, missing_to_null, widened

# Rows handled at once, and bytes of them: whichever is reached first bounds the memory of a pass.
BLOCK_ROWS = 1 << 19
BLOCK_BYTES = 1 << 27
PARQUET_ROWS = 1 << 13  # decoded at once: Arrow cannot decode 2 GB of a list's text together
CSV_BYTES = 1 << 22  # bytes parsed at once; no line may be longer
DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
SUFFIXES = (*DELIMITERS, *(f"{suffix}.gz" for suffix in DELIMITERS), ".parquet")
END = rb"\r\n|\r|\n"  # of a line
INVALID_UTF8 = re.compile(r"column #(\d+): Row #(\d+): .*invalid UTF8")  # pyarrow's words
TYPO = 0.85  # likeness of a name of seven letters to itself with one of them wrong
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # in the name of a folder: the column is missing
HINTS = 10  # absent columns that are named and looked for among the others


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
        with reading(file):
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
            batch = pa.record_batch([widened(each) for each in batch.columns], batch.schema.names)
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

        with reading(file):
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
                    f"{file}: row {row}: expected {ragged[0].expected_columns} columns, got "
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
def reading(file: Path) -> Iterator[None]:
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
        with reading(path):
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


def _refuse_other(
    file: Path, start: int, column: str, values: pa.Array, wanted: str | None
) -> None:
    """Raise DataError where a column of a file is not what the file's folder says."""
    texts = Block(file, start, pa.table({column: values}), ())
    found, codes, _ = texts.distinct(column, values)
    (expected,) = canonical(missing_to_null(pa.array([wanted], TEXT)))
    same = pc.is_null(found) if not expected.is_valid else pc.equal(found, expected)
    kept = same.fill_null(False).take(codes).fill_null(not expected.is_valid)
    texts.refuse(
        column,
        ~kept.to_numpy(zero_copy_only=False),
        f"is not {wanted!r}, which the file's folder is named by: rename or drop one of them.",
    )
