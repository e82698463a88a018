"""Iteration over modules that does not flush tables, and copies in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def parts_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all its submodules, each with the prefix of its parameter names. Unlike
    ``named_modules`` this does not flush tables, so their rows may lack steps."""
    yield prefix, module
    for name, child in module.named_children():
        yield from parts_of(child, f"{prefix}{name}.")


def parameters_of(module: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter and its name, by :func:`parts_of`."""
    names: dict[nn.Parameter, str] = {}
    for prefix, part in parts_of(module):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, prefix + name)
    return names


def put_buffer(module: nn.Module, name: str, values: list[int] | Tensor, like: Tensor) -> None:
    """Gives a buffer of int64 its values, on the device of ``like``; in the memory that it has
    there, which CUDA graphs read."""
    tensor = torch.tensor(values, device="cpu") if isinstance(values, list) else values
    buffer = module._buffers[name]
    if buffer is None or buffer.device != like.device:
        setattr(module, name, tensor.to(like.device, torch.int64))
    else:
        buffer.copy_(tensor)


def in_evaluation(module: nn.Module) -> nn.Module:
    """The module in evaluation mode: a shallow copy with the same parameters, buffers and hooks.

    The mode of the module itself stays as it is, for other threads may be using it.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper calls the original
    copied = module.__class__.__new__(module.__class__)
    parts = module._modules.items()
    children = {name: None if part is None else in_evaluation(part) for name, part in parts}
    changed = {"training": False, "_modules": children, "_compiled_call_impl": None}
    copied.__dict__.update(module.__dict__ | changed)
    return copied
