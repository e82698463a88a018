"""The table of Adam's steps, from which a row catches up."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_fast.optim.step_log import StepLog, first_lines, step_options
from stem_fast.reference.adam import COLUMNS, LEFT


class AdamStepTable(StepLog):
    """Every Adam step since the last flush, as the table that ``adam_rows`` reads.

    ``steps`` is float64 [N, 29]. Line i describes step ``t = base + i`` in columns

    0  ``lr / (1 - beta1^t)``
    1  ``1 / sqrt(1 - beta2^t)``
    2  ``weight_decay``; decoupled: ``1 - lr * weight_decay``
    3  decoupled: the product of column 2 since ``base``; else 1. On CUDA line 0 holds 0 after a
       step for which the table had no line left
    4 .. 10  for rows whose last step is t: the sums over j of ``a_j * (x_j - x_1)^p``,
       p = 0 .. 6 (decoupled: with ``a_j`` divided by the product of decays up to step t + j)
    4 .. 28  with L2, instead: the series of :func:`stem_fast.reference.new_rows` for rows that no
       gradient has touched up to step t

    docs/exact-adam.md derives the sums and the series.
    """

    def __init__(
        self,
        step: int,
        device: torch.device,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        decoupled: bool = False,
    ) -> None:
        super().__init__(step, device)
        self.betas, self.eps, self.decoupled = betas, eps, decoupled
        # The factor by which decoupled decay has shrunk weights since base, and in the last step,
        # as far as the host knows.
        self.left, self.factor = 1.0, 1.0
        self.steps = torch.zeros(first_lines(device), COLUMNS, dtype=torch.float64, device=device)
        self.steps[0, LEFT] = 1
        self.l2 = False  # whether coupled weight decay was above 0 in one of them

    def advance(self, lr: float | Tensor, weight_decay: float | Tensor) -> None:
        """Adds a step, and its terms to the sums of the lines before it."""
        options = step_options(self.steps, lr, weight_decay)
        self.count()
        self.left *= self.factor
        self.l2 |= not self.decoupled and (isinstance(weight_decay, Tensor) or weight_decay != 0)
        if self.done >= len(self.steps):
            self.steps = torch.cat([self.steps, torch.zeros_like(self.steps)])
        torch.ops.stem_fast.adam_schedule(
            self.steps, self.clock, options, *self.betas, self.eps, self.decoupled, self.l2
        )
        if self.clock.is_cuda:  # a CUDA graph does not count its steps
            torch._assert_async(
                self.steps[0, LEFT], "its step table is full: flush the table more often"
            )

    def replayed(self) -> None:
        super().replayed()
        self.left *= self.factor

    @property
    def needs_flush(self) -> bool:  # type: ignore[override]
        """Whether another step would bring the product in column 3 so near 0 that the quotient of
        two lines is lost, or weights shrink so much faster than momentum that the sums blow up."""
        near = abs(self.left * self.factor) < 1e-150
        return self.done > 0 and (near or abs(self.factor) < self.betas[0] ** 2)

    def set_next_decay(self, lr: float | Tensor, weight_decay: float | Tensor) -> None:
        """Tells ``needs_flush`` the options of the next step."""
        self.factor = decay_factor(lr, weight_decay) if self.decoupled else 1.0

    def caught_up(self) -> None:
        super().caught_up()
        self.left = 1.0
        self.steps[0].zero_()
        self.steps[0, LEFT].fill_(1)
        # A CUDA graph replays the kernel that it captured, with L2 or without.
        self.l2 = self.l2 and self.clock.is_cuda


def decay_factor(lr: float | Tensor, weight_decay: float | Tensor) -> float:
    """The factor ``1 - lr * weight_decay`` of a step of decoupled decay; 1 if either is on a GPU,
    where the host does not know its value.

    Raises:
        ValueError: the factor is 0, up to 1e-6.
    """
    if any(isinstance(option, Tensor) and option.is_cuda for option in (lr, weight_decay)):
        return 1.0
    decay = float(lr) * float(weight_decay)
    if abs(1 - decay) < 1e-6:
        raise ValueError(
            f"lr * weight_decay: expected other than 1 with decoupled decay, got {decay:g}, which "
            "would set every weight to 0: lower one of them"
        )
    return 1 - decay
