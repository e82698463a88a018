"""Tables in (CSV, TSV, Parquet), an encoded and memory-mapped data set out, batches of tensors.

Two streaming passes: ``fit_encoding`` reads the training split and learns vocabularies (FuxiCTR's
convention) and standardisation; ``load`` encodes any split once into a cache of .npy files.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from stem_fast.common import DataError
from stem_fast.data.blocks import Block, ListTexts, Values
from stem_fast.data.cache import Writer, cache_root, read_entry, write_entry
from stem_fast.data.dataset import Dataset, Known
from stem_fast.data.joins import Join, read_blocks
from stem_fast.data.schema import Encoding, Schema, SequenceField, table_owners
from stem_fast.data.tables import Table, refuse_changed, signatures
from stem_fast.data.texts import TEXT, canonical

CACHE_VERSION = 3  # a part of every cache key: raise it when the encoded form changes
# Counts, and bytes of their texts, kept unmerged beyond what merging would leave; of all columns.
MERGE_ROWS, MERGE_BYTES = 1 << 20, 1 << 28
NEARLY_ALL = 0.95  # a share that is no chance: something is wrong with the data or its spelling
FEW_VALUES = 20  # too few to warn of: they may all be unknown by chance


def fit_encoding(path: str | Path, schema: Schema, *, joins: Sequence[Join] = ()) -> Encoding:
    """Learn vocabularies and standardisation from the training split, in one streaming pass.

    Ids as in FuxiCTR's tokenizer: values sorted by (-count, text), those with at least
    ``schema.min_count`` occurrences kept; columns that share a table add their counts.
    Raises DataError for absent columns, bad numbers or labels, no rows, a label without values,
    sequences whose texts are lists in brackets, a file that changes meanwhile, or a header or
    delimiter where every table it could apply to is Parquet. Warns of sequences whose texts are
    mostly of several words where none has the default delimiter.
    """
    before = signatures(path, *(join.path for join in joins))
    owners = table_owners(schema)
    delimiters = {sequence.name: sequence.delimiter for sequence in schema.sequences}
    counts = {owner: _Counts(len(owners)) for owner in owners}
    texts = {name: ListTexts(name, delimiter) for name, delimiter in delimiters.items()}
    moments = {name: _Moments() for name in schema.numeric}
    labelled = np.zeros(len(schema.tasks), bool)
    source = Table(path, schema.header, schema.delimiter)
    _refuse_ignored(schema, [source, *(Table(join.path) for join in joins)])
    for block in _blocks(source, schema, joins, labels=True, weight=True):
        for owner, columns in owners.items():
            for name in columns:
                if name in delimiters:
                    texts[name].add(block)
                    values, _ = block.lists(name, delimiters[name])
                else:
                    values = block.column(name)
                counts[owner].add(block.distinct(name, values))
        for name, moment in moments.items():
            moment.add(block.numbers(name))
        labelled |= ~np.isnan(_labels(block, schema)).all(axis=0)
        if schema.weight is not None:
            _weights(block, schema.weight)
    refuse_changed(before)
    for text in texts.values():
        problem = text.judge()
        if problem is not None:
            warnings.warn(problem, stacklevel=2)
    for label, present in zip(schema.tasks, labelled, strict=True):
        if not present:
            raise DataError(f"{path}: label '{label}' is missing on every row: leave it out.")
    for name, moment in moments.items():
        if not np.isfinite([moment.mean, moment.std]).all():
            raise DataError(
                f"{path}: column '{name}' holds numbers too large to standardise: rescale it."
            )
    return Encoding(
        schema,
        {owner: count.vocabulary(schema.min_count) for owner, count in counts.items()},
        tuple(moment.mean for moment in moments.values()),
        tuple(moment.std for moment in moments.values()),
    )


def load(
    path: str | Path,
    encoding: Encoding,
    *,
    cache: str | Path | None = None,
    joins: Sequence[Join] = (),
    labels: bool = True,
    weight: bool = True,
) -> Dataset:
    """Encode a table, or map the cache entry of an earlier call with the same content.

    The entry is named by a hash of the content of every file and of the encoding, so a changed
    source is encoded anew; a damaged entry is rebuilt; an interrupted one never shows.
    Warns of columns of which nearly every value is missing or unknown, and of joins that match
    nearly no row: as a rule a value is spelled in two ways then.
    ``labels=False`` needs and reads no label, group or weight column, ``weight=False`` no weight
    column: only training uses it.
    ``cache`` is the folder of all entries, by default that of ``cache_root``.
    Raises DataError as ``fit_encoding`` does.
    """
    schema = encoding.schema
    source = Table(path, schema.header, schema.delimiter)
    tables = [source, *(Table(join.path, None, schema.delimiter) for join in joins)]
    before = signatures(*(table.path for table in tables))
    keys = [join.key for join in joins]
    contents = [table.content() for table in tables]
    weight = weight and labels and schema.weight is not None
    identity = json.dumps([CACHE_VERSION, contents, keys, encoding.to_dict(), labels, weight])
    entry = cache_root(cache) / hashlib.blake2b(identity.encode(), digest_size=20).hexdigest()
    arrays = read_entry(entry)
    if arrays is None:
        with write_entry(entry) as writer:
            blocks = _blocks(source, schema, joins, labels, weight)
            _encode(blocks, encoding, labels, weight, writer)
            refuse_changed(before)
        arrays = read_entry(entry)
    if arrays is None:
        raise DataError(f"{entry}: was damaged while it was written: try again.")
    notes = json.loads(arrays["notes"].tobytes())
    columns = {name: Known(*counts) for name, counts in notes["columns"].items()}
    _warn(path, encoding, columns, joins, [Known(*counts) for counts in notes["joins"]])
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Dataset(
        tensors["ids"],
        tensors.get("numeric"),
        {
            sequence.name: (tensors[f"sequence{i}_values"], tensors[f"sequence{i}_offsets"])
            for i, sequence in enumerate(schema.sequences)
        },
        tensors.get("labels"),
        tensors.get("weight"),
        np.asarray(arrays["group"]) if "group" in arrays else None,
        columns,
    )


def _warn(
    path: str | Path,
    encoding: Encoding,
    columns: dict[str, Known],
    joins: Sequence[Join],
    keys: Sequence[Known],
) -> None:
    """Warns of joins and of columns of which nearly nothing is known."""
    unmatched = [
        (join, known)
        for join, known in zip(joins, keys, strict=True)
        if known.values >= FEW_VALUES and known.unknown_share >= NEARLY_ALL
    ]
    for join, known in unmatched:
        warnings.warn(
            f"{path}: {100 * known.unknown_share:.1f} % of its {join.key!r} are not in "
            f"{join.path}, such as {known.unknown_value!r} where that has {known.known_value!r}, "
            "and get none of its columns: are the keys spelled in two ways?",
            stacklevel=3,
        )
    schema = encoding.schema
    sequences = {sequence.name: sequence for sequence in schema.sequences}
    for name, known in columns.items():
        if not known.values and known.rows >= FEW_VALUES and not unmatched:
            warnings.warn(f"{path}: column {name!r} is missing on every row", stacklevel=3)
        # Where no value is known at all, fit has warned of that.
        if (
            known.values < FEW_VALUES
            or known.unknown_share < NEARLY_ALL
            or known.known_value is None
        ):
            continue
        ways = "spelled in two ways"
        if name in sequences:
            ways += f", divided by something else than {sequences[name].delimiter!r}"
        warnings.warn(
            f"{path}: {100 * known.unknown_share:.1f} % of the values of column {name!r} are "
            f"unknown to the model, such as {known.unknown_value!r} where it knows "
            f"{known.known_value!r}: are they {ways}, or rarer than min_count "
            f"{schema.min_count} in training?",
            stacklevel=3,
        )


def _refuse_ignored(schema: Schema, tables: Sequence[Table]) -> None:
    """A header is the first table's, the delimiter that of the side tables too."""
    kinds = [table.kind for table in tables]
    for key, value, used in (
        ("header", schema.header, kinds[0] != ".parquet"),
        ("delimiter", schema.delimiter, any(kind != ".parquet" for kind in kinds)),
    ):
        if value is not None and not used:
            raise DataError(
                f"{key} is {value!r}, but {tables[0].path} is Parquet, which has none: "
                "leave it out."
            )


def _blocks(
    table: Table, schema: Schema, joins: Sequence[Join], labels: bool, weight: bool
) -> Iterator[Block]:
    columns = [*schema.features]
    if labels:
        columns += [*schema.tasks, *([schema.group] if schema.group else [])]
    if weight and schema.weight is not None:
        columns.append(schema.weight)
    return read_blocks(table, columns, joins)


class _Counts:
    """How often each text occurs, over blocks and over the columns that share a table.

    ``tables`` of them share the room for what is not merged yet.
    """

    def __init__(self, tables: int = 1) -> None:
        self.room = MERGE_ROWS // tables, MERGE_BYTES // tables
        self.texts = [pa.array([], TEXT)]
        self.counts = [np.zeros(0, np.int64)]
        self.size = self.merged = 0, 0  # texts and their bytes: all, and those merged

    def add(self, values: Values) -> None:
        texts, codes, _ = values
        counts = np.bincount(codes.drop_null().to_numpy(), minlength=len(texts))
        self.texts.append(texts.drop_null())
        self.counts.append(counts[texts.is_valid().to_numpy(zero_copy_only=False)])
        self.size = self.size[0] + len(self.texts[-1]), self.size[1] + self.texts[-1].nbytes
        # Merging only when the parts have doubled keeps the total work linear.
        limits = zip(self.size, self.merged, self.room, strict=True)
        if any(size > 2 * merged + room for size, merged, room in limits):
            self._merge()

    def _merge(self) -> None:
        distinct = pa.concat_arrays(self.texts).dictionary_encode()
        # The weights make it float64, which holds counts up to 2**53 exactly.
        counts = np.bincount(distinct.indices.to_numpy(), weights=np.concatenate(self.counts))
        self.texts = [distinct.dictionary]
        self.counts = [counts.astype(np.int64)]
        self.size = self.merged = len(counts), distinct.dictionary.nbytes

    def vocabulary(self, min_count: int) -> list[str]:
        """Texts in id order. Arrow sorts text by UTF-8 bytes, which is by code points."""
        self._merge()
        table = pa.table({"text": self.texts[0], "count": self.counts[0]})
        table = table.filter(self.counts[0] >= min_count)
        return table.sort_by([("count", "descending"), ("text", "ascending")])["text"].to_pylist()


class _Moments:
    """Streaming mean and population std of one column, NaN left out (Chan, Golub, LeVeque 1983).

    Deviations are from the first value seen, so a constant column has a std of exactly 0.
    """

    def __init__(self) -> None:
        self.shift: float | None = None
        self.rows = 0
        self.shifted_mean = 0.0
        self.squares = 0.0

    def add(self, values: np.ndarray) -> None:
        values = values[~np.isnan(values)]
        if not len(values):
            return
        if self.shift is None:
            self.shift = float(values[0])
        with np.errstate(over="ignore", invalid="ignore"):  # fit_encoding refuses the overflow
            shifted = values - self.shift
            mean = float(shifted.mean())
            squares = float(np.square(shifted - mean).sum())
            rows = self.rows + len(values)
            delta = mean - self.shifted_mean
            self.squares += squares + delta * delta * self.rows * len(values) / rows
            self.shifted_mean += delta * len(values) / rows
            self.rows = rows

    @property
    def mean(self) -> float:
        return (self.shift or 0.0) + self.shifted_mean

    @property
    def std(self) -> float:
        """1 for a constant column and for one without values."""
        return float(np.sqrt(self.squares / self.rows)) or 1.0 if self.rows else 1.0


class _Groups:
    """Codes of group values by first appearance, over blocks."""

    def __init__(self) -> None:
        self.seen = pa.array([], TEXT)

    def codes(self, values: Values) -> np.ndarray:
        texts, codes, _ = values
        new = pc.is_in(texts, value_set=self.seen, skip_nulls=True)
        new = texts.filter(pc.and_(pc.invert(new), pc.is_valid(texts))).unique()
        self.seen = pa.concat_arrays([self.seen, new])
        found = pc.index_in(texts, value_set=self.seen, skip_nulls=True)
        return found.take(codes).fill_null(-1).to_numpy().astype(np.int32)


class _Seen:
    """Counts what becomes a ``Known``, over blocks."""

    def __init__(self, known_value: str | None = None) -> None:
        self.rows = self.values = self.known = 0
        self.unknown_value: str | None = None
        self.known_value = known_value

    def add(self, rows: int, values: Values, found: pa.Array) -> None:
        """``found`` (null = not) is where each of the distinct values was found."""
        counts = np.bincount(values.codes.drop_null().to_numpy(), minlength=len(values.texts))
        counts *= values.texts.is_valid().to_numpy(zero_copy_only=False)
        unknown = counts * found.is_null().to_numpy(zero_copy_only=False)
        self.rows += rows
        self.values += int(counts.sum())
        self.known += int(counts.sum() - unknown.sum())
        if self.unknown_value is None and unknown.any():
            self.unknown_value = values.spelled[int(unknown.argmax())].as_py()

    def result(self) -> Known:
        return Known(self.rows, self.values, self.known, self.unknown_value, self.known_value)


class _Vocabulary:
    """Values to ids."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = pa.array(words, TEXT)
        self.canonical = canonical(self.words)

    def ids(self, rows: int, values: Values, missing: int, seen: _Seen) -> np.ndarray:
        """int32 ids: position + 1 in the vocabulary, ``len(words) + 1`` when unknown."""
        # Runs of older releases have learned what stood in their files ("1170.0"), in columns of
        # several types even two ids of one value: their own spelling comes first.
        found = pc.index_in(values.spelled, value_set=self.words)
        if values.texts is not values.spelled or self.canonical is not self.words:
            found = pc.coalesce(found, pc.index_in(values.texts, value_set=self.canonical))
        seen.add(rows, values, found)
        ids = np.where(
            values.texts.is_valid(), found.fill_null(len(self.words)).to_numpy() + 1, missing
        )
        # Missing rows have code -1, which picks the last element.
        return np.append(ids, missing).astype(np.int32)[values.codes.fill_null(-1).to_numpy()]


def _sequence_ids(
    block: Block, sequence: SequenceField, vocabulary: _Vocabulary, seen: _Seen
) -> tuple[np.ndarray, np.ndarray]:
    """(ids of the kept elements, row after row; number of them in each row)."""
    values, lengths = block.lists(sequence.name, sequence.delimiter)
    distinct = block.distinct(sequence.name, values)
    ids = vocabulary.ids(len(block), distinct, missing=0, seen=seen)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    present = ids > 0
    if not present.all():
        ids, rows = ids[present], rows[present]
        lengths = np.bincount(rows, minlength=len(lengths))
    from_end = np.cumsum(lengths)[rows] - np.arange(len(rows))  # 1 for the last of a row
    return ids[from_end <= sequence.max_len], np.minimum(lengths, sequence.max_len)


def _standardised(block: Block, name: str, mean: float, std: float, seen: _Seen) -> np.ndarray:
    numbers = block.numbers(name)
    present = len(block) - int(np.isnan(numbers).sum())
    seen.rows += len(block)
    seen.values += present
    seen.known += present
    with np.errstate(over="ignore"):
        values = ((numbers - mean) / std).astype(np.float32)
    block.refuse(name, np.isinf(values), "is too large to standardise: correct it.")
    return np.nan_to_num(values, copy=False, nan=0.0)


def _labels(block: Block, schema: Schema) -> np.ndarray:
    """float32 [rows, T], NaN = missing. Raises DataError for a binary label beyond 0 and 1, and for
    one without the log1p that its kind asks for."""
    labels = np.empty((len(block), len(schema.tasks)), np.float32)
    for task, (name, kind) in enumerate(schema.labels.items()):
        values = block.numbers(name)
        if kind == "binary":
            wrong = ~(np.isnan(values) | (values == 0) | (values == 1))
            advice = f"correct it, leave it empty, or fit it as {name}:regression."
            block.refuse(name, wrong, f"is not 0 or 1: {advice}")
        with np.errstate(over="ignore"):
            labels[:, task] = values
        block.refuse(name, np.isinf(labels[:, task]), "is beyond float32: rescale it.")
        if kind == "regression:log1p":
            advice = f"correct it, leave it empty, or fit it as {name}:regression."
            wrong = labels[:, task] <= -1
            block.refuse(name, wrong, f"is not above -1, and has no log1p: {advice}")
    return labels


def _weights(block: Block, name: str) -> np.ndarray:
    """float32 [rows]. Raises DataError for a missing or negative weight."""
    with np.errstate(over="ignore"):
        weights = block.numbers(name).astype(np.float32)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    block.refuse(name, wrong, "is no weight (finite, at least 0): correct it or drop the row.")
    return weights


def _encode(
    blocks: Iterable[Block], encoding: Encoding, labels: bool, weight: bool, writer: Writer
) -> None:
    schema = encoding.schema
    vocabularies = {name: _Vocabulary(words) for name, words in encoding.vocabularies.items()}
    owners = {column: name for name, columns in table_owners(schema).items() for column in columns}
    seen = {
        name: _Seen(next(iter(encoding.vocabularies.get(owners.get(name, ""), ())), None))
        for name in schema.features
    }
    keys: list[_Seen] = []
    standards = list(zip(schema.numeric, encoding.numeric_mean, encoding.numeric_std, strict=True))
    totals = [0] * len(schema.sequences)
    groups = _Groups()
    for i in range(len(schema.sequences)):
        writer.append(f"sequence{i}_offsets", np.zeros(1, np.int64))
    sizes = encoding.vocab_sizes  # made anew by each look at it
    for block in blocks:
        for i, match in enumerate(block.matches):
            if i == len(keys):
                keys.append(_Seen(match.side.example))
            keys[i].add(len(block), match.key, match.found)
        ids = np.empty((len(block), len(schema.categorical)), np.int32)
        for i, name in enumerate(schema.categorical):
            distinct = block.distinct(name, block.column(name))
            unknown = sizes[name] - 1
            ids[:, i] = vocabularies[name].ids(len(block), distinct, unknown, seen[name])
        writer.append("ids", ids)
        if standards:
            numbers = [_standardised(block, *each, seen[each[0]]) for each in standards]
            writer.append("numeric", np.stack(numbers, axis=1))
        for i, sequence in enumerate(schema.sequences):
            vocabulary = vocabularies[owners[sequence.name]]
            values, lengths = _sequence_ids(block, sequence, vocabulary, seen[sequence.name])
            offsets = totals[i] + np.cumsum(lengths)
            totals[i] = int(offsets[-1])
            writer.append(f"sequence{i}_values", values)
            writer.append(f"sequence{i}_offsets", offsets)
        if labels:
            writer.append("labels", _labels(block, schema))
        if weight and schema.weight is not None:
            writer.append("weight", _weights(block, schema.weight))
        if labels and schema.group is not None:
            distinct = block.distinct(schema.group, block.column(schema.group))
            writer.append("group", groups.codes(distinct))
    notes = {
        "columns": {name: each.result() for name, each in seen.items()},
        "joins": [each.result() for each in keys],
    }
    writer.append("notes", np.frombuffer(json.dumps(notes).encode(), np.uint8))
