"""STEM-Net and its family: one network, and a table of who reads, sees and teaches whom."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stem_fast import ops, reference
from stem_fast.models import official
from stem_fast.models.config import make_config
from stem_fast.models.tasks import predictions, standardised
from stem_fast.models.wiring import Wiring, expert_inputs, expert_masks
from stem_fast.nn import batched
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.nn.experts import expert_mixture
from stem_fast.nn.grouped import GroupedMLP, has_batch_norm
from stem_fast.nn.modules import in_evaluation, parameters_of, parts_of, put_buffer

if TYPE_CHECKING:
    from stem_fast.serving.inference import Inference

Sequences = Mapping[str, Tensor | tuple[Tensor, Tensor]]
RECOMPUTED = 1024  # rows whose outputs are made again together


class STEMNet(nn.Module):
    """STEM-Net (Su et al., AAAI 2024): shared and task-specific embeddings, AFTB gating.

    Every feature value owns one embedding per task and a shared one. Each task's experts read the
    task's embeddings, shared experts the shared ones; every task's gate mixes *all* experts in the
    forward pass, and its loss teaches only its own and the shared ones.

    Args:
        vocab_sizes: categorical field -> rows of its vocabulary (0 = padding, last = unknown), in
            the order of the columns of ``ids``.
        tasks: label names, in the order of the outputs.
        embedding_dim: D, of each space.
        num_layers: stacked STEM layers, each of experts and gates.
        num_shared_experts: S.
        num_specific_experts: P, for each task.
        expert_hidden_units, gate_hidden_units, tower_hidden_units: widths.
        hidden_activations: name of an activation, see :data:`stem_fast.nn.grouped.ACTIVATIONS`;
            also "prelu" and "dice".
        net_dropout: dropout after every hidden layer.
        batch_norm: batch norm in every hidden layer.
        numeric: numeric fields, the columns of ``numeric``.
        sequences: sequence field -> vocabulary size, or the categorical field it shares rows with.
        pooling: "mean" or "sum", for all sequences or by name.
        kinds: task -> "binary" (default), "regression" or "regression:log1p" (of log(1 + label)).
        scales: regression task -> (mean, standard deviation) of its labels (after log1p): the
            network's output, and the loss, are of labels standardised by them, and
            :meth:`predict` undoes it. ``train.fit`` learns those that are not given.
        fields: order of all fields in the network's input; default categorical, numeric, sequence.

    Raises:
        ValueError: for sizes, names or orders that don't fit together.

    The keyword names and defaults are the official code's (``models/STEM.py``,
    ``config/model_config.yaml``).
    """

    # DistributedDataParallel leaves to the arena what is the arena's: see stem_fast.nn.parallel.
    _ddp_params_and_buffers_to_ignore = (
        "order",
        *(f"embedding.{name}" for name in ("weight", "offsets", "sizes", "bad")),
    )

    def __init__(
        self,
        vocab_sizes: Mapping[str, int],
        tasks: Sequence[str],
        *,
        embedding_dim: int = 16,
        num_layers: int = 1,
        num_shared_experts: int = 8,
        num_specific_experts: int = 1,
        expert_hidden_units: Sequence[int] = (512, 512, 512),
        gate_hidden_units: Sequence[int] = (128, 64),
        tower_hidden_units: Sequence[int] = (128, 64),
        hidden_activations: str = "relu",
        net_dropout: float = 0.0,
        batch_norm: bool = False,
        numeric: Sequence[str] = (),
        sequences: Mapping[str, int | str] | None = None,
        pooling: str | Mapping[str, str] = "mean",
        kinds: Mapping[str, str] | None = None,
        scales: Mapping[str, Sequence[float]] | None = None,
        fields: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.config = make_config(
            vocab_sizes=vocab_sizes,
            tasks=tasks,
            embedding_dim=embedding_dim,
            num_layers=num_layers,
            num_shared_experts=num_shared_experts,
            num_specific_experts=num_specific_experts,
            expert_hidden_units=expert_hidden_units,
            gate_hidden_units=gate_hidden_units,
            tower_hidden_units=tower_hidden_units,
            hidden_activations=hidden_activations,
            net_dropout=net_dropout,
            batch_norm=batch_norm,
            numeric=numeric,
            sequences=sequences,
            pooling=pooling,
            kinds=kinds,
            scales=scales,
            fields=fields,
        )
        config = self.config
        self.tasks = tuple(tasks)
        # On the device, because a CUDA graph cannot copy an index of the host's.
        self.register_buffer("order", None, persistent=False)
        self.wiring = self.wire(len(tasks), num_specific_experts, num_shared_experts)
        wiring, num_experts = self.wiring, len(self.wiring.reads)
        if not num_experts:
            raise ValueError(
                "num_shared_experts, num_specific_experts: expected at least 1 expert, got 0"
            )
        wiring.check(len(tasks))
        if num_experts > ops.MAX_EXPERTS or len(wiring.gates) > ops.MAX_GATES:
            raise ValueError(
                f"expected at most {ops.MAX_EXPERTS} experts and {ops.MAX_GATES} gates, got "
                f"{num_experts} and {len(wiring.gates)}: use fewer experts or tasks"
            )
        if num_layers > 1 and len(wiring.see) != len(wiring.spaces):
            raise ValueError(f"num_layers: expected 1 for {type(self).__name__}, got {num_layers}")

        self.embedding = EmbeddingArena(
            config["vocab_sizes"],
            config["numeric"],
            config["sequences"],
            config["pooling"],
            max(wiring.spaces) + 1,
            embedding_dim,
        )
        mlp: dict[str, Any] = {
            "hidden_activations": hidden_activations,
            "dropout": net_dropout,
            "batch_norm": batch_norm,
        }
        self.experts = nn.ModuleList()
        self.gate_mlps = nn.ModuleList()
        width = embedding_dim * len(config["fields"])
        for _ in range(num_layers):
            self.experts.append(GroupedMLP(num_experts, width, expert_hidden_units, **mlp))
            if wiring.gates:
                self.gate_mlps.append(
                    GroupedMLP(
                        len(wiring.gates), width, gate_hidden_units, outputs=num_experts, **mlp
                    )
                )
            width = expert_hidden_units[-1]
        self.towers = GroupedMLP(len(tasks), width, tower_hidden_units, outputs=1, **mlp)
        self._fill_order()
        self.register_load_state_dict_post_hook(_filled)  # which may have assigned the table

    def _fill_order(self) -> None:
        """``order``, which no checkpoint holds, on the table's device: where fields stand in the
        lookup, None for a model that takes them as they come."""
        config = self.config
        default = [*config["vocab_sizes"], *config["numeric"], *config["sequences"]]
        places = {name: place for place, name in enumerate(default)}
        order = [places[name] for name in config["fields"]]
        if order != list(range(len(order))):
            put_buffer(self, "order", order, self.embedding.weight)

    def _apply(self, *args: Any, **options: Any) -> STEMNet:
        super()._apply(*args, **options)
        self._fill_order()  # to_empty has left nothing of it
        return self

    @staticmethod
    def wire(tasks: int, specific: int, shared: int) -> Wiring:
        """STEM: a space per task and a shared one; see all, teach one's own and the shared."""
        everything, own, common = expert_masks(tasks, specific, shared)
        return Wiring(
            spaces=tuple(range(tasks + 1)),
            reads=expert_inputs(tasks, specific, shared),
            gates=(*((t, tasks) for t in range(tasks)), (tasks,)),
            see=(everything,) * (tasks + 1),
            learn=(*(mask | common for mask in own), everything),
            towers=tuple(range(tasks)),
        )

    def forward(
        self,
        ids: Tensor,
        numeric: Tensor | None = None,
        sequences: Sequences | None = None,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Logits (for regression tasks: values, standardised by ``scales``) [B, T].

        Args:
            ids: int32 or int64 [B, F], columns in the order of ``vocab_sizes``.
            numeric: float [B, N], columns in the order of ``numeric``.
            sequences: name -> padded ids [B, L] (0 = padding), or jagged (values [n],
                offsets [B+1]).
            recompute: keep no outputs of layers for the backward pass, which makes them again for
                ``RECOMPUTED`` rows at a time: in larger batches less memory, for a third more
                products. (With dropout, other masks.) ``TrainingConfig.micro_batch_size`` saves
                memory without them.

        Raises:
            IndexError: an id outside its field's vocabulary (names the field, id, row and size).
            ValueError, TypeError: inputs of another shape, type or set of names.
            ValueError: ``recompute`` with batch norm or Dice, which look at the whole batch.
        """
        if not recompute:
            return self.network(*self.lookup(ids, numeric, sequences))
        if has_batch_norm(self):
            raise ValueError(
                "recompute: expected a model without batch norm and Dice: turn one of them off"
            )
        random = self.training and self.config["net_dropout"] > 0
        parts = (each.split(RECOMPUTED, 1) for each in self.lookup(ids, numeric, sequences))
        logits = [
            checkpoint(self.network, x, z, use_reentrant=False, preserve_rng_state=random)
            for x, z in zip(*parts, strict=True)
        ]
        return torch.cat(logits)

    def lookup(
        self, ids: Tensor, numeric: Tensor | None = None, sequences: Sequences | None = None
    ) -> tuple[Tensor, Tensor]:
        """The first half of the call: what the network reads of every sample.

        Returns:
            The embeddings of each space [G, B, I], and the sums of spaces that gates of the first
            layer read [S, B, I]; each in memory of its own, which micro-batches write to.
        """
        sums = self._sums(self._live(0))
        masks = [sum(1 << self.wiring.spaces[n] for n in names) for names in sums]
        x, z = self.embedding(ids, numeric, sequences, masks)  # [G or S, B, fields, D]
        if self.order is not None:
            x, z = (part.index_select(2, self.order) for part in (x, z))
        return x.flatten(2), z.flatten(2)

    def network(self, x: Tensor, z: Tensor) -> Tensor:
        """The second half: logits [B, T] of what :meth:`lookup` returns, or of a part of it."""
        return self._network(x, z, self.experts, self.gate_mlps, self.towers)[0]

    def _network(
        self, x: Tensor, z: Tensor, layers: Any, gate_mlps: Any, towers: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """What follows the lookup, by the model's groups of networks or others called alike: logits
        [B, T], and each layer's gate logits [K, B, E] (empty for models without)."""
        wiring = self.wiring
        spaces = batched.unbind(x)
        inputs = [spaces[g] for g in wiring.spaces]
        added = dict(zip(self._sums(self._live(0)), batched.unbind(z), strict=True))
        gate_logits = []
        for layer, experts in enumerate(layers):
            live = self._live(layer)
            gates, see = wiring.gates[:live], wiring.see[:live]
            if not wiring.gates:
                outputs = batched.unbind(experts(inputs, wiring.reads))  # E of [B, H]
                inputs = [outputs[mask.bit_length() - 1] for mask in see]
                continue
            if layer:
                added = {
                    names: functools.reduce(torch.add, [inputs[n] for n in names])
                    for names in self._sums(live)
                }
            reads = [added[names] if names in added else inputs[names[0]] for names in gates]
            gate_logits.append(gate_mlps[layer](reads, range(len(reads))))  # [K, B, E]
            learn = wiring.learn[:live]
            mixed = expert_mixture(experts, inputs, wiring.reads, gate_logits[-1], see, learn)
            inputs = list(mixed)  # K of [B, H]
        return towers(inputs, wiring.towers).squeeze(2).T, gate_logits

    def _live(self, layer: int) -> int:
        """How many gates of a layer run: nobody reads the last layer's shared output, so that its
        gate, after the tasks', does not."""
        wiring = self.wiring
        return len(wiring.see) if layer < len(self.experts) - 1 else max(wiring.towers) + 1

    def _sums(self, live: int) -> list[tuple[int, ...]]:
        """The inputs that the first ``live`` gates read the sums of."""
        return [names for names in self.wiring.gates[:live] if len(names) > 1]

    def predict(
        self, ids: Tensor, numeric: Tensor | None = None, sequences: Sequences | None = None
    ) -> Tensor:
        """Probabilities (for regression tasks: values, in units of the labels) [B, T]; arguments as
        for the call.

        Runs in evaluation mode and without autograd, whatever mode the model is in, and leaves that
        as it is: threads may share the model.
        """
        return self._probabilities(self._evaluate(ids, numeric, sequences)[0])

    def compile_inference(self, precision: str = "fp32") -> Inference:
        """:meth:`predict` made ready for many calls, in a precision: see
        :class:`stem_fast.serving.inference.Inference`."""
        from stem_fast.serving.inference import Inference  # which is above this room

        return Inference(self, precision)

    def _probabilities(self, output: Tensor) -> Tensor:
        return predictions(output, self.tasks, self.config["kinds"], self.config["scales"])

    def standardised(self, labels: Tensor) -> Tensor:
        """Labels [B, T] as the loss compares them to the network's outputs: those of regression
        tasks after log1p where that is their kind, and standardised by ``scales``."""
        return standardised(labels, self.tasks, self.config["kinds"], self.config["scales"])

    def gates(
        self, ids: Tensor, numeric: Tensor | None = None, sequences: Sequences | None = None
    ) -> list[Tensor]:
        """Mean weight of each gate on each expert, a [K, E] tensor a layer.

        Rows follow :attr:`gate_names` (the last layer has no shared gate), columns
        :attr:`expert_names`.
        """
        logits = self._evaluate(ids, numeric, sequences)[1]
        return [reference.gate_weights(x, self.wiring.see[: len(x)]).mean(1) for x in logits]

    @property
    def gate_names(self) -> list[str]:
        """Tasks in order, then "shared"; [] for models without gates."""
        return [*self.tasks, "shared"][: len(self.wiring.gates)]

    @property
    def expert_names(self) -> list[str]:
        """ "task.0", "task.1", ... of each task, then "shared.0", ..."""
        counts = [(task, self.config["num_specific_experts"]) for task in self.tasks]
        counts.append(("shared", self.config["num_shared_experts"]))
        return [f"{name}.{i}" for name, count in counts for i in range(count)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. (A module around this one walks over its parameters, which makes the steps
        that rows of the table have missed: there use that of the optimizers.)"""
        for parameter in parameters_of(self):
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad = parameter.grad.detach().zero_()

    @torch.no_grad()
    def _evaluate(
        self, ids: Tensor, numeric: Tensor | None, sequences: Sequences | None
    ) -> tuple[Tensor, list[Tensor]]:
        groups = self.experts, self.gate_mlps, self.towers
        parts = (in_evaluation(group) for group in groups)
        return self._network(*self.lookup(ids, numeric, sequences), *parts)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As torch's; the table's rows may still lack steps, which would else be made at every
        forward pass of DistributedDataParallel with batch norm."""
        start = f"{prefix}." if prefix else ""
        seen = set()
        for before, part in parts_of(self, start) if recurse else [(start, self)]:
            for name, buffer in part._buffers.items():
                if buffer is not None and not (remove_duplicate and buffer in seen):
                    seen.add(buffer)
                    yield before + name, buffer

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        task_weights: Tensor | None = None,
        sample_weights: Tensor | None = None,
        mask: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Sum over the tasks of the mean loss over the rows that have the task's label.

        Binary cross entropy for binary tasks, squared error for regression ones (official code:
        every weight 1, every label there).

        Args:
            logits: [B, T], the model's output.
            labels: [B, T], 0 or 1 for binary tasks (not checked here: it would make every step
                wait), in their own units for regression tasks, see :meth:`standardised`; NaN is a
                missing label, which trains the row's other tasks only.
            task_weights: [T], a factor on each task's loss.
            sample_weights: [B], a factor on each row's loss; the mean still divides by the number
                of labels, so that a row's weight does not depend on its batch.
            mask: bool [B, T], False for labels to leave out beside the missing ones.
            counts: int64 [T], the labels that each task's mean divides by; default those that are
                there. With the whole batch's, the losses of its parts add up to its own.

        Returns:
            A scalar; a task without any label adds 0.
        """
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels: expected shape {list(logits.shape)}, got {list(labels.shape)}"
            )
        regression = [int(self.config["kinds"][task] != "binary") for task in self.tasks]
        labels = self.standardised(labels)
        means = ops.task_losses(logits, labels, regression, mask, sample_weights, counts)
        if task_weights is not None:
            means = means * task_weights
        return means.sum()

    def regularization(self, embedding: float = 0.0, net: float = 0.0) -> Tensor:
        """``(lambda / 2) * ||W||^2`` over the embedding tables and over all other weights.

        As in the official code, "all other" are the weights and biases of linear layers (numeric
        fields included), batch norm and PReLU.
        """
        total = self.embedding.weight.new_zeros(())
        if embedding:
            self.embedding.flush()
            # Norms of rows, because squares would be a second table, and because torch adds a norm
            # up one by one: over a whole table of 0.6 M rows float32 loses 0.3 % of it.
            norms = torch.linalg.vector_norm(self.embedding.weight, dim=1)
            total = total + embedding / 2 * norms.square().sum()
        if net:
            for parameter, name in parameters_of(self).items():
                if name != "embedding.weight" and not name.endswith("alpha"):
                    total = total + net / 2 * parameter.square().sum()
        return total

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        tasks: Sequence[str],
        fields: Sequence[str] | None = None,
        **options: Any,
    ) -> STEMNet:
        """A STEM-Net from a checkpoint of the official code; every size is read off its tensors.

        Args:
            state_dict: as ``torch.load(path, weights_only=True)`` returns it.
            tasks: label names in the official order.
            fields: features in the official order; default: the order of the checkpoint.
            options: what a checkpoint does not tell (sequences, pooling, kinds, activation and
                dropout), see :func:`stem_fast.models.official.from_official`.
        """
        cls._require_stem()
        return official.from_official(cls, state_dict, tasks=tasks, fields=fields, **options)

    def to_official(self) -> dict[str, Tensor]:
        """The state dict that the official code's STEM loads: :mod:`stem_fast.models.official`."""
        self._require_stem()
        return official.to_official(self)

    @classmethod
    def _require_stem(cls) -> None:
        if cls.wire is not STEMNet.wire:
            raise TypeError(f"expected STEMNet for an official STEM checkpoint, got {cls.__name__}")


def _filled(model: STEMNet, keys: Any) -> None:
    model._fill_order()
