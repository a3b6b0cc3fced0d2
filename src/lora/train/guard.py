"""A step whose loss or gradient is not finite is not taken, and too many in a row end the run."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .steps import Step

_SHOWN = 8  # rows that a message names


@dataclass
class Guard:
    """Looks at each step before the optimizer does.

    most: bad steps in a row that end the run. say: tells the user. in_a_row, skipped: bad steps since the last good
    one, and in all.
    """

    most: int
    say: Callable[[str], None] = lambda text: None
    in_a_row: int = 0
    skipped: int = 0

    def passes(self, step: Step, rows: list[int]) -> bool:
        """Whether a step may be taken; what is wrong with it is said, with the rows that it had.

        Raises:
            NonFiniteError: it is the last that may be bad.
        """
        numbers = {"loss": step.loss, "gradient's norm": step.grad_norm}
        wrong = next((f"the {name} is {value}" for name, value in numbers.items() if not math.isfinite(value)), None)
        if wrong is None:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.skipped += 1
        shown = ", ".join(map(str, rows[:_SHOWN])) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        where = f"step {step.number}: {wrong} (rows {shown} of the encoded data)"
        if self.in_a_row >= self.most:
            times = f", the {self.in_a_row}th time in a row" if self.in_a_row > 1 else ""
            raise NonFiniteError(f"{where}{times}, so the run was stopped before it", step.number)
        self.say(f"{where}: these rows are left out, and the step is taken with the next ones")
        return False


def gradient_norm(trained: Iterable[Tensor], most: float) -> tuple[Tensor, Callable[[], None]]:
    """The norm of the gradients of what trains, and what clips them to `most` by it (nothing for 0)."""
    parameters = [p for p in trained if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def clip() -> None:
        if most > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)

    return norm, clip
