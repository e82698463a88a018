"""Reading: every format gives the same columns, side tables join, refusals name the place."""

from __future__ import annotations

import datetime
import gzip
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from encoded import parquet, refused

from stem_fast.common import DataError
from stem_fast.data import tables
from stem_fast.data.blocks import Block
from stem_fast.data.joins import Join, read_blocks
from stem_fast.data.tables import Table


def text(path: Path, content: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path


def blocks(path: Path, columns: str, *joins: Join, **options: Any) -> list[Block]:
    return list(read_blocks(Table(path, **options), columns.split(), joins))


def values(path: Path, column: str, *joins: Join, **options: Any) -> list[str | None]:
    """A column as the texts that it is compared by."""
    found: list[str | None] = []
    for block in blocks(path, column, *joins, **options):
        texts, codes, _ = block.distinct(column, block.column(column))
        found += texts.take(codes).to_pylist()
    return found


def lists(path: Path, column: str, *joins: Join, delimiter: str = "|") -> list[list[str | None]]:
    found: list[list[str | None]] = []
    for block in blocks(path, column, *joins):
        elements, lengths = block.lists(column, delimiter)
        texts, codes, _ = block.distinct(column, elements)
        flat = iter(texts.take(codes).to_pylist())
        found += [[next(flat) for _ in range(length)] for length in lengths]
        assert next(flat, "end") == "end"
    return found


def numbers(path: Path, column: str) -> np.ndarray:
    return np.concatenate([block.numbers(column) for block in blocks(path, column)])


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.csv.gz", "a.b.csv"])
def test_csv(tmp_path: Path, name: str) -> None:
    path = text(tmp_path / name, 'x,y\n007,"a,\n""b"""\n1.10,é\n')
    assert values(path, "x") == ["007", "1.10"]
    assert values(path, "y") == ['a,\n"b"', "é"]


@pytest.mark.parametrize("name", ["a.tsv", "a.txt", "a.tsv.gz", "a.txt.gz"])
def test_tsv(tmp_path: Path, name: str) -> None:
    assert values(text(tmp_path / name, "x\ty\na,b\t1\n"), "x") == ["a,b"]


@pytest.mark.parametrize("delimiter", [None, "\t"])
def test_a_quote_between_tabs_is_a_character(tmp_path: Path, delimiter: str | None) -> None:
    """One that is alone would swallow the lines up to the next."""
    path = text(
        tmp_path / ("a.csv" if delimiter else "a.tsv"), 'x\ty\n"a\t1\nb\t2\nc"\t3\n"d"\t4\n'
    )
    assert values(path, "x", delimiter=delimiter) == ['"a', "b", 'c"', '"d"']


@pytest.mark.parametrize("options", [{}, {"header": ("x",)}])
def test_an_empty_line_of_one_column_is_a_missing_value(tmp_path: Path, options: Any) -> None:
    lines = ["v1", "", "v2", ""]
    path = text(tmp_path / "a.csv", "\n".join([*([] if options else ["x"]), *lines, ""]))
    assert values(path, "x", **options) == ["v1", None, "v2", None]
    two = text(tmp_path / "b.csv", "x,y\n1,2\n\n3,4\n\n")
    assert values(two, "x") == ["1", "3"]
    late = text(tmp_path / "c.csv", "\n\r\n\nx\nv1\n\nv2\n")
    assert values(late, "x") == ["v1", None, "v2"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_first_line_is_the_header(tmp_path: Path, end: str) -> None:
    path = text(tmp_path / "a.csv", "")
    path.write_bytes(end.join(["", "\ufeffx,y", "1,2", "3", ""]).encode()[len(end) :])
    assert Table(path).names() == ["x", "y"]  # whatever is wrong below
    path.write_bytes(end.join(['x 5",y', '1,"2', '3"', "4,5,6", ""]).encode())
    assert Table(path).names() == ['x 5"', "y"]  # within a cell a quote is a character
    path.write_bytes(end.join(['x,"y', '1"', "1,2", ""]).encode())
    assert Table(path).names() == ["x", f"y{end}1"]
    assert values(path, "x") == ["1"]


def test_a_table_that_is_read_the_wrong_way(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "user;item;click\n1;2;0\n")
    with refused(
        "a.csv: no column 'user', 'item', 'click'. Its first line, read as names, is "
        "'user;item;click': fit takes a --delimiter if something else than ',' is between them, a "
    ):
        blocks(path, "user item click")
    with refused("no column 'user'. A side table's columns need"):
        blocks(path, "user", header=("a", "b", "c"), delimiter=";")
    with refused("no column 'usr'. Did you mean 'user'?"):
        blocks(text(tmp_path / "b.csv", "user,item\n1,2\n"), "usr")
    path.write_bytes("user,item\n1,2\n".encode("utf-16"))
    with refused("a.csv: the names of its columns are not valid UTF-8: save the file as UTF-8."):
        blocks(path, "user")


def test_true_and_false_are_numbers(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "x,y\nTrue,1\nfalse,2\n,3\n0.5,yes\n")
    assert numbers(path, "x")[[0, 1, 3]].tolist() == [1, 0, 0.5]
    assert np.isnan(numbers(path, "x")[2])
    with refused("a.csv: column 'y', row 3: 'yes' is not a number: correct it or leave it empty."):
        numbers(path, "y")


def test_header_and_delimiter_of_the_schema(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "1;2\n3;4\n")
    assert values(path, "b", header=("a", "b"), delimiter=";") == ["2", "4"]


def test_missing_texts(tmp_path: Path) -> None:
    cells = ["", "NULL", "\\N", "NaN", "nan", "null", " ", "None"]
    wanted = [None] * 5 + ["null", " ", "None"]
    csv = text(tmp_path / "a.csv", "x,y\n" + "".join(f"{cell},1\n" for cell in cells))
    assert values(csv, "x") == wanted
    assert values(parquet(tmp_path / "a.parquet", x=cells), "x") == wanted


def test_a_header_whose_quote_is_never_closed_is_refused(tmp_path: Path) -> None:
    for header in ('"user,item', 'user,"item'):
        path = text(tmp_path / "t.csv", f"{header}\n1,2\n2,3\n")
        with refused("is never closed: close or remove it."):
            Table(path).names()


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        (pa.array([1, None, -7], pa.int8()), ["1", None, "-7"]),
        (
            pa.array([2**63, 2**64 - 1, 2**53 + 1], pa.uint64()),
            ["9223372036854775808", "18446744073709551615", "9007199254740993"],
        ),
        (pa.array([2**53 + 1, -(2**63)]), ["9007199254740993", "-9223372036854775808"]),
        (pa.array([3.0, None, float("nan"), 2.5]), ["3", None, None, "2.5"]),
        (
            pa.array([0.0, -0.0, 3e15, -(2.0**52)]),
            ["0", "0", "3000000000000000", "-4503599627370496"],
        ),
        (
            pa.array([1e70, float("inf"), float("-inf")]),
            ["1e+70", "inf", "-inf"],
        ),
        (  # whole floats are the integers that they are
            pa.array([2.0**53, 2.0**53 + 2, -(2.0**63), 2.0**63, 2.0**64 - 2048, 2.0**64]),
            [
                "9007199254740992",
                "9007199254740994",
                "-9223372036854775808",
                "9223372036854775808",
                "18446744073709549568",
                "1.8446744073709552e+19",
            ],
        ),
        (pa.array([0.1, 4.0], pa.float32()), ["0.1", "4"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array(["a", None, ""]), ["a", None, None]),
        (pa.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
        (pa.array([5, None]).dictionary_encode(), ["5", None]),
        (pa.array([b"a", None]), ["a", None]),
        (pa.array([datetime.date(2022, 4, 9)]), ["2022-04-09"]),
        (pa.array([Decimal("1.50"), None]), ["1.5", None]),
        (pa.array([Decimal("1170.00"), Decimal("-0.05")]), ["1170", "-0.05"]),
        (pa.array([Decimal("0"), Decimal("2e-9")], pa.decimal128(20, 10)), ["0", "0.000000002"]),
        (pa.array([Decimal("10")], pa.decimal256(50, 0)), ["10"]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_text_of_every_type(tmp_path: Path, cells: pa.Array, wanted: list[str | None]) -> None:
    assert values(parquet(tmp_path / "a.parquet", x=cells), "x") == wanted


INSTANT = datetime.datetime(2022, 4, 9, 1, 2, 3, 450000)


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        *((pa.array([INSTANT], pa.timestamp(unit)), "01:02:03.45") for unit in ("ms", "us", "ns")),
        (pa.array([INSTANT.replace(microsecond=0)], pa.timestamp("s")), "01:02:03"),
        (pa.array([INSTANT.replace(microsecond=0)], pa.timestamp("ns")), "01:02:03"),
        *(
            (pa.array([INSTANT], pa.timestamp("ms", zone)), "01:02:03.45Z")
            for zone in ("UTC", "+02:00")
        ),
        (pa.array(["2022-04-09T01:02:03.450Z"]), "01:02:03.45Z"),
        (pa.array(["2022-04-09 01:02:03.450000+00:00"]), "01:02:03.45Z"),
        (pa.array(["2022-04-09T01:02:03.000"]), "01:02:03"),
        (pa.array(["2022-04-09 03:02:03+02:00"]), "03:02:03+02:00"),
    ],
)
def test_an_instant_is_one_value_in_every_unit_and_zone(
    tmp_path: Path, cells: pa.Array, wanted: str
) -> None:
    assert values(parquet(tmp_path / "a.parquet", x=cells), "x") == [f"2022-04-09 {wanted}"]


def test_midnight_is_the_date(tmp_path: Path) -> None:
    """pandas reads dates as timestamps, and writes those of midnight as dates again."""
    day = datetime.date(2022, 4, 9)
    columns = [
        pa.array([day]),
        pa.array([day], pa.date64()),
        pa.array([datetime.datetime(2022, 4, 9)], pa.timestamp("ns")),
        pa.array(["2022-04-09 00:00:00"]),
    ]
    for cells in columns:
        assert values(parquet(tmp_path / "a.parquet", x=cells), "x") == ["2022-04-09"]
    clock = [pa.array([datetime.time(1, 2, 3)], kind) for kind in (pa.time32("s"), pa.time64("ns"))]
    for cells in clock:
        assert values(parquet(tmp_path / "a.parquet", x=cells), "x") == ["01:02:03"]


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ("1170.0", "1170"),
        ("1170.00", "1170"),
        ("-7.0", "-7"),
        ("0.0", "0"),
        ("-0.0", "0"),
        ("1e+16", "10000000000000000"),
        ("1.2345678901234568e+17", "123456789012345680"),
        ("9007199254740993.0", "9007199254740993"),
        ("18446744073709551615.0", "18446744073709551615"),
        ("True", "true"),
        ("FALSE", "false"),
        # These may be names of their own: codes, versions, hexadecimal numbers.
        *(
            (cell, cell)
            for cell in ("007", "007.0", "1.10", "1.50", "1.0.0", "1e3", "1e+70", "+1.0")
        ),
        *((cell, cell) for cell in ("inf", "-0", ".0", "1.", " 1.0", "x1.0", "T", "None", "1_0.0")),
    ],
)
def test_text_has_one_spelling_a_value(tmp_path: Path, cell: str, wanted: str) -> None:
    """Value by value, so that a file that has one in another place means the same."""
    assert values(text(tmp_path / "a.csv", f"x,y\n{cell},1\n"), "x") == [wanted]
    assert values(parquet(tmp_path / "a.parquet", x=["é+:.TF", None, cell]), "x")[2] == wanted
    assert values(parquet(tmp_path / "b.parquet", x=[wanted]), "x") == [wanted]


def test_pandas_csv_of_a_column_with_a_gap(tmp_path: Path) -> None:
    """pandas' own text of it: a gap makes integers floats, truths objects."""
    gap = text(tmp_path / "a.csv", "id,new,at,seen\n1170.0,True,2022-04-09,1.0|2.0\n,,,\n")
    whole = parquet(
        tmp_path / "a.parquet",
        id=pa.array([1170, None], pa.int32()),
        new=[True, None],
        at=pa.array([datetime.datetime(2022, 4, 9), None], pa.timestamp("ns")),
        seen=[[1, 2], None],
    )
    for column in ("id", "new", "at"):
        assert values(gap, column) == values(whole, column)
        assert values(gap, column)[1] is None
    assert lists(gap, "seen") == lists(whole, "seen") == [["1", "2"], []]


def test_pyarrow_csv_of_a_parquet_table_means_the_same(tmp_path: Path) -> None:
    table = pa.table(
        {
            "int": [1, None, 3],
            "float": [1.0, 0.25, None],
            "large": [3e15, 2.0**60, None],
            "zone": pa.array(
                [datetime.datetime(2022, 4, 9), None, None], pa.timestamp("ms", "UTC")
            ),
            "bool": [True, None, False],
            "date": [datetime.date(2022, 4, 9), None, datetime.date(1970, 1, 1)],
            "time": [datetime.datetime(2022, 4, 9, 1, 2, 3), None, None],
            "text": ["a", "", 'b,"'],
        }
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    pa.csv.write_csv(table, tmp_path / "a.csv")
    for column in table.column_names:
        assert values(tmp_path / "a.csv", column) == values(tmp_path / "a.parquet", column)


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([[1, None], [], None, [2]]),
        pa.array([[1, None], [], None, [2]], pa.large_list(pa.int32())),
        pa.array([["1", None], [], None, ["2"]]),
        pa.array([["1", ""], [], None, ["2"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        pa.array(["1|", "", None, "2"]),
        pa.array([["0"], ["1", None], [], None, ["2"]]).slice(1),
    ],
)
def test_lists(tmp_path: Path, cells: pa.Array) -> None:
    path = parquet(tmp_path / "a.parquet", x=cells)
    assert lists(path, "x") == [["1", None], [], [], ["2"]]


def lists_of(cells: pa.Array) -> tuple[list[Any], list[int]]:
    elements, lengths = Block(Path("a"), 0, pa.table({"x": cells}), ()).lists("x", "|")
    return elements.to_pylist(), lengths.tolist()


def test_a_null_list_may_hide_elements() -> None:
    offsets, mask = pa.array([0, 2, 4, 5]), pa.array([False, True, False])
    cells = pa.ListArray.from_arrays(offsets, pa.array([1, 2, 8, 9, 3]), mask=mask)
    assert lists_of(cells) == ([1, 2, 3], [2, 0, 1])


def test_lists_of_one_size_and_single_values() -> None:
    fixed = pa.array([[1, 2], None, [3, None]], pa.list_(pa.int64(), 2))
    assert lists_of(fixed) == ([1, 2, 3, None], [2, 0, 2])
    assert lists_of(pa.array([4, None])) == (["4"], [1, 0])


def test_list_delimiter_is_plain_text(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "x,y\n1.+2.+3,0\n")
    assert lists(path, "x", delimiter=".+") == [["1", "2", "3"]]


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        (pa.array([1, None, 3]), [1, np.nan, 3]),
        (pa.array([2**62 + 1]), [2.0**62]),
        (pa.array([1.5, float("nan")]), [1.5, np.nan]),
        (pa.array([" 1.5 ", "", "NULL", "-1e3", "+2", ".5"]), [1.5, np.nan, np.nan, -1000, 2, 0.5]),
        (pa.array([True, False, None]), [1, 0, np.nan]),
        (pa.array([Decimal("0.25")]), [0.25]),
        (pa.array(["7"]).dictionary_encode(), [7]),
        (pa.nulls(2), [np.nan, np.nan]),
    ],
)
def test_numbers(tmp_path: Path, cells: pa.Array, wanted: list[float]) -> None:
    found = numbers(parquet(tmp_path / "a.parquet", x=cells), "x")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("bad", [0, 4, 6])
def test_the_first_bad_number_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, bad: int
) -> None:
    monkeypatch.setattr(tables, "BLOCK_ROWS", rows)
    cells = ["1", "", "2", "3", "4", "5", "6"]
    cells[bad] = "12a"
    path = text(tmp_path / "a.csv", "x,y\n" + "".join(f"{cell},0\n" for cell in cells))
    message = f"a.csv: column 'x', row {bad}: '12a' is not a number: correct it or leave it empty."
    with refused(message):
        numbers(path, "x")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (pa.array([1.0, float("-inf")]), "column 'x', row 1: -inf is not finite: correct it or"),
        (pa.array(["1", "inf"]), "column 'x', row 1: 'inf' is not finite"),
        (pa.array(["0x10"]), "column 'x', row 0: '0x10' is not a number"),
        (pa.array([[1]]), "a.parquet: column 'x' holds list<element: int64>, not numbers."),
        (pa.array([datetime.date(2022, 1, 1)]), "column 'x' holds date32[day], not numbers."),
        (pa.array([b"1"]), "column 'x' holds binary, not numbers."),
    ],
)
def test_what_is_not_a_number(tmp_path: Path, cells: pa.Array, message: str) -> None:
    with refused(message):
        numbers(parquet(tmp_path / "a.parquet", x=cells), "x")


def test_types_without_a_text_form(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet", list=[[1]], struct=[{"a": 1}], bytes=[b"\xff"], deep=[[[1]]]
    )
    with refused("column 'list' holds list<element: int64>, which has no text form; a column of "):
        values(path, "list")
    with refused("column 'bytes' holds binary, which has no text form ("):
        values(path, "bytes")
    with refused("column 'struct' holds struct<a: int64>, not lists of values."):
        lists(path, "struct")
    with refused("column 'deep' holds list<element: int64>, which has no text form"):
        lists(path, "deep")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_blocks_number_the_rows_of_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, rows: int
) -> None:
    monkeypatch.setattr(tables, "BLOCK_ROWS", rows)
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, cells in {"b": "45", "a": "0123"}.items():
        table = pa.table({"x": list(cells)})
        if suffix == ".csv":
            pa.csv.write_csv(table, folder / f"{name}.csv")
        else:
            pa.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=2)
    (folder / "_SUCCESS").touch()
    (folder / ".a.crc").touch()
    assert values(folder, "x") == list("012345")
    starts = [(block.file.stem, block.start, len(block)) for block in blocks(folder, "x")]
    wanted = [("a", start, min(rows, 4 - start)) for start in range(0, 4, rows)]
    wanted += [("b", start, min(rows, 2 - start)) for start in range(0, 2, rows)]
    if suffix == ".csv" or rows != 7:  # rows of several row groups make one block
        assert starts == wanted
    else:
        assert starts == [("a", 0, 4), ("b", 0, 2)]


WIDE = {
    "text": pa.array([f"{row:0400}" for row in range(40)]),
    "few": pa.array([f"{row % 2:0400}" for row in range(40)]).dictionary_encode(),
    "list": pa.array([[f"{row:0200}"] * (row % 4) for row in range(40)]),
    "categories": pa.array(
        [[f"{row % 7:0200}"] * (row % 4) for row in range(40)],
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ),
    "fixed": pa.array([[f"{row:0200}"] * 2 for row in range(40)], pa.list_(pa.string(), 2)),
}


@pytest.mark.parametrize("row_group", [40, 7])
@pytest.mark.parametrize("column", list(WIDE))
def test_blocks_are_bounded_by_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, row_group: int
) -> None:
    """Also where the file, of dictionaries, is small; and no type stays that 2 GB are too much for,
    which lie in the lists of one block sooner than in BLOCK_ROWS of theirs."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 4000)
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({column: WIDE[column]}), path, row_group_size=row_group)
    found = blocks(path, column)
    assert 4 <= len(found) <= 12
    assert all(block.table.nbytes <= 4000 for block in found)
    wide = "large_string" if column in ("text", "few") else "large_list<element: large_string>"
    assert {str(block.table[column].type) for block in found} == {wide}
    read = values if column in ("text", "few") else lists
    assert read(path, column) == WIDE[column].to_pylist()
    csv = text(tmp_path / "a.csv", "x,y\n" + "".join(f"{row:0400},1\n" for row in range(40)))
    monkeypatch.setattr(tables, "CSV_BYTES", 2000)
    assert 4 <= len(blocks(csv, "x")) <= 12


def test_wide_columns_of_a_side_table_bound_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 4000)
    side = parquet(
        tmp_path / "side.parquet", k=pa.array([1, 2]), v=pa.array(["a" * 400, "b" * 400])
    )
    log = parquet(tmp_path / "log.parquet", k=pa.array([1, 2, 2, 3] * 25))
    found = blocks(log, "v", Join(side, "k"))
    assert 9 <= len(found) <= 12
    assert values(log, "v", Join(side, "k")) == ["a" * 400, "b" * 400, "b" * 400, None] * 25


def test_lists_of_categories_over_row_groups(tmp_path: Path) -> None:
    """Each row group has a dictionary of its own, and a long one goes over to plain text."""
    cells = pa.array(
        [[f"{row * k % 501}" for k in range(row % 5)] for row in range(3000)],
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    )
    for name, options in {
        "a": {"row_group_size": 500},
        "b": {"dictionary_pagesize_limit": 100, "data_page_size": 200},
    }.items():
        path = tmp_path / f"{name}.parquet"
        pa.parquet.write_table(pa.table({"x": cells}), path, **options)
        assert lists(path, "x") == cells.to_pylist()


def test_a_file_longer_than_what_is_parsed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "CSV_BYTES", 64)
    cells = [f'"line {row}\nof two"' for row in range(50)]
    path = text(tmp_path / "a.csv", "x,y\n" + "".join(f"{cell},1\n" for cell in cells))
    assert values(path, "x") == [cell.strip('"') for cell in cells]
    with path.open("a") as file:
        file.write("1,2,3\n")
    with refused("a.csv: row 50: expected 2 columns, got 3: '1,2,3'."):
        values(path, "x")


def test_ragged_rows(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "x,y\n1,2\n3\n")
    with refused("a.csv: row 1: expected 2 columns, got 1: '3'."):
        values(path, "x")
    with refused("a.csv: row 2: expected 2 columns, got 1: '3'."):
        values(path, "b", header=("a", "b"))  # now the first line is a row
    with refused("a.csv: row 0: expected 3 columns, got 2: 'x,y'."):
        values(path, "b", header=("a", "b", "c"))


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = text(tmp_path / "log.csv", "user_id,video_id\n1,2\n")
    with refused("log.csv: no column 'usr_id', 'zzz'. Did you mean 'user_id' for 'usr_id'?"):
        blocks(path, "video_id usr_id zzz")
    side = Join(text(tmp_path / "users.csv", "user_id,user_city\n1,x\n"), "user_id")
    with refused("no column 'usr_id'. Did you mean 'user_id'?"):  # in use, and nearer than the rest
        blocks(path, "user_id usr_id", side)
    # Of the names in use only a misspelt one: as much like 'video_id' is many another column.
    with refused(
        "no column 'video_type'. A side table's columns need its --join FILE:KEY in every"
    ):
        blocks(path, "user_id video_id video_type")
    folder = tmp_path / "parts"
    folder.mkdir()
    text(folder / "0.csv", "x,y\n1,2\n")
    text(folder / "1.csv", "x,z\n1,2\n")
    with refused("1.csv: no column 'y'."):
        blocks(folder, "x y")


class Counted(str):
    """A name that counts what it is compared with."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_names_of_many_columns_are_not_compared_with_each_other(
    tmp_path: Path, suffix: str
) -> None:
    many = 400
    table = pa.table({f"c{i}": [i, i] for i in range(many)})
    if suffix == ".csv":
        pa.csv.write_csv(table, tmp_path / "a.csv")
    else:
        pa.parquet.write_table(table, tmp_path / "a.parquet")
    names = [Counted(name) for name in table.column_names]
    Counted.compared = 0
    (block,) = read_blocks(Table(tmp_path / f"a{suffix}"), names, ())
    for name in names:
        block.numbers(name)
    assert Counted.compared < 40 * many
    names = [Counted(f"{name} x") for name in names]
    with refused("and 390 more. Did you mean 'c0' for 'c0 x'?"):
        list(read_blocks(Table(tmp_path / f"a{suffix}"), names, ()))


def test_columns_that_stand_twice(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "x,x,y\n1,2,3\n")
    assert values(path, "y") == ["3"]
    with refused("a.csv: column 'x' stands there twice: rename one."):
        blocks(path, "x")
    pa.parquet.write_table(pa.table([[1], [2]], names=["x", "x"]), tmp_path / "a.parquet")
    with refused("a.parquet: column 'x' stands there twice: rename one."):
        blocks(tmp_path / "a.parquet", "x")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with refused("nowhere.csv: no such file or folder."):
        blocks(tmp_path / "nowhere.csv", "x")
    supported = "supported: .csv, .tsv, .txt, .csv.gz, .tsv.gz, .txt.gz, .parquet."
    for name in ("a.json", "a.gz", "csv"):
        with refused(f"{name}: unknown kind of file, {supported}"):
            blocks(text(tmp_path / name, "x"), "x")
    with refused("a.parquet: cannot be read: "):
        blocks(text(tmp_path / "a.parquet", "not parquet"), "x")
    damaged = tmp_path / "a.csv.gz"
    damaged.write_bytes(gzip.compress(b"x,y\n" + b"1,2\n" * 9999)[:-40])
    with refused("a.csv.gz: cannot be read: "):
        blocks(damaged, "x")


def test_invalid_utf8_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CSV_BYTES", 64)
    path = tmp_path / "latin.csv"
    path.write_bytes(b"x,y\n" + b"1,2\n" * 50 + b"1,\xff\n")
    with refused("latin.csv: column 'y', row 50: is not valid UTF-8: save the file as UTF-8."):
        blocks(path, "y")
    with refused("latin.csv: column 'b', row 51: is not valid UTF-8"):
        blocks(path, "a b", header=("a", "b"))  # now the first line is a row
    assert values(path, "x") == ["1"] * 51


def test_invalid_utf8_of_parquet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PARQUET_ROWS", 2)
    cells = pa.array([b"1", b"2", None, b"2", b"caf\xe9", b"\xff"]).view(pa.string())
    offsets = pa.array([0, 3, 3, 5, 6], pa.int32())
    path = parquet(tmp_path / "a.parquet", x=cells, y=cells.dictionary_encode())
    for column, read in (("x", values), ("y", values), ("x", numbers), ("x", lists)):
        with refused(f"a.parquet: column '{column}', row 4: b'caf\\xe9' is not valid UTF-8: write"):
            read(path, column)
    path = parquet(tmp_path / "b.parquet", x=pa.ListArray.from_arrays(offsets, cells))
    with refused("b.parquet: column 'x', row 2: b'caf\\xe9' is not valid UTF-8: write the file's"):
        lists(path, "x")
    side = parquet(tmp_path / "c.parquet", k=pa.array(range(6)), v=cells)
    log = parquet(tmp_path / "log.parquet", k=pa.array([0, 5]))
    with refused("log.parquet: column 'v', row 1: b'\\xff' is not valid UTF-8"):
        values(log, "v", Join(side, "k"))


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    with refused("parts: an empty folder."):
        blocks(folder, "x")
    text(folder / "a.csv", "x\n1\n")
    text(folder / "b.csv.gz", "x\n2\n")
    assert values(folder, "x") == ["1", "2"]
    text(folder / "c.tsv", "x\n1\n")
    with refused("parts: holds a.csv and c.tsv: use files of one kind."):
        blocks(folder, "x")
    (folder / "c.tsv").unlink()
    (folder / "c.csv").mkdir()
    with refused("c.csv: unknown kind of file"):
        blocks(folder, "x")


def test_tables_without_rows(tmp_path: Path) -> None:
    header = text(tmp_path / "a.csv", "x,y\n")
    with refused("a.csv: no rows."):
        blocks(header, "x")
    with refused("a.parquet: no rows."):
        blocks(parquet(tmp_path / "a.parquet", x=pa.array([], pa.int64())), "x")
    log = text(tmp_path / "log.csv", "x,z\n1,2\n")
    with refused("a.csv: no rows."):
        blocks(log, "z y", Join(header, "x"))


EMPTY = {
    ".csv": [
        b"",
        b"x,y",
        b"x,y\n",
        b"\n\r\n",
        b"\xef\xbb\xbf",
        b"\xef\xbb\xbfx,y\n\n",
        b'"x","y"\r\n',
    ],
    ".csv.gz": [b"", *(gzip.compress(part) for part in (b"", b"x,y", b"x,y\n"))],
    ".parquet": [b""],
}


def empty_parts(folder: Path, suffix: str) -> None:
    folder.mkdir()
    for number, content in enumerate(EMPTY[suffix]):
        (folder / f"{number}a{suffix}").write_bytes(content)
    if suffix == ".parquet":
        parquet(folder / f"1{suffix}", x=pa.array([], pa.int64()))
        parquet(folder / f"2{suffix}")  # as pandas writes a frame without columns


@pytest.mark.parametrize("suffix", list(EMPTY))
def test_parts_without_rows_are_left_out(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "parts"
    empty_parts(folder, suffix)
    with refused("parts: no rows."):
        blocks(folder, "x")
    for part in folder.iterdir():
        with refused(f"{part.name}: no rows."):
            blocks(part, "x")
    for name, cells in {"0": [1, 2], "3": [3]}.items():
        table = pa.table({"x": cells, "y": cells})
        if suffix == ".parquet":
            pa.parquet.write_table(table, folder / f"{name}z{suffix}")
        else:
            pa.csv.write_csv(table, folder / f"{name}z.csv")
    assert values(folder, "x") == ["1", "2", "3"]
    with refused("no column 'z'."):
        blocks(folder, "z")


def test_empty_lines_and_parts_without_rows(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, content in {"a": "x", "b": "", "c": "x\n", "d": "x\n\n", "e": "x\nv\n"}.items():
        text(folder / f"{name}.csv", content)
    assert values(folder, "x") == [None, "v"]  # one column: the empty line of d is a value
    for path in folder.iterdir():
        path.unlink()
    for name, content in {"a": "", "b": "\n", "c": "1,2\n"}.items():
        text(folder / f"{name}.csv", content)
    assert values(folder, "x", header=("x", "y")) == ["1"]


# ---- folders named by a column -------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_folders_are_columns(tmp_path: Path, suffix: str) -> None:
    log = tmp_path / "log"
    parts = {
        "dt=2024-01-02/hour=07": "3",
        "dt=2024-01-01/hour=9": "2",
        "dt=2024-01-01/hour=03": "1",
        "dt=__HIVE_DEFAULT_PARTITION__/hour=a%2Fb%3D": "45",
        "_temporary/dt=2024-01-09/hour=1": "9",
        ".staging/dt=2024-01-09/hour=1": "9",
    }
    for folder, cells in parts.items():
        (log / folder).mkdir(parents=True)
        part = log / folder / f"part{suffix}"
        if suffix == ".parquet":
            parquet(part, x=list(map(int, cells)), y=["a"] * len(cells))
        else:
            text(part, "x,y\n" + "".join(f"{cell},a\n" for cell in cells))
    for mark in ("_SUCCESS", "dt=2024-01-01/_SUCCESS", "dt=2024-01-01/hour=03/.part.crc"):
        (log / mark).touch()
    (log / "dt=2024-01-03").mkdir()  # a day without files
    assert values(log, "x") == ["1", "2", "3", "4", "5"]
    assert values(log, "dt") == ["2024-01-01"] * 2 + ["2024-01-02", None, None]
    assert values(log, "hour") == ["03", "9", "07", "a/b=", "a/b="]
    (found, *_) = blocks(log, "dt y hour")
    assert found.table.to_pylist() == [{"dt": "2024-01-01", "y": "a", "hour": "03"}]
    assert Table(log).names() == ["x", "y", "dt", "hour"]
    with refused("part" + suffix + ": column 'hour', row 0: 'a/b=' is not a number"):
        numbers(log, "hour")
    days = parquet(tmp_path / "days.parquet", dt=["2024-01-02", "2024-01-01"], kind=["w", "h"])
    assert values(log, "kind", Join(days, "dt")) == ["h", "h", "w", None, None]
    joined = text(tmp_path / "x.csv", "x,y\n5,1\n3,2\n")
    assert values(joined, "dt", Join(log, "x")) == [None, "2024-01-02"]


def test_a_file_beside_folders_lacks_their_column(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (log / "dt=1").mkdir(parents=True)
    parquet(log / "dt=1" / "a.parquet", x=[1])
    parquet(log / "b.parquet", x=[2])
    assert values(log, "x") == ["2", "1"]
    with refused("log: no column 'dt'."):
        values(log, "dt")
    parquet(log / "b.parquet", x=[2], dt=["0"])  # which has it itself
    assert values(log, "dt") == ["0", "1"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_of_the_file_and_of_its_folder(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PARQUET_ROWS", 2)
    log = tmp_path / "log"
    (log / "dt=7").mkdir(parents=True)

    def write(days: list[int | None]) -> None:
        table = pa.table({"x": list(range(len(days))), "dt": days})
        if suffix == ".csv":
            pa.csv.write_csv(table, log / "dt=7" / "a.csv")
        else:
            pa.parquet.write_table(table, log / "dt=7" / "a.parquet")

    write([7, 7, 7])
    assert values(log, "dt") == ["7", "7", "7"]
    assert Table(log).names() == ["x", "dt"]
    for days in ([7, 7, 7, 8, 9], [7, 7, 7, None]):
        write(days)
        with refused(f"a{suffix}: column 'dt', row 3: "):
            values(log, "dt")
        assert values(log, "x")[:3] == ["0", "1", "2"]
    (log / "dt=7" / f"a{suffix}").rename(log / f"a{suffix}")
    (log / "dt=7").rename(log / f"dt={tables.NO_VALUE}")
    (log / f"a{suffix}").rename(log / f"dt={tables.NO_VALUE}" / f"a{suffix}")
    with refused(f"a{suffix}: column 'dt', row 0: "):
        values(log, "dt")


def test_folders_that_are_no_columns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (log / "dt=1" / "dt=2").mkdir(parents=True)
    with refused("dt=2: column 'dt' is named by two of its folders: rename one."):
        blocks(log, "x")
    (log / "dt=1" / "dt=2").rename(log / "dt=1" / "more")
    with refused("more: unknown kind of file, supported: .csv"):
        blocks(log, "x")
    (log / "dt=1" / "more").rmdir()
    with refused("log: an empty folder."):
        blocks(log, "x")
    (log / "dt=1" / "again").symlink_to(log)
    with refused("again: unknown kind of file"):
        blocks(log, "x")
    (log / "dt=1" / "again").rename(log / "dt=1" / "h=1")
    with refused("named by two of its folders"):  # and no walk without an end
        blocks(log, "x")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """Reading a FIFO would wait for a writer for ever."""
    os.mkfifo(tmp_path / "a.csv")
    with refused("a.csv: is no regular file: copy what it gives to one."):
        blocks(tmp_path / "a.csv", "x")
    folder = tmp_path / "parts"
    folder.mkdir()
    text(folder / "a.csv", "x\n1\n")
    (folder / "b.csv").symlink_to(tmp_path / "a.csv")
    with refused("b.csv: is no regular file"):
        blocks(folder, "x")
    (folder / "b.csv").unlink()
    (folder / "b.csv").symlink_to(tmp_path / "nowhere")
    with refused("b.csv: is no regular file"):
        blocks(folder, "x")
    (folder / "b.csv").unlink()
    (folder / "b.csv").symlink_to("a.csv")
    assert values(folder, "x") == ["1", "1"]
    for name, why in (("a\0.csv", "null byte"), ("a" * 5000 + ".csv", "File name too long")):
        with pytest.raises(DataError, match=f"cannot be read: .*{why}") as error:
            blocks(tmp_path / name, "x")
        assert len(str(error.value)) < 300
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    with refused("cannot be read: Too many levels of symbolic links."):
        blocks(tmp_path / "loop.csv", "x")


@pytest.fixture
def users(tmp_path: Path) -> Join:
    cells = {"user": [2.0, 1.0, None], "age": [20, 10, 99], "seen": [[7, 8], [9], None]}
    return Join(parquet(tmp_path / "users.parquet", **cells), "user")


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users: Join, rows: int) -> None:
    monkeypatch.setattr(tables, "BLOCK_ROWS", rows)
    log = text(tmp_path / "log.csv", "user,x\n1,a\n2,b\n,c\n3,d\n1,e\n")
    assert values(log, "age", users) == ["10", "20", None, None, "10"]
    assert lists(log, "seen", users) == [["9"], ["7", "8"], [], [], ["9"]]
    assert values(log, "user", users) == ["1", "2", None, "3", "1"]


def test_a_key_may_come_from_an_earlier_join(tmp_path: Path) -> None:
    log = parquet(tmp_path / "log.parquet", video=[1, 2, 3])
    videos = Join(text(tmp_path / "videos.csv", "video,author\n1,x\n2,y\n"), "video")
    authors = Join(text(tmp_path / "authors.tsv", "author\tfans\ny\t5\n"), "author")
    assert values(log, "fans", videos, authors) == [None, "5", None]
    with refused("log.parquet: no column 'author'."):
        blocks(log, "fans", authors, videos)


def test_side_tables_have_their_own_header_line(tmp_path: Path) -> None:
    log = text(tmp_path / "log.csv", "1;a\n2;b\n")
    side = Join(text(tmp_path / "side.csv", "user;age\n2;20\n"), "user")
    assert values(log, "age", side, header=("user", "x"), delimiter=";") == [None, "20"]


def test_a_side_table_in_a_folder(tmp_path: Path) -> None:
    log = parquet(tmp_path / "log.parquet", user=[1, 2])
    folder = tmp_path / "users"
    folder.mkdir()
    parquet(folder / "0.parquet", user=pa.array([1], pa.int8()), age=pa.nulls(1))
    parquet(folder / "1.parquet", user=[2], age=[20])
    assert values(log, "age", Join(folder, "user")) == [None, "20"]
    # As the files of the table itself, these are compared by their texts.
    parquet(folder / "2.parquet", user=["x"], age=[2.0])
    parquet(folder / "3.parquet", user=pa.array([2**53 + 1, 4]), age=["", "30"])
    log = parquet(tmp_path / "more.parquet", user=["2", "x", str(2**53 + 1), "4"])
    assert values(log, "age", Join(folder, "user")) == ["20", "2", None, "30"]
    tagged = tmp_path / "tagged"
    tagged.mkdir()
    for number, tags in enumerate((pa.nulls(1), pa.array([[1, 2]]), pa.array([[3]]))):
        parquet(tagged / f"{number}.parquet", user=[number], tags=tags)
    log = parquet(tmp_path / "log.parquet", user=[0, 1, 2])
    assert lists(log, "tags", Join(tagged, "user")) == [[], ["1", "2"], ["3"]]


def test_joins_that_are_refused(tmp_path: Path, users: Join) -> None:
    log = text(tmp_path / "log.csv", "user,age,x\n1,5,a\n")
    with refused(f"users.parquet: column 'age' is in {log} too: rename or drop one of them."):
        blocks(log, "age", users)
    assert values(log, "x", users) == ["a"]  # only a column that is used must be unambiguous
    with refused("users.parquet: no column 'usr'. Did you mean 'user'?"):
        blocks(log, "x", Join(users.path, "usr"))
    keyless = text(tmp_path / "keyless.csv", "uzer,x\n1,a\n")
    with refused("keyless.csv: no column 'user'. Did you mean 'uzer'?"):
        blocks(keyless, "x", users)
    with refused(f"log.csv joined with {users.path}: no column 'sen'. Did you mean 'seen'?"):
        blocks(log, "sen", users)
    twice = text(tmp_path / "twice.csv", "user,city\n5,a\n7,b\n6,c\n7,d\n5,e\n")
    with refused("twice.csv: key 'user' must be unique, but '7' stands on rows 1 and 3."):
        blocks(log, "city", Join(twice, "user"))
    with refused("nowhere.csv: no such file or folder."):
        blocks(log, "x", Join(tmp_path / "nowhere.csv", "user"))
