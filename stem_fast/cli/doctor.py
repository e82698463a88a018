"""``stem-fast doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from stem_fast import ops
from stem_fast.cli import report


def doctor() -> None:
    """Versions, devices, and which backends are available (and why not)."""
    report.print_pairs(machine())


def machine() -> dict[str, str]:
    rows = {"python": platform.python_version()}
    for package in ("stem_fast", "torch", "triton", "numpy", "pyarrow"):
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows["torch"] = torch.__version__  # which says for what CUDA it was built
    capability = torch.backends.cpu.get_cpu_capability()
    rows["cpu"] = f"{capability}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    without = "no device found" if torch.version.cuda else "torch is built without CUDA"
    rows["cuda"] = ", ".join(names) or without
    for backend, state in ops.backends().items():
        rows[f"backend {backend}"] = state
    return rows
