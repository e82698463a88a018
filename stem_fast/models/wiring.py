"""Who reads, sees and teaches whom: all that tells one model of the family from another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wiring:
    """All that tells one model of the family from another.

    Experts are numbered task-major with the shared ones last, gates likewise. A mask is an int
    whose bit e stands for expert e.
    """

    spaces: tuple[int, ...]  # input of the first layer -> embedding space it is
    reads: tuple[int, ...]  # expert -> input it reads
    gates: tuple[tuple[int, ...], ...]  # gate -> inputs whose sum it reads; () = nothing to weigh
    see: tuple[int, ...]  # mixture -> experts in it (forward); one each where there are no gates
    learn: tuple[int, ...]  # mixture -> experts it teaches (backward)
    towers: tuple[int, ...]  # task -> mixture its tower reads

    def check(self, tasks: int) -> None:
        """Raises ValueError where parts don't fit together, or a mixture is of nothing."""
        inputs, experts, mixtures = len(self.spaces), len(self.reads), len(self.see)
        every = (1 << experts) - 1
        for name, given, due in (
            ("towers", len(self.towers), tasks),
            ("learn", len(self.learn), mixtures),
            ("gates", len(self.gates) or mixtures, mixtures),
        ):
            if given != due:
                raise ValueError(f"wire: {name} are {given}, {due} are due")
        for name, places, end in (
            ("spaces", self.spaces, max(self.spaces, default=0) + 1),
            ("reads", self.reads, inputs),
            ("gates", [i for gate in self.gates for i in gate], inputs),
            ("towers", self.towers, mixtures),
        ):
            for place in places:
                if not 0 <= place < end:
                    raise ValueError(f"wire: {name} have {place}, there are 0 to {end - 1}")
        for name, masks, low in (("see", self.see, 1), ("learn", self.learn, 0)):
            for mask in masks:
                if not low <= mask <= every:
                    raise ValueError(f"wire: {name} has the mask {mask:#b}, of {experts} experts")
        for seen, taught in zip(self.see, self.learn, strict=True):
            if taught & ~seen:
                raise ValueError(f"wire: {taught:#b} is taught, of which {seen:#b} is seen")
        if not self.gates and any(mask & (mask - 1) for mask in self.see):
            raise ValueError("wire: without gates every mixture sees one expert")
        if not all(self.gates):
            raise ValueError("wire: a gate reads no input")


def expert_inputs(tasks: int, specific: int, shared: int) -> tuple[int, ...]:
    """Each task's experts read the task's input, shared ones the last."""
    return (*(t for t in range(tasks) for _ in range(specific)), *(tasks,) * shared)


def expert_masks(tasks: int, specific: int, shared: int) -> tuple[int, list[int], int]:
    """Masks of all experts, of each task's own, and of the shared ones."""
    own = [((1 << specific) - 1) << t * specific for t in range(tasks)]
    common = ((1 << shared) - 1) << tasks * specific
    return sum(own) | common, own, common
