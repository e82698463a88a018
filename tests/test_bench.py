"""The benchmark harness on tiny shapes: what it reports, and what it refuses to report."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import cases, contenders, memory, peers, peers_report, run, test_ops, turns
from bench.ops import lookup, mixture
from stem_fast.models.family import MODELS
from stem_fast.models.network import STEMNet

ROOT = Path(__file__).parents[1]
TINY = cases.SETTINGS["tiny"]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@pytest.mark.parametrize("op", run.OPS)
def test_every_contender_is_right_and_what_is_wrong_is_seen(op: str) -> None:
    case = run.OPS[op](TINY, "cpu")
    assert {cases.OURS, *case.ceilings} <= set(case.contenders)
    # Nobody else makes missed steps.
    peers = set(case.contenders) - {cases.OURS, *case.ceilings}
    assert peers or op == "catch_up_l2"
    for name, build in case.contenders.items():
        if name in case.ceilings or "compiled" in name:  # compiling takes too long here
            continue
        try:
            contender = build()
        except cases.NotInstalledError:
            continue
        result = contender.run(*contender.prepare())
        case.check(result)
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        floats = [t for t in flat(tensors) if t.is_floating_point()]
        floats[-1].detach()[0, -1] += 1e-3
        with pytest.raises(AssertionError):
            case.check(result)


def flat(tensors: list[Any]) -> list[torch.Tensor]:
    return [t for each in tensors for t in (each if isinstance(each, list) else [each])]


def test_bytes_are_those_of_the_shapes() -> None:
    s = TINY
    experts, logits, out = (
        4 * s.experts * s.batch * s.width,
        4 * s.tasks * s.batch * s.experts,
        4 * s.tasks * s.batch * s.width,
    )
    assert mixture.mixture_forward(s, "cpu").moved == experts + logits + out
    assert mixture.mixture_forward_backward(s, "cpu").moved == 3 * (experts + logits) + 2 * out
    x, z = (4 * n * s.batch * s.fields * s.dim for n in (s.spaces, s.tasks))
    ids = 8 * s.batch * s.fields
    assert lookup.lookup_forward(s, "cpu").moved == 2 * x + z + ids
    arena = 4 * s.rows * s.spaces * s.dim
    assert lookup.lookup_backward(s, "cpu").moved == x + z + ids + arena


def test_ids_are_in_their_fields_and_follow_zipf() -> None:
    ids = cases.zipf(1000, (50_000, 1), 1.1, torch.Generator().manual_seed(0))
    assert int(ids.min()) == 1
    assert int(ids.max()) <= 999
    counts = ids.flatten().bincount(minlength=1000).double()
    assert counts[1] / counts[2] == pytest.approx(2**1.1, rel=0.05)


class Clock:
    """In the place of pytest-benchmark's fixture: whether it was asked for a time."""

    timed = False

    def pedantic(self, *_: Any, **__: Any) -> None:
        self.timed = True


def test_a_wrong_result_is_never_timed() -> None:
    case = mixture.mixture_forward(TINY, "cpu")
    right = case.contenders[cases.OURS]().run
    case.contenders["wrong"] = lambda: cases.Contender(lambda: right() * 1.001)
    entry, clock = test_ops.Entry(case, {}, set()), Clock()
    for _ in range(2):  # nor in a later block
        with pytest.raises(AssertionError):
            test_ops.measure(clock, entry, "wrong")
        assert not clock.timed
    test_ops.measure(clock, entry, cases.OURS)
    assert clock.timed


@linux
def test_a_run_with_a_red_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the processes: our mixture is broken, its peers and the lookup are not."""
    Path(tmp_path, "broken.py").write_text(
        "from stem_fast import ops\n"
        "right = ops.mixture\n"
        "ops.mixture = lambda *arguments: right(*arguments) * 1.001\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p broken")
    file = tmp_path / "results" / "bench.json"
    contenders = ["--contenders", "official", "FBGEMM TBE"]
    arguments = ["--ops", "lookup_forward", "mixture_forward", "--settings", "tiny", *contenders]
    speed = ["--blocks", "2", "--seconds", "0.01", "--threads", "1"]
    assert run.main(["--json", str(file), *arguments, *speed]) == 1
    report = json.loads(file.read_text())
    expected = {"command", "date", "commit", "machine", "versions", "settings", "runs"}
    assert set(report) == expected
    assert str(tmp_path) not in report["command"]
    assert report["settings"] == {"tiny": TINY._asdict()}
    assert set(report["runs"]) == {"default allocator", "warm allocator"}
    for found in report["runs"].values():
        results = {(r["op"], r["contender"]): r for r in found["results"]}
        broken = results.pop(("mixture_forward", cases.OURS))
        assert broken["status"] == "wrong"
        assert "seconds" not in broken
        assert "ours_faster" not in results["mixture_forward", "official"]
        tbe = results.pop(("lookup_forward", "FBGEMM TBE"))
        assert tbe["status"] in ("ok", "not installed")
        for result in results.values():
            assert result["status"] == "ok", result
            assert result["rounds"] >= 6
            low, high = result["block_seconds"]
            assert low <= result["seconds"] <= high
            rate = result["bytes"] / result["seconds"] / 1e9
            assert result["gb_per_s"] == pytest.approx(rate)
        ours = results["lookup_forward", cases.OURS]
        ceiling = max(results["lookup_forward", name]["gb_per_s"] for name in cases.GATHERS)
        assert ours["of_ceiling"] == pytest.approx(ours["gb_per_s"] / ceiling)
    assert "| tiny | mixture_forward | stem_fast | wrong |  |  |" in run.markdown(run.rows(report))


def test_the_table_says_what_the_file_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"setting": "tiktok", "op": "lookup_forward"}
    ours = {"contender": "stem_fast", "status": "ok", "seconds": 0.002, "gb_per_s": 6.25}
    peer = {"contender": "official", "status": "ok", "seconds": 0.005, "gb_per_s": 2.5}
    results = [
        {**common, **ours, "of_ceiling": 0.625},
        {**common, **peer, "of_ceiling": 0.25, "ours_faster": 2.5},
        {**common, "contender": "gather", "status": "ok", "seconds": 0.001, "gb_per_s": 10.0},
        {**common, "contender": "TBE", "status": "not installed", "note": "not installed: fbgemm"},
    ]
    codes = {"activations": 2e6, "forward": 1e6, "backward": 3e6, "update": 4e6, "gradients": 1e6}
    report = {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "machine": {"processor": "CPU", "threads": 2},
        "versions": {"torch": "2.13.0"},
        "runs": {"default allocator": {"others_cores": 0.1, "results": results}},
        "memory": {"codes": dict.fromkeys(memory.CODES, codes)},
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(report))
    assert run.main(["--table", str(file)]) == 0
    assert capsys.readouterr().out.strip().splitlines() == [
        "CPU, 2 threads, torch 2.13.0, commit abc, 2026-01-02T03:04:05+00:00; "
        "other programs kept 0.1 cores busy",
        "",
        "| setting | op | contender | ms, default allocator | GB/s (of ceiling) | ours is faster |",
        "| --- | --- | --- | --- | --- | --- |",
        "| tiktok | lookup_forward | stem_fast | 2 | 6.2 (62%) |  |",
        "| tiktok | lookup_forward | official | 5 | 2.5 (25%) | 2.50x |",
        "| tiktok | lookup_forward | gather | 1 | 10.0 |  |",
        "| tiktok | lookup_forward | TBE | not installed: fbgemm |  |  |",
        "",
        "| peak MB of a step | official | stem_fast |",
        "| --- | --- | --- |",
        "| activations | 2 | 2 |",
        "| forward | 1 | 1 |",
        "| backward | 3 | 3 |",
        "| update | 4 | 4 |",
        "| gradients | 1 | 1 |",
    ]


@linux
def test_memory_of_a_step() -> None:
    command = [sys.executable, "-m", "bench.memory", "--code", "stem_fast", "--setting", "tiny"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(finished.stdout)
    assert found["adam_state"] == pytest.approx(2 * found["parameters"], rel=1e-3)
    # The first two expert layers' outputs are there at the end of the forward, in any case.
    experts = 4 * TINY.experts * TINY.batch * 2 * 512
    assert found["forward"] >= experts
    assert found["activations"] >= experts


# A python3 that answers as one on a machine with a GPU would; report() runs for real.
PYTHON_WITH_GPU = """#!/bin/bash
case "$*" in
  *get_device_name*) echo "NVIDIA Test 80GB" ;;
  *get_device_capability*) echo 9.0 ;;
  "- "*) exec {python} "$@" ;;
  *"-m pytest"*) [ "$STEM_FAST_BACKEND" = triton ] && sleep 1 ;; # ends after the other backend
  *bench.run*) echo '{{"runs": {{}}, "command": "inner"}}' >"${{@: -1}}" ;;
esac
"""


def test_gpu_check_goes_on_after_a_failure(tmp_path: Path) -> None:
    scripts = {
        "python-with-gpu": PYTHON_WITH_GPU.format(python=sys.executable),
        "compute-sanitizer": "#!/bin/bash\n[ $2 != racecheck ]\n",
    }
    for name, text in scripts.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": "python-with-gpu",
        "OUT": str(tmp_path / "out"),
    }
    finished = subprocess.run(
        ["bash", str(ROOT / "bench/gpu_check.sh")], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 1
    log, report = sorted((tmp_path / "out").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert log.name.startswith("gpu_nvidia_test_80gb_")
    assert log.suffix == ".log"
    found = json.loads(report.read_text())
    assert found["device"] == "NVIDIA Test 80GB"
    assert found["command"] == "bash bench/gpu_check.sh"
    assert found["runs"] == found["steps"] == {}
    assert not found["passed"]
    assert [(each["stage"], each["exit"]) for each in found["stages"]] == [
        ("build", 0),
        ("tests, triton", 0),
        ("tests, cuda", 1),
        ("tests, default", 1),
        ("memcheck, triton", 0),
        ("memcheck, cuda", 0),
        ("steps", 0),
        ("benchmarks", 0),
        ("racecheck, triton", 1),
        ("racecheck, cuda", 1),
    ]


def test_gpu_check_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    finished = subprocess.run(
        ["bash", str(ROOT / "bench/gpu_check.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    assert "no torch that sees a CUDA device" in finished.stderr


# Whole models


OFFICIAL = os.environ.get("STEM_FAST_OFFICIAL")  # a checkout of the official code, if there is one
PEERS = ("--settings", "tiny", "--blocks", "2", "--seconds", "0.02", "--threads", "1")


def in_process(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Turns without processes, which take seconds to start; what they were asked for."""
    asked = []

    def take(self: peers.Turns, environment: Any, **what: Any) -> dict[str, Any]:
        asked.append({**what, "environment": environment})
        self.wall += 1
        threads = torch.get_num_threads()
        with contextlib.redirect_stdout(sys.stderr):
            result = turns.run({**self.common, **what})
        torch.set_num_threads(threads)
        change(result)
        return {**json.loads(json.dumps(result)), "others_cores": 0.0}

    monkeypatch.setattr(peers.Turns, "take", take)
    monkeypatch.setattr(turns, "ceilings", lambda *_: {"rates": RATES})
    monkeypatch.setattr(turns, "REQUESTS", (1, 64))
    monkeypatch.setattr(peers, "REQUESTS", (1, 64))
    monkeypatch.setattr(peers_report, "REQUESTS", (1, 64))
    return asked


RATES = {"float32": 1e11, "bfloat16": 2e11, "copy": 1e10}


@pytest.mark.parametrize("network", ["stem", "ple", "mmoe"])
@pytest.mark.parametrize("layers", [1, 2])
def test_flops_are_those_of_the_model(network: str, layers: int) -> None:
    if network == "mmoe" and layers == 2:
        pytest.skip("MMoE has one layer")
    setting = TINY._replace(layers=layers, tasks=3)
    problem = contenders.synthetic(setting)
    sizes = dict(problem.network)
    if network == "mmoe":
        sizes |= {"num_shared_experts": setting.experts, "num_specific_experts": 0}
    # In float64, whose products are torch's: the counter does not know oneDNN's.
    model = MODELS[network](problem.fields, problem.tasks, **sizes).double()
    ids, labels = next(problem.draw(setting.batch))
    with FlopCounterMode(display=False) as forward:
        logits = model(ids)
    # Of our PLE every gate has a logit for every expert; the official code's have those they see.
    unseen = setting.tasks * (setting.experts - setting.specific - setting.shared)
    unseen += (layers - 1) * (setting.experts - setting.shared + unseen)
    more = 2 * setting.batch * peers.GATES[-1] * unseen if network == "ple" else 0
    assert forward.get_total_flops() - more == peers.cost(setting, setting.batch, network).flops
    with FlopCounterMode(display=False) as backward:
        model.loss(logits, labels).backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total - 3 * more == peers.cost(setting, setting.batch, network, train=True).flops


def test_bytes_of_a_model() -> None:
    problem = contenders.synthetic(TINY)
    model = STEMNet(problem.fields, problem.tasks, **problem.network)
    shared_gate = sum(t[TINY.tasks].numel() for t in model.gate_mlps.parameters())
    dense = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    ids, _ = next(problem.draw(200_000))
    # A batch that reads every row but padding.
    assert all(len(column.unique()) == 99 for column in ids.T)
    assert peers.distinct_rows(TINY, 200_000) == 8 * 99
    width = TINY.spaces * TINY.dim
    expected = 4 * (dense - shared_gate + 8 * 99 * width) + 200_000 * (8 * 8 + 4 * 2)
    assert peers.cost(TINY, 200_000).bytes == expected
    wide, low = (
        [peers.cost(TINY, 64, train=train, dtype=dtype).bytes for train in (False, True)]
        for dtype in ("float32", "bfloat16")
    )
    assert wide[1] > 10 * 4 * (dense - shared_gate)
    assert wide[0] - low[0] == 2 * (dense - shared_gate)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    unused = sum(p[TINY.tasks].numel() for p in model.gate_mlps.parameters() if p.dim() == 2)
    outputs = sum(bias.numel() for bias in biases) - unused
    assert wide[1] - low[1] == 4 * (dense - shared_gate + 64 * outputs)


def test_peers_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = in_process(monkeypatch)
    file = tmp_path / "results" / "peers.json"
    names = [name for name in contenders.CONTENDERS if name.startswith(cases.OURS)]
    names += ["official", "DeepCTR-Torch PLE"]
    arguments = ["--json", str(file), *PEERS, "--what", "step", "inference"]
    if OFFICIAL:
        arguments += ["--official", OFFICIAL]
    assert peers.main([*arguments, "--contenders", *names]) == 0
    table = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert str(tmp_path) not in report["command"]
    assert report["command"].startswith("python -m bench.peers --json FILE --settings tiny")
    checks = report["checks"]["tiny"]
    reference = "official" if OFFICIAL else "stem_fast in float64"
    assert checks[cases.OURS]["compared_with"] == reference
    assert checks["official"]["status"] == ("ok" if OFFICIAL else "not installed")
    optional = ("ok", "not installed")
    results = {(r["what"], r["contender"], r["allocator"]): r for r in report["results"]}
    for (what, name, _), result in results.items():
        allowed = ("ok",) if cases.OURS in name else optional
        assert result["status"] in allowed, result
        if result["status"] != "ok":
            assert result["note"]
            assert "seconds" not in result
            continue
        assert "turns" not in result
        for each in [result] if what == "step" else result["requests"].values():
            assert each["blocks"] == 2
            low, high = each["block_seconds"]
            assert low <= each["seconds"] <= high
            assert each["seconds"] <= each["p99_seconds"]
            rate = RATES["bfloat16" if "bf16" in name else "float32"]
            least = max(each["flops"] / rate, each["bytes"] / RATES["copy"])
            assert each["of_roofline"] == pytest.approx(least / each["seconds"])
    # Both contenders' turns in both orders, in their own allocators.
    steps = [a for a in asked if a["what"] == "step" and a["contender"] == cases.OURS]
    assert [bool(a["environment"]) for a in steps] == [False, True, True, False]
    absent = "| tiny | official | not installed: the official code (--official PATH) |"
    assert (absent in table) == (OFFICIAL is None)
    assert f"| tiny | 64 | {cases.OURS} | " in table

    assert peers.main(["--table", str(file)]) == 0
    assert capsys.readouterr().out == table


class Moment:
    """In the place of a CUDA event."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Moment) -> float:
        return 1000 * (end.at - self.at)


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a torch built for CUDA looks for its driver, whatever it is told",
)
def test_peers_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the GPU: models stay on the CPU, and the last contender's process dies early."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Moment)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 4_000_000)
    monkeypatch.setattr(run, "machine", lambda device, _: {"gpu": device})
    monkeypatch.setattr(run, "gpu_state", lambda: {"power_w": 700.0})
    monkeypatch.setattr(turns, "gpu_ceilings", lambda _: {"rates": {**RATES, "tf32": 1.5e11}})
    in_process(monkeypatch)

    def process(self: peers.Turns, _: Any, what: Any) -> tuple[list[str], str, float]:
        self.wall += 1
        options = {**self.common, **what, "device": "cpu"}
        with contextlib.redirect_stdout(sys.stderr):
            lines = [json.dumps({part: found}) for part, found in turns.on_gpu(options)]
        ended = what["contender"] == contenders.MICRO
        return (lines[:2], "its process ended with -6", 0.0) if ended else (lines, "", 0.0)

    monkeypatch.setattr(peers.Turns, "process", process)
    threads = torch.get_num_threads()
    names = [cases.OURS, "official", contenders.MICRO]
    arguments = ["--device", "cuda", "--json", str(tmp_path / "peers.json"), "--runs", "fp32"]
    arguments += ["bf16", "--settings", "tiny", "--seconds", "0.01", "--contenders", *names]
    if OFFICIAL:
        arguments += ["--official", OFFICIAL]
    assert peers.main(arguments) == 1
    torch.set_num_threads(threads)
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "peers.json").read_text())
    results = {(r["what"], r["contender"], r["precision"]): r for r in report["results"]}
    for precision, rate in (("fp32", RATES["float32"]), ("bf16", RATES["bfloat16"])):
        for name in names[: 2 if OFFICIAL else 1]:
            step = results["step", name, precision]
            assert step["status"] == "ok", step
            assert step["rounds"] >= turns.GPU_ROUNDS
            assert step["gpu_state"] == {"power_w": 700.0}
            least = max(step["flops"] / rate, step["bytes"] / RATES["copy"])
            assert step["of_roofline"] == pytest.approx(least / step["seconds"])
            requests = results["inference", name, precision]["requests"]
            assert list(requests) == ["1", "64"]
            assert requests["1"]["p99_seconds"] >= requests["1"]["seconds"]
            assert results["memory", name, precision]["peak"] == 4_000_000
            assert report["checks"]["tiny"][f"{name}, {precision}"]["status"] == "ok"
        assert results["memory", names[2], precision]["status"] == "ok"
        died = results["step", names[2], precision]
        assert (died["status"], died["note"]) == ("failed", "its process ended with -6")
    assert "| ms of a step, fp32 | of the roofline | ours is faster | ms of a step, bf16 |" in table
    assert "| peak MB of training, fp32 | MB of parameters | of ours |" in table
    assert "| tiny | 100 | 150 | 200 | 10 |" in table


@pytest.mark.skipif(not OFFICIAL, reason="needs the official code")
def test_the_official_code_in_bf16() -> None:
    problem = contenders.synthetic(TINY)
    compared, low = turns.check("official", problem, OFFICIAL, device="cpu", precision="bf16")
    assert compared == "official"
    exact = contenders.Official(problem, low.state(), OFFICIAL)
    ids, labels = next(problem.draw(TINY.batch))
    found, right = (each.outputs(each.batch(ids, labels)) for each in (low, exact))
    assert found["probabilities"].dtype == torch.float32
    apart = turns.distance(found["probabilities"], right["probabilities"])
    assert 1e-5 < apart < 0.02
    assert {p.dtype for p in low.module.parameters()} == {torch.float32}


def test_a_process_that_takes_too_long() -> None:
    options = peers.parse(["--json", "x", *PEERS, "--limit", "0.01"])
    found = peers.Turns(options).parts(["step"], contender=cases.OURS, setting="tiny")
    assert found["check"]["status"] == found["step"]["status"] == "failed"
    assert found["step"]["note"] == "its process took more than 0.01 s"


def test_a_peer_that_is_wrong_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = in_process(monkeypatch)
    right = STEMNet.forward

    def wrong(model: STEMNet, *inputs: Any, **options: Any) -> torch.Tensor:
        logits = right(model, *inputs, **options)
        return logits if logits.dtype == torch.float64 else logits * 1.001

    monkeypatch.setattr(STEMNet, "forward", wrong)
    file = tmp_path / "peers.json"
    arguments = ["--json", str(file), *PEERS, "--what", "step", "--contenders", cases.OURS]
    assert peers.main(arguments) == 1
    report = json.loads(file.read_text())
    assert report["checks"]["tiny"][cases.OURS]["status"] == "wrong"
    assert [a["what"] for a in asked if a.get("contender") == cases.OURS] == ["check"]
    assert all("seconds" not in result for result in report["results"])
    assert f"| tiny | {cases.OURS} | wrong |" in capsys.readouterr().out


@pytest.mark.parametrize("main", [run.main, peers.main])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ('{"command": "stem-fast compare a"}', "no results"),
    ],
)
def test_a_table_of_no_results(main: Any, content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match=f"--table {file}: .*{said}"):
        main(["--table", str(file)])


def test_no_checkout_is_said_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    with pytest.raises(SystemExit):
        peers.main(["--json", str(file), "--official", str(tmp_path)])
    assert "models/STEM.py is not there" in capsys.readouterr().err
    assert not file.exists()


def test_wrong_weights_after_a_step_are_seen() -> None:
    problem = contenders.synthetic(TINY)
    start = contenders.Ours(problem).state()
    ids, labels = next(problem.draw(TINY.batch))

    class Late(contenders.Ours):
        def train_step(self, batch: Any) -> torch.Tensor:
            loss = super().train_step(batch)
            with torch.no_grad():
                self.model.towers.blocks[0].weight[0, 0] += 1e-3  # one unit's
            return loss

    turns.agree(contenders.Ours(problem, start), contenders.Ours(problem, start), ids, labels)
    with pytest.raises(AssertionError, match=r"after a step tower\.0\.mlp\.0\.weight differs"):
        turns.agree(Late(problem, start), contenders.Ours(problem, start), ids, labels)


def test_low_precision_is_held_to_autocast() -> None:
    problem = contenders.synthetic(TINY)
    start = {
        key: tensor * 1000 if "embed" in key else tensor
        for key, tensor in contenders.Ours(problem).state().items()
    }
    ids, labels = next(problem.draw(TINY.batch))

    class Low(contenders.Ours):
        error = 0.0

        def outputs(self, batch: Any) -> dict[str, torch.Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                found = super().outputs(batch)
            return {key: tensor + self.error for key, tensor in found.items()}

        def train_step(self, batch: Any) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().train_step(batch)

    def build() -> contenders.Ours:
        return contenders.Ours(problem, start)

    with pytest.raises(AssertionError, match="differ by"):  # as float32 it would not do
        turns.agree(Low(problem, start), build(), ids, labels)
    autocast = turns.Autocast(problem, start)
    with mock.patch("stem_fast.nn.batched.networks", side_effect=AssertionError("ours")):
        autocast.outputs(autocast.batch(ids, labels))  # torch's own operations alone
    turns.agree(Low(problem, start), build(), ids, labels, autocast)
    off = Low(problem, start)
    off.error = 0.1
    with pytest.raises(AssertionError, match="differ by"):
        turns.agree(off, build(), ids, labels, turns.Autocast(problem, start))


@linux
def test_a_turn_is_a_process_with_its_own_allocator() -> None:
    options = peers.parse(["--json", "x", *PEERS])
    found = peers.Turns(options).take(
        memory.ALLOCATOR, what="memory", contender=cases.OURS, setting="tiny"
    )
    assert found["status"] == "ok", found
    # The table, its gradient's rows, and Adam's two numbers for each.
    table = 4 * TINY.rows * TINY.spaces * TINY.dim
    assert found["parameters"] > table
    assert 3 * found["parameters"] < found["peak"] < 64e6


def test_what_peers_refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        ([], "give --json to run or --table to print"),
        (["--json", "x", "--what", "epoch"], "--what epoch needs --train and --valid"),
        (["--json", "x", "--blocks", "0"], "--blocks is 0"),
        (["--json", "x", "--device", "cuda"], "--device cuda: torch sees no CUDA device"),
        (["--json", "x", "--device", "cuda", "--runs", "warm allocator"], "are fp32; tf32; bf16"),
        (["--json", "x", "--device", "cuda", "--contenders", "torch-rechub PLE"], "on cuda are"),
    ):
        with pytest.raises(SystemExit):
            peers.main(arguments)
        assert message in capsys.readouterr().err


def test_the_plot(tmp_path: Path) -> None:
    step = {"setting": "tiny", "what": "step", "allocator": "warm allocator", "status": "ok"}
    report = {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "machine": {"processor": "CPU", "threads": 2},
        "versions": {"torch": "2.13.0"},
        "others_cores": 0.1,
        "checks": {},
        "ceilings": {},
        "results": [
            {
                **step,
                "contender": name,
                "seconds": 0.1,
                "roofline_seconds": 0.01,
                "of_roofline": 0.1,
            }
            for name in (cases.OURS, "official")
        ],
    }
    failed = {**step, "contender": "torch-rechub PLE", "status": "failed", "note": "no memory"}
    report["results"].append(failed)
    stored = str(tmp_path / "peers.json")
    Path(stored).write_text(json.dumps(report))
    pictures = [tmp_path / name for name in ("peers.png", "peers.svg", "again.svg")]
    for picture in pictures:
        assert peers.main(["--table", stored, "--plot", str(picture)]) == 1  # one failed
    png, svg, again = (picture.read_bytes() for picture in pictures)
    assert png.startswith(b"\x89PNG")
    assert svg == again
    for text, found in ((b">official<", 1), (b"> 100<", 2), (b"torch-rechub", 0)):
        assert svg.count(text) == found, text
    report["results"] = [failed]
    Path(stored).write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="no steps and no requests"):
        peers.main(["--table", stored, "--plot", str(pictures[0])])
