"""What columns mean (``Schema``), and what the training split taught us (``Encoding``)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stem_fast.common import COLUMNS, KINDS, DataError, described, nearest, shown

POOLINGS = ("mean", "sum")
ENCODING_VERSION = 1
LARGEST = 2**31 - 1  # of sizes and counts, which 32 bits must hold


@dataclass(frozen=True)
class SequenceField:
    """A feature that holds a list of values, looked up and pooled to one vector.

    name       column
    shares     categorical field whose vocabulary and embedding it uses (None: it has its own)
    pooling    "mean" or "sum" over the values; an empty sequence gives zeros
    max_len    only the last ``max_len`` values of a row are kept (the most recent stands last)
    delimiter  between the values of a text cell; Parquet list columns need none
    """

    name: str
    shares: str | None = None
    pooling: str = "mean"
    max_len: int = 50
    delimiter: str = "|"

    def __post_init__(self) -> None:
        _check_name("sequence", self.name)
        where = f"sequence '{self.name}'"
        if self.shares is not None:
            _check_name(f"{where}: shares", self.shares)
        if self.pooling not in POOLINGS:
            raise DataError(
                f"{where}: expected pooling {' or '.join(POOLINGS)}, got {shown(self.pooling)}."
                + nearest(shown(self.pooling), POOLINGS)
            )
        _check_positive(f"{where}, max_len", self.max_len)
        if not isinstance(self.delimiter, str) or not self.delimiter:
            raise DataError(f"{where}: expected delimiter as text, got {shown(self.delimiter)}.")


@dataclass(frozen=True)
class Schema:
    """Which columns are labels, features, group and weight, and how text files are read.

    labels       label -> "binary" (0 or 1), "regression" or "regression:log1p" (fitted to
                 log(1 + label)); their order is the task order
    categorical  one value a row, looked up in a vocabulary
    numeric      one number a row, standardised
    sequences    lists of values
    group        column that groups rows for gAUC; may be a feature too
    weight       column of sample weights (finite, >= 0)
    min_count    values seen fewer times in the training split become "unknown"
    header       column names of a CSV/TSV that has no header line
    delimiter    of CSV/TSV cells; None: by suffix, comma for .csv, tab for .tsv and .txt

    Every part may be given in the forms that ``from_dict`` reads.
    Raises DataError for a wrong type and when the parts contradict each other.
    """

    labels: dict[str, str] = described(  # noqa: RUF009, a field
        dataclasses.MISSING,
        COLUMNS,
        "tasks (needed): is_click,watch_time:regression",
        many=True,
        metavar="A,B",
    )
    categorical: tuple[str, ...] = described(
        (), COLUMNS, "columns looked up in a vocabulary", many=True, metavar="A,B"
    )
    numeric: tuple[str, ...] = described(
        (), COLUMNS, "columns standardised as numbers", many=True, metavar="A,B"
    )
    sequences: tuple[SequenceField, ...] = described(
        (),
        COLUMNS,
        "list columns: watch_seq=video_id (shares video_id's vocabulary),tags",
        many=True,
        flags=("--sequence", "--sequences"),
        metavar="A,B",
    )
    group: str | None = described(None, COLUMNS, "column that gAUC groups by")
    weight: str | None = described(None, COLUMNS, "column of sample weights")
    min_count: int = described(10, COLUMNS, "rarer values become unknown", kind=int)
    header: tuple[str, ...] | None = described(
        None, COLUMNS, "column names of a file without them", many=True, metavar="A,B"
    )
    delimiter: str | None = described(None, COLUMNS, "of text files (default: by suffix)")

    def __post_init__(self) -> None:
        converted: dict[str, Any] = {
            "labels": _labels("labels", self.labels or ()),
            "categorical": _names("categorical", self.categorical or ()),
            "numeric": _names("numeric", self.numeric or ()),
            "sequences": _sequences("sequences", self.sequences or ()),
            "header": None if self.header is None else _names("header", self.header),
        }
        for key, value in converted.items():
            object.__setattr__(self, key, value)
        if not self.labels:
            raise DataError("labels: expected at least one column, got none.")
        for name, kind in self.labels.items():
            _check_name("labels", name)
            if kind not in KINDS:
                raise DataError(
                    f"label '{name}': expected a kind of {', '.join(KINDS)}, got {shown(kind)}."
                    + nearest(shown(kind), KINDS)
                )
        self._check_columns()
        _check_positive("min_count", self.min_count)
        _check_distinct(self.header or (), "header names column '{}' twice.")
        if self.delimiter is not None and not (
            isinstance(self.delimiter, str)
            and len(self.delimiter) == 1
            and self.delimiter.isascii()
            and self.delimiter not in '\n\r"'
        ):
            raise DataError(
                "delimiter: expected one ASCII character other than a line end or quote, got "
                f"{shown(self.delimiter)}."
            )

    def _check_columns(self) -> None:
        if not self.features:
            raise DataError(
                "features: expected at least one column in categorical, numeric or sequences, got "
                "none."
            )
        _check_distinct(
            (*self.labels, *self.features),
            "column '{}' is used twice: expected one label or one feature a column.",
        )
        for field in self.sequences:
            if field.shares is not None and field.shares not in self.categorical:
                raise DataError(
                    f"sequence '{field.name}': expected to share a categorical field, got "
                    f"'{field.shares}'.{nearest(field.shares, self.categorical)}"
                )
        if self.group is not None:
            _check_name("group", self.group)
            if self.group in self.labels:
                raise DataError(f"group '{self.group}' is a label: name another column.")
        if self.weight is not None:
            _check_name("weight", self.weight)
            if self.weight in self.labels or self.weight in self.features:
                raise DataError(
                    f"weight '{self.weight}' is a label or a feature too: name another column."
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Label names in task order."""
        return tuple(self.labels)

    @property
    def features(self) -> tuple[str, ...]:
        """Feature names: categorical, numeric, sequences."""
        return (*self.categorical, *self.numeric, *(field.name for field in self.sequences))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Schema:
        """A schema from plain YAML or JSON types.

        labels       mapping label -> kind, or (a list of) the text that ``parse_labels`` reads
        sequences    mapping name -> options or the field it shares, list of mappings with a name,
                     or (a list of) the text that ``parse_sequences`` reads
        categorical, numeric, header    list, or comma-separated text

        Raises DataError for an unknown key (naming the nearest known one) or a wrong type.
        """
        return cls(**{"labels": (), **_check_keys(cls, "schema", mapping)})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``Schema.from_dict`` reads them back."""
        plain = dataclasses.asdict(self)
        for key in ("categorical", "numeric", "sequences", "header"):
            if plain[key] is not None:
                plain[key] = list(plain[key])
        return plain


@dataclass(frozen=True)
class Encoding:
    """A schema fitted on the training split: vocabularies and standardisation. Immutable.

    vocabularies  table owner (categorical fields, and sequences that share nothing) -> its values
                  in id order. FuxiCTR's convention: id 0 is padding, id = position + 1 for known
                  values (by descending count, then by text), the last id is "unknown".
    numeric_mean, numeric_std  one float64 a numeric column; the std of a constant column is 1
    """

    schema: Schema
    vocabularies: dict[str, list[str]]
    numeric_mean: tuple[float, ...] = ()
    numeric_std: tuple[float, ...] = ()

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """Categorical field -> rows of its table: known values, padding and unknown."""
        return {name: len(self.vocabularies[name]) + 2 for name in self.schema.categorical}

    @property
    def sequence_tables(self) -> dict[str, int | str]:
        """Sequence -> the categorical field whose table it shares, or the rows of its own."""
        return {
            field.name: field.shares or len(self.vocabularies[field.name]) + 2
            for field in self.schema.sequences
        }

    @property
    def pooling(self) -> dict[str, str]:
        """Sequence -> "mean" or "sum"."""
        return {field.name: field.pooling for field in self.schema.sequences}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``Encoding.from_dict`` reads back exactly the same encoding."""
        return {
            "version": ENCODING_VERSION,
            "schema": self.schema.to_dict(),
            "vocabularies": {name: list(values) for name, values in self.vocabularies.items()},
            "numeric_mean": list(self.numeric_mean),
            "numeric_std": list(self.numeric_std),
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Encoding:
        """The encoding that ``to_dict`` wrote. Raises DataError for another version or damage."""
        if not isinstance(mapping, Mapping) or mapping.get("version") != ENCODING_VERSION:
            found = mapping.get("version") if isinstance(mapping, Mapping) else None
            raise DataError(
                f"encoding version: expected {ENCODING_VERSION}, got {shown(found)} of another "
                "release of stem_fast: fit again."
            )
        try:
            schema = Schema.from_dict(mapping["schema"])
            encoding = cls(
                schema,
                {
                    name: list(_typed(f"the vocabulary of '{name}'", values, list))
                    for name, values in mapping["vocabularies"].items()
                },
                tuple(float(_typed("a mean", x, int, float)) for x in mapping["numeric_mean"]),
                tuple(float(_typed("a std", x, int, float)) for x in mapping["numeric_std"]),
            )
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"damaged encoding: {type(error).__name__}: {error}.") from error
        if set(encoding.vocabularies) != set(table_owners(schema)):
            raise DataError(
                "damaged encoding: expected the vocabularies of its schema, got others."
            )
        if not len(encoding.numeric_mean) == len(encoding.numeric_std) == len(schema.numeric):
            raise DataError(
                "damaged encoding: expected one mean and std a numeric column, got others."
            )
        if not all(map(math.isfinite, encoding.numeric_mean + encoding.numeric_std)):
            raise DataError(
                "damaged encoding: expected a finite mean and std, got NaN or infinity."
            )
        for name, std in zip(schema.numeric, encoding.numeric_std, strict=True):
            if std <= 0:
                raise DataError(f"damaged encoding: std of '{name}': expected above 0, got {std}.")
        for name, values in encoding.vocabularies.items():
            if not all(isinstance(value, str) and is_unicode(value) for value in values):
                raise DataError(f"damaged encoding: a value of '{name}' is not text.")
            if len(set(values)) < len(values):
                raise DataError(f"damaged encoding: a value of '{name}' stands there twice.")
        return encoding


def _typed(what: str, value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        known = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"damaged encoding: {what}: expected {known}, got {shown(value)}.")
    return value


def table_owners(schema: Schema) -> dict[str, list[str]]:
    """Vocabulary owner -> the columns whose values it counts, itself first."""
    owners = {name: [name] for name in schema.categorical}
    for field in schema.sequences:
        owners.setdefault(field.shares or field.name, []).append(field.name)
    return owners


def parse_labels(text: str) -> dict[str, str]:
    """``"finish,watch_time:regression"`` -> {"finish": "binary", "watch_time": "regression"};
    ``"watch_time:regression:log1p"`` has the kind "regression:log1p"."""
    pairs = [item.partition(":") for item in _split(text)]
    _check_distinct([name for name, _, _ in pairs], "labels name '{}' twice.")
    return {name: kind or "binary" for name, _, kind in pairs}


def parse_sequences(text: str) -> tuple[SequenceField, ...]:
    """``"watch_seq=video_id,tags"``: watch_seq shares video_id's table, tags has its own."""
    pairs = [item.partition("=") for item in _split(text)]
    return tuple(SequenceField(name, shares=shares or None) for name, _, shares in pairs)


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _labels(key: str, value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return parse_labels(value)
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, Sequence):
        raise DataError(f"{key}: expected a list of column names, got {shown(value)}.")
    labels: dict[str, str] = {}
    for item in value:
        if isinstance(item, Mapping):
            added = dict(item)
        else:
            _check_name(key, item)
            added = parse_labels(item)
        _check_distinct([*labels, *added], "labels name '{}' twice.")
        labels |= added
    return labels


def _sequences(key: str, value: Any) -> tuple[SequenceField, ...]:
    if isinstance(value, str):
        return parse_sequences(value)
    if isinstance(value, Mapping):
        value = [
            {"name": name, "shares": options}
            if isinstance(options, str)
            else {"name": name, **_check_keys(SequenceField, f"sequence '{name}'", options or {})}
            for name, options in value.items()
        ]
    if not isinstance(value, Sequence):
        raise DataError(f"{key}: expected a list or a mapping, got {shown(value)}.")
    return tuple(field for item in value for field in _sequence(item))


def _sequence(item: Any) -> tuple[SequenceField, ...]:
    if isinstance(item, SequenceField):
        return (item,)
    if isinstance(item, str):
        return parse_sequences(item)
    options = _check_keys(SequenceField, "sequence", item)
    if "name" not in options:
        raise DataError(f"sequences: expected a name, got {shown(dict(options))}.")
    return (SequenceField(**options),)


def _names(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(_split(value))
    if not isinstance(value, Sequence):
        raise DataError(f"{key}: expected a list of column names, got {shown(value)}.")
    for name in value:
        _check_name(key, name)
    return tuple(value)


def _check_keys(cls: type, what: str, mapping: Any) -> Mapping[str, Any]:
    known = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(mapping, Mapping):
        raise DataError(
            f"{what}: expected a mapping with keys of {', '.join(known)}, got {shown(mapping)}."
        )
    for key in mapping:
        if key not in known:
            raise DataError(
                f"{what}: unknown key '{str(key)[:100]}', known: {', '.join(known)}."
                f"{nearest(key, known)}"
            )
    return mapping


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not name or not is_unicode(name):
        raise DataError(
            f"{what}: expected a column name, got {shown(name)}: write it as quoted text."
        )


def is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON, YAML and arguments may hold and no table."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_distinct(names: Iterable[str], message: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(message.format(name))
        seen.add(name)


def _check_positive(what: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{what}: expected a whole number of at least 1, got {shown(value)}.")
    if value > LARGEST:
        raise DataError(f"{what}: expected at most {LARGEST}, got {shown(value)}.")
