"""``DistributedDataParallel(model)`` of a model whose table has sparse gradients.

DDP broadcasts and reduces dense tensors alone, so it leaves the table to the arena
(``STEMNet._ddp_params_and_buffers_to_ignore``). This does for the table what DDP does for the rest:
all ranks begin with rank 0's, and after a backward pass all have the mean of their gradients, of
the rows of all batches. Gradients are known by rank and rows are added up in the same order
everywhere, so tables stay alike bit for bit.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from stem_fast import ops

if TYPE_CHECKING:
    from stem_fast.nn.arena import EmbeddingArena


@torch.compiler.disable
def group_of(arena: EmbeddingArena) -> Any:
    """The process group whose ranks share the gradients of this forward pass, or None.

    The first pass of each wrapper with autograd broadcasts the table. One without, which a rank or
    a thread may make alone, does nothing.

    Raises RuntimeError where a wrapper would reduce a sparse gradient itself, or ranks may have
    different numbers of batches (``join``).
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not torch.is_grad_enabled():
        return None
    if arena.wrappers is None:
        arena.wrappers = weakref.WeakKeyDictionary()
    ours = arena.wrappers.get(ddp)
    if ours is None:
        ours = _is_left_to(arena, ddp)
        if ours:
            arena.flush()
            dist.broadcast(arena.weight.detach(), group=ddp.process_group, group_src=0)
        arena.wrappers[ddp] = ours
    if not ours:
        return None
    if ddp._join_config.enable:
        raise RuntimeError(
            "DistributedDataParallel.join() knows nothing of the embedding table: give every rank "
            "as many batches, the last ones of no rows where there are none left"
        )
    return ddp.process_group if ddp.require_backward_grad_sync else None


def _is_left_to(arena: EmbeddingArena, ddp: DistributedDataParallel) -> bool:
    """Whether a wrapper holds this arena, and leaves its table alone."""
    name = next((n for n, module in ddp.module.named_modules() if module is arena), None)
    if name is None:
        return False
    table = f"{name}.weight"
    if table not in ddp.parameters_to_ignore and arena.sparse:
        raise RuntimeError(
            f"DistributedDataParallel reduces {table}, whose gradient is sparse: wrap the STEMNet "
            "itself, or before wrapping what holds it, call DistributedDataParallel."
            f"_set_params_and_buffers_to_ignore_for_model(module, [{table!r}])"
        )
    return table in ddp.parameters_to_ignore


@torch.compiler.disable
def reduce_after(arena: EmbeddingArena, x: Tensor, group: Any) -> None:
    """Has the gradient of the table reduced at the end of the backward pass that goes through x.

    At the end, because only then DDP has begun its own reductions on every rank.
    """
    node = x.grad_fn
    if node is not None:
        reduce = functools.partial(_reduce, arena, group)
        node.register_prehook(lambda _: Variable._execution_engine.queue_callback(reduce))


@torch.no_grad()
def _reduce(arena: EmbeddingArena, group: Any) -> None:
    """Replaces the gradient of the table by the mean of all ranks'."""
    weight, ranks = arena.weight, dist.get_world_size(group)
    if weight.grad is None:
        return
    rows, values = arena.row_gradients()
    if rows is None:
        dist.all_reduce(values.div_(ranks), group=group)
        return
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [int(each) for each in _gathered(count, ranks, group)]
    # Collectives want the same size everywhere.
    room = max(counts) - len(rows)
    rows = torch.cat([rows, rows.new_zeros(room)])
    values = torch.cat([values, values.new_zeros(room, values.shape[1])])
    every_rows, every_values = (_gathered(each, ranks, group) for each in (rows, values))
    rows, values = ops.merge_rows(
        torch.cat([each[:n] for each, n in zip(every_rows, counts, strict=True)]),
        torch.cat([each[:n] for each, n in zip(every_values, counts, strict=True)]),
    )
    weight.grad = ops.sparse_gradient(rows, values.div_(ranks), weight.shape)
    arena.planned = rows
    if arena.optimizer is not None:
        # Other ranks have read their rows, so that these have made the steps that they had missed.
        # Here they make them apart from the next step too, which else rounds differently.
        arena.optimizer.catch_up(weight, rows)


def _gathered(tensor: Tensor, ranks: int, group: Any) -> list[Tensor]:
    every = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(every, tensor.contiguous(), group=group)
    return every
