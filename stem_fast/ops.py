"""The custom ops on one page: schema, default, shape function, gradient and backend.

Calling an op takes three hops: the function here, PyTorch's dispatcher, the kernel. The default of
every op is :mod:`stem_fast.reference`; the C++ library overrides it on CPU, Triton on CUDA.

``STEM_FAST_BACKEND``, read at import, chooses: ``auto`` (the fastest on each device), or
``reference``, ``cpp``, ``triton``. A backend that is asked for and not there is an ImportError,
never a silent fallback. With ``TRITON_INTERPRET=1`` a chosen ``triton`` runs on CPU, slowly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_fast import reference

_library = torch.library.Library("stem_fast", "DEF")
_library.define("lookup(Tensor weight, Tensor ids, Tensor offsets, int spaces) -> Tensor")
_library.define("lookup_backward(Tensor grad, Tensor ids, Tensor offsets, int rows) -> Tensor")
_library.define("mixture(Tensor y, Tensor logits, int[] see, int[] learn) -> Tensor")
_library.define(
    "mixture_backward(Tensor grad, Tensor y, Tensor logits, int[] see, int[] learn)"
    " -> (Tensor, Tensor)"
)
for _name in ("lookup", "lookup_backward", "mixture", "mixture_backward"):
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def lookup(weight: Tensor, ids: Tensor, offsets: Tensor, spaces: int) -> Tensor:
    """Embeddings of categorical fields, all spaces in one pass; see :func:`reference.lookup`."""
    return torch.ops.stem_fast.lookup(weight, ids, offsets, spaces)


@torch.library.register_fake("stem_fast::lookup")
def _lookup_fake(weight: Tensor, ids: Tensor, offsets: Tensor, spaces: int) -> Tensor:
    batch, fields = ids.shape
    return weight.new_empty(spaces, batch, fields * (weight.shape[1] // spaces))


@torch.library.register_fake("stem_fast::lookup_backward")
def _lookup_backward_fake(grad: Tensor, ids: Tensor, offsets: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[0] * (grad.shape[2] // ids.shape[1]))


def _lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, offsets, _ = inputs
    ctx.save_for_backward(ids, offsets)
    ctx.rows = weight.shape[0]


def _lookup_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    ids, offsets = ctx.saved_tensors
    return torch.ops.stem_fast.lookup_backward(grad, ids, offsets, ctx.rows), None, None, None


torch.library.register_autograd("stem_fast::lookup", _lookup_grad, setup_context=_lookup_setup)


def mixture(y: Tensor, logits: Tensor, see: Sequence[int], learn: Sequence[int]) -> Tensor:
    """The AFTB gated mixture with its asymmetric backward; see :func:`reference.mixture`."""
    # Autocast can leave gates and experts in different types.
    return torch.ops.stem_fast.mixture(y, logits.to(y.dtype), list(see), list(learn))


@torch.library.register_fake("stem_fast::mixture")
def _mixture_fake(y: Tensor, logits: Tensor, see: list[int], learn: list[int]) -> Tensor:
    return y.new_empty(logits.shape[0], *y.shape[1:])


@torch.library.register_fake("stem_fast::mixture_backward")
def _mixture_backward_fake(
    grad: Tensor, y: Tensor, logits: Tensor, see: list[int], learn: list[int]
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(logits)


def _mixture_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, logits, ctx.see, ctx.learn = inputs
    ctx.save_for_backward(y, logits)


def _mixture_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dy, dlogits = torch.ops.stem_fast.mixture_backward(grad, *ctx.saved_tensors, ctx.see, ctx.learn)
    return dy, dlogits, None, None


torch.library.register_autograd("stem_fast::mixture", _mixture_grad, setup_context=_mixture_setup)


def _load_cpp() -> str:
    """Load the C++ library, which overrides the defaults on CPU. Returns its state."""
    libraries = sorted(Path(__file__).parent.glob("_cpp.*"))
    if not libraries:
        return "not built (no C++ compiler was found at installation)"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"built, but does not load: {error}"
    return "in use on cpu"


def _load_triton() -> str:
    """Register the Triton kernels on CUDA (interpreted: on CPU). Returns their state."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        from stem_fast.kernels import lookup, mixture
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "triton is not installed"
    device = "CPU" if interpreted else "CUDA"
    _library.impl("lookup", lookup.lookup, device)
    _library.impl("mixture", mixture.mixture, device)
    _library.impl("mixture_backward", mixture.mixture_backward, device)
    return f"in use on {device.lower()}"


def _load(choice: str) -> dict[str, str]:
    """Load what ``choice`` asks for. Returns every backend's state."""
    loaders = {"cpp": _load_cpp, "triton": _load_triton}
    if choice not in ("auto", "reference", *loaders):
        known = ", ".join(["auto", "reference", *loaders])
        raise ImportError(f"STEM_FAST_BACKEND={choice!r} is none of {known}")
    # The interpreter is for tests, which name triton.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    fastest = {"cpp"} if interpreted else {"cpp", "triton"}
    wanted = fastest if choice == "auto" else {choice}
    off = f"off (STEM_FAST_BACKEND={choice})"
    states = {name: load() if name in wanted else off for name, load in loaders.items()}
    if choice in states and not states[choice].startswith("in use"):
        raise ImportError(f"STEM_FAST_BACKEND={choice}: {states[choice]}")
    return {"reference": "the default of every op", **states}


_states = _load(os.environ.get("STEM_FAST_BACKEND", "auto"))


def backends() -> dict[str, str]:
    """State of every backend: "in use on cpu" or "in use on cuda", or why it is not."""
    return dict(_states)
