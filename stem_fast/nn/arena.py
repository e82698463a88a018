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
        """Makes the steps that rows int64 [U] of a table (None: all rows) have missed."""


def runs_ahead(tensor: Tensor) -> bool:
    """Whether reading a tensor's values on the host waits for the device."""
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

    ``sparse`` (default False) makes the gradient of ``weight`` a sparse COO tensor of the batch's
    rows instead of a dense one. It needs an optimizer that takes sparse gradients, and has no
    effect under ``torch.compile``.

    ``optimizer`` is set by an optimizer whose rows may miss steps (:mod:`stem_fast.optim`). Rows
    catch up before the arena reads them, and before code iterates over the parameters of the arena
    or of a module that holds it. Call :meth:`flush` before you read ``weight`` directly.

    ``bounds`` says what happens on CUDA to ids outside their vocabulary. "raise" (default) reads
    the unknown value instead and records the id for :meth:`raise_bad_ids`, so that no step waits
    for the device. "clamp" reads the unknown value. "off" does not check; a wrong id reads another
    row. On CPU a wrong id always raises at once. Offsets of sequences are checked on CPU only. The
    same holds under ``torch.compile`` and in exported programs, but ids that a program on CUDA
    records are never reported.
    """

    offsets: Tensor
    sizes: Tensor
    bad: Tensor
    sparse = False
    optimizer: LateRows | None = None
    planned: Tensor | None = None  # rows of the newest row plan
    # DDP wrappers that have trained it, and whether they leave the table to stem_fast.nn.parallel.
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
            raise ValueError(f"sequences: expected at most {MAX_SEQUENCES}, got {len(sequences)}")
        self.pooling = dict(pooling)
        self.spaces, self.dim = spaces, dim
        own = {name: size for name, size in sequences.items() if isinstance(size, int)}
        self.tables: dict[str, slice] = {}
        rows = 0
        for name, size in {**vocab_sizes, **own}.items():
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(
                    f"field {name!r}: expected a vocabulary of at least 1 row, got {size!r}"
                )
            self.tables[name] = slice(rows, rows + size)
            rows += size
        for name, shared in sequences.items():
            if isinstance(shared, str):
                if shared not in vocab_sizes:
                    raise ValueError(
                        f"sequence {name!r}: expected to share a categorical field, got {shared!r}"
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
        """Fills the buffers that no checkpoint holds, on the table's device; ``noted`` are the bad
        ids so far.

        A model that was created on "meta" gets its values here.
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
        self.flush()  # pending steps would change the new values
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
        batch = ids.shape[0]  # len() would fix a symbolic size to a number
        bags, mean = self._bags(sequences or {}, batch, ids.dtype)
        wrapped = DistributedDataParallel._active_ddp_module is not None
        group = parallel.group_of(self) if wrapped else None
        plan = None
        # Export has flushed the table already; an exported program has no optimizer.
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
            raise ValueError(
                f"numeric: expected None without numeric fields, got {list(numeric.shape)}"
            )
        return x, z

    def _insert(self, x: Tensor, numeric: Tensor) -> Tensor:
        """Numeric fields between the categorical and the sequence fields."""
        categorical = len(self.categorical)
        return torch.cat([x[:, :, :categorical], numeric, x[:, :, categorical:]], 2)

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """Flushes, then does as torch's. Every iteration over the parameters of a module that holds
        this one (``parameters``, ``torch.export``, averages of weights) calls this."""
        self.flush()
        return super().named_modules(*args, **options)

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Flushes, then does as torch's."""
        self.flush()  # with recurse=False torch does not call named_modules
        return super().named_parameters(*args, **options)

    def _apply(self, *args: Any, **options: Any) -> EmbeddingArena:
        self.flush()  # the optimizer does not follow when the table is cast or moved
        noted = self.bad
        super()._apply(*args, **options)
        self._fill_buffers(noted)  # to_empty drops their values
        return self

    def flush(self) -> None:
        """Makes all missed steps. Call it before you read ``weight`` directly."""
        if self.optimizer is not None:
            self.optimizer.catch_up(self.weight, None)

    def release(self) -> None:
        """Flushes and detaches the optimizer; gradients are dense again."""
        self.flush()
        self.optimizer, self.sparse = None, False

    def row_gradients(self) -> tuple[Tensor | None, Tensor]:
        """The gradient of ``weight``: distinct rows int64 [U] and values [U, G*D], on CUDA padded
        with row 0; (None, [R, G*D]) if it is dense."""
        grad = self.weight.grad
        assert grad is not None
        if not grad.is_sparse:
            return None, grad
        rows, values = grad._indices()[0], grad._values()
        # A gradient accumulated over several batches has other memory than the newest plan.
        alone = self.planned is not None and rows.data_ptr() == self.planned.data_ptr()
        if alone or grad.is_coalesced():
            return rows, values
        return ops.merge_rows(rows, values)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.flush()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.flush()  # pending steps would change the loaded values
        super()._load_from_state_dict(*args)
        if self.offsets.device != self.weight.device:  # a table was assigned
            self._fill_buffers(None)

    def __getstate__(self) -> dict[str, Any]:
        """Flushes. A copy has no optimizer: it stays with the original."""
        self.flush()
        own = "optimizer", "planned", "wrappers"
        kept = {key: value for key, value in self.__dict__.items() if key not in own}
        # Gradients are dense without an optimizer that takes sparse ones.
        return kept if self.optimizer is None else kept | {"sparse": False}

    def raise_bad_ids(self) -> None:
        """Raises on CUDA for an id outside its vocabulary since the last call (``bounds`` "raise").

        It waits for the device; training calls it once an epoch.

        Raises:
            IndexError: naming the field, the id and the first row or value that held it.
        """
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
            raise ValueError(f"ids: expected shape {expected}, got {list(ids.shape)}")
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
        return self._in_bounds(ids, self.categorical, slice(fields))

    def _in_bounds(
        self, ids: Tensor, names: Sequence[str], fields: slice, bounds: Tensor | None = None
    ) -> Tensor:
        """Checks ids [B, n] of n fields: on CUDA replaces and records bad ones, on CPU raises.

        ``bounds`` are the offsets of a sequence field, whose ids are [values, 1].
        """
        if runs_ahead(ids):
            if self.bounds == "off":
                return ids
            return ops.check_ids(ids, self.sizes[fields], self.bad[fields])
        sizes = self.sizes[fields]
        # A raise that depends on data would break the graph.
        if names and torch.compiler.is_compiling():
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
            raise ValueError(f"numeric: expected shape {expected} ({names}), got {got}")
        return numeric

    def _bags(
        self,
        sequences: Mapping[str, Tensor | tuple[Tensor, Tensor]],
        batch: int,
        dtype: torch.dtype,
    ) -> tuple[list[Tensor], int]:
        """All sequences as (bags, mask of means), the arguments of :func:`reference.lookup`."""
        if sequences.keys() != self.sequences.keys():
            raise ValueError(
                f"sequences: expected {sorted(self.sequences)}, got {sorted(sequences)}"
            )
        rows, bounds, mean, length = [], [], 0, 0
        for s, name in enumerate(self.sequences):
            values, offsets = self._jagged(name, sequences[name], batch)
            first = self.tables[name].start
            rows.append(torch.where(values == 0, 0, values + first).to(dtype))
            bounds.append(offsets + length)
            length += values.shape[0]
            mean |= (self.pooling[name] == "mean") << s
        return [torch.cat(rows), torch.stack(bounds)] if rows else [], mean

    def _jagged(
        self, name: str, sequence: Tensor | tuple[Tensor, Tensor], batch: int
    ) -> tuple[Tensor, Tensor]:
        """Checks a sequence, padded [B, L] or jagged (values [n], offsets [B+1]), and returns it
        jagged."""
        padded = isinstance(sequence, Tensor)
        if isinstance(sequence, Tensor):
            if sequence.dim() != 2 or sequence.shape[0] != batch:
                shape = list(sequence.shape)
                raise ValueError(f"sequence {name!r}: expected shape [{batch}, L], got {shape}")
            length = sequence.shape[1]
            sequence = (
                sequence.reshape(-1),
                torch.arange(batch + 1, device=sequence.device) * length,
            )
        values, offsets = sequence
        if values.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"sequence {name!r}: expected int32 or int64, got {values.dtype}")
        if offsets.shape[0] != batch + 1:
            raise ValueError(
                f"sequence {name!r}: expected offsets [{batch + 1}], got {list(offsets.shape)}"
            )
        if not (padded or runs_ahead(offsets) or torch.compiler.is_compiling()):
            reference.check_bounds(name, offsets, len(values))
        field = list(self.tables).index(name)
        checked = self._in_bounds(values[:, None], [name], slice(field, field + 1), offsets)
        return checked[:, 0], offsets.long()
