"""compile_inference against predict, for every model of the family."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import assert_within
from torch import nn

from stem_fast import ops
from stem_fast.common import DataError
from stem_fast.models.family import MODELS
from stem_fast.models.network import STEMNet
from stem_fast.nn import batched
from stem_fast.serving import inference

EXPERTS = {
    "stem": {"num_specific_experts": 2, "num_shared_experts": 2},
    "single": {"num_specific_experts": 2},
    "shared_bottom": {},
    "mmoe": {"num_shared_experts": 3},
    "ple": {"num_specific_experts": 1, "num_shared_experts": 2},
}
NUMBERS = [0, 1, 2, inference.FEW + 1, inference.CHUNK + 3]


def build(name: str, **options: Any) -> tuple[STEMNet, Any]:
    """A model of every kind of field and task, and what makes a batch of n rows for it."""
    torch.manual_seed(7)
    model = MODELS[name](
        {"user": 40, "item": 30},
        ["click", "time"],
        embedding_dim=4,
        expert_hidden_units=(24, 16),
        gate_hidden_units=(8,),
        tower_hidden_units=(8,),
        numeric=["price"],
        sequences={"seen": "item", "tags": 5},
        kinds={"time": "regression"},
        scales={"time": (2.0, 0.5)},
        fields=["seen", "price", "user", "tags", "item"],
        **{**EXPERTS[name], **options},
    )
    nn.init.normal_(model.embedding.weight)

    def batch(n: int) -> tuple[Any, ...]:
        ids = torch.stack([torch.randint(1, size, (n,)) for size in (40, 30)], 1)
        lengths = torch.randint(0, 4, (n,))
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        seen = torch.randint(1, 30, (int(offsets[-1]),)), offsets
        return ids, torch.randn(n, 1), {"seen": seen, "tags": torch.randint(0, 5, (n, 2))}

    return model, batch


def as_on_cuda(compiled: inference.Inference) -> None:
    """Has networks of an inference on CPU run at once."""
    experts, gates, towers = compiled.parts
    for part in (*experts, *gates, towers):
        assert not part.at_once
        part.at_once = True


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("precision", "cuda", "fused"),
    [
        ("fp32", False, False),
        ("fp32", True, False),
        ("fp32", True, True),
        ("bf16", False, True),
        ("bf16", True, True),
    ],
)
@pytest.mark.parametrize("n", NUMBERS)
def test_is_predict_within_the_bound_of_its_type(
    name: str, precision: str, cuda: bool, fused: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(name, net_dropout=0.3)
    given = batch(n)
    compiled = model.compile_inference(precision)
    assert compiled.parts is not None
    if cuda:
        as_on_cuda(compiled)
        monkeypatch.setattr(batched, "fused", lambda dtype: fused)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        own = model.predict(*given)
    actual = compiled(*given)
    assert actual.dtype == torch.float32
    assert not actual.requires_grad
    assert torch.equal(actual, compiled(*given))
    ids, numeric, sequences = given
    exact = model.double().predict(ids, numeric.double(), sequences)
    if precision == "fp32":
        assert_within(actual, own, exact)
    else:  # activations are rounded to bfloat16 layer by layer
        assert actual.shape == exact.shape
        rounding = torch.finfo(torch.bfloat16).eps * exact.abs().clamp(min=1)
        assert ((actual - exact).abs() <= 4 * rounding).all()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_norm": True},
        {"hidden_activations": "gelu"},
        {"hidden_activations": "prelu", "net_dropout": 0.2},
        {"hidden_activations": "dice"},
    ],
)
@pytest.mark.parametrize("n", [0, 1, 40])
def test_other_networks_run_as_in_predict(options: dict[str, Any], n: int) -> None:
    model, batch = build("stem", **options)
    given = batch(n)
    expected = model.predict(*given)
    assert torch.equal(model.compile_inference()(*given), expected)
    assert model.training
    rounded = model.compile_inference("bf16")(*given)
    torch.testing.assert_close(rounded, expected, atol=0.05, rtol=0.05)


def test_threads_share_one_of_a_model_that_trains() -> None:
    """Batch norm and dropout must be in evaluation mode in every thread, and in no other after."""
    model, batch = build("stem", batch_norm=True, net_dropout=0.5)
    compiled = model.compile_inference()
    requests = [batch(n) for n in range(1, 40)]
    expected = [compiled(*each) for each in requests]
    with ThreadPoolExecutor(3) as threads:
        for actual, right in zip(
            threads.map(lambda each: compiled(*each), requests), expected, strict=True
        ):
            assert torch.equal(actual, right)
    assert model.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n", NUMBERS[1:])
def test_a_number_that_is_none_is_seen(precision: str, n: int) -> None:
    """No layer's ReLU hides NaN, whatever way its size makes it take."""
    model, batch = build("stem")
    ids, numeric, sequences = batch(n)
    numeric[0] = torch.nan
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(ids, numeric, sequences)
        predicted = model.predict(ids, numeric, sequences)
    for found in (logits, predicted, model.compile_inference(precision)(ids, numeric, sequences)):
        assert found[0].isnan().all()
        assert found[1:].isfinite().all()


@pytest.mark.parametrize("cuda", [False, True])
def test_layers_of_experts_and_a_model_in_float64(cuda: bool) -> None:
    model, batch = build("stem", num_layers=3)
    ids, numeric, _ = batch(50)
    model.double()
    for n in (1, 50):
        given = ids[:n], numeric[:n].double(), {"seen": batch(n)[2]["seen"], "tags": ids[:n] % 5}
        compiled = model.compile_inference()
        if cuda:
            as_on_cuda(compiled)
        actual = compiled(*given)
        torch.testing.assert_close(actual, model.predict(*given))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, inference.FEW, inference.FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_those_of_the_moment(precision: str, n: int, dtype: torch.dtype) -> None:
    """Of every network; the table is the model's own."""
    model, batch = build("stem")
    model.to(dtype)
    given = batch(n)
    compiled = model.compile_inference(precision)
    before = compiled(*given)
    for name, parameter in model.named_parameters():
        if not name.startswith("embedding."):
            parameter.detach().add_(0.5)
    assert torch.equal(compiled(*given), before)
    assert not torch.equal(model.compile_inference(precision)(*given), before)
    model.embedding.weight.detach().mul_(2)
    assert not torch.equal(compiled(*given), before)


@pytest.mark.parametrize("options", [{}, {"batch_norm": True}])
@pytest.mark.parametrize("n", [1, inference.FEW + 1])
def test_fp64_is_of_a_copy(options: dict[str, Any], n: int) -> None:
    """The caller's model stays in its type, with its values, and may change."""
    model, batch = build("stem", **options)
    kept = copy.deepcopy(model.state_dict())
    ids, numeric, sequences = batch(n)
    exact = copy.deepcopy(model).double().predict(ids, numeric.double(), sequences)
    compiled = model.compile_inference("fp64")
    assert compiled(ids, numeric, sequences).dtype == torch.float64
    torch.testing.assert_close(compiled(ids, numeric, sequences), exact, rtol=1e-12, atol=0)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == kept[name].dtype
        assert torch.equal(tensor, kept[name])
    for parameter in model.parameters():
        parameter.detach().add_(0.5)
    torch.testing.assert_close(compiled(ids, numeric, sequences), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"batch_norm": True}])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("n", [1, inference.FEW + 1])
@pytest.mark.parametrize("onednn", [True, False])
def test_autocast_around_it_has_no_part_in_it(
    options: dict[str, Any],
    precision: str,
    n: int,
    onednn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not onednn:  # whose products autocast does not know
        monkeypatch.setattr(batched, "onednn", lambda x: False)
    model, batch = build("stem", **options)
    given = batch(n)
    compiled = model.compile_inference(precision)
    expected = compiled(*given)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(compiled(*given), expected)


MODES = {
    "dropout": {"net_dropout": 0.5},
    "batch norm": {"batch_norm": True, "net_dropout": 0.2},
    "dice": {"hidden_activations": "dice", "net_dropout": 0.2},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_threads_share_a_model_in_training_mode(options: dict[str, Any]) -> None:
    """Every way to predict, at once: the answers of the model in evaluation mode, bit for bit, and
    its mode and running statistics as they were, while predicting too."""
    model, batch = build("stem", **options)
    for _ in range(3):
        model(*batch(20)).sum().backward()  # running statistics of their own
    model.experts[0].blocks[0].eval()  # a part of it stays as it is
    given = batch(12)
    single = copy.deepcopy(model).eval()
    expected = single.predict(*given)
    gates = single.gates(*given)[0]
    modes = [module.training for module in model.modules()]
    statistics = copy.deepcopy(dict(model.named_buffers()))
    changed = []

    def look(*_: Any) -> None:
        if [module.training for module in model.modules()] != modes:
            changed.append(True)

    for group in (*model.experts, *model.gate_mlps, model.towers):
        group.blocks[0].register_forward_hook(look)
    shared = [model.compile_inference() for _ in range(2)]

    def predictions(n: int) -> list[torch.Tensor]:
        ways = model.predict, shared[n % 2], model.compile_inference(), shared[(n + 1) % 2]
        return [predict(*given) for predict in ways]

    close = {"rtol": 1e-5, "atol": 1e-6} if shared[0].parts else {"rtol": 0, "atol": 0}
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(predictions, n) for n in range(12)]
        seen = [pool.submit(model.gates, *given) for _ in range(4)]
        for each in asked:
            first, *others = each.result()
            assert torch.equal(first, expected)
            for other in others:
                torch.testing.assert_close(other, expected, **close)
                assert torch.equal(other, others[0])
        for each in seen:
            assert torch.equal(each.result()[0], gates)
    assert not changed
    assert [module.training for module in model.modules()] == modes
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, statistics[name]), name


def test_a_compiled_part_predicts_in_evaluation_mode() -> None:
    model, batch = build("stem", net_dropout=0.5)
    given = batch(6)
    expected = model.predict(*given)
    model.towers.compile(backend="eager")
    model.gate_mlps[0] = torch.compile(model.gate_mlps[0], backend="eager")
    assert model.training
    assert torch.equal(model.predict(*given), expected)


def test_what_is_wrong_is_refused() -> None:
    model, batch = build("stem")
    ids, *rest = batch(3)
    with pytest.raises(
        DataError, match="precision: expected one of fp32, tf32, bf16, fp64, got 'fp16'"
    ):
        model.compile_inference("fp16")
    with pytest.raises(DataError, match="precision is 'tf32', which cpu cannot do"):
        model.compile_inference("tf32")
    ids[1, 1] = 30
    with pytest.raises(IndexError, match="field 'item': id 30 at row 1"):
        model.compile_inference()(ids, *rest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("graphs", [2, 0])
def test_requests_are_graphs_on_a_gpu(
    precision: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the CPU or the device, of sizes that come again, more of them than graphs are kept; or
    without graphs, as on references."""
    monkeypatch.setattr(inference, "GRAPHS", graphs)
    if not graphs:
        monkeypatch.setattr(ops, "capturable", lambda: False)
    model, batch = build("stem")
    exact, model = copy.deepcopy(model).double(), model.cuda()
    compiled = model.compile_inference(precision)
    bound = {"fp32": 1e-5, "bf16": 3e-2, "fp64": 1e-9}[precision]
    for n in (5, 17, 5, 300, 5, 17):
        ids, numeric, sequences = batch(n)
        given = ids, numeric, sequences
        if n == 17:
            seen = tuple(part.cuda() for part in sequences["seen"])
            given = ids.cuda(), numeric.cuda(), {"seen": seen, "tags": sequences["tags"].cuda()}
        actual = compiled(*given)
        assert actual.is_cuda
        expected = exact.predict(ids, numeric.double(), sequences)
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=bound, atol=bound)
    assert len(compiled.graphs) == graphs
    with torch.no_grad():
        model.embedding.weight.mul_(2)
        exact.embedding.weight.mul_(2)
    if precision != "fp64":  # a copy of the model
        expected = exact.predict(ids, numeric.double(), sequences)
        actual = compiled(ids, numeric, sequences)
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=bound, atol=bound)
