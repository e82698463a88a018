"""In what numbers the matrix products run: fp32, tf32 (CUDA) or bf16; or everything in fp64.

fp64 is for telling rounding from mathematics: a model is float32 before and after. In the others
weights, their gradients and the optimizer's state, the embeddings, softmax, the last layer of gates
and towers, and the loss are float32, and so are the sums within a product.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from stem_fast.common import DataError

PRECISIONS = ("fp32", "tf32", "bf16", "fp64")
_switch = threading.Lock()  # of the two below
_users, _before = 0, ""  # of tf32 at the moment, and what was before the first of them


def check(precision: str, device: str | torch.device) -> None:
    """Raises DataError for a precision that the device cannot do, or that there is not."""
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise DataError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision == "tf32" and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        raise DataError(
            f"precision is 'tf32', which {device} cannot do (NVIDIA GPUs since Ampere can): give "
            "fp32 or bf16."
        )
    if precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise DataError(f"precision is 'bf16', which {device} cannot do: give fp32.")


def autocast(precision: str, device: str | torch.device) -> AbstractContextManager[Any]:
    """What a forward pass in bf16 runs under; in another precision it does nothing."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


@contextmanager
def tf32(precision: str) -> Iterator[None]:
    """What forward and backward pass in tf32 run under; in another precision it does nothing.

    The switch is the process's: requests in tf32 and in fp32 do not go well side by side.
    """
    if precision != "tf32":
        yield
        return
    global _users, _before
    products = torch.backends.cuda.matmul
    with _switch:
        if not _users:
            _before = products.fp32_precision
            if _before != "tf32":
                # torch has an older switch too, and refuses to read it while the two differ: this
                # sets both.
                products.allow_tf32 = True
        _users += 1
    try:
        yield
    finally:
        with _switch:
            _users -= 1
            if not _users and _before != "tf32":
                products.allow_tf32 = False
                # What it reads as may be what holds for all of torch; that goes on holding.
                everywhere = torch.backends.fp32_precision  # type: ignore[attr-defined]
                products.fp32_precision = "none" if _before == everywhere else _before
