"""The steps of an embedding table since its last flush, when all rows had made all of them."""

from __future__ import annotations

import torch
from torch import Tensor


class StepLog:
    """The steps of an embedding table since its last flush.

    ``clock`` is int64 [2] on the table's device: (base, now), the steps of the last flush and of
    the newest update. No method waits for the device.
    """

    has_pending = True  # whether missed steps change rows at all
    needs_flush = False  # whether the table must be flushed before another step like the last

    def __init__(self, step: int, device: torch.device) -> None:
        self.clock = torch.tensor([step, step], device=device)
        self.done = 0  # steps since the last flush, as far as the host knows
        self.hidden = False  # whether a CUDA graph makes steps that the host does not count

    def count(self) -> None:
        """Counts a step that the host makes."""
        self.hidden |= is_captured(self.clock)
        self.done += 1

    def replayed(self) -> None:
        """Counts a step that the replay of a CUDA graph made."""
        self.done, self.hidden = self.done + 1, False

    def caught_up(self) -> None:
        """Restarts the log: every row has made every step."""
        self.clock[0].copy_(self.clock[1])
        self.done = 0


def first_lines(device: torch.device) -> int:
    """Lines of a new step table.

    It grows when the host sees it fill up. A CUDA graph cannot grow it and needs room for all steps
    between two flushes, which are rare because flushing a large table takes long.
    """
    return 16384 if device.type == "cuda" else 1024


def is_captured(tensor: Tensor) -> bool:
    """Whether work on the tensor is now being captured in a CUDA graph rather than run."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def step_options(like: Tensor, *options: float | Tensor) -> Tensor:
    """Options of a step as float64 on the device of ``like``, without waiting for the device."""
    if like.is_cpu and not any(isinstance(option, Tensor) for option in options):
        return torch.tensor(options, dtype=torch.float64)
    values = like.new_empty(len(options), dtype=torch.float64)
    for place, option in zip(values, options, strict=True):
        place.fill_(option.reshape(()) if isinstance(option, Tensor) else option)
    return values
