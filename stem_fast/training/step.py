"""One step of training, step for step as the official code does; on CUDA as one graph.

Source: ``fuxictr/pytorch/models/rank_model.py`` and ``multitask_model.py`` of LiangcaiSu/STEM.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stem_fast import ops
from stem_fast.common import DataError
from stem_fast.data.dataset import Batch
from stem_fast.models.network import STEMNet
from stem_fast.nn.arena import runs_ahead
from stem_fast.nn.grouped import has_batch_norm
from stem_fast.nn.modules import parameters_of, parts_of
from stem_fast.nn.precision import autocast, tf32
from stem_fast.optim import OPTIMIZERS, TableOptimizer
from stem_fast.training.options import TrainingConfig

WARM_UP = 3  # steps before a capture: kernels are compiled, and state is made
FLUSH = 16000  # steps between two flushes of the tables; their schedules have more room


def make_optimizers(model: STEMNet, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """``config.embedding_optimizer`` for the embedding tables, dense Adam for all other weights."""
    rest = [p for p in model.parameters() if p is not model.embedding.weight]
    rate = config.learning_rate
    # A graph cannot count the steps on the host.
    options: dict[str, Any] = {"fused": True, "capturable": model.embedding.weight.is_cuda}
    if config.embedding_optimizer == "dense_adam":
        return [torch.optim.Adam(model.parameters(), lr=rate, **options)]
    table = OPTIMIZERS[config.embedding_optimizer](model.embedding, lr=rate)
    return [torch.optim.Adam(rest, lr=rate, **options), table]


def train_step(
    model: STEMNet,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Batch,
    config: TrainingConfig,
) -> Tensor:
    """One official step: loss + L2, backward, clip to the global norm, update.

    Returns the loss as a detached scalar on the model's device. The table's L2 term is in it where
    the table is trained by a dense optimizer; the others never read the whole table, and have
    ``config.embedding_regularizer``, where it is above 0, as their ``weight_decay`` of this step.
    """
    if batch.labels is None:
        raise DataError("the data was loaded without labels, so it cannot train.")
    if config.precision == "fp64" and model.embedding.weight.dtype != torch.float64:
        raise DataError("precision is 'fp64', and the model is not: call model.double() before.")
    _check_decay(optimizers, config.embedding_regularizer)
    for optimizer in optimizers:
        optimizer.zero_grad()
    with tf32(config.precision):
        loss = _backward(model, batch, config)
    table, strength = model.embedding.weight, config.embedding_regularizer
    if strength and table.grad is not None and not table.grad.is_sparse:
        # The gradient of model.regularization, without tensors as large as the table.
        table.grad.add_(table.detach(), alpha=strength)
        with torch.no_grad():
            loss = loss + model.regularization(strength, 0.0)
    clipped = clip_grad_norm_(model, config.max_gradient_norm, embedding_regularizer=strength)
    for optimizer in optimizers:
        # Clipping shrinks the L2 term of every row, of those in no sample too.
        with _decay(optimizer, clipped * strength if strength else None):
            optimizer.step()
    return loss


def _check_decay(optimizers: Sequence[torch.optim.Optimizer], strength: float) -> None:
    """Raises DataError for a table with two terms of L2, or one in another form."""
    tables = [each for each in optimizers if strength and isinstance(each, TableOptimizer)]
    for table in tables:
        for group in table.param_groups:
            own = group["weight_decay"]
            if isinstance(own, Tensor) or own or group.get("decoupled_weight_decay"):
                raise DataError(
                    f"embedding_regularizer is {strength:g}, and the table's "
                    f"{type(table).__name__} has a weight decay of its own (weight_decay={own}, or "
                    "decoupled): set the first to 0, or drop the other."
                )


@contextmanager
def _decay(optimizer: torch.optim.Optimizer, decay: Tensor | float | None) -> Iterator[None]:
    """The optimizer of a table with a ``weight_decay`` (None: its own), for one step."""
    table = decay is not None and isinstance(optimizer, TableOptimizer)
    groups = optimizer.param_groups if table else []
    own = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = decay
    try:
        yield
    finally:
        for group, value in zip(groups, own, strict=True):
            group["weight_decay"] = value


def _backward(model: STEMNet, batch: Batch, config: TrainingConfig) -> Tensor:
    """The loss, the table's L2 term left out, as a detached scalar; and every gradient of it."""
    if 0 < config.micro_batch_size < len(batch.ids):
        loss = _in_micro_batches(model, batch, config)
    else:
        with autocast(config.precision, batch.ids.device):
            logits = model(batch.ids, batch.numeric, batch.sequences)
        loss = _loss(model, logits, batch, config)
        loss.backward()
    if config.net_regularizer:
        penalty = model.regularization(0.0, config.net_regularizer)
        if penalty.requires_grad:
            penalty.backward()
        loss = loss + penalty
    return loss.detach()


def _in_micro_batches(model: STEMNet, batch: Batch, config: TrainingConfig) -> Tensor:
    """The loss and its gradients, the network's outputs in memory for a micro-batch at a time; the
    lookup and its gradient are the whole batch's."""
    _check_micro_batches(model, config)
    assert batch.labels is not None
    counts = (~batch.labels.isnan()).sum(0)
    size, device = config.micro_batch_size, batch.ids.device
    with autocast(config.precision, device):
        whole = model.lookup(batch.ids, batch.numeric, batch.sequences)
    grads = [each.detach() for each in whole]  # in the same memory: no part is read again
    total = torch.zeros((), dtype=model.embedding.weight.dtype, device=device)
    for start in range(0, len(batch.ids), size):
        rows = slice(start, start + size)
        parts = [each.detach()[:, rows].requires_grad_(each.requires_grad) for each in whole]
        with autocast(config.precision, device):
            logits = model.network(*parts)
        loss = _loss(model, logits, batch, config, rows, counts)
        loss.backward()
        for part, grad in zip(parts, grads, strict=True):
            grad[:, rows] = 0 if part.grad is None else part.grad
        total += loss.detach()
    if whole[0].requires_grad:
        torch.autograd.backward(whole, grads)
    return total


def _check_micro_batches(model: STEMNet, config: TrainingConfig) -> None:
    """Refuses what the parts of a batch would change, or pass by."""
    cause = f"micro_batch_size is {config.micro_batch_size}, and"
    if has_batch_norm(model):
        raise DataError(f"{cause} the model has batch norm (or Dice): give one up.")
    # A compiled model's is no method of STEMNet either.
    own = [
        name
        for name in ("forward", "loss")
        if getattr(getattr(model, name), "__func__", None) is not getattr(STEMNet, name)
    ]
    if own:
        raise DataError(
            f"{cause} {type(model).__name__} has a {own[0]} of its own, of whole batches: set it "
            "to 0."
        )


def _loss(
    model: STEMNet,
    logits: Tensor,
    batch: Batch,
    config: TrainingConfig,
    rows: slice = slice(None),
    counts: Tensor | None = None,
) -> Tensor:
    """The loss of some rows of a batch, whose labels count in all ``counts`` [T]."""
    assert batch.labels is not None
    # A subclass may have a loss that does not know of parts.
    options = {} if counts is None else {"counts": counts}
    return model.loss(
        logits,
        batch.labels[rows],
        task_weights=_task_weights(config.task_weights, logits.device),
        sample_weights=None if batch.weight is None else batch.weight[rows],
        **options,
    )


@torch.no_grad()
def clip_grad_norm_(
    model: STEMNet, max_norm: float, *, embedding_regularizer: float = 0.0
) -> Tensor | float:
    """``torch.nn.utils.clip_grad_norm_`` of a model, whose table has a sparse gradient.

    Of such a table the rows of the batch count; the L2 term of all others is below rounding and
    left out.

    Args:
        model: after the backward pass.
        max_norm: of all gradients together; 0: they are left alone.
        embedding_regularizer: of an L2 term that counts in the norm and is clipped with it: the
            optimizer of the table then gets it, times the factor, as ``weight_decay``. (torch's
            adds weight decay after clipping: leave 0.)

    Returns:
        The factor that gradients were multiplied by, at most 1.
    """
    if not max_norm:
        return 1.0
    trained = [p.grad for p in parameters_of(model) if p.grad is not None]
    clipped = [grad for grad in trained if not grad.is_sparse]
    measured = clipped
    table = model.embedding.weight
    sparse = table.grad if table.grad is not None and table.grad.is_sparse else None
    if sparse is not None:
        rows, values = model.embedding.row_gradients()
        assert rows is not None
        # Not table[rows]: on CPU that takes five times as long.
        own = table.index_select(0, rows)
        measured = [*clipped, torch.add(values, own, alpha=embedding_regularizer, out=own)]
        clipped.append(sparse._values())
    norm = nn.utils.get_total_norm(measured)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if not runs_ahead(factor) and factor == 1:
        return 1.0
    torch._foreach_mul_(clipped, factor)
    return factor


@functools.cache
def _task_weights(weights: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
    """Kept, because a copy to the device would make every step wait, and CUDA graphs read it."""
    return None if weights is None else torch.tensor(weights, device=device)


class TrainStep:
    """:func:`train_step`, on CUDA replayed from a CUDA graph.

    The first ``WARM_UP`` batches of ``config.batch_size`` rows are trained as they are, the next is
    captured. A change of an optimizer's options (the numbers among them, but not those in tensors
    on the GPU, which a graph reads), of what is trained or of its place in memory begins anew, as a
    longer sequence than all before does; what changes at every step is never captured. Other
    batches (the last of an epoch), those of a model in evaluation mode, and all batches on the CPU
    (on a GPU, too, without a backend for it) are trained as they are always. The steps are the same
    either way.

    Args:
        model: on the device of its batches.
        optimizers: of :func:`make_optimizers`, or others that can be captured
            (``torch.optim.Adam(..., capturable=True)``).
        config: as for train_step.
    """

    def __init__(
        self,
        model: STEMNet,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainingConfig,
    ) -> None:
        self.model, self.optimizers, self.config = model, optimizers, config
        self.warm = 0  # steps with this batch and these options
        self.batch: Batch | None = None  # what a graph reads
        self.kept: list[Any] = []  # _kept() after the last step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of the step, as train_step's; errors too."""
        tables = [each for each in self.optimizers if isinstance(each, TableOptimizer)]
        due = any(table.pending_steps >= FLUSH or table.needs_flush for table in tables)
        if self.graph is not None and due:
            self.model.embedding.flush()  # a schedule that grew would be another one
        if not self._capturable(batch):
            return train_step(self.model, self.optimizers, batch, self.config)
        with torch.cuda.device(batch.ids.device):
            loss = self._captured_step(batch)
        if self.graph is not None:
            for table in tables:
                table.replayed()
        return loss

    def _captured_step(self, batch: Batch) -> Tensor:
        if self.batch is None or not self._fits(self.batch, batch):
            self.batch, self.warm, self.graph = _room(batch), 0, None
        elif self.kept != self._kept():
            self.warm, self.graph = 0, None
        self._copy(self.batch, batch)
        if self.warm < WARM_UP:
            return self._warm_up(self.batch)
        if self.graph is None:
            self.graph = self._capture(self.batch)
        self.graph.replay()
        return self.loss.clone()

    def _capturable(self, batch: Batch) -> bool:
        whole = len(batch.ids) == self.config.batch_size
        return batch.ids.is_cuda and ops.capturable() and whole and self.model.training

    def _kept(self) -> list[Any]:
        """What a graph keeps as it was: options, what is trained, and where tensors are."""
        model = self.model
        found: list[Any] = [(p.data_ptr(), p.requires_grad) for p in parameters_of(model)]
        for _, part in parts_of(model):
            found += [b.data_ptr() for b in part._buffers.values() if b is not None]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                found.append({k: _number(v) for k, v in group.items() if k != "params"})
            found.append([tensor.data_ptr() for tensor in _state(optimizer)])
        return found

    @staticmethod
    def _fits(own: Batch, batch: Batch) -> bool:
        """Whether the graph's own batch holds it: sequences may be shorter than those captured."""

        def form(of: Batch) -> list[Any]:
            """All but the number of a sequence's values."""
            found: list[Any] = [*of.sequences]
            for values, offsets in of.sequences.values():
                found += [values.shape[1:], values.dtype, values.device, offsets]
            found += [of.ids, of.numeric, of.labels, of.weight]
            return [(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in found]

        return form(own) == form(batch) and all(
            len(values) <= len(own.sequences[name][0])
            for name, (values, _) in batch.sequences.items()
        )

    def _warm_up(self, batch: Batch) -> Tensor:
        """A step that is not captured, of the graph's own batch."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(batch.ids.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = train_step(self.model, self.optimizers, batch, self.config)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.warm += 1
        self.kept = self._kept()
        return loss.clone()  # on this stream, whose memory it then is

    def _capture(self, batch: Batch) -> torch.cuda.CUDAGraph:
        self.model.embedding.flush()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: one of them copies the next batch.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.loss = train_step(self.model, self.optimizers, batch, self.config)
        return graph

    @staticmethod
    def _copy(own_batch: Batch, batch: Batch) -> None:
        """Into the graph's own batch."""
        for own, given in (
            (own_batch.ids, batch.ids),
            (own_batch.numeric, batch.numeric),
            (own_batch.labels, batch.labels),
            (own_batch.weight, batch.weight),
        ):
            if own is not None and given is not None:
                own.copy_(given)
        for name, (values, offsets) in batch.sequences.items():
            own_values, own_offsets = own_batch.sequences[name]
            own_values[: len(values)].copy_(values)  # what is past the offsets is nobody's
            own_offsets.copy_(offsets)


def _room(batch: Batch) -> Batch:
    """Memory for batches like this one; the values of sequences get a fourth more, so that few
    batches have more."""
    sequences = {
        name: (values.new_zeros(len(values) + len(values) // 4 + 1), offsets.clone())
        for name, (values, offsets) in batch.sequences.items()
    }
    return batch.map(torch.clone)._replace(sequences=sequences)


def _number(value: Any) -> Any:
    """An option as a graph has it: a tensor of the GPU by its place, of the CPU by its value."""
    if not isinstance(value, Tensor):
        return value
    return value.data_ptr() if value.is_cuda else value.item()


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What an optimizer's step works on, parameters and gradients aside."""
    if isinstance(optimizer, TableOptimizer):
        yield from optimizer.tensors()
        return
    for state in optimizer.state.values():
        yield from (t for t in state.values() if isinstance(t, Tensor))
