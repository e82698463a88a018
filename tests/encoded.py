"""Helpers of the tests that write tables and compare what they are encoded to."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from torch import Tensor

from stem_fast.common import DataError
from stem_fast.data.dataset import Dataset


def refused(message: str) -> Any:
    return pytest.raises(DataError, match=re.escape(message))


def parquet(path: Path, **columns: Any) -> Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


def jagged(values: Tensor, offsets: Tensor) -> list[list[int]]:
    assert offsets[0] == 0
    assert offsets[-1] == len(values)
    return [values[a:b].tolist() for a, b in pairwise(offsets.tolist())]


def same(a: Dataset, b: Dataset) -> None:
    np.testing.assert_array_equal(a.ids, b.ids)
    for name in ("numeric", "labels", "weight", "group"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)
    assert a.sequences.keys() == b.sequences.keys()
    for name, (values, offsets) in a.sequences.items():
        np.testing.assert_array_equal(values, b.sequences[name][0])
        np.testing.assert_array_equal(offsets, b.sequences[name][1])
