"""What is measured: an op in a setting, who computes it, what is right, what it must move.

A :class:`Case` holds one op's inputs and its contenders: ours; the official formulation
(LiangcaiSu/STEM, ``models/STEM.py`` and FuxiCTR's embedding layers) in eager PyTorch and under
torch.compile; PyTorch's and FBGEMM's embedding ops; and a ceiling, which moves as many bytes in the
same pattern and computes nothing. All of them read the same inputs and get the same upstream
gradients. Peers are given views, lists and index layouts as they like them, outside the time.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stem_fast import ops

OURS = "stem_fast"


class Setting(NamedTuple):
    """Sizes of a model and its batch; ``rows`` is the whole table's, one field has rows/fields."""

    batch: int
    rows: int
    specific: int  # experts of each task
    shared: int
    width: int  # H
    fields: int = 8
    dim: int = 16
    tasks: int = 2
    layers: int = 1  # of whole models (bench/contenders.py); an op is of one layer

    @property
    def spaces(self) -> int:
        return self.tasks + 1

    @property
    def experts(self) -> int:
        return self.tasks * self.specific + self.shared


SETTINGS = {
    "tiktok": Setting(batch=4096, rows=600_000, specific=1, shared=8, width=512),
    "tall": Setting(batch=4096, rows=10_000_000, specific=1, shared=8, width=512),
    "large": Setting(batch=16384, rows=10_000_000, specific=1, shared=22, width=256),
    "tiny": Setting(batch=64, rows=800, specific=1, shared=2, width=24),  # for tests of the bench
}
DEFAULT_SETTINGS = ("tiktok", "large")


class NotInstalledError(Exception):
    """A contender whose library or compiler is not on this machine."""


class Contender(NamedTuple):
    """``run`` is timed, once a round, on what ``prepare`` (not timed) returns."""

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple


@dataclass
class Case:
    """One op in one setting."""

    moved: int  # bytes: every input read once, every output written once
    ceilings: tuple[str, ...]  # the contenders that say how fast bytes move at best
    ceiling_moved: int  # bytes that one run of them moves
    contenders: dict[str, Callable[[], Contender]]  # built when they are first needed
    check: Callable[[Any], None]  # raises AssertionError unless it is given the right result


def zipf(rows: int, shape: tuple[int, int], exponent: float, draw: torch.Generator) -> Tensor:
    """Ids 1 .. rows-1 with P(id) ~ id ** -exponent, as vocabularies sorted by count give them."""
    odds = torch.arange(1, rows, dtype=torch.float64) ** -exponent
    uniform = torch.rand(shape, generator=draw, dtype=torch.float64) * odds.sum()
    return torch.searchsorted(odds.cumsum(0), uniform).clamp(max=rows - 2) + 1


def size(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``function`` under torch.compile, which forgets what it compiled before."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise NotInstalledError("triton")
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
        raise NotInstalledError("a C++ compiler")
    torch.compiler.reset()  # else the settings before count against its limit of recompilations
    return torch.compile(function, dynamic=False)


def copy_ceiling(moved: int, device: str) -> Contender:
    """A copy that moves ``moved`` bytes, half of them read and half written."""
    source = torch.ones(moved // 8, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source))


GATHERS = ("gather, index_select", "gather, stem_fast")


def gather_ceilings(
    table: Tensor, ids: Tensor, offsets: Tensor
) -> dict[str, Callable[[], Contender]]:
    """Whole rows of a table in the order of the ids: PyTorch's way, into a buffer that is there
    already, and our kernel's, of one space and without sums, where it is the faster one."""
    index = (ids + offsets).flatten()
    target = table.new_empty(len(index), table.shape[1])
    gathers = (
        lambda: Contender(lambda: torch.index_select(table, 0, index, out=target)),
        lambda: Contender(lambda: ops.lookup(table, ids, offsets, 1)),
    )
    return dict(zip(GATHERS, gathers, strict=True))


def fbgemm(device: str) -> tuple[Any, Any]:
    """FBGEMM's modules (common, training) of table-batched embeddings (TBE), on CPU."""
    if importlib.util.find_spec("fbgemm_gpu") is None:
        raise NotInstalledError("fbgemm-gpu-cpu (1.8.0 works with torch 2.13)")
    if device != "cpu":
        raise NotInstalledError("fbgemm-gpu for CUDA")
    module = "fbgemm_gpu.split_table_batched_embeddings_ops"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that its CPU build does not have
        common, training = (
            importlib.import_module(f"{module}_{part}") for part in ("common", "training")
        )
    return common, training
