"""Text and numbers of a column's values, in one spelling whatever the file's types."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TEXT = pa.large_string()
# Text that means "missing", in CSV cells, Parquet strings and list elements alike.
MISSING = pa.array(["", "NULL", "\\N", "NaN", "nan"], TEXT)
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
NUMBERS = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_boolean,
    pa.types.is_null,
)


def joined(parts: Sequence[pa.Array]) -> pa.ChunkedArray:
    """Arrays one after the other, as text where files differ in type."""
    types = {part.type for part in parts}
    if any(pa.types.is_nested(each) for each in types):
        whole = pa.concat_tables([pa.table({"": p}) for p in parts], promote_options="permissive")
        return whole[""]
    return pa.chunked_array(
        [one_spelling(p, file_spelling(p)) for p in parts] if len(types) > 1 else parts
    )


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def widened(array: pa.Array) -> pa.Array:
    """The same values with 64-bit offsets and without dictionaries: a block's 2 GB of text, or what
    its dictionary stands for, would be too much for Arrow's smaller types."""
    kind = widened_type(array.type)
    return array if kind == array.type else array.cast(kind)


def widened_type(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_dictionary(kind):
        return widened_type(kind.value_type)
    if types.is_string(kind) or types.is_string_view(kind):
        return TEXT
    if types.is_binary(kind) or types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pa.large_list(kind.value_field.with_type(widened_type(kind.value_type)))
    return kind


def file_spelling(values: pa.Array) -> pa.Array:
    """The text of each value as it stands or as Arrow writes it, null where it means "missing"."""
    texts = values.cast(TEXT)
    if pa.types.is_floating(values.type):
        texts = _float_texts(values, texts)
    return missing_to_null(texts)


def one_spelling(values: pa.Array, spelled: pa.Array) -> pa.Array:
    """The text that each value is compared by; ``spelled`` is its ``file_spelling``."""
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


def missing_to_null(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_in(texts, value_set=MISSING), pa.scalar(None, TEXT), texts)


def as_numbers(values: pa.Array) -> np.ndarray:
    return values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def true_to_one(texts: pa.Array) -> pa.Array:
    """1 and 0 for true and false, however they are written."""
    small = pc.utf8_lower(texts)
    texts = pc.if_else(pc.equal(small, "true"), "1", texts)
    return pc.if_else(pc.equal(small, "false"), "0", texts)


def first_failure(texts: pa.Array) -> np.ndarray:
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
