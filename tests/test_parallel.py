"""DistributedDataParallel of a model: two ranks beside one process, and what is refused."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stem_fast import STEMNet, optim

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank has in the end, of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    lines = [[sys.executable, ranks.__file__, str(rank), str(folder)] for rank in range(2)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # where a machine's name says nothing
    processes = [
        subprocess.Popen(line, env=variables, stderr=subprocess.PIPE, text=True) for line in lines
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ranks.CASES)
def test_ranks_end_alike_and_as_one_process(
    name: str, both: list[dict[str, dict[str, Tensor]]]
) -> None:
    """From different weights, of batches of different sizes and some of no rows."""
    case = ranks.CASES[name]
    one, other = (each[name] for each in both)
    expected = ranks.train(case, ranks.build(case, 0), None)
    assert one.keys() == other.keys() == expected.keys()
    close = 1e-6 if case.dtype == torch.float32 else 1e-12
    for key, value in expected.items():
        assert torch.equal(one[key], other[key]), key
        torch.testing.assert_close(one[key], value, rtol=close, atol=close, msg=key)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


class Holder(nn.Module):
    """A model within a module of a user's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        return self.model(*inputs)


def test_a_module_that_holds_the_model_says_what_is_the_arenas(alone: None) -> None:
    case = ranks.CASES["adam"]
    *inputs, _ = ranks.batch(case, 0, 0, 0)
    holder = Holder(ranks.build(case, 0))
    DistributedDataParallel(holder)(*inputs).sum().backward()  # DDP's own, while it is dense
    dense = holder.model.embedding.weight.grad
    assert dense is not None
    optim.ExactAdam(holder.model.embedding)
    with pytest.raises(RuntimeError, match=r"reduces model\.embedding\.weight, whose g"):
        DistributedDataParallel(holder)(*inputs)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        holder, ["model.embedding.weight"]
    )
    holder.zero_grad()
    DistributedDataParallel(holder)(*inputs).sum().backward()
    torch.testing.assert_close(holder.model.embedding.weight.grad.to_dense(), dense)


def test_ranks_with_fewer_batches_are_refused(alone: None) -> None:
    case = ranks.CASES["adam"]
    model = ranks.build(case, 0)
    *inputs, _ = ranks.batch(case, 0, 0, 0)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="give every rank as many batches"), wrapped.join():
        wrapped(*inputs)


def test_no_pass_makes_the_steps_of_all_rows(alone: None) -> None:
    """Nor does that which broadcasts the buffers of batch norm."""
    model = STEMNet({"f": 20}, ["click"], expert_hidden_units=(4,), batch_norm=True)
    assert dict(model.named_buffers()).keys() == dict(nn.Module.named_buffers(model)).keys()
    optimizer = optim.ExactAdam(model.embedding)
    wrapped = DistributedDataParallel(model)
    for step in range(1, 4):
        wrapped(torch.randint(1, 20, (5, 1))).sum().backward()
        optimizer.step()
        assert optimizer.pending_steps == step


def test_another_model_within_a_forward_pass_is_left_alone(alone: None) -> None:
    """As a teacher's is."""
    case = ranks.CASES["adam"]
    teacher, model = ranks.build(case, 0), ranks.build(case, 1)
    *inputs, _ = ranks.batch(case, 0, 0, 0)
    taught = []
    model.register_forward_pre_hook(lambda *_: taught.append(teacher(*inputs)))
    wrapped = DistributedDataParallel(model)
    wrapped(*inputs).sum().backward()
    assert list(teacher.embedding.wrappers.values()) == [False]
    assert list(model.embedding.wrappers.values()) == [True]


def test_a_wrapper_broadcasts_at_its_first_pass_with_autograd(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where a rank evaluates or predicts alone, nor when wrappers of one model take turns."""
    case = ranks.CASES["adam"]
    model = ranks.build(case, 0)
    *inputs, _ = ranks.batch(case, 0, 0, 0)
    monkeypatch.setattr(dist, "broadcast", lambda table, **_: table.fill_(7))  # rank 0's
    weight = model.embedding.weight
    one, other = DistributedDataParallel(model), DistributedDataParallel(model)
    passes = []

    def look(wrapped: nn.Module, value: float) -> None:
        nn.init.constant_(weight, value)
        wrapped(*inputs)
        passes.append(float(weight[3, 3].detach()))

    def predict(*_: Any) -> None:  # as a thread might meanwhile
        model.predict(*inputs)

    with torch.no_grad():
        look(one, 1)
    with torch.inference_mode():
        look(one, 2)
    model.register_forward_pre_hook(predict)
    with torch.no_grad():
        look(other, 3)
    for wrapped, value in [(one, 4), (other, 5), (one, 6), (other, 8)]:
        look(wrapped, value)
    assert passes == [1, 2, 3, 7, 7, 6, 8]
    assert len(model.embedding.wrappers) == 2
    del one, other, wrapped
    gc.collect()
    assert not model.embedding.wrappers  # it keeps no wrapper alive
