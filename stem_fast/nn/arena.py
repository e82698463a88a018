"""The embedding arena: every feature's embeddings in every space, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stem_fast import ops, reference
from stem_fast.nn import parallel
from stem_fast.nn.modules import put_buffer

MAX_SEQUENCES = 63  # one bit each in an int64 says which are means
_NEVER = torch.iinfo(torch.int64).max  # no bad id was seen


class LateRows(Protocol):
    """An optimizer that lets rows miss steps, and makes them when the rows are needed."""

    def catch_up(self, weight: Tensor, rows: Tensor | None) -> None:
        """Makes the steps that rows [U] of a table (None: all rows) have missed."""


def runs_ahead(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values makes the device wait."""
    return tensor.is_cuda


class EmbeddingArena(nn.Module):
    """The embeddings of every feature in every space, in one table.

    Args:
        vocab_sizes: rows of each categorical field (0 = padding, last = unknown).
        numeric: names of numeric fields; each owns one vector, scaled by the value (FuxiCTR).
        sequences: sequence field -> its own vocabulary size, or the categorical field whose
            rows it shares.
        pooling: sequence field -> "mean" or "sum".
        spaces: G.
        dim: D.

    ``weight`` is [R, G*D], R the sum of all vocabularies: a row holds the G embeddings of one
    value side by side. ``numeric_weight`` is [N, G*D], None without numeric fields. They are drawn
    from N(0, 1e-4^2) and xavier_normal as in the official code; padding rows are zero.

    ``sparse`` (default False) asks for a sparse COO gradient of ``weight``, of the batch's rows
    alone, instead of a dense one; for optimizers that know it, and not for ``torch.compile``.
    ``optimizer`` is set by one that lets rows miss steps (:mod:`stem_fast.optim`). The arena has
    them made before it reads the table, and before anybody walks over its parameters or those of a
    module that holds it; :meth:`flush` is for who reads ``weight`` directly.
    ``bounds`` says what happens on CUDA to ids outside their vocabulary: "raise" (default) reads
    the unknown value instead and notes the id for :meth:`raise_bad_ids`, so that no step waits;
    "clamp" reads the unknown value; "off" does not look, for ids known to be right (a wrong one
    reads another row). On CPU they always raise at once, and offsets of sequences are looked at on
    CPU alone. All of it holds under ``torch.compile`` and in exported programs too; of what a
    program on CUDA noted nobody hears.
    """

    offsets: Tensor
    sizes: Tensor
    bad: Tensor
    sparse = False
    optimizer: LateRows | None = None
    planned: Tensor | None = None  # rows of the newest plan
    # Those that have trained it, and whether they leave it to itself: see stem_fast.nn.parallel.
    wrappers: WeakKeyDictionary[nn.Module, bool] | None = None
    bounds: Literal["raise", "clamp", "off"] = "raise"

    def __init__(
        self,
        vocab_sizes: Mapping[str, int],
        numeric: Sequence[str],
        sequences: Mapping[str, int | str],
        pooling: Mapping[str, str],
        spaces: int,
        dim: int,
    ) -> None:
        super().__init__()
        self.categorical = tuple(vocab_sizes)
        self.numeric = tuple(numeric)
        self.sequences = dict(sequences)
        if len(sequences) > MAX_SEQUENCES:
            raise ValueError(f"{len(sequences)} sequences; at most {MAX_SEQUENCES}")
        self.pooling = dict(pooling)
        self.spaces, self.dim = spaces, dim
        own = {name: size for name, size in sequences.items() if isinstance(size, int)}
        self.tables: dict[str, slice] = {}
        rows = 0
        for name, size in {**vocab_sizes, **own}.items():
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(f"field {name!r}: a vocabulary of {size} rows")
            self.tables[name] = slice(rows, rows + size)
            rows += size
        for name, shared in sequences.items():
            if isinstance(shared, str):
                if shared not in vocab_sizes:
                    raise ValueError(
                        f"sequence {name!r} shares {shared!r}, which is no categorical field"
                    )
                self.tables[name] = self.tables[shared]
        self.weight = nn.Parameter(ops.new_table(torch.empty(rows, spaces * dim)))
        self.numeric_weight = (
            nn.Parameter(torch.empty(len(self.numeric), spaces * dim)) if self.numeric else None
        )
        for name in ("offsets", "sizes", "bad"):
            self.register_buffer(name, None, persistent=False)
        self._fill_buffers(None)
        self.reset_parameters()

    def _fill_buffers(self, noted: Tensor | None) -> None:
        """What no checkpoint holds, on the table's device; ``noted`` are the bad ids so far.

        Without it a model that began on "meta" would never get the values.
        """
        starts = [self.tables[name].start for name in self.categorical]
        sizes = [table.stop - table.start for table in self.tables.values()]
        put_buffer(self, "offsets", starts, self.weight)
        put_buffer(self, "sizes", sizes, self.weight)
        if noted is None or noted.is_meta:
            put_buffer(self, "bad", [_NEVER] * len(sizes), self.weight)
        else:
            put_buffer(self, "bad", noted, self.weight)

    def reset_parameters(self) -> None:
        self.flush()  # steps that are owed would change what is drawn
        nn.init.normal_(self.weight, std=1e-4)
        with torch.no_grad():
            self.weight[[table.start for table in self.tables.values()]] = 0
        if self.numeric_weight is not None:
            for row in self.numeric_weight.detach():
                nn.init.xavier_normal_(row[:, None])

    def forward(
        self,
        ids: Tensor,
        numeric: Tensor | None = None,
        sequences: Mapping[str, Tensor | tuple[Tensor, Tensor]] | None = None,
        sums: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of a batch, and sums of them over spaces.

        Args:
            ids: int32 or int64 [B, F].
            numeric: float [B, N].
            sequences: name -> padded ids [B, L], or jagged (values [n], offsets [B+1]).
            sums: K bit masks over the spaces.

        Returns:
            x [G, B, fields, D] in the order categorical, numeric, sequence, and
            z [K, B, fields, D], ``z[k]`` the sum of ``x[g]`` over the bits g of ``sums[k]``.

        Raises:
            IndexError: on CPU, an id outside its vocabulary.
            ValueError, TypeError: inputs of another shape, type or set of names.
        """
        ids = self._check_ids(ids)
        batch = ids.shape[0]  # len would make a number of a program's symbol
        bags, mean = self._bags(sequences or {}, batch, ids.dtype)
        wrapped = DistributedDataParallel._active_ddp_module is not None
        group = parallel.group_of(self) if wrapped else None
        plan = None
        # Exporting walks over the parameters before; a program neither trains nor owes steps.
        if not torch.compiler.is_exporting():
            learns = self.weight.requires_grad and torch.is_grad_enabled()
            if self.sparse and learns and not ops.transformed():
                plan = ops.row_plan(ids, self.offsets, bags, mean, len(self.weight))
                self.planned = plan.rows
            if self.optimizer is not None:
                self.optimizer.catch_up(self.weight, None if plan is None else plan.rows)
        both = (
            self.weight.new_empty(self.spaces, batch, 0),
            self.weight.new_empty(len(sums), batch, 0),
        )
        if len(self.weight):
            both = ops.lookup(self.weight, ids, self.offsets, self.spaces, sums, bags, mean, plan)
            if group is not None:
                parallel.reduce_after(self, both[0], group)
        fields = len(self.categorical) + len(self.sequences)
        x, z = (part.unflatten(2, (fields, self.dim)) for part in both)
        if self.numeric_weight is not None:
            values = self._check_numeric(numeric, batch).to(self.numeric_weight.dtype)
            scaled = (values[:, :, None] * self.numeric_weight).unflatten(2, (self.spaces, -1))
            x = self._insert(x, scaled.permute(2, 0, 1, 3))
            z = self._insert(z, reference.space_sums(scaled.permute(2, 0, 1, 3), sums))
        elif numeric is not None:
            raise ValueError("numeric values were given, but the model has no numeric field")
        return x, z

    def _insert(self, x: Tensor, numeric: Tensor) -> Tensor:
        """Numeric fields between the categorical and the sequence fields."""
        categorical = len(self.categorical)
        return torch.cat([x[:, :, :categorical], numeric, x[:, :, categorical:]], 2)

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """As torch's, after :meth:`flush`: every walk over the parameters of a module that holds
        this one (``parameters``, ``torch.export``, averages of weights) comes through here."""
        self.flush()
        return super().named_modules(*args, **options)

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's, after :meth:`flush`."""
        self.flush()  # without recurse torch does not ask for modules
        return super().named_parameters(*args, **options)

    def _apply(self, *args: Any, **options: Any) -> EmbeddingArena:
        self.flush()  # before the table is rounded or moved, where its optimizer does not follow
        noted = self.bad
        super()._apply(*args, **options)
        self._fill_buffers(noted)  # to_empty has left nothing of them
        return self

    def flush(self) -> None:
        """Make the steps that ``optimizer`` owes the table: for who reads ``weight`` directly."""
        if self.optimizer is not None:
            self.optimizer.catch_up(self.weight, None)

    def release(self) -> None:
        """Flush, and forget the optimizer: gradients are dense again."""
        self.flush()
        self.optimizer, self.sparse = None, False

    def row_gradients(self) -> tuple[Tensor | None, Tensor]:
        """The gradient of ``weight`` as (rows int64 [U], values [U, G*D]), each row once, on CUDA
        padded with row 0; of a dense one (None, [R, G*D])."""
        grad = self.weight.grad
        assert grad is not None
        if not grad.is_sparse:
            return None, grad
        rows, values = grad._indices()[0], grad._values()
        # A gradient of several batches, added up, has other memory than the newest plan.
        alone = self.planned is not None and rows.data_ptr() == self.planned.data_ptr()
        if alone or grad.is_coalesced():
            return rows, values
        return ops.merge_rows(rows, values)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.flush()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.flush()  # steps that are owed would change what is loaded
        super()._load_from_state_dict(*args)
        if self.offsets.device != self.weight.device:  # a table was assigned
            self._fill_buffers(None)

    def __getstate__(self) -> dict[str, Any]:
        """What copies are made from: the optimizer is the original's."""
        self.flush()
        own = "optimizer", "planned", "wrappers"
        kept = {key: value for key, value in self.__dict__.items() if key not in own}
        # It was the optimizer that asked for sparse gradients.
        return kept if self.optimizer is None else kept | {"sparse": False}

    def raise_bad_ids(self) -> None:
        """On CUDA, wait for the device and raise IndexError for the first id that was outside its
        vocabulary since the last call (``bounds`` "raise"); training does so once an epoch."""
        if not runs_ahead(self.bad) or self.bounds != "raise":
            return
        for name, place in zip(self.tables, self.bad.tolist(), strict=True):
            if place != _NEVER:
                self.bad.fill_(_NEVER)
                value = (place & 0xFFFFFFFF) - (place >> 31 & 1) * 2**32
                at = "value" if name in self.sequences else "row"
                table = self.tables[name]
                size = table.stop - table.start
                raise reference.outside_named(name, size, value, place >> 32, at)

    def _check_ids(self, ids: Tensor) -> Tensor:
        fields = len(self.categorical)
        if ids.dim() != 2 or ids.shape[1] != fields:
            expected = f"[B, {fields}] ({', '.join(self.categorical)})"
            raise ValueError(f"ids have shape {list(ids.shape)}, expected {expected}")
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids are {ids.dtype}, expected int32 or int64")
        return self._in_bounds(ids, self.categorical, slice(fields))

    def _in_bounds(
        self, ids: Tensor, names: Sequence[str], fields: slice, bounds: Tensor | None = None
    ) -> Tensor:
        """ids [B, n] of the n named fields, checked: on CUDA replaced and noted, on CPU raised.

        ``bounds`` are the offsets of a sequence field, whose ids are [values, 1].
        """
        if runs_ahead(ids):
            if self.bounds == "off":
                return ids
            return ops.check_ids(ids, self.sizes[fields], self.bad[fields])
        sizes = self.sizes[fields]
        if (
            names and torch.compiler.is_compiling()
        ):  # a raise that depends on data would break the graph
            return torch.ops.stem_fast.checked(ids, sizes, list(names), bounds)
        place = torch.ops.stem_fast.outside(ids, sizes).item()
        if place >= 0:
            raise reference.outside_error(place, ids, sizes, names, bounds)
        return ids

    def _check_numeric(self, numeric: Tensor | None, batch: int) -> Tensor:
        expected = [batch, len(self.numeric)]
        if numeric is None or list(numeric.shape) != expected:
            got = None if numeric is None else list(numeric.shape)
            names = ", ".join(self.numeric)
            raise ValueError(f"numeric has shape {got}, expected {expected} ({names})")
        return numeric

    def _bags(
        self,
        given: Mapping[str, Tensor | tuple[Tensor, Tensor]],
        batch: int,
        dtype: torch.dtype,
    ) -> tuple[list[Tensor], int]:
        """All sequences as the bags, and the mask of means, of :func:`reference.lookup`."""
        if given.keys() != self.sequences.keys():
            raise ValueError(f"sequences {sorted(given)} given, {sorted(self.sequences)} expected")
        rows, bounds, mean, length = [], [], 0, 0
        for s, name in enumerate(self.sequences):
            values, offsets = self._jagged(name, given[name], batch)
            first = self.tables[name].start
            rows.append(torch.where(values == 0, 0, values + first).to(dtype))
            bounds.append(offsets + length)
            length += values.shape[0]
            mean |= (self.pooling[name] == "mean") << s
        return [torch.cat(rows), torch.stack(bounds)] if rows else [], mean

    def _jagged(
        self, name: str, given: Tensor | tuple[Tensor, Tensor], batch: int
    ) -> tuple[Tensor, Tensor]:
        """A padded [B, L] or jagged (values [n], offsets [B+1]) sequence, checked, as jagged."""
        padded = isinstance(given, Tensor)
        if isinstance(given, Tensor):
            if given.dim() != 2 or given.shape[0] != batch:
                shape = list(given.shape)
                raise ValueError(f"sequence {name!r} has shape {shape}, expected [{batch}, L]")
            length = given.shape[1]
            given = (
                given.reshape(-1),
                torch.arange(batch + 1, device=given.device) * length,
            )
        values, offsets = given
        if values.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"sequence {name!r} is {values.dtype}, expected int32 or int64")
        if offsets.shape[0] != batch + 1:
            raise ValueError(f"sequence {name!r}: offsets must be [{batch + 1}]")
        if not (padded or runs_ahead(offsets) or torch.compiler.is_compiling()):
            reference.check_bounds(name, offsets, len(values))
        field = list(self.tables).index(name)
        checked = self._in_bounds(values[:, None], [name], slice(field, field + 1), offsets)
        return checked[:, 0], offsets.long()
