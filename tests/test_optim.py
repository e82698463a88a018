"""The optimizers of embedding tables against torch's on the dense table."""

from __future__ import annotations

import copy
import io
import math
import pickle
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from cases import DEVICES
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils._pytree import tree_leaves

from stem_fast import STEMNet, optim
from stem_fast.data.dataset import Batch
from stem_fast.nn.arena import EmbeddingArena
from stem_fast.nn.modules import parameters_of
from stem_fast.optim.sgd import Products
from stem_fast.training.options import TrainingConfig
from stem_fast.training.step import TrainStep

devices = pytest.mark.parametrize("device", DEVICES)
ROWS, SPACES, DIM, BATCH = 400, 2, 3, 24
NEVER, ALWAYS, ONCE = ROWS - 1, 1, ROWS - 2  # rows that no batch, every batch, one batch reads
Make = Callable[[Any], torch.optim.Optimizer]


def arena(dtype: torch.dtype = torch.float64, device: str = "cpu") -> EmbeddingArena:
    made = EmbeddingArena({"f": ROWS}, (), {}, {}, SPACES, DIM).to(device, dtype)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=draw) * 0.01)
        made.weight[0] = 0
    return made


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """(ids [B, 1], gradients [B, G*D] in float64) of Zipf(1.1) batches."""
    draw = torch.Generator().manual_seed(1)
    zipf = 1 / torch.arange(1, ROWS - 2, dtype=torch.float64) ** 1.1
    found = []
    for step in range(steps):
        ids = torch.multinomial(zipf, BATCH, replacement=True, generator=draw) + 1
        ids[0] = ALWAYS
        ids[1] = ONCE if step == steps // 3 else 0
        size = 10 ** torch.randint(-6, -1, (BATCH, 1), generator=draw).double()
        found.append((ids[:, None], torch.randn(BATCH, SPACES * DIM, generator=draw) * size))
    return found


def train(
    model: EmbeddingArena,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    lr: Callable[[int], float] = lambda step: 1e-3,
    clip: float = 0.0,
    first: int = 0,
) -> None:
    for step, (ids, grads) in enumerate(data, first):
        ids, grads = ids.to(model.weight.device), grads.to(model.weight)
        optimizer.param_groups[0]["lr"] = lr(step)
        optimizer.zero_grad()
        x, _ = model(ids)
        loss = (x[:, :, 0].permute(1, 0, 2).flatten(1) * grads).sum()
        # A gradient that depends on the weights shows a row that was read too early.
        (loss + 1e-2 * x.square().sum()).backward()
        if clip:
            values = model.row_gradients()[1]
            factor = (clip / (values.norm() + 1e-6)).clamp(max=1.0)
            (model.weight.grad._values() if model.sparse else model.weight.grad).mul_(factor)
        optimizer.step()


def adams(decay: float, decoupled: bool) -> tuple[Make, Make]:
    """(ours of an arena, torch's of the same arena)."""
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return (
        lambda a: optim.ExactAdam(a, weight_decay=decay, decoupled=decoupled),
        lambda a: kind([a.weight], weight_decay=decay),
    )


def assert_same(
    ours: tuple[EmbeddingArena, torch.optim.Optimizer],
    theirs: tuple[EmbeddingArena, torch.optim.Optimizer],
    bound: float,
) -> None:
    """Weights and all state: each within the bound of the entry and of its column's size."""
    pairs = {"weight": (ours[0].state_dict()["weight"], theirs[0].weight.detach())}
    states = [optimizer.state_dict()["state"][0] for _, optimizer in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    pairs |= {name: (states[0][name], states[1][name]) for name in states[0]}
    for name, (actual, expected) in pairs.items():
        # Relative; what is so small that the rounding of a step would hide it is left out.
        floor = bound * 1e-3 * expected.double().abs().amax()
        error = (actual.double() - expected.double()).abs()
        worst = (error / (expected.double().abs() + floor)).max()
        assert (error <= bound * expected.double().abs() + floor * bound).all(), (name, worst)


COSINE = lambda step: 1e-3 * (0.55 + 0.45 * math.cos(step / 200))  # noqa: E731


@devices
@pytest.mark.parametrize(
    ("decay", "decoupled"), [(0.0, False), (1e-4, False), (1e-2, True)], ids=["", "l2", "adamw"]
)
@pytest.mark.parametrize("how", ["constant", "cosine", "clipped", "resumed"])
def test_exact_adam_is_dense_adam(how: str, decay: float, decoupled: bool, device: str) -> None:
    ours, theirs = arena(device=device), arena(device=device)
    make, make_torch = adams(decay, decoupled)
    optimizer, dense = make(ours), make_torch(theirs)
    lr = COSINE if how == "cosine" else lambda step: 1e-3
    data, clip = batches(1000), 1e-3 if how == "clipped" else 0.0
    train(theirs, dense, data, lr, clip)
    half = 500 if how == "resumed" else 1000
    train(ours, optimizer, data[:half], lr, clip)
    if how == "resumed":
        saved = io.BytesIO()
        torch.save({"model": ours.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        ours = arena(device=device)
        optimizer = make(ours)
        ours.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        train(ours, optimizer, data[half:], lr, clip, first=half)
    assert_same((ours, optimizer), (theirs, dense), 1e-9)
    moved = (ours.weight - arena(device=device).weight).abs().amax(1)
    assert moved[ALWAYS] > 0
    assert moved[ONCE] > 0
    assert bool(moved[NEVER] > 0) == (decay > 0)


@devices
@pytest.mark.parametrize(("decay", "start"), [(0.0, 1.0), (1e-4, 1.0), (1e-6, 0.01)])
def test_exact_adam_in_float32(decay: float, start: float, device: str) -> None:
    """As near to the exact trajectory as torch's float32 is, or 1e-5 of the largest entry; with a
    flush in the middle. The last has weights as small as the arena's own: new rows wake at once."""
    tables = arena(torch.float32, device), arena(torch.float32, device), arena(device=device)
    with torch.no_grad():
        tables[0].weight.mul_(start)
    first = tables[0].weight.detach().double()[NEVER]
    for table in tables[1:]:
        table.load_state_dict(tables[0].state_dict())
    make, make_torch = adams(decay, False)
    optimizers = make(tables[0]), make_torch(tables[1]), make_torch(tables[2])
    for table, optimizer in zip(tables, optimizers, strict=True):
        train(table, optimizer, batches(1000)[:20])
    optimizers[0].flush()
    if decay:  # a row that no batch reads
        weights = [table.weight.detach().double()[NEVER] for table in tables]
        assert (weights[2] - first).abs().min() > 0.01 * first.abs().min()
        assert (weights[0] - weights[2]).abs().max() <= 1e-5 * first.abs().max()
    for table, optimizer in zip(tables, optimizers, strict=True):
        train(table, optimizer, batches(1000)[20:], first=20)
    optimizers[0].flush()
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        actual, own, exact = (
            (table.weight if name == "weight" else optimizer.state[table.weight][name]).double()
            for table, optimizer in zip(tables, optimizers, strict=True)
        )
        scale = exact.abs().amax()
        error, theirs = ((each - exact).abs().amax() / scale for each in (actual, own))
        assert error <= max(1e-5, 2 * theirs), (name, error, theirs)


def test_states_of_torch_and_ours_load_each_other() -> None:
    make, make_torch = adams(1e-4, False)
    data = batches(90)
    expected = arena()
    dense = make_torch(expected)
    train(expected, dense, data)
    ours, theirs = arena(), arena()
    exact = make(ours)
    train(ours, exact, data[:30])
    theirs.load_state_dict(ours.state_dict())
    middle = make_torch(theirs)
    middle.load_state_dict(exact.state_dict())
    train(theirs, middle, data[30:60], first=30)
    ours.load_state_dict(theirs.state_dict())
    exact.load_state_dict(middle.state_dict())
    train(ours, exact, data[60:], first=60)
    assert_same((ours, exact), (expected, dense), 1e-9)


def test_a_state_that_is_loaded_is_not_shared() -> None:
    """Nor need it have options that torch has had since 2.7 alone."""
    ours, theirs = arena(), arena()
    dense = torch.optim.Adam([theirs.weight])
    train(theirs, dense, batches(20))
    state = dense.state_dict()
    for group in state["param_groups"]:
        group.pop("decoupled_weight_decay", None)
    before = copy.deepcopy(state["state"][0])
    ours.load_state_dict(theirs.state_dict())
    optimizer = optim.ExactAdam(ours)
    optimizer.load_state_dict(state)
    train(ours, optimizer, batches(9))
    for name, value in before.items():
        assert torch.equal(state["state"][0][name], value), name


def test_gradients_of_several_batches_and_skipped_steps() -> None:
    """As with gradient accumulation and with a scaler that found an overflow."""
    ours, theirs = arena(), arena()
    make, make_torch = adams(1e-4, False)
    optimizer, dense = make(ours), make_torch(theirs)
    for step, (ids, grads) in enumerate(batches(120)):
        for model, each in ((ours, optimizer), (theirs, dense)):
            x, _ = model(ids)
            (x[:, :, 0].permute(1, 0, 2).flatten(1) * grads).sum().backward()
            if step % 3 == 2:
                if step % 5:
                    each.step()
                each.zero_grad()
    assert_same((ours, optimizer), (theirs, dense), 1e-9)


def test_groups_have_options_of_their_own() -> None:
    ours, theirs = [arena(), arena()], [arena(), arena()]
    optimizer = optim.ExactAdam(
        [{"params": ours[0], "lr": 1e-2}, {"params": ours[1], "betas": (0.5, 0.9)}]
    )
    dense = torch.optim.Adam(
        [
            {"params": [theirs[0].weight], "lr": 1e-2},
            {"params": [theirs[1].weight], "betas": (0.5, 0.9)},
        ]
    )
    for ids, grads in batches(60):
        for models, each in ((ours, optimizer), (theirs, dense)):
            each.zero_grad()
            for model in models:
                x, _ = model(ids)
                (x[:, :, 0].permute(1, 0, 2).flatten(1) * grads).sum().backward()
            each.step()
    for model, twin in zip(ours, theirs, strict=True):
        model.flush()
        torch.testing.assert_close(model.weight, twin.weight, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.5), (0.99, 0.9)])
def test_other_betas(betas: tuple[float, float]) -> None:
    ours, theirs = arena(), arena()
    optimizer = optim.ExactAdam(ours, betas=betas)
    dense = torch.optim.Adam([theirs.weight], betas=betas)
    for model, each in ((ours, optimizer), (theirs, dense)):
        train(model, each, batches(300))
    assert_same((ours, optimizer), (theirs, dense), 1e-9)


def test_l2_that_comes_and_goes() -> None:
    """With flushes between: rows miss steps with it and without it, in one absence."""
    ours, theirs = arena(), arena()
    optimizer, dense = optim.ExactAdam(ours), torch.optim.Adam([theirs.weight])
    data = batches(400)
    for first, decay in ((0, 0.0), (60, 1e-3), (130, 0.0), (200, 1e-2), (290, 1e-4)):
        for model, each in ((ours, optimizer), (theirs, dense)):
            each.param_groups[0]["weight_decay"] = decay
            train(model, each, data[first : first + 90], first=first)
        if first in (130, 200):
            ours.flush()
    assert_same((ours, optimizer), (theirs, dense), 1e-9)


def test_long_absences_with_l2_end_where_dense_adam_does() -> None:
    """Steps without a gradient: rows decay, at last to nothing, which the replay stops at."""
    tables = [arena(torch.float32), arena(torch.float32), arena()]
    make, make_torch = adams(1e-4, False)
    optimizers = [kind(t) for t, kind in zip(tables, (make, make_torch, make_torch), strict=True)]
    nothing = (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, SPACES * DIM))
    for table, each in zip(tables, optimizers, strict=True):
        train(table, each, [*batches(5), *[nothing] * 1500])
    tables[0].flush()
    ours, theirs, exact = (table.weight.detach().double() for table in tables)
    largest = exact.abs().max()
    assert largest > 1e-4
    bound = 2 * (theirs - exact).abs().max() + 1e-5 * largest
    assert (ours - exact).abs().max() <= bound
    train(tables[0], optimizers[0], [nothing] * 8500)
    tables[0].flush()
    assert tables[0].weight.abs().max() < 1e-8  # false for NaN


@pytest.mark.parametrize("decay", [0.0, 1e-4])
def test_more_steps_than_a_schedule_begins_with(decay: float) -> None:
    ours, theirs = arena(), arena()
    make, make_torch = adams(decay, False)
    optimizer, dense = make(ours), make_torch(theirs)
    for model, each in ((ours, optimizer), (theirs, dense)):
        train(model, each, batches(1100), COSINE)
    assert_same((ours, optimizer), (theirs, dense), 1e-9)


@pytest.mark.parametrize(
    ("decay", "steps", "bound"), [(100.0, 4000, 1e-7), (500.0, 300, 1e-9), (1500.0, 30, 1e-9)]
)
def test_decoupled_decay_that_leaves_little(decay: float, steps: int, bound: float) -> None:
    """Of what was not read for thousands of steps, as good as nothing; the last changes signs."""
    ours, theirs = arena(), arena()
    make, make_torch = adams(decay, True)
    optimizer, dense = make(ours), make_torch(theirs)
    for model, each in ((ours, optimizer), (theirs, dense)):
        train(model, each, batches(steps))
    assert_same((ours, optimizer), (theirs, dense), bound)
    optimizer.param_groups[0]["lr"] = 1 / decay
    with pytest.raises(ValueError, match=r"lr \* weight_decay: expected other than 1 .*, got 1,"):
        optimizer.step()


def test_a_step_that_is_refused_is_made_of_no_table() -> None:
    tables = arena(), arena()
    optimizer = optim.ExactAdam(tables[0], weight_decay=0.1, decoupled=True)
    optimizer.add_param_group({"params": tables[1], "weight_decay": 1000.0})  # lr is 1e-3
    before = [table.weight.detach().clone() for table in tables]
    for table in tables:
        table.weight.grad = torch.ones_like(table.weight)
    with pytest.raises(
        ValueError,
        match=r"lr [*] weight_decay: expected other than 1 with decoupled decay, got 1, which",
    ):
        optimizer.step()
    assert optimizer.pending_steps == 0
    assert not optimizer.state
    for table, weight in zip(tables, before, strict=True):
        assert torch.equal(table.weight, weight)
    tables[1].weight.grad = None  # makes no step, so nothing is refused
    optimizer.step()
    torch.testing.assert_close(tables[0].weight, before[0] * (1 - 1e-4) - 1e-3)
    assert torch.equal(tables[1].weight, before[1])


def test_decoupled_decay_is_flushed_before_it_leaves_nothing() -> None:
    """After 3,900 steps 0.82^3900 of a weight is left, which no float64 holds: a batch's rows after
    that are right all the same."""
    ours, theirs = arena(), arena()
    optimizer = optim.ExactAdam(ours, weight_decay=180.0, decoupled=True)
    dense = torch.optim.AdamW([theirs.weight], weight_decay=180.0)
    data = batches(2)
    padding = torch.zeros(1, 1, dtype=torch.int64)
    for model, each in ((ours, optimizer), (theirs, dense)):
        train(model, each, data[:1])
        zeros = torch.zeros_like(model.weight)
        rows = torch.sparse_coo_tensor(
            padding, zeros[:1], zeros.shape, is_coalesced=True, check_invariants=False
        )
        model.weight.grad = rows if model is ours else zeros
        for _ in range(3900):
            each.step()
        train(model, each, data[1:])
        for _ in range(20):
            each.step()
    assert_same((ours, optimizer), (theirs, dense), 1e-7)
    assert (ours.weight.abs().amax(1) > 1e-5).any()


def test_decay_is_known_of_steps_that_a_graph_replays() -> None:
    table = arena()
    optimizer = optim.ExactAdam(table, lr=0.1, weight_decay=0.5, decoupled=True)
    train(table, optimizer, batches(1), lambda step: 0.1)
    assert not optimizer.needs_flush
    for _ in range(6800):  # 0.95^6800 is 1e-151
        optimizer.replayed()
    assert optimizer.needs_flush
    optimizer.flush()
    assert not optimizer.needs_flush


def test_betas_and_eps_change() -> None:
    ours, theirs = arena(), arena()
    optimizer, dense = optim.ExactAdam(ours), torch.optim.Adam([theirs.weight])
    data = batches(90)
    for betas, eps, part in (
        ((0.9, 0.999), 1e-8, data[:30]),
        ((0.8, 0.999), 1e-8, data[30:60]),
        ((0.8, 0.99), 1e-4, data[60:]),
    ):
        for model, each in ((ours, optimizer), (theirs, dense)):
            each.param_groups[0] |= {"betas": betas, "eps": eps}
            train(model, each, part)
    assert_same((ours, optimizer), (theirs, dense), 1e-9)


def test_a_scheduler_that_cycles_momentum_is_followed_with_a_warning() -> None:
    ours, theirs = arena(), arena()
    optimizer, dense = optim.ExactAdam(ours), torch.optim.Adam([theirs.weight])
    for model, each in ((ours, optimizer), (theirs, dense)):
        cycle = torch.optim.lr_scheduler.OneCycleLR(each, max_lr=1e-2, total_steps=60)
        for batch in batches(59):
            lr = each.param_groups[0]["lr"]
            if each is optimizer and cycle.last_epoch == 2:
                with pytest.warns(UserWarning, match="Give OneCycleLR or CyclicLR cycle_momentum"):
                    train(model, each, [batch], lambda step, lr=lr: lr)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    train(model, each, [batch], lambda step, lr=lr: lr)
            cycle.step()
    assert_same((ours, optimizer), (theirs, dense), 1e-9)


def test_momentum_in_bfloat16() -> None:
    """v is as without: in so few digits it would never shrink."""
    tables = [arena(torch.float32), arena(torch.float32)]
    kinds = torch.float32, torch.bfloat16
    optimizers = [
        optim.ExactAdam(each, state_dtype=kind) for each, kind in zip(tables, kinds, strict=True)
    ]
    start, data = tables[0].weight.detach().clone(), batches(900)
    for model, each in zip(tables, optimizers, strict=True):
        each.param_groups[0]["lr"] = 1e-3
        for ids, grads in data:
            each.zero_grad()
            x, _ = model(ids)
            x.backward(grads.to(x).unflatten(1, (SPACES, DIM)).permute(1, 0, 2)[:, :, None])
            each.step()
    full, short = (each.state_dict()["state"][0] for each in optimizers)
    assert short["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(short["exp_avg_sq"], full["exp_avg_sq"], rtol=1e-5, atol=0)
    own, other = (table.weight.detach() - start for table in tables)
    assert (own - other).norm() <= 0.02 * own.norm()
    again = optim.ExactAdam(arena(torch.float32), state_dtype=torch.bfloat16)
    again.load_state_dict(optimizers[1].state_dict())
    kept = again.state_dict()["state"][0]
    assert all(torch.equal(kept[name], short[name]) for name in short)


def test_an_optimizer_takes_over_what_the_one_before_owed() -> None:
    ours, theirs = arena(), arena()
    data = batches(60)
    for rate, part in ((1e-2, data[:30]), (1e-3, data[30:])):
        # Each begins with an empty state.
        optimizer, dense = optim.ExactAdam(ours), torch.optim.Adam([theirs.weight])
        for model, each in ((ours, optimizer), (theirs, dense)):
            train(model, each, part, lambda step, rate=rate: rate)
    assert_same((ours, optimizer), (theirs, dense), 1e-9)
    other = optim.SGD(ours, lr=0.1)
    with pytest.raises(RuntimeError, match="only optimizer, got another SGD"):
        optimizer.step()
    train(ours, other, data[:1])


def test_a_step_that_fails_is_not_counted() -> None:
    table = arena()
    optimizer = optim.ExactAdam(table)
    train(table, optimizer, batches(3))
    with pytest.raises(RuntimeError):
        train(table, optimizer, batches(1), lambda step: torch.ones(2))  # type: ignore[arg-type]
    assert optimizer.pending_steps == 3


def test_an_optimizer_is_not_copied() -> None:
    table = arena()
    for optimizer in (optim.ExactAdam(table), optim.SGD(table)):
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled: create one for"):
                copied(optimizer)


# ---- tables at rest --------------------------------------------------------------------------


READS: dict[str, Callable[[EmbeddingArena], Tensor]] = {
    "state_dict": lambda a: a.state_dict()["weight"],
    "forward without autograd": lambda a: _read(a),
    "deepcopy": lambda a: copy.deepcopy(a).weight,
    "flush": lambda a: (a.flush(), a.weight)[1],
    "release": lambda a: (a.release(), a.weight)[1],
}


def _read(table: EmbeddingArena) -> Tensor:
    with torch.no_grad():
        x, _ = table(torch.arange(ROWS)[:, None])
    return x[:, :, 0].permute(1, 0, 2).flatten(1)


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_table_at_rest_is_what_dense_adam_has(read: Callable[[EmbeddingArena], Tensor]) -> None:
    ours, theirs = arena(), arena()
    make, make_torch = adams(1e-4, False)
    data = batches(40)
    train(ours, make(ours), data)
    train(theirs, make_torch(theirs), data)
    behind = ours.weight.detach().clone()
    assert not torch.allclose(behind, theirs.weight, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(read(ours).detach(), theirs.weight.detach(), rtol=1e-9, atol=1e-14)


def test_threads_that_read_a_table_make_no_step_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [arena(), arena()]
    for table in tables:
        train(table, adams(1e-4, False)[0](table), batches(20))
    tables[0].flush()
    make, running, ever = optim.ExactAdam._run, [], []

    def run(*arguments: Any) -> None:
        running.append(1)
        time.sleep(0.02)  # in which all others come as far
        ever.append(len(running))
        make(*arguments)
        running.pop()

    monkeypatch.setattr(optim.ExactAdam, "_run", run)
    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(_read, tables[1]) for _ in range(4)]:
            assert torch.equal(each.result(), tables[0].weight)
    assert ever == [1]


def test_loaded_weights_are_not_moved_by_steps_of_the_past() -> None:
    table = arena()
    train(table, adams(0.0, False)[0](table), batches(40))
    start = arena().weight.detach()
    table.load_state_dict({"weight": start})
    table.flush()
    assert torch.equal(table.weight, start)


def test_a_copy_trains_without_the_optimizer() -> None:
    table = arena()
    train(table, adams(0.0, False)[0](table), batches(3))
    twin = copy.deepcopy(table)
    assert twin.optimizer is None
    train(twin, torch.optim.Adam([twin.weight]), batches(3))  # which takes no sparse gradient
    assert table.optimizer is not None
    assert table.sparse


def test_whoever_reads_a_model_sees_a_table_at_rest() -> None:
    def seen(model: STEMNet) -> tuple[Tensor, ...]:
        saved = model.to_official()  # first: what comes after it makes the steps that are owed
        return *saved.values(), model.regularization(1.0, 0.0), model.predict(ids)

    model = STEMNet({"f": ROWS}, ["click"], expert_hidden_units=(4,), embedding_dim=4)
    optimizer = optim.ExactAdam(model.embedding, lr=0.1)
    for ids, _ in batches(5):
        optimizer.zero_grad()
        model(ids).sum().backward()
        optimizer.step()
    ids = torch.arange(ROWS)[:, None]
    before = seen(model)
    optimizer.flush()
    after = seen(model)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


class Holder(nn.Module):
    """A module that knows nothing of tables."""

    def __init__(self, model: STEMNet) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(ids)
        return logits


def _network() -> Holder:
    """Trained by a few batches, so that nearly every row owes steps."""
    torch.manual_seed(0)
    model = STEMNet({"f": ROWS}, ["click"], expert_hidden_units=(4,), embedding_dim=4)
    table = optim.ExactAdam(model.embedding, lr=0.1)
    for ids, _ in batches(5):
        table.zero_grad()
        model(ids).sum().backward()
        table.step()
    table.zero_grad()
    return Holder(model).eval()


EVERY_ROW = torch.arange(ROWS)[:, None]
NAME = "inner.embedding.weight"


def _average(holder: Holder) -> Tensor:
    average = swa_utils.AveragedModel(Holder(STEMNet(**holder.inner.config)))
    average.update_parameters(holder)
    return average.module.get_parameter(NAME)


def _by_hand(holder: Holder) -> Tensor:
    """An average of weights as everybody writes it."""
    average = Holder(STEMNet(**holder.inner.config))
    with torch.no_grad():
        for old, new in zip(average.parameters(), holder.parameters(), strict=True):
            old.copy_(new)
    return average.get_parameter(NAME)


def _distributed(holder: Holder) -> Tensor:
    """What DistributedDataParallel sends to the other processes."""
    sent: list[Tensor] = []
    with mock.patch("torch.distributed.utils._sync_params_and_buffers") as send:
        send.side_effect = lambda group, tensors, *rest: sent.extend(t.clone() for t in tensors)
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            nn.parallel.DistributedDataParallel(holder)
        finally:
            dist.destroy_process_group()
    return next(tensor for tensor in sent if tensor.shape == (ROWS, 8))


def _exported(module: nn.Module, strict: bool = False) -> nn.Module:
    return torch.export.export(module, (EVERY_ROW,), strict=strict).module()


# Of a module that holds a model: its table, or its answers for every row.
WALKS: dict[str, Callable[[Holder], Any]] = {
    "parameters": lambda h: list(h.parameters()),
    "named_parameters": lambda h: dict(h.named_parameters())[NAME],
    "parameters of the arena": lambda h: next(h.inner.embedding.parameters()),
    "its own parameters": lambda h: next(h.inner.embedding.parameters(recurse=False)),
    "modules": lambda h: next(m.weight for m in h.modules() if isinstance(m, EmbeddingArena)),
    "state_dict": lambda h: h.state_dict(),
    "state_dict of the arena": lambda h: h.inner.embedding.state_dict(),
    "deepcopy": lambda h: copy.deepcopy(h).get_parameter(NAME),
    "pickle": lambda h: pickle.loads(pickle.dumps(h)).state_dict(),
    "safetensors": lambda h: safetensors.torch.load(
        safetensors.torch.save({n: p.detach() for n, p in h.named_parameters()})
    )[NAME],
    "AveragedModel": _average,
    "an average by hand": _by_hand,
    "parameters_to_vector": lambda h: nn.utils.parameters_to_vector(h.parameters()),
    "functional_call": lambda h: torch.func.functional_call(
        h, dict(h.named_parameters()), (EVERY_ROW,)
    ),
    "functional_call of constants": lambda h: torch.func.functional_call(
        h, {n: p.detach() for n, p in h.named_parameters()}, (EVERY_ROW,)
    ),
    "stack_module_state": lambda h: torch.func.stack_module_state([h, h])[0],
    "DistributedDataParallel": _distributed,
    "double": lambda h: h.double().get_parameter(NAME),
    "half": lambda h: h.half().get_parameter(NAME),
    "to_empty": lambda h: (
        (h.to_empty(device="cpu"), h.load_state_dict(_network().state_dict()))
        and h.get_parameter(NAME)
    ),
    "reset_parameters": lambda h: (
        torch.manual_seed(0),
        h.inner.embedding.reset_parameters(),
        h.state_dict(),
    )[2],
    "compile_inference": lambda h: h.inner.compile_inference()(EVERY_ROW),
    "to_official": lambda h: h.inner.to_official(),
    "compile": lambda h: _answers(
        torch.compile(h.inner.embedding, backend="eager", fullgraph=True)
    ),
    "export": lambda h: _exported(h)(EVERY_ROW),
    "strict export of the arena": lambda h: _exported(h.inner.embedding, strict=True)(EVERY_ROW),
}


@torch.no_grad()
def _answers(holder: Callable[[Tensor], Tensor]) -> Tensor:
    return holder(EVERY_ROW)


@pytest.mark.parametrize("read", WALKS.values(), ids=WALKS.keys())
def test_who_reads_parameters_without_the_module_sees_a_table_at_rest(
    read: Callable[[Holder], Any],
) -> None:
    holders = _network(), _network()
    behind, rested = (h.inner.embedding for h in holders)
    rested.flush()
    assert not torch.allclose(behind.weight, rested.weight, atol=1e-3)
    behind, rested = (tree_leaves(read(h)) for h in holders)
    assert len(behind) == len(rested)
    for actual, expected in zip(behind, rested, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_training_step_leaves_the_rows_that_it_does_not_read() -> None:
    """What it asks of parameters (gradients, places) costs no step of the whole table."""
    model = _network().inner.train()
    table = model.embedding.optimizer
    assert isinstance(table, optim.ExactAdam)
    rest = torch.optim.Adam([p for p in parameters_of(model) if p is not model.embedding.weight])
    made = table.pending_steps
    settings = TrainingConfig(max_gradient_norm=1.0, net_regularizer=1e-3, micro_batch_size=8)
    steps = TrainStep(model, [table, rest], settings)
    for ids, _ in batches(3):
        model.zero_grad()
        model.zero_grad(set_to_none=False)
        steps(Batch(ids, None, {}, torch.ones(len(ids), 1), None))
        steps._kept()  # on a GPU every step looks at it
        made += 1
        assert table.pending_steps == made


# ---- the others ------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_sgd_is_dense_sgd(momentum: float, decay: float, device: str) -> None:
    ours, theirs = arena(device=device), arena(device=device)
    optimizer = optim.SGD(ours, momentum=momentum, weight_decay=decay)
    dense = torch.optim.SGD([theirs.weight], momentum=momentum, weight_decay=decay)
    for model, each in ((ours, optimizer), (theirs, dense)):
        train(model, each, batches(300), lambda step: COSINE(step) * 100)
    ours.flush()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-9, atol=1e-15)
    if momentum:
        actual, expected = (
            each.state[model.weight]["momentum_buffer"]
            for model, each in ((ours, optimizer), (theirs, dense))
        )
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-15)


@devices
def test_sgd_with_options_of_every_step(device: str) -> None:
    """Rates and L2 that change, as tensors too, and momentum that is switched off in between."""
    ours, theirs = arena(device=device), arena(device=device)
    optimizer = optim.SGD(ours, momentum=0.9)
    dense = torch.optim.SGD([theirs.weight], momentum=0.9)
    for step, batch in enumerate(batches(1200)):
        for model, each in ((ours, optimizer), (theirs, dense)):
            group = each.param_groups[0]
            group["weight_decay"] = 1e-3 * (step % 3)
            group["momentum"] = 0.0 if step % 100 > 97 else 0.9
            if each is optimizer:
                group["weight_decay"] = model.weight.new_tensor([group["weight_decay"]])
            train(model, each, [batch], lambda step: COSINE(step) * 100, first=step)
    ours.flush()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-9, atol=1e-15)
    buffers = (
        each.state[model.weight]["momentum_buffer"]
        for model, each in ((ours, optimizer), (theirs, dense))
    )
    torch.testing.assert_close(*buffers, rtol=1e-9, atol=1e-15)


@devices
def test_a_step_of_sgd_costs_the_same_after_any_number(device: str) -> None:
    """Its table grows by doubling, and a step changes a line for each bit of its number."""
    products = Products(torch.device(device))
    place, lines = products.steps.data_ptr(), len(products.steps)
    for step in range(1, 3000):
        before = products.steps.clone()
        products.advance(1e-2, 0.9, 1e-4)
        if step in (lines, 2 * lines):
            place = products.steps.data_ptr()
            before = torch.cat([before, torch.zeros_like(before)])
        assert products.steps.data_ptr() == place
        changed = int((products.steps != before).any(1).sum())
        assert changed <= 1 + step.bit_length()
    lines = 16384 if device == "cuda" else 4096  # a graph has room from the start
    assert len(products.steps) == lines
    products.caught_up()
    products.advance(1e-2, 0.9, 1e-4)
    assert products.clock.tolist() == [2999, 3000]
    assert len(products.steps) == lines


@devices
def test_plain_sgd_leaves_rows_without_gradients_alone(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = arena(device=device)
    optimizer = optim.SGD(table)
    train(table, optimizer, batches(3))
    monkeypatch.setattr(optimizer, "_run", None)
    before = table.weight.detach().clone()
    table.flush()
    assert torch.equal(table.weight, before)


@devices
def test_adagrad_is_dense_adagrad(device: str) -> None:
    ours, theirs = arena(device=device), arena(device=device)
    optimizer = optim.Adagrad(ours)
    dense = torch.optim.Adagrad([theirs.weight])
    for model, each in ((ours, optimizer), (theirs, dense)):
        train(model, each, batches(100))
    sums = optimizer.state[ours.weight]["sum"], dense.state[theirs.weight]["sum"]
    torch.testing.assert_close(*sums, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=0)


@devices
def test_row_wise_adagrad_keeps_one_sum_a_row(device: str) -> None:
    ours, table = arena(device=device), arena(device=device).weight.detach()
    optimizer = optim.RowWiseAdagrad(ours, lr=0.1, weight_decay=1e-2)
    total = table.new_zeros(ROWS)
    for ids, _ in batches(20):
        ids = ids.to(device)
        optimizer.zero_grad()
        (ours(ids)[0].square().sum() / 2).backward()
        optimizer.step()
        # The gradient of a row is itself, times its occurrences.
        for row in set(ids.flatten().tolist()) - {0}:
            grad = table[row] * (int((ids == row).sum()) + 1e-2)
            total[row] += grad.square().mean()
            table[row] -= 0.1 * grad / (total[row].sqrt() + 1e-8)
    torch.testing.assert_close(ours.weight.detach(), table, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(optimizer.state[ours.weight]["sum"], total, rtol=1e-9, atol=1e-30)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_row_wise_adagrad_is_fbgemms() -> None:
    pytest.importorskip("fbgemm_gpu")
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    width = 8  # FBGEMM wants a multiple of four
    ours = EmbeddingArena({"f": ROWS}, (), {}, {}, 2, width // 2)
    theirs = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
        eps=1e-8,
        pooling_mode=PoolingMode.NONE,
    )
    theirs.split_embedding_weights()[0].copy_(ours.weight.detach())
    optimizer = optim.RowWiseAdagrad(ours, lr=0.1)
    draw = torch.Generator().manual_seed(0)
    for ids, _ in batches(30):
        ids = ids.clamp(min=1)  # padding is ours alone
        grad = torch.randn(len(ids), width, generator=draw)
        optimizer.zero_grad()
        (ours(ids)[0][:, :, 0].permute(1, 0, 2).flatten(1) * grad).sum().backward()
        optimizer.step()
        (theirs(ids.flatten(), torch.arange(len(ids) + 1)) * grad).sum().backward()
    torch.testing.assert_close(ours.weight.detach(), theirs.split_embedding_weights()[0])


def test_gradients_are_forgotten_or_zeroed() -> None:
    model = arena()
    optimizer = optim.ExactAdam(model)
    x, _ = model(torch.ones(3, 1, dtype=torch.int64))
    x.sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert model.weight.grad is not None
    assert not model.weight.grad.to_dense().any()
    optimizer.zero_grad()
    assert model.weight.grad is None


def test_lazy_adam_is_sparse_adam() -> None:
    """torch.optim.SparseAdam of the same sparse gradients; eps, which it scales, left out."""
    ours, theirs = arena(), arena()
    theirs.sparse = True
    optimizer = optim.LazyAdam(ours, eps=1e-30)
    sparse = torch.optim.SparseAdam([theirs.weight], eps=1e-30)
    for model, each in ((ours, optimizer), (theirs, sparse)):
        train(model, each, batches(100))
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", optim.OPTIMIZERS.values(), ids=optim.OPTIMIZERS.keys())
def test_a_step_replayed_from_a_cuda_graph(kind: Callable[..., optim.TableOptimizer]) -> None:
    options = {"lr": 1e-3, "weight_decay": 1e-3}
    options |= {"momentum": 0.9} if kind is optim.SGD else {}
    data = batches(40)
    eager, model = arena(device="cuda"), arena(device="cuda")
    train(eager, kind(eager, **options), data)
    optimizer = kind(model, **options)
    ids, grads = (part.cuda() for part in data[0])

    def step() -> None:
        optimizer.zero_grad()
        x, _ = model(ids)
        loss = (x[:, :, 0].permute(1, 0, 2).flatten(1) * grads).sum()
        (loss + 1e-2 * x.square().sum()).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, and state is made, before the capture
        for batch in data[:5]:
            ids.copy_(batch[0])
            grads.copy_(batch[1])
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for batch in data[5:]:
        ids.copy_(batch[0])
        grads.copy_(batch[1])
        graph.replay()
    for each in (eager, model):
        each.flush()
    torch.testing.assert_close(model.weight, eager.weight, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", optim.OPTIMIZERS.values(), ids=optim.OPTIMIZERS.keys())
def test_every_optimizer_resumes_and_takes_dense_gradients(
    kind: Callable[..., optim.TableOptimizer],
) -> None:
    options = {"weight_decay": 1e-3} | ({"momentum": 0.9} if kind is optim.SGD else {})
    data = batches(40)
    whole = arena()
    train(whole, kind(whole, **options), data)
    first = arena()
    optimizer = kind(first, **options)
    train(first, optimizer, data[:20])
    second = arena()
    second.load_state_dict(first.state_dict())
    again = kind(second, **options)
    again.load_state_dict(optimizer.state_dict())
    train(second, again, data[20:], first=20)
    whole.flush()
    second.flush()
    torch.testing.assert_close(second.weight, whole.weight, rtol=1e-9, atol=1e-15)
    second.flush()
    second.weight.grad = torch.ones_like(second.weight)
    before = second.weight.detach().clone()
    again.step()
    assert (second.weight < before).all(), "a dense gradient moves every row"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda a: optim.ExactAdam([a.weight]), TypeError, "got Parameter: give it model"),
        (
            lambda a: optim.SGD(torch.nn.Embedding(3, 2)),
            TypeError,
            "got Embedding: give it model.e",
        ),
        (lambda a: optim.ExactAdam(a, lr=-1.0), ValueError, r"lr: .*, got -1.0"),
        (
            lambda a: optim.Adagrad(a, lr=math.inf),
            ValueError,
            "lr: expected a finite .*, got inf",
        ),
        (lambda a: optim.ExactAdam(a, lr=torch.tensor(math.nan)), ValueError, r"lr: .*, got nan"),
        (
            lambda a: optim.ExactAdam(a, lr="1"),
            ValueError,
            "lr: expected a finite .*, got '1'",
        ),
        (
            lambda a: optim.ExactAdam(a, weight_decay=math.inf),
            ValueError,
            r"weight_decay: .*, got inf",
        ),
        (lambda a: optim.ExactAdam(a, betas=(0.9,)), ValueError, "expected two numbers"),
        (lambda a: optim.ExactAdam(a, betas=(0.9, 1.0)), ValueError, r"betas\[1\]: .*, got 1.0"),
        (lambda a: optim.SGD(a, momentum=-0.5), ValueError, r"momentum: .*, got -0.5"),
    ],
)
def test_what_is_refused(make: Make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(arena())


def test_options_of_a_state_are_checked() -> None:
    state = optim.ExactAdam(arena()).state_dict()
    state["param_groups"][0]["betas"] = (0.9,)
    with pytest.raises(ValueError, match="expected two numbers"):
        optim.ExactAdam(arena()).load_state_dict(state)


def test_states_that_do_not_fit_are_refused() -> None:
    table = arena()
    optimizer = optim.ExactAdam(table)
    train(table, optimizer, batches(2))
    state = optimizer.state_dict()
    other = torch.optim.Adam([table.weight], amsgrad=True)
    with pytest.raises(ValueError, match="group 0: expected no amsgrad, got amsgrad=True"):
        optimizer.load_state_dict(other.state_dict())
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:3]
    with pytest.raises(ValueError, match=r"exp_avg: expected shape \[400, 6\] .*, got \[3, 6\]"):
        optimizer.load_state_dict(state)


def test_sums_of_the_other_adagrad_are_refused() -> None:
    tables = [arena(), arena()]
    both = [optim.Adagrad(tables[0]), optim.RowWiseAdagrad(tables[1])]
    for table, optimizer in zip(tables, both, strict=True):
        train(table, optimizer, batches(2))
    states = [optimizer.state_dict() for optimizer in both]
    with pytest.raises(ValueError, match=r"sum: expected shape \[400, 6\] .*, got \[400\]:"):
        both[0].load_state_dict(states[1])
    with pytest.raises(ValueError, match=r"sum: expected shape \[400\] .*, got \[400, 6\]:"):
        both[1].load_state_dict(states[0])
    for table, optimizer, state in zip(tables, both, states, strict=True):
        assert torch.equal(optimizer.state[table.weight]["sum"], state["state"][0]["sum"])


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (optim.SGD, lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True), "nesterov=True"),
        (optim.SGD, lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.5), "dampening=0.5"),
        (optim.Adagrad, lambda p: torch.optim.Adagrad(p, lr_decay=0.1), "lr_decay=0.1"),
        (optim.ExactAdam, lambda p: torch.optim.Adam(p, maximize=True), "maximize=True"),
    ],
)
def test_options_of_torch_alone_are_refused(
    ours: Callable[..., optim.TableOptimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    message: str,
) -> None:
    table = arena()
    state = theirs([table.weight]).state_dict()
    with pytest.raises(ValueError, match=f"group 0: expected no .*, got {message}, which has no"):
        ours(table).load_state_dict(state)
