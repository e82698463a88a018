"""Grouped networks against the plain PyTorch networks they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import devices
from torch import nn

from stem_fast.nn.arena import EmbeddingArena
from stem_fast.nn.grouped import ACTIVATIONS, GroupedBatchNorm, GroupedMLP, activation


def arena(**changes: object) -> EmbeddingArena:
    options = {
        "vocab_sizes": {"user": 5, "item": 4},
        "numeric": ["price"],
        "sequences": {"history": "item", "tags": 3},
        "pooling": {"history": "mean", "tags": "sum"},
        "spaces": 2,
        "dim": 3,
    }
    return EmbeddingArena(**{**options, **changes})


IDS = torch.tensor([[1, 2], [4, 0]])
PRICE = torch.tensor([[0.5], [-2.0]])
SEQUENCES = {"history": torch.tensor([[3, 3, 0], [0, 0, 0]]), "tags": torch.tensor([[1], [2]])}


def test_fields_stand_in_order_and_spaces_apart() -> None:
    layer = arena()
    nn.init.normal_(layer.weight)
    x, z = layer(IDS, PRICE, SEQUENCES, [0b11, 0b10])
    assert x.shape == (2, 2, 5, 3)
    torch.testing.assert_close(z, torch.stack([x[0] + x[1], x[1]]))
    w, item, tags = layer.weight, 5, 9
    for space, columns in enumerate((slice(0, 3), slice(3, 6))):
        torch.testing.assert_close(x[space, 0, 0], w[1, columns])
        torch.testing.assert_close(x[space, 0, 1], w[item + 2, columns])
        torch.testing.assert_close(x[space, 1, 2], -2 * layer.numeric_weight[0, columns])
        torch.testing.assert_close(x[space, 0, 3], w[item + 3, columns])
        torch.testing.assert_close(x[space, 1, 3], torch.zeros(3))
        torch.testing.assert_close(x[space, 1, 4], w[tags + 2, columns])


def test_padded_and_jagged_sequences_agree() -> None:
    layer = arena()
    jagged = {
        "history": (torch.tensor([3, 3], dtype=torch.int32), torch.tensor([0, 2, 2])),
        "tags": (torch.tensor([1, 2]), torch.tensor([0, 1, 2])),
    }
    padded, _ = layer(IDS, PRICE, SEQUENCES)
    torch.testing.assert_close(layer(IDS, PRICE, jagged)[0], padded)


def test_dense_and_sparse_gradients_agree() -> None:
    layer = arena()
    gradients = []
    for sparse in (False, True):
        layer.sparse = sparse
        x, z = layer(IDS, PRICE, SEQUENCES, [0b11])
        gradients.append(torch.autograd.grad(x.cos().sum() + z.sin().sum(), layer.weight)[0])
    dense, coo = gradients
    assert coo.is_coalesced()
    assert coo.indices()[0].tolist() == [1, 4, 7, 8, 10, 11]
    torch.testing.assert_close(coo.to_dense(), dense)


@devices
def test_a_gradient_is_known_as_the_newest_batchs(device: str) -> None:
    """By its memory, which autograd does not copy: else each step on CUDA would plan twice."""
    layer = arena(numeric=(), sequences={}, pooling={}).to(device)
    layer.sparse = True
    for _ in range(2):
        layer.weight.grad = None
        layer(IDS.to(device))[0].sum().backward()
        assert layer.planned is not None
        assert layer.weight.grad._indices().data_ptr() == layer.planned.data_ptr()
        layer(IDS.flip(0).to(device))[0].sum().backward()
        assert layer.weight.grad._indices().data_ptr() != layer.planned.data_ptr()


def test_gradients_added_up_are_not_taken_for_the_newest_batchs() -> None:
    layer = arena(numeric=(), sequences={}, pooling={})
    layer.sparse = True
    # As CUDA adds up two batches; then come as many rows whose gradient nobody asks for.
    twice = torch.tensor([[1, 2, 1, 2]])
    values = torch.ones(4, 6)
    layer.weight.grad = torch.sparse_coo_tensor(
        twice, values, layer.weight.shape, check_invariants=True
    )
    layer(torch.tensor([[1, 1], [2, 2]]))
    rows, sums = layer.row_gradients()
    assert rows is not None
    assert rows.tolist() == [1, 2]
    assert sums.tolist() == [[2.0] * 6] * 2


def test_bad_ids_on_a_device_are_named_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA does, on tensors of the CPU: replaced by the unknown value, noted, raised once."""
    monkeypatch.setattr("stem_fast.nn.arena.runs_ahead", lambda tensor: True)
    layer = arena()
    history = torch.tensor([[3, -5, 0], [0, 4, 0]])
    x, _ = layer(torch.tensor([[1, 2], [9, 0]]), PRICE, {**SEQUENCES, "history": history})
    clamped = torch.tensor([[3, 3, 0], [0, 3, 0]])
    expected, _ = layer(torch.tensor([[1, 2], [4, 0]]), PRICE, {**SEQUENCES, "history": clamped})
    torch.testing.assert_close(x, expected)
    with pytest.raises(IndexError, match=r"'user': id 9 at row 1 is outside its voc.* of 5"):
        layer.raise_bad_ids()
    layer.raise_bad_ids()
    layer(IDS, PRICE, {**SEQUENCES, "history": history})
    with pytest.raises(IndexError, match="field 'history': id -5 at value 1 is outside"):
        layer.raise_bad_ids()
    layer.raise_bad_ids()
    layer.bounds = "clamp"
    torch.testing.assert_close(
        layer(torch.tensor([[1, 2], [9, 0]]), PRICE, SEQUENCES)[0][:, :, :3], expected[:, :, :3]
    )
    layer.raise_bad_ids()
    layer.bounds = "off"
    x, _ = layer(torch.tensor([[6, 2]]), PRICE[:1], {"history": IDS[:1] * 0, "tags": IDS[:1] * 0})
    assert torch.equal(x[0, 0, 0], layer.weight[6, :3])  # a row of "item"
    layer.raise_bad_ids()


def test_tables_start_small_with_padding_at_zero() -> None:
    torch.manual_seed(0)
    layer = arena(vocab_sizes={"user": 500, "item": 700})
    assert not layer.weight[[0, 500, 1200]].any()
    assert layer.weight.std().item() == pytest.approx(1e-4, rel=0.05)
    assert layer.numeric_weight.std() > 0.1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [5, 0]], "field 'user': id 5 at row 1 is outside its vocabulary of 5"),
        ([[1, -1], [1, 0]], "field 'item': id -1 at row 0 is outside its vocabulary of 4"),
    ],
)
def test_ids_outside_the_vocabulary(ids: list[list[int]], message: str) -> None:
    with pytest.raises(IndexError, match=message):
        arena()(torch.tensor(ids), PRICE, SEQUENCES)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (
            torch.tensor([[1, 2], [3, 4]]),
            "field 'history': id 4 at row 1 is outside its voc.* of 4",
        ),
        ((torch.tensor([1, 9]), torch.tensor([0, 0, 2])), "id 9 at row 1 is outside"),
        (torch.tensor([[1, 2]]), r"sequence 'history': expected shape \[2, L\], got \[1, 2\]"),
        (
            (torch.tensor([1, 2]), torch.tensor([0, 2])),
            r"sequence 'history': expected offsets \[3\], got \[2\]",
        ),
        ((torch.tensor([1, 2]), torch.tensor([0, 1, 1])), "offsets must be from 0 to 2"),
        ((torch.tensor([1, 2]), torch.tensor([0, 3, 2])), "offsets decrease"),
    ],
)
def test_bad_sequences(sequence: object, message: str) -> None:
    with pytest.raises((IndexError, ValueError), match=message):
        arena()(IDS, PRICE, {**SEQUENCES, "history": sequence})


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (
            (IDS[:, :1], PRICE, SEQUENCES),
            ValueError,
            r"ids: expected shape \[B, 2\] \(user, item\), got \[2, 1\]",
        ),
        (
            (IDS.float(), PRICE, SEQUENCES),
            TypeError,
            r"ids: expected int32 or int64, got torch\.float32",
        ),
        (
            (IDS, None, SEQUENCES),
            ValueError,
            r"numeric: expected shape \[2, 1\] \(price\), got None",
        ),
        (
            (IDS, PRICE[:1], SEQUENCES),
            ValueError,
            r"numeric: expected shape \[2, 1\] \(price\), got \[1, 1\]",
        ),
        (
            (IDS, PRICE, {**SEQUENCES, "tags": torch.ones(2, 1)}),
            TypeError,
            r"sequence 'tags': expected int32 or int64, got torch\.float32",
        ),
        ((IDS, PRICE, {}), ValueError, r"sequences: expected \['history', 'tags'\], got \[\]"),
    ],
)
def test_bad_inputs(inputs: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        arena()(*inputs)


def test_numeric_values_for_a_model_without() -> None:
    layer = arena(numeric=[], sequences={}, pooling={})
    with pytest.raises(
        ValueError, match=r"numeric: expected None without numeric fields, got \[2, 1\]"
    ):
        layer(IDS, PRICE)


def test_bad_tables() -> None:
    with pytest.raises(
        ValueError, match="field 'user': expected a vocabulary of at least 1 row, got 0"
    ):
        arena(vocab_sizes={"user": 0})
    with pytest.raises(
        ValueError, match="sequence 'history': expected to share a categorical field, got 'itm'"
    ):
        arena(sequences={"history": "itm"})


ALONE = {
    "prelu": lambda units: nn.PReLU(units, init=0.1),
    **{name: lambda units, act=act: act() for name, act in ACTIVATIONS.items()},
}


@pytest.mark.parametrize("name", [*ALONE, "ReLU", "dice"])
def test_group_is_its_networks_side_by_side(name: str) -> None:
    """Forward, every gradient and running statistics, in training mode with batch norm."""
    torch.manual_seed(1)
    group = GroupedMLP(3, 5, (6, 4), outputs=2, hidden_activations=name, batch_norm=True).double()
    for parameter in group.parameters():  # biases and Dice's alpha start at 0
        parameter.detach().add_(torch.randn_like(parameter), alpha=0.3)
    before = copy.deepcopy(group)
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    reads = [1, 0, 1]
    y = group(x, reads)
    grad = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    parameters = dict(group.named_parameters())
    gradients = dict(
        zip(parameters, torch.autograd.grad(y, list(parameters.values()), grad), strict=True)
    )
    expected_dx = torch.zeros_like(dx)
    for e, n in enumerate(reads):
        blocks: list[nn.Module] = []
        for inputs, units in ((5, 6), (6, 4)):
            blocks += [nn.Linear(inputs, units), nn.BatchNorm1d(units), alone(name, units)]
        network = nn.Sequential(*blocks, nn.Linear(4, 2)).double()
        network.load_state_dict({key.removeprefix("mlp."): t for key, t in before.official(e)})
        torch.testing.assert_close(network(x[n]), y[e])
        after = {key.removeprefix("mlp."): t for key, t in group.official(e)}
        torch.testing.assert_close(dict(network.state_dict()), after)
        ours = {name.replace("blocks.", ""): g[e] for name, g in gradients.items()}
        inputs_and_parameters = [x, *network.parameters()]
        dx_e, *theirs = torch.autograd.grad(network(x[n]), inputs_and_parameters, grad[e])
        expected_dx += dx_e
        for (key, _), right in zip(network.named_parameters(), theirs, strict=True):
            torch.testing.assert_close(ours[key], right)
    torch.testing.assert_close(dx, expected_dx)


class Dice(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(units, affine=False, eps=1e-9, momentum=0.01)
        self.alpha = nn.Parameter(torch.zeros(units))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.bn(x).sigmoid()
        return x * (p + self.alpha * (1 - p))


def alone(name: str, units: int) -> nn.Module:
    return Dice(units) if name == "dice" else ALONE[name.lower()](units)


def test_batch_norm_keeps_each_networks_statistics() -> None:
    group = GroupedBatchNorm(3, 4)
    alone = [nn.BatchNorm1d(4) for _ in range(3)]
    for _ in range(3):
        x = torch.randn(2, 8, 4) * 3 + 1  # the third network never runs
        group(x)
        for one, part in zip(alone, x, strict=False):
            one(part)
    for e, one in enumerate(alone):
        torch.testing.assert_close(group.running_mean[e], one.running_mean)
        torch.testing.assert_close(group.running_var[e], one.running_var)
        assert group.num_batches_tracked[e] == one.num_batches_tracked
    group.eval()
    x = torch.randn(3, 8, 4)
    before = {name: tensor.clone() for name, tensor in group.state_dict().items()}
    expected = torch.stack([one.eval()(part) for one, part in zip(alone, x, strict=True)])
    torch.testing.assert_close(group(x), expected)
    for name, tensor in group.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_dropout_stands_after_every_hidden_layer_only() -> None:
    group = GroupedMLP(2, 3, (4, 5), outputs=1, dropout=0.5)
    assert [type(b).__name__ for b in group.blocks] == [
        "GroupedLinear", "ReLU", "Dropout", "GroupedLinear", "ReLU", "Dropout", "GroupedLinear"
    ]  # fmt: skip
    x = torch.randn(2, 50, 3)
    assert not torch.equal(group(x, [0, 1]), group(x, [0, 1]))
    group.eval()
    assert torch.equal(group(x, [0, 1]), group(x, [0, 1]))


def test_linear_layers_start_xavier_normal() -> None:
    torch.manual_seed(0)
    block = GroupedMLP(4, 300, (200,)).blocks[0]
    for one in block.weight:
        assert one.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.03)
    assert not block.bias.any()


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="unknown activation 'rellu'; known: dice, elu, gelu"):
        activation("rellu", 1, 1)


# ---- ids outside their vocabularies, however the arena is called ----------------------------


def by_eager(layer: EmbeddingArena, inputs: tuple[object, ...]) -> object:
    return layer


def by_compile(layer: EmbeddingArena, inputs: tuple[object, ...]) -> object:
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


def by_export(layer: EmbeddingArena, inputs: tuple[object, ...]) -> object:
    return torch.export.export(layer, inputs).module()


JAGGED = {
    "history": (torch.tensor([3, 3, 1]), torch.tensor([0, 2, 3])),
    "tags": (torch.tensor([1, 2]), torch.tensor([0, 1, 2])),
}
WRONG = {
    "too large": (lambda ids, tags, offsets: ids[1, 0].fill_(5), "field 'user': id 5 at row 1 is"),
    "negative": (lambda ids, tags, offsets: ids[0, 1].fill_(-1), "field 'item': id -1 at row 0 is"),
    "in a sequence": (lambda ids, tags, offsets: tags[1].fill_(3), "field 'tags': id 3 at row 1"),
    "offsets short": (
        lambda ids, tags, offsets: offsets[2].fill_(2),
        "offsets must be from 0 to 3",
    ),
    "offsets falling": (lambda ids, tags, offsets: offsets[1].fill_(4), "offsets decrease"),
}


@pytest.mark.parametrize("how", [by_eager, by_compile, by_export])
def test_ids_outside_their_vocabulary_raise_in_every_kind_of_call(how: Callable[..., Any]) -> None:
    layer = arena()
    called = how(layer, (IDS, PRICE, JAGGED))
    torch.testing.assert_close(called(IDS, PRICE, JAGGED), layer(IDS, PRICE, JAGGED))
    for spoil, message in WRONG.values():
        ids, sequences = IDS.clone(), copy.deepcopy(JAGGED)
        spoil(ids, sequences["tags"][0], sequences["history"][1])
        with pytest.raises((IndexError, ValueError), match=message):
            called(ids, PRICE, sequences)


@pytest.mark.parametrize("how", [by_compile, by_export])
def test_ids_outside_their_vocabulary_are_unknown_on_a_gpu_in_every_kind_of_call(
    how: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing there waits for the device; the CPU stands in for one."""
    monkeypatch.setattr("stem_fast.nn.arena.runs_ahead", lambda tensor: True)
    layer = arena()
    called = how(layer, (IDS, PRICE, SEQUENCES))
    wrong, tags = torch.tensor([[1, 4], [-1, 0]]), torch.tensor([[9], [2]])
    unknown, unknown_tags = torch.tensor([[1, 3], [4, 0]]), torch.tensor([[2], [2]])
    expected = layer(unknown, PRICE, {**SEQUENCES, "tags": unknown_tags})
    torch.testing.assert_close(called(wrong, PRICE, {**SEQUENCES, "tags": tags}), expected)
    if how is by_compile:
        with pytest.raises(IndexError, match="field 'user': id -1 at row 1 is outside"):
            layer.raise_bad_ids()


def test_bad_ids_noted_before_a_move_are_raised_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stem_fast.nn.arena.runs_ahead", lambda tensor: True)
    layer = arena()
    places = [buffer.data_ptr() for buffer in layer.buffers()]
    layer(torch.tensor([[7, 2], [4, 0]]), PRICE, SEQUENCES)
    layer.double()
    assert places == [buffer.data_ptr() for buffer in layer.buffers()]  # CUDA graphs read them
    with pytest.raises(IndexError, match="field 'user': id 7 at row 0 is outside"):
        layer.raise_bad_ids()
