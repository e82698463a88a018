"""Training of a small model by ranks of DistributedDataParallel, and by one process as well.

test_parallel.py runs this file as the processes of two ranks, and trains beside them alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stem_fast import STEMNet, optim
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.training.step import clip_grad_norm_

RANKS, STEPS = 2, 5
SIZES = [(6, 9), (4, 0), (1, 30), (0, 5), (7, 7)]  # rows of each rank's batch, step by step


@dataclass(frozen=True)
class Case:
    table: Callable[[EmbeddingArena], Any] | None  # None: a dense gradient, and torch's Adam
    before: bool = False  # whether the table's optimizer is made before the model is wrapped
    clip: float = 0.0
    parts: int = 1  # backward passes a step, all but the last without a reduction
    dtype: torch.dtype = torch.float64


CASES = {
    "adam": Case(lambda a: optim.ExactAdam(a, lr=0.1)),
    "adam, l2, clipped": Case(
        lambda a: optim.ExactAdam(a, lr=0.1, weight_decay=1e-2), before=True, clip=0.05
    ),
    "adam, no_sync": Case(lambda a: optim.ExactAdam(a, lr=0.1), clip=0.05, parts=3),
    "adam, float32": Case(lambda a: optim.ExactAdam(a, lr=1e-3), dtype=torch.float32),
    "sgd, momentum": Case(lambda a: optim.SGD(a, lr=0.1, momentum=0.9, weight_decay=1e-2)),
    "adagrad": Case(lambda a: optim.Adagrad(a, lr=0.1), parts=2),
    "lazy adam": Case(lambda a: optim.LazyAdam(a, lr=0.1)),
    "dense": Case(None, clip=0.05, parts=2),
}


def build(case: Case, seed: int) -> STEMNet:
    torch.manual_seed(seed)
    model = STEMNet(
        {"user": 40, "item": 30},
        ["click", "like"],
        embedding_dim=4,
        num_shared_experts=1,
        expert_hidden_units=(8,),
        gate_hidden_units=(4,),
        tower_hidden_units=(4,),
        numeric=["price"],
        sequences={"seen": "item"},
    )
    nn.init.normal_(model.embedding.weight)
    return model.to(case.dtype)


def batch(case: Case, step: int, part: int, rank: int) -> tuple[Any, ...]:
    """What the model takes, and the labels."""
    draw = torch.Generator().manual_seed(100 * step + 10 * part + rank)
    n = SIZES[step][rank]
    ids, seen = (torch.randint(0, 30, (n, 2), generator=draw) for _ in range(2))
    price, labels = (torch.rand(n, k, generator=draw).to(case.dtype) for k in (1, 2))
    return ids, price, {"seen": seen}, labels


def train(case: Case, model: STEMNet, rank: int | None) -> dict[str, Tensor]:
    """The weights, and states of the table, after all steps; with rank None as all ranks."""
    make, forward = case.table, model
    table = [make(model.embedding)] if make and case.before else []
    if rank is not None:
        forward = nn.parallel.DistributedDataParallel(model, process_group=dist.new_group())
    if make and not case.before:
        table = [make(model.embedding)]
    rest = [p for p in model.parameters() if not table or p is not model.embedding.weight]
    optimizers = [torch.optim.Adam(rest, lr=1e-3), *table]
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part in range(case.parts):
            last = part == case.parts - 1
            alone = forward.no_sync() if rank is not None and not last else None
            for one in range(RANKS) if rank is None else [rank]:
                *inputs, labels = batch(case, step, part, one)
                with alone or contextlib.nullcontext():
                    loss = model.loss(forward(*inputs), labels)
                    (loss / RANKS if rank is None else loss).backward()
        clip_grad_norm_(model, case.clip)
        for optimizer in optimizers:
            optimizer.step()
    found = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for each in table:
        for name, value in each.state_dict()["state"][0].items():
            found[f"table's {name}"] = torch.as_tensor(value).clone()
    return found


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS
    )
    found = {name: train(case, build(case, rank), rank) for name, case in CASES.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
