"""What is measured of the embedding optimizers: whole steps of the tables (lookup, its backward,
update), the update alone, and the catch-up of rows that have missed very many steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.cases import (
    OURS,
    Case,
    Contender,
    NotInstalledError,
    Setting,
    copy_ceiling,
    fbgemm,
    size,
    zipf,
)
from stem_fast import ops, reference
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.optim import ExactAdam
from stem_fast.optim.step_table import AdamStepTable

WARM_UP = 300  # steps before the first that is timed: rows have missed some by then
RATE, EPS = 1e-3, 1e-8
SMALLER = "stem_fast, a twentieth of the rows"  # in turns with ours, to tell how flat its time is


@dataclass
class Steps:
    """Batches of one setting, always the same ones, and steps over them.

    The first is checked against the optimizer's formula from the table's ``start``; then follow
    ``WARM_UP`` that nobody looks at, then those that are timed.
    """

    setting: Setting
    device: str
    decay: float

    def __post_init__(self) -> None:
        s, vocab = self.setting, self.setting.rows // self.setting.fields
        self.offsets = (torch.arange(s.fields) * vocab).to(self.device)
        draw = torch.Generator().manual_seed(2)
        grad = torch.randn(s.spaces, s.batch, s.fields, s.dim, generator=draw) / s.batch
        self.grad = grad.to(self.device)

    def of(self, rows: int) -> Steps:
        """The same of a table with so many rows."""
        return replace(self, setting=self.setting._replace(rows=rows))

    def start(self) -> Tensor:
        s = self.setting
        draw = torch.Generator(self.device).manual_seed(1)
        start = torch.empty(s.rows, s.spaces * s.dim, device=self.device)
        start.normal_(0, 1e-4, generator=draw)
        start[:: s.rows // s.fields] = 0  # padding rows
        return start

    def contender(
        self,
        table: Tensor,
        step: Callable[[Tensor], None],
        *,
        dense: bool = False,
        row_wise: bool = False,
        graph: bool = False,
    ) -> Contender:
        """``step`` makes one step of the table with ids [B, F]; ``graph``: on CUDA as a graph."""
        draw, made = torch.Generator().manual_seed(3), 0
        if graph and self.device == "cuda":
            step = captured(step)

        def batch() -> Tensor:
            s = self.setting
            return zipf(s.rows // s.fields, (s.batch, s.fields), 1.1, draw).to(self.device)

        def prepare() -> tuple[Any, ...]:
            nonlocal made
            if made == 1:
                # A dense step costs the same whatever rows have missed.
                for _ in range(2 if dense or self.setting.rows < 1000 else WARM_UP):
                    step(batch())
            made += 1
            return (batch(),)

        def run(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            step(ids)
            return ids, table, torch.tensor(row_wise)

        return Contender(run, prepare)

    def check(self, actual: tuple[Tensor, Tensor, Tensor]) -> None:
        """After the first step: every row that the batch reads, and padding."""
        ids, table, row_wise = actual
        if len(table) != self.setting.rows:
            self.of(len(table)).check(actual)
            return
        assert not table[self.offsets].any()
        rows, where = (ids + self.offsets).flatten().unique(return_inverse=True)
        slots = self.grad.permute(1, 2, 0, 3).flatten(2).flatten(0, 1).double()
        before = self.start()[rows].double()
        grad = torch.zeros_like(before).index_add_(0, where, slots)
        if row_wise:
            moved = grad / (grad.square().mean(1, keepdim=True).sqrt() + EPS)
        else:
            grad += self.decay * before
            moved = grad / (grad.abs() + EPS)
        torch.testing.assert_close(table[rows].double(), before - RATE * moved, rtol=0, atol=2e-6)


def captured(step: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A step that is replayed from a CUDA graph after the first few."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    own: list[Tensor] = []
    seen = 0

    def run(ids: Tensor) -> None:
        nonlocal seen
        seen += 1
        if seen <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(ids)
            torch.cuda.current_stream().wait_stream(stream)
            return
        if not own:
            own.append(ids.clone())
            with torch.cuda.graph(graph, stream=stream):
                step(own[0])
        own[0].copy_(ids)
        graph.replay()

    return run


def embedding_step(setting: Setting, device: str, decay: float = 0.0) -> Case:
    """Ours keeps to dense Adam's trajectory; the peers that do less have it in their names."""
    steps = Steps(setting, device, decay)
    s, width = setting, setting.spaces * setting.dim

    def ours(steps: Steps) -> Contender:
        vocab = steps.setting.rows // s.fields
        names = {str(f): vocab for f in range(s.fields)}
        arena = EmbeddingArena(names, (), {}, {}, s.spaces, s.dim).to(device)
        arena.load_state_dict({"weight": steps.start()})
        optimizer = ExactAdam(arena, lr=RATE, eps=EPS, weight_decay=decay)

        def step(ids: Tensor) -> None:
            optimizer.zero_grad()
            x, _ = arena(ids)
            x.backward(steps.grad)
            optimizer.step()

        return steps.contender(arena.weight.detach(), step, graph=True)

    def torchs(sparse: bool) -> Contender:
        if sparse and s.rows > 2_000_000:
            raise NotInstalledError("memory for one more table of this size")
        table = torch.nn.Embedding.from_pretrained(steps.start(), freeze=False, sparse=sparse)
        parameters = list(table.parameters())
        optimizer = (
            # It adds eps before the bias correction.
            torch.optim.SparseAdam(parameters, lr=RATE, eps=EPS * 0.001**0.5)
            if sparse
            else torch.optim.Adam(
                parameters,
                lr=RATE,
                eps=EPS,
                weight_decay=decay,
                fused=True,
                capturable=device == "cuda",
            )
        )
        grad = steps.grad.permute(1, 2, 0, 3).flatten(2).contiguous()

        def step(ids: Tensor) -> None:
            optimizer.zero_grad()
            table(ids + steps.offsets).backward(grad)
            optimizer.step()

        return steps.contender(table.weight.detach(), step, dense=not sparse, graph=not sparse)

    def row_wise() -> Contender:
        common, training = fbgemm(device)
        table = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(s.rows, width, common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)],
            optimizer=importlib.import_module("fbgemm_gpu.split_embedding_configs").EmbOptimType(
                "exact_row_wise_adagrad"
            ),
            learning_rate=RATE,
            eps=EPS,
            pooling_mode=common.PoolingMode.NONE,
            bounds_check_mode=common.BoundsCheckMode.NONE,
        )
        weight = table.split_embedding_weights()[0]
        weight.copy_(steps.start())
        grad = steps.grad.permute(1, 2, 0, 3).reshape(-1, width)
        starts = torch.arange(len(grad) + 1)

        def step(ids: Tensor) -> None:
            table((ids + steps.offsets).flatten(), starts).backward(grad)

        return steps.contender(weight, step, row_wise=True)

    _, prepare = steps.contender(steps.grad, lambda ids: None)
    (ids,) = prepare()
    unique = len((ids + steps.offsets).unique())
    # Of a batch's rows weight, m and v are read and written, by catch-up and by update; x is
    # written, and its gradient read.
    moved = 2 * 6 * 4 * unique * width + 2 * size(steps.grad)
    contenders = {
        OURS: lambda: ours(steps),
        SMALLER: lambda: ours(steps.of(s.rows // 20)),
        "nn.Embedding, fused dense Adam": lambda: torchs(False),
        "FBGEMM TBE, row-wise Adagrad": row_wise,
        "copy": lambda: copy_ceiling(moved, device),
    }
    if not decay:
        contenders["nn.Embedding, SparseAdam"] = lambda: torchs(True)
    return Case(moved, ("copy",), moved, contenders, steps.check)


def embedding_step_l2(setting: Setting, device: str) -> Case:
    return embedding_step(setting, device, decay=1e-6)


def adam_rows(setting: Setting, device: str) -> Case:
    """The update alone, of a batch's rows that owe no step: weight, m and v are read and written,
    the gradient is read."""
    s, steps = setting, Steps(setting, device, 0.0)
    draw = torch.Generator().manual_seed(5)
    ids = zipf(s.rows // s.fields, (s.batch, s.fields), 1.1, draw).to(device)
    rows = ops.row_plan(ids, steps.offsets, rows=s.rows).rows
    grad = torch.randn(len(rows), s.spaces * s.dim, generator=draw).to(device) / s.batch
    named = rows != 0  # on CUDA padding fills the plan
    before = steps.start()[rows[named]]

    def ours() -> Contender:
        # In huge pages, as ExactAdam has them.
        shape = s.rows, before.shape[1]
        tables = [ops.new_table(before.new_empty(shape)).zero_() for _ in range(3)]
        tables[0].copy_(steps.start())
        last = ops.new_table(rows.new_empty(s.rows, dtype=torch.int32)).zero_()
        step_table = AdamStepTable(0, torch.device(device))
        step_table.advance(RATE, 0.0)
        log = step_table.steps, step_table.clock
        mine = rows[named]

        def prepare() -> tuple[()]:
            last[rows] = 0  # as before the step
            return ()

        def run() -> tuple[Tensor, Tensor]:
            torch.ops.stem_fast.adam_rows(
                *tables, last, rows, grad, *log, 0.9, 0.999, EPS, False, False
            )
            return tables[0], mine

        return Contender(run, prepare)

    def torchs() -> Contender:
        weight = torch.nn.Parameter(before.clone())
        weight.grad = grad[named]
        every = torch.arange(len(weight), device=device)
        optimizer = torch.optim.Adam(
            [weight], lr=RATE, eps=EPS, fused=True, capturable=device == "cuda"
        )

        def run() -> tuple[Tensor, Tensor]:
            optimizer.step()
            return weight.detach(), every

        return Contender(run)

    def check(actual: tuple[Tensor, Tensor]) -> None:
        table, places = actual
        assert len(table) < s.rows or not table[steps.offsets].any()  # padding
        exact = grad[named].double()
        exact = before.double() - RATE * exact / (exact.abs() + EPS)
        torch.testing.assert_close(table[places].double(), exact, rtol=0, atol=2e-6)

    moved = 7 * size(before)
    contenders = {
        OURS: ours,
        "torch's fused Adam, those rows side by side": torchs,
        "copy": lambda: copy_ceiling(moved, device),
    }
    return Case(moved, ("copy",), moved, contenders, check)


MISSED = 10_000


def catch_up_l2(setting: Setting, device: str) -> Case:
    """The replay's worst case: every row of a batch was trained once, ``MISSED`` steps ago, and L2
    moves it at each of them."""
    s, decay = setting, 1e-6
    draw = torch.Generator().manual_seed(4)
    ids = zipf(s.rows // s.fields, (s.batch, s.fields), 1.1, draw)
    count = len((ids + torch.arange(s.fields) * (s.rows // s.fields)).unique())
    grad = torch.randn(count, s.spaces * s.dim, generator=draw) / s.batch
    # What one step makes of a row: m, v, and a move by the learning rate.
    start = (torch.randn_like(grad) * RATE, 0.1 * grad, 0.001 * grad.square())
    step_table = AdamStepTable(1000, torch.device(device))
    for _ in range(MISSED):
        step_table.advance(RATE, decay)
    last = torch.full((count,), 1000, dtype=torch.int32)

    def arguments(tables: tuple[Tensor, ...]) -> tuple[Any, ...]:
        rest = step_table.steps, step_table.clock, 0.9, 0.999, EPS, False, True
        return *tables, None, None, *rest

    def ours() -> Contender:
        def prepare() -> tuple[Tensor, ...]:
            return tuple(t.to(device, copy=True) for t in (*start, last))

        def run(*tables: Tensor) -> Tensor:
            torch.ops.stem_fast.adam_rows(*arguments(tables))
            return tables[0]

        return Contender(run, prepare)

    def check(actual: Any) -> None:
        """Of a few rows, 1e-5 of the largest entry before or after: L2 leaves hardly any."""
        few = tuple(t[:64].to(device, torch.float64) for t in start)
        before = few[0].abs().max()
        reference.adam_rows(*arguments((*few, last[:64].to(device))))
        within = 1e-5 * torch.maximum(before, few[0].abs().max()).item()
        torch.testing.assert_close(actual[:64].double(), few[0], rtol=0, atol=within)

    moved = 2 * size(*start, last)
    contenders = {
        OURS: ours,
        "copy": lambda: copy_ceiling(moved, device),
    }
    return Case(moved, ("copy",), moved, contenders, check)


OPS = {
    "embedding_step": embedding_step,
    "embedding_step_l2": embedding_step_l2,
    "adam_rows": adam_rows,
    "catch_up_l2": catch_up_l2,
}
