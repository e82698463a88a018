"""Registering an op: its schema, its default and its shape function at once.

Calling an op takes three hops: the function on its page, PyTorch's dispatcher, the kernel. The
default of every op is the function of its name in :mod:`stem_fast.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from stem_fast import reference

library = torch.library.Library("stem_fast", "DEF")
SCHEMAS: dict[str, str] = {}  # of all ops, by name
_Function = TypeVar("_Function", bound=Callable[..., Any])


def define(schema: str, *, second_derivative: bool = True) -> Callable[[_Function], _Function]:
    """Defines the op of a schema, whose decorated function tells the shapes of its results.

    ``second_derivative=False`` is for ops that are a gradient: differentiating them is refused.
    """
    name, _, rest = schema.partition("(")

    def register(shapes: _Function) -> _Function:
        SCHEMAS[name] = f"({rest}"
        library.define(schema)
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"stem_fast::{name}", shapes)
        if not second_derivative:
            torch.library.register_autograd(f"stem_fast::{name}", _no_second_derivative)
        return shapes

    return register


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the ops of stem_fast have no second derivative (create_graph=True)")


def step_by_step() -> bool:
    """Whether torch looks into what is called, and wants its own steps there: ``torch.compile``,
    ``torch.export``, and the transforms of ``torch.func``."""
    return torch.compiler.is_compiling() or transformed()


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is on. None knows a gradient that ``torch.library``
    registers, so that references stand in for the ops that have one."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_gradient(name: str, why: str) -> None:
    """Makes differentiating an op an error that says why."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"torch.ops.stem_fast.{name} has no gradient: {why}")

    torch.library.register_autograd(f"stem_fast::{name}", refuse)
