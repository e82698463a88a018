"""The other models of the family: each a wiring of the same network."""

from __future__ import annotations

from typing import Any

from stem_fast.models.network import STEMNet
from stem_fast.models.wiring import Wiring, expert_inputs, expert_masks


class PLE(STEMNet):
    """Progressive Layered Extraction (Tang et al., RecSys 2020): one embedding space; a task's
    gate sees its own and the shared experts; the shared gate sees the shared ones (as in the
    official code here; the paper's sees all)."""

    @staticmethod
    def wire(tasks: int, specific: int, shared: int) -> Wiring:
        if not shared:
            raise ValueError("num_shared_experts: expected at least 1 for PLE's shared gate, got 0")
        _, own, common = expert_masks(tasks, specific, shared)
        see = (*(mask | common for mask in own), common)
        return Wiring(
            spaces=(0,) * (tasks + 1),
            reads=expert_inputs(tasks, specific, shared),
            gates=tuple((g,) for g in range(tasks + 1)),
            see=see,
            learn=see,
            towers=tuple(range(tasks)),
        )


class MMoE(STEMNet):
    """Multi-gate Mixture of Experts (Ma et al., KDD 2018): all experts are shared."""

    def __init__(self, *args: Any, num_specific_experts: int = 0, **options: Any) -> None:
        super().__init__(*args, num_specific_experts=num_specific_experts, **options)

    @staticmethod
    def wire(tasks: int, specific: int, shared: int) -> Wiring:
        if specific:
            raise ValueError(f"num_specific_experts: expected 0 for MMoE, got {specific}")
        everything = (1 << shared) - 1
        return Wiring(
            spaces=(0,),
            reads=(0,) * shared,
            gates=((0,),) * tasks,
            see=(everything,) * tasks,
            learn=(everything,) * tasks,
            towers=tuple(range(tasks)),
        )


class SharedBottom(STEMNet):
    """One network for all tasks (Caruana, 1997) and a tower for each."""

    def __init__(
        self,
        *args: Any,
        num_shared_experts: int = 1,
        num_specific_experts: int = 0,
        **options: Any,
    ) -> None:
        experts = (num_shared_experts, num_specific_experts)
        if experts != (1, 0):
            raise ValueError(
                "SharedBottom: expected num_shared_experts 1 and num_specific_experts 0, got "
                f"{num_shared_experts} and {num_specific_experts}"
            )
        super().__init__(*args, num_shared_experts=1, num_specific_experts=0, **options)

    @staticmethod
    def wire(tasks: int, specific: int, shared: int) -> Wiring:
        return Wiring(spaces=(0,), reads=(0,), gates=(), see=(1,), learn=(1,), towers=(0,) * tasks)


class SingleTask(STEMNet):
    """A network of its own for every task, embeddings included: nothing is shared."""

    def __init__(self, *args: Any, num_shared_experts: int = 0, **options: Any) -> None:
        super().__init__(*args, num_shared_experts=num_shared_experts, **options)

    @staticmethod
    def wire(tasks: int, specific: int, shared: int) -> Wiring:
        if shared or not specific:
            raise ValueError(
                "SingleTask: expected num_shared_experts 0 and num_specific_experts of at least 1, "
                f"got {shared} and {specific}"
            )
        _, own, _ = expert_masks(tasks, specific, shared)
        return Wiring(
            spaces=tuple(range(tasks)),
            reads=expert_inputs(tasks, specific, shared),
            gates=tuple((t,) for t in range(tasks)) if specific > 1 else (),
            see=tuple(own),
            learn=tuple(own),
            towers=tuple(range(tasks)),
        )


MODELS: dict[str, type[STEMNet]] = {
    "stem": STEMNet,
    "single": SingleTask,
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
}
