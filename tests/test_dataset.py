"""Loading from the cache, and batches: every row once, in the order that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from encoded import jagged, parquet, refused, same
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_fast.data import cache, encode
from stem_fast.data.dataset import Batch, Dataset
from stem_fast.data.encode import fit_encoding, load
from stem_fast.data.joins import Join
from stem_fast.data.schema import Encoding, Schema


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("STEM_FAST_CACHE", str(folder))
    return folder


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Encoding]:
    path = parquet(tmp_path / "a.parquet", y=[0, 1, 1], x=["a", "b", "a"])
    return path, fit_encoding(path, Schema({"y": "binary"}, ("x",), min_count=1))


def never(*_: Any) -> None:
    raise AssertionError("encoded again")


def test_a_second_load_does_not_encode(
    small: tuple[Path, Encoding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, encoding = small
    first = load(path, encoding)
    monkeypatch.setattr(encode, "_encode", never)
    same(load(path, encoding), first)
    same(load(path, Encoding.from_dict(json.loads(json.dumps(encoding.to_dict())))), first)
    moved = path.rename(tmp_path / "b.parquet")  # content counts, not the name
    same(load(moved, encoding), first)
    changes: tuple[dict[str, Any], ...] = (
        {"labels": False},
        {"cache": tmp_path / "other"},
        {"joins": [Join(parquet(tmp_path / "side.parquet", x=["a"]), "x")]},
    )
    for changed in changes:
        with pytest.raises(AssertionError, match="encoded again"):
            load(moved, encoding, **changed)
    other = Encoding(encoding.schema, {"x": ["b", "a"]})
    with pytest.raises(AssertionError, match="encoded again"):
        load(moved, other)


def test_a_changed_source_is_encoded_anew(small: tuple[Path, Encoding]) -> None:
    path, encoding = small
    assert load(path, encoding).ids.tolist() == [[1], [2], [1]]
    parquet(path, y=[0, 1, 1], x=["b", "b", "?"])
    assert load(path, encoding).ids.tolist() == [[2], [2], [3]]
    parquet(path, y=[0, 1, 1], x=["a", "b", "a"])
    assert load(path, encoding).ids.tolist() == [[1], [2], [1]]


def test_a_changed_side_table_is_joined_anew(tmp_path: Path) -> None:
    log = parquet(tmp_path / "log.parquet", y=[0, 1], user=[1, 2])
    side = [Join(parquet(tmp_path / "side.parquet", user=[1, 2], x=["a", "b"]), "user")]
    encoding = fit_encoding(log, Schema({"y": "binary"}, ("x",), min_count=1), joins=side)
    assert load(log, encoding, joins=side).ids.tolist() == [[1], [2]]
    parquet(tmp_path / "side.parquet", user=[1, 2], x=["b", "b"])
    assert load(log, encoding, joins=side).ids.tolist() == [[2], [2]]


def test_keys_are_part_of_a_joined_tables_entry(tmp_path: Path) -> None:
    log = parquet(tmp_path / "log.parquet", y=[0, 1], user=[1, 2], friend=[2, 1])
    side = parquet(tmp_path / "side.parquet", user=[1, 2], friend=[2, 1], x=["a", "b"])
    encoding = Encoding(Schema({"y": "binary"}, ("x",)), {"x": ["a", "b"]})
    parquet(tmp_path / "other.parquet", user=[1, 2], friend=[1, 2], x=["a", "b"])
    assert load(log, encoding, joins=[Join(side, "user")]).ids.tolist() == [[1], [2]]
    parquet(tmp_path / "side.parquet", user=[1, 2], friend=[1, 2], x=["a", "b"])
    by = {key: load(log, encoding, joins=[Join(side, key)]).ids for key in ("user", "friend")}
    assert by["user"].tolist() == [[1], [2]]
    assert by["friend"].tolist() == [[2], [1]]


@pytest.mark.parametrize("step", ["_encode", "_labels"])
def test_a_source_that_changes_while_it_is_read(
    small: tuple[Path, Encoding],
    monkeypatch: pytest.MonkeyPatch,
    cache_folder: Path,
    step: str,
) -> None:
    path, encoding = small
    size, work = path.stat().st_size, getattr(encode, step)

    def slow(*arguments: Any) -> Any:
        result = work(*arguments)
        parquet(path, y=[0, 1, 1], x=["b", "a", "b"])
        assert path.stat().st_size == size  # only its time tells
        return result

    monkeypatch.setattr(encode, step, slow)
    message = "a.parquet: the data changed while it was read: try again."
    if step == "_labels":
        with refused(message):
            fit_encoding(path, encoding.schema)
        parquet(path, y=[0, 1, 1], x=["a", "b", "a"])
    with refused(message):
        load(path, encoding)
    assert list(cache_folder.iterdir()) == []


def test_a_damaged_entry_is_rebuilt(small: tuple[Path, Encoding], cache_folder: Path) -> None:
    path, encoding = small
    first = load(path, encoding)
    (entry,) = cache_folder.iterdir()
    changed = bytearray((entry / "ids.npy").read_bytes())
    changed[-1] ^= 0x40  # an id of a billion
    (entry / "ids.npy").unlink()  # the old file is mapped
    (entry / "ids.npy").write_bytes(changed)
    same(load(path, encoding), first)
    for damage in ("ids.npy", "labels.npy", cache.META):
        (entry / damage).unlink()
        same(load(path, encoding), first)
        assert list(cache_folder.iterdir()) == [entry]


def test_an_aborted_encoding_leaves_nothing(
    small: tuple[Path, Encoding], monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    path, encoding = small
    with monkeypatch.context() as patch:
        patch.setattr(encode, "_labels", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(path, encoding)
    assert list(cache_folder.iterdir()) == []
    assert load(path, encoding).rows == 3


def sample(lengths: list[int]) -> Dataset:
    """Rows that can be told from each other, in every column."""
    size = len(lengths)
    row = torch.arange(size)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Dataset(
        torch.stack([row, row + 1000], 1).int(),
        row[:, None] / 2,
        {"s": (torch.arange(int(offsets[-1])).int(), offsets)},
        torch.stack([row % 2, row], 1).float(),
        row / 4,
    )


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.integers(1, 50),
    st.one_of(st.none(), st.integers(0, 2**40)),
)
def test_batches_hold_every_row_once(lengths: list[int], size: int, seed: int | None) -> None:
    dataset = sample(lengths)
    lists = jagged(*dataset.sequences["s"])
    found: list[int] = []
    sizes = []
    for batch in dataset.batches(size, seed=seed):
        rows = batch.ids[:, 0].tolist()
        sizes.append(len(rows))
        found += rows
        assert batch.ids.dtype == torch.int32
        assert batch.numeric is not None
        assert batch.labels is not None
        assert batch.weight is not None
        assert batch.ids[:, 1].tolist() == [row + 1000 for row in rows]
        assert batch.numeric.tolist() == [[row / 2] for row in rows]
        assert batch.labels.tolist() == [[row % 2, row] for row in rows]
        assert batch.weight.tolist() == [row / 4 for row in rows]
        values, offsets = batch.sequences["s"]
        assert (values.dtype, offsets.dtype) == (torch.int32, torch.int64)
        assert jagged(values, offsets) == [lists[row] for row in rows]
    total = len(lengths)
    assert sizes == [size] * (total // size) + [total % size] * (total % size > 0)
    if seed is None:
        assert found == list(range(total))
    else:
        generator = torch.Generator().manual_seed(seed)
        assert found == torch.randperm(total, generator=generator).tolist()


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.integers(1, 50),
    st.one_of(st.none(), st.integers(0, 2**40)),
)
def test_data_on_a_device_gives_the_same_batches(
    lengths: list[int], size: int, seed: int | None
) -> None:
    dataset = sample(lengths)
    order = None
    if seed is not None:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    pairs = zip(
        dataset.batches(size, seed=seed), dataset._resident_batches(size, order), strict=True
    )
    for expected, batch in pairs:
        for field in ("ids", "numeric", "labels", "weight"):
            assert torch.equal(getattr(batch, field), getattr(expected, field))
        for own, other in zip(batch.sequences["s"], expected.sequences["s"], strict=True):
            assert own.dtype == other.dtype
            assert torch.equal(own, other)


def test_data_moves_to_a_device_whole() -> None:
    dataset = sample([2, 0, 1])
    moved = dataset.to("meta")
    assert {t.device.type for t in (moved.ids, moved.numeric, moved.labels, moved.weight)} == {
        "meta"
    }
    assert {part.device.type for part in moved.sequences["s"]} == {"meta"}
    # ids int32 [3, 2], numeric float32 [3, 1], 3 values, 4 offsets, labels [3, 2], weights
    assert dataset.nbytes == moved.nbytes == 24 + 12 + 12 + 32 + 24 + 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("resident", [True, False])
def test_batches_on_a_gpu(resident: bool) -> None:
    dataset = sample([n % 5 for n in range(1000)])
    source = dataset.to("cuda") if resident else dataset
    found = [batch.map(torch.Tensor.cpu) for batch in source.batches(64, seed=3, device="cuda")]
    for batch, expected in zip(found, dataset.batches(64, seed=3), strict=True):
        assert torch.equal(batch.ids, expected.ids)
        assert torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.sequences["s"][0], expected.sequences["s"][0])


def test_the_seed_decides_the_order() -> None:
    dataset = sample([1] * 100)

    def order(seed: int) -> list[int]:
        return [int(i) for batch in dataset.batches(7, seed=seed) for i in batch.ids[:, 0]]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_batches_without_optional_columns() -> None:
    (batch,) = Dataset(torch.zeros(3, 2, dtype=torch.int32)).batches(5, seed=1)
    assert batch == Batch(batch.ids, None, {}, None, None)
    assert batch.ids.shape == (3, 2)


def test_batches_go_to_the_device() -> None:
    batch = next(sample([2, 1]).batches(2, device="meta"))
    tensors = [batch.ids, batch.numeric, batch.labels, batch.weight, *batch.sequences["s"]]
    assert all(tensor is not None and tensor.is_meta for tensor in tensors)


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        next(sample([1]).batches(0))
