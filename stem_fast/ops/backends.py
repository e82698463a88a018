"""The choice of a backend, and the loading of its library.

``STEM_FAST_BACKEND``, read at import, chooses: ``auto`` (the fastest on each device), or
``reference``, ``cpp``, ``triton``, ``cuda`` (C++). A backend that is asked for and not there is an
ImportError, never a silent fallback. With ``TRITON_INTERPRET=1`` a chosen ``triton`` runs on CPU,
slowly.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from stem_fast.ops.lookup import lookup_backward
from stem_fast.ops.registry import library

# What the CUDA C++ library has, and of that what an H100 has shown to be faster than Triton's, the
# forward mixture as fast (bench/results/gpu_nvidia_h100_80gb_hbm3_2026-11-27.json).
CUDA = (
    *("lookup", "row_gradients", "check_ids", "mixture", "mixture_backward"),
    *("adam_rows", "sgd_rows", "adagrad_rows"),
)
FASTER_IN_CUDA = ("lookup", "mixture", "mixture_backward")


class BackendError(ImportError):
    """The backend that STEM_FAST_BACKEND asks for does not exist or cannot be loaded."""


def _load_cpp() -> str:
    """Load the C++ library, which overrides the defaults on CPU. Returns its state."""
    return _load_library("_cpp", "no C++ compiler was found at installation") or "in use on cpu"


def _load_library(name: str, missing: str) -> str:
    """Load a compiled library of this package. Returns why it is not loaded, or nothing."""
    files = (Path(__file__).parents[1] / f"{name}.{ending}" for ending in ("so", "pyd"))
    libraries = [file for file in files if file.exists()]
    if not libraries:
        return f"not built ({missing})"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"built, but does not load: {error}"
    return ""


def _load_triton(without: Sequence[str] = ()) -> str:
    """Register the Triton kernels of all ops but some on CUDA (interpreted: on CPU). Returns their
    state."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        from stem_fast.kernels import (
            adagrad,
            adam,
            check_ids,
            linear,
            lookup,
            loss,
            mixture,
            row_plan,
            sgd,
        )
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "triton is not installed"
    device = "CPU" if interpreted else "CUDA"
    with warnings.catch_warnings():
        # Some ops are C++'s too, and this is the choice between the two.
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for module, names in (
            (lookup, ("lookup",)),
            (row_plan, ("row_plan", "row_gradients")),
            (check_ids, ("check_ids",)),
            (mixture, ("mixture", "mixture_backward")),
            (linear, ("bias_relu", "relu_backward", "expert_mixture_inference")),
            (linear, ("grouped_linear", "grouped_linear_backward")),
            (loss, ("task_losses", "task_losses_backward")),
            (adam, ("adam_rows", "adam_schedule")),
            (sgd, ("sgd_rows",)),
            (adagrad, ("adagrad_rows",)),
        ):
            for name in names:
                if name not in without:
                    library.impl(name, getattr(module, name), device)
    return f"in use on {device.lower()}"


def _load_cuda() -> str:
    """Load the CUDA C++ library, which overrides the defaults on CUDA. Returns its state."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _load_library("_cuda", "no nvcc was found at installation") or "in use on cuda"


def _load(choice: str) -> dict[str, str]:
    """Load what ``choice`` asks for. Returns every backend's state."""
    names = ("cpp", "cuda", "triton")
    if choice not in ("auto", "reference", *names):
        known = ", ".join(["auto", "reference", *names])
        raise BackendError(f"STEM_FAST_BACKEND={choice!r} is none of {known}")
    # The interpreter is for tests, which name triton.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    fastest = {"cpp"} if interpreted else set(names)
    wanted = fastest if choice == "auto" else {choice}
    off = f"off (STEM_FAST_BACKEND={choice}; set it to {{}} to have it, or to know why not)"
    states = {name: off.format(name) for name in names}
    if "cpp" in wanted:
        states["cpp"] = _load_cpp()
    if "cuda" in wanted:
        states["cuda"] = _load_cuda()
    cuda = states["cuda"] == "in use on cuda"
    if "triton" in wanted or (cuda and not interpreted):
        # C++ has not every op: Triton has the others.
        kept = FASTER_IN_CUDA if choice == "auto" else CUDA
        states["triton"] = _load_triton(kept if cuda else ())
    if cuda or states["triton"].startswith("in use"):
        device = "CPU" if states["triton"] == "in use on cpu" else "CUDA"
        library.impl("lookup_backward", lookup_backward, device)
    if choice in states and not states[choice].startswith("in use"):
        raise BackendError(f"STEM_FAST_BACKEND={choice}: {states[choice]}")
    return {"reference": "in use where no other is", **states}


_states = _load(os.environ.get("STEM_FAST_BACKEND", "auto"))


def backends() -> dict[str, str]:
    """State of every backend: "in use on cpu" or "in use on cuda", or why it is not."""
    return dict(_states)


def capturable() -> bool:
    """Whether a CUDA graph can hold the ops: references wait for the device, which it cannot."""
    return _states["triton"] == "in use on cuda"
