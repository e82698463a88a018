"""Peak memory of one training step, ours and the official code's, on the CPU.

    python -m bench.run --json FILE --official PATH

Both build the network of the TikTok setting, each in its own process, and take the same steps:
forward with the loss, backward, clip, Adam. What counts is resident memory, as the kernel sees it,
because ours keeps large buffers outside of torch's allocator: the peak of each phase of a later
step, over what the process held before its first step and over Adam's state. malloc is told to give
what is freed back to the system: what it keeps depends on chance, a tenth of the peak up or down.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import cases
from bench import official as adapter
from stem_fast.models.network import STEMNet

CODES = ("official", "stem_fast")
# Buffers of more than 64 KiB are mapped one by one.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STEPS = 4  # the last is measured: by then buffers are kept, and Adam has its state
REGULARIZER, NORM = 1e-6, 10.0  # of the embeddings; of the gradient
NETWORK: dict[str, Any] = {"embedding_dim": 16, "num_shared_experts": 8, "num_specific_experts": 1}
EXPERT_UNITS = [512, 512, 512]


class Run(NamedTuple):
    """A model to be trained: its loss on a batch, what is left to do after the backward pass, its
    parameters and optimizer."""

    loss: Callable[[], Tensor]
    regularize: Callable[[], object]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    kept: int  # bytes of gradients that stay allocated from step to step


def build(code: str, official: str | None, setting: cases.Setting, units: list[int]) -> Run:
    draw = torch.Generator().manual_seed(3)
    vocab = setting.rows // setting.fields
    fields = {f"f{f}": vocab for f in range(setting.fields)}
    tasks = [f"t{t}" for t in range(setting.tasks)]
    ids = cases.zipf(vocab, (setting.batch, setting.fields), 1.1, draw)
    labels = torch.randint(0, 2, (setting.batch, setting.tasks), generator=draw).float()
    if code == "official":
        assert official is not None
        model = adapter.build(
            adapter.load(official),
            fields,
            tasks,
            expert_hidden_units=units,
            embedding_regularizer=REGULARIZER,
            learning_rate=1e-3,
            **NETWORK,
        )
        batch = adapter.inputs(model, dict(zip(fields, ids.T, strict=True)), labels)
        loss = functools.partial(adapter.loss, model, batch)  # L2 is in it
        return Run(loss, lambda: None, list(model.parameters()), model.optimizer, 0)
    ours = STEMNet(fields, tasks, expert_hidden_units=units, **NETWORK)
    table = ours.embedding.weight

    def regularize() -> None:  # as stem_fast.training.step.train_step does
        assert table.grad is not None
        table.grad.add_(table.detach(), alpha=REGULARIZER)

    return Run(
        lambda: ours.loss(ours(ids), labels),
        regularize,
        list(ours.parameters()),
        torch.optim.Adam(ours.parameters(), lr=1e-3),
        table.numel() * table.element_size(),
    )


def step(run: Run, phase: Callable[[str], None]) -> None:
    """One step of either code; calls ``phase`` at the start of each phase and at the end."""
    run.optimizer.zero_grad()
    phase("forward")
    loss = run.loss()
    phase("backward")
    loss.backward()
    run.regularize()
    phase("update")
    nn.utils.clip_grad_norm_(run.parameters, NORM)
    run.optimizer.step()
    phase("")


def status(field: str) -> int:
    """A size in bytes from /proc: VmRSS is resident now, VmHWM at its highest."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    """VmHWM is VmRSS again."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(code: str, official: str | None, setting: cases.Setting) -> dict[str, Any]:
    """Bytes of this process; run it in a fresh one."""
    # Libraries, threads and code are in memory before the count starts.
    tiny = build(code, official, cases.SETTINGS["tiny"], [8])
    step(tiny, lambda _: None)
    run = build(code, official, setting, EXPERT_UNITS)
    before = status("VmRSS")
    for _ in range(STEPS - 1):
        step(run, lambda _: None)
    state = sum(
        t.numel() * t.element_size()
        for each in run.optimizer.state.values()
        for t in each.values()
        if isinstance(t, Tensor)
    )
    peaks: dict[str, int] = {}
    phases: list[str] = []

    def phase(name: str) -> None:
        if phases:
            peaks[phases[-1]] = status("VmHWM") - before - state
        phases.append(name)
        reset_peak()

    step(run, phase)
    gradients = sum(
        p.grad.numel() * p.grad.element_size() for p in run.parameters if p.grad is not None
    )
    return {
        "parameters": sum(p.numel() * p.element_size() for p in run.parameters),
        "adam_state": state,
        "gradients": gradients,
        **peaks,
        # Gradients of parameters are there at the end of the backward in both; ours keeps the
        # memory of the table's in the forward too.
        "activations": max(peaks["forward"] - run.kept, peaks["backward"] - gradients),
    }


def compare(official: str, threads: int) -> dict[str, Any]:
    """Both codes, each in a process of its own."""
    found: dict[str, Any] = {}
    for code in CODES:
        command = [sys.executable, "-m", "bench.memory", "--code", code, "--threads", str(threads)]
        result = subprocess.run(
            [*command, "--official", str(Path(official).resolve())],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **ALLOCATOR},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[code] = json.loads(result.stdout.splitlines()[-1])
    theirs, ours = (found[code]["activations"] for code in CODES)
    return {
        "setting": "tiktok",
        "unit": "bytes",
        "environment": ALLOCATOR,
        "official_commit": adapter.commit(Path(official)),
        "codes": found,
        "ours_over_official": ours / theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--code", required=True, choices=CODES)
    parser.add_argument("--official", help="a checkout of the official repository")
    parser.add_argument("--setting", choices=cases.SETTINGS, default="tiktok")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.code == "official" and not options.official:
        parser.error("--code official needs --official PATH")
    torch.set_num_threads(options.threads)
    setting = cases.SETTINGS[options.setting]
    print(json.dumps(measure(options.code, options.official, setting)))


if __name__ == "__main__":
    main()
