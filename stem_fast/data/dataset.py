"""Encoded rows in memory or memory-mapped, and batches of tensors drawn from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(NamedTuple):
    """B rows of a ``Dataset``, with F categorical and N numeric columns, and T tasks."""

    ids: Tensor  # int32 [B, F], schema order
    numeric: Tensor | None  # float32 [B, N], standardised
    sequences: dict[str, tuple[Tensor, Tensor]]  # name -> (values int32 [n], offsets int64 [B+1])
    labels: Tensor | None  # float32 [B, T], NaN = missing
    weight: Tensor | None  # float32 [B]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed."""

        def maybe(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return Batch(
            change(self.ids),
            maybe(self.numeric),
            {name: (change(v), change(o)) for name, (v, o) in self.sequences.items()},
            maybe(self.labels),
            maybe(self.weight),
        )


class Known(NamedTuple):
    """How many values of a column (or keys of a join) are known, with an example of each side.

    Missing values count for neither; of sequences every element counts. Numbers are all known.
    """

    rows: int
    values: int
    known: int
    unknown_value: str | None  # None: there is none
    known_value: str | None

    @property
    def unknown_share(self) -> float:
        """0 where there is no value."""
        return (self.values - self.known) / self.values if self.values else 0.0


@dataclass(frozen=True, eq=False)
class Dataset:
    """Encoded rows: tensors as in ``Batch``, for all rows; ``load`` memory-maps them."""

    ids: Tensor
    numeric: Tensor | None = None
    sequences: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    labels: Tensor | None = None
    weight: Tensor | None = None
    group: np.ndarray | None = None  # int32 [rows], codes by first appearance, -1 = missing
    known: dict[str, Known] = field(default_factory=dict)  # feature -> how much of it is known

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Of the tensors, on whatever device."""
        tensors = [self.ids, self.numeric, self.labels, self.weight]
        tensors += [part for jagged in self.sequences.values() for part in jagged]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str) -> Dataset:
        """The same rows with every tensor on a device; ``group`` stays as it is."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Dataset(
            self.ids.to(device),
            moved(self.numeric),
            {name: (v.to(device), o.to(device)) for name, (v, o) in self.sequences.items()},
            moved(self.labels),
            moved(self.weight),
            self.group,
            self.known,
        )

    def __len__(self) -> int:
        return self.rows

    def take(self, rows: np.ndarray) -> Dataset:
        """Some of the rows (int64 numbers, in any order), copied, on the CPU."""
        data = self.to("cpu")
        return Dataset(
            _rows(data.ids, rows),
            None if data.numeric is None else _rows(data.numeric, rows),
            {name: _jagged_rows(*jagged, rows) for name, jagged in data.sequences.items()},
            None if data.labels is None else _rows(data.labels, rows),
            None if data.weight is None else _rows(data.weight, rows),
            None if data.group is None else data.group[rows],
        )

    def batches(
        self, batch_size: int, *, seed: int | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """All rows once, ``batch_size`` at a time, the last batch shorter.

        seed None keeps the order of the file (batches of data on the CPU are views, not copies);
        else the order is ``torch.randperm`` of a CPU generator with that seed. Data that was moved
        to a device (:meth:`to`) stays there, whatever ``device`` says.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        order = None
        if seed is not None:
            order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        if self.ids.device.type != "cpu":
            return self._resident_batches(batch_size, order)
        batches = self._host_batches(batch_size, order)
        device = torch.device(device)
        if device.type == "cuda":
            return _ahead(batches, device)
        return (batch.map(lambda tensor: tensor.to(device)) for batch in batches)

    def _host_batches(self, batch_size: int, order: Tensor | None) -> Iterator[Batch]:
        for start in range(0, self.rows, batch_size):
            stop = min(start + batch_size, self.rows)
            index = slice(start, stop) if order is None else order[start:stop].numpy()
            yield Batch(
                _rows(self.ids, index),
                None if self.numeric is None else _rows(self.numeric, index),
                {name: _jagged_rows(*jagged, index) for name, jagged in self.sequences.items()},
                None if self.labels is None else _rows(self.labels, index),
                None if self.weight is None else _rows(self.weight, index),
            )

    def _resident_batches(self, batch_size: int, order: Tensor | None) -> Iterator[Batch]:
        """Of data on a device, gathered there; the host waits once, for the sizes of sequences."""
        device = self.ids.device
        order = torch.arange(self.rows) if order is None else order
        order, edges = order.to(device), [*range(0, self.rows, batch_size), self.rows]
        sizes = {
            name: F.pad(offsets.diff()[order].cumsum(0), (1, 0))[edges].diff().tolist()
            for name, (_, offsets) in self.sequences.items()
        }
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            index = order[start:stop]
            yield Batch(
                self.ids[index],
                None if self.numeric is None else self.numeric[index],
                {
                    name: _jagged_on_device(*jagged, index, sizes[name][number])
                    for name, jagged in self.sequences.items()
                },
                None if self.labels is None else self.labels[index],
                None if self.weight is None else self.weight[index],
            )


def _ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches of the host on a CUDA device: the next one is gathered, in a thread, and copied while
    one is worked on."""
    stream = torch.cuda.Stream(device)

    def take() -> tuple[Batch, torch.cuda.Event] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            copied = batch.map(lambda t: t.pin_memory().to(device, non_blocking=True))
            return copied, stream.record_event()

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(take)
        while (found := ahead.result()) is not None:
            ahead = pool.submit(take)
            batch, copied = found
            copied.wait(torch.cuda.current_stream(device))
            batch.map(_used_here)
            yield batch


def _used_here(tensor: Tensor) -> Tensor:
    """Memory of another stream, which is not to be used again before this one is done with it."""
    tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


# Rows are gathered with numpy: torch's gathers start a thread team a call, which for a batch costs
# more than the copy, and 10 ms each where other processes keep the cores busy.
def _rows(values: Tensor, index: slice | np.ndarray) -> Tensor:
    if isinstance(index, slice):
        return values[index]
    return torch.from_numpy(values.numpy().take(index, axis=0))


def _jagged_rows(
    values: Tensor, offsets: Tensor, index: slice | np.ndarray
) -> tuple[Tensor, Tensor]:
    if isinstance(index, slice):
        part = offsets[index.start : index.stop + 1]
        return values[part[0] : part[-1]], part - part[0]
    bounds = offsets.numpy()
    starts = bounds[index]
    lengths = bounds[index + 1] - starts
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    # Element j of the result comes from its row's start plus its place within that row.
    source = np.repeat(starts - ends[:-1], lengths)
    source += np.arange(len(source))
    return _rows(values, source), torch.from_numpy(ends)


def _jagged_on_device(
    values: Tensor, offsets: Tensor, index: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """As ``_jagged_rows``; ``size`` is the number of values, which only the device knows."""
    starts = offsets[index]
    lengths = offsets[index + 1] - starts
    ends = F.pad(lengths.cumsum(0), (1, 0))
    source = torch.repeat_interleave(starts - ends[:-1], lengths, output_size=size)
    return values[source + torch.arange(size, device=values.device)], ends
