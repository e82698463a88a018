"""Who reads, sees and teaches whom: all that distinguishes the models of the family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wiring:
    """All that distinguishes one model of the family from another.

    Experts are numbered task-major with the shared ones last, gates likewise. A mask is an int
    whose bit e stands for expert e.
    """

    spaces: tuple[int, ...]  # input of the first layer -> its embedding space
    reads: tuple[int, ...]  # expert -> input it reads
    gates: tuple[tuple[int, ...], ...]  # gate -> inputs whose sum it reads; () = no gates
    see: tuple[int, ...]  # mixture -> experts it sees (forward); one each without gates
    learn: tuple[int, ...]  # mixture -> experts it teaches (backward)
    towers: tuple[int, ...]  # task -> mixture its tower reads

    def check(self, tasks: int) -> None:
        """Raises ValueError if the parts do not fit together or a mixture sees no expert."""
        inputs, experts, mixtures = len(self.spaces), len(self.reads), len(self.see)
        every = (1 << experts) - 1
        for name, got, expected in (
            ("towers", len(self.towers), tasks),
            ("learn", len(self.learn), mixtures),
            ("gates", len(self.gates) or mixtures, mixtures),
        ):
            if got != expected:
                raise ValueError(f"wire: {name}: expected {expected} entries, got {got}")
        for name, places, end in (
            ("spaces", self.spaces, max(self.spaces, default=0) + 1),
            ("reads", self.reads, inputs),
            ("gates", [i for gate in self.gates for i in gate], inputs),
            ("towers", self.towers, mixtures),
        ):
            for place in places:
                if not 0 <= place < end:
                    raise ValueError(
                        f"wire: {name}: expected numbers from 0 to {end - 1}, got {place}"
                    )
        for name, masks, low in (("see", self.see, 1), ("learn", self.learn, 0)):
            for mask in masks:
                if not low <= mask <= every:
                    raise ValueError(
                        f"wire: {name}: expected masks from {low:#b} to {every:#b}, got {mask:#b}"
                    )
        for seen, taught in zip(self.see, self.learn, strict=True):
            if taught & ~seen:
                raise ValueError(
                    f"wire: learn: expected only experts in see ({seen:#b}), got {taught:#b}"
                )
        if not self.gates and any(mask & (mask - 1) for mask in self.see):
            raise ValueError("wire: see: expected one expert a mixture without gates, got several")
        if not all(self.gates):
            raise ValueError("wire: gates: expected at least one input a gate, got a gate of none")


def expert_inputs(tasks: int, specific: int, shared: int) -> tuple[int, ...]:
    """Each task's experts read the task's input, shared ones the last."""
    return (*(t for t in range(tasks) for _ in range(specific)), *(tasks,) * shared)


def expert_masks(tasks: int, specific: int, shared: int) -> tuple[int, list[int], int]:
    """Masks of all experts, of each task's own, and of the shared ones."""
    own = [((1 << specific) - 1) << t * specific for t in range(tasks)]
    common = ((1 << shared) - 1) << tasks * specific
    return sum(own) | common, own, common
