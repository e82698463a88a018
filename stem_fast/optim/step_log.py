"""The steps of a table since every row had made all of them."""

from __future__ import annotations

import torch
from torch import Tensor


class StepLog:
    """The steps of a table since its last flush, on its device: no line waits for it.

    ``clock`` is int64 [2], (base, now).
    """

    has_pending = True  # whether a row that has missed steps differs from what it would be
    needs_flush = False  # whether a flush is due before another step like the last

    def __init__(self, step: int, device: torch.device) -> None:
        self.clock = torch.tensor([step, step], device=device)
        self.done = 0  # steps, as far as the host knows
        self.hidden = False  # whether a CUDA graph makes steps that the host does not count

    def count(self) -> None:
        """Counts a step."""
        self.hidden |= is_captured(self.clock)
        self.done += 1

    def replayed(self) -> None:
        """Counts a step that a CUDA graph has made."""
        self.done, self.hidden = self.done + 1, False

    def caught_up(self) -> None:
        """Every row has made every step: the log begins anew."""
        self.clock[0].copy_(self.clock[1])
        self.done = 0


def first_lines(device: torch.device) -> int:
    """Of a new step table. It grows where the host sees it fill up: not in a CUDA graph, which needs
    room for all steps between two flushes, and those of a large table take long."""
    return 16384 if device.type == "cuda" else 1024


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done to it is captured in a CUDA graph, and not done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def step_options(like: Tensor, *options: float | Tensor) -> Tensor:
    """Options of a step as float64 on the device of ``like``, which nothing waits for."""
    if like.is_cpu and not any(isinstance(option, Tensor) for option in options):
        return torch.tensor(options, dtype=torch.float64)
    found = like.new_empty(len(options), dtype=torch.float64)
    for place, option in zip(found, options, strict=True):
        place.fill_(option.reshape(()) if isinstance(option, Tensor) else option)
    return found
