"""How an implicit meta-gradient is found, as a plain description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymeta.spec.optimizers import Adam, LearnableLR, Optimizer, check_number
from pymeta.spec.schedule import check_count


@dataclass(frozen=True)
class Implicit:
    """Implicit gradients (Rajeswaran, Finn, Kakade, Levine 2019, arXiv:1909.04630), for `MAML`.

    The inner loop minimises L(phi; support) + strength/2 |phi - start|^2, the paper's lambda being
    `strength` (and `anchor` in this library). At its minimum the meta-gradient does not depend on
    how it was reached: with v the gradient of what flows into phi, it is the solution x of

        (I + H / strength) x = v,    H the Hessian of L at phi,

    found for each task by conjugate gradients on Hessian-vector products; no inner step is gone
    back through, or kept. It is exact so far as the inner loop and the solver have converged.

    Args:
        strength: lambda, above 0. Larger than -1 times the smallest eigenvalue of H, or the
            solution means nothing; a call's `anchor=` [T] has each task's own.
        cg_steps: most steps of the solver; each costs one Hessian-vector product of all tasks.
        tolerance: a task is done when its residual is at most this times |v|.

    Raises:
        TypeError, ValueError: a value is out of its range.

    Example:
        >>> from pymeta import Implicit
        >>> Implicit(strength=2.0, cg_steps=5)
        Implicit(strength=2.0, cg_steps=5, tolerance=1e-06)
    """

    strength: float
    cg_steps: int = 5
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        """Check the fields."""
        strength = check_number("Implicit.strength", self.strength, above=True)
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "cg_steps", check_count("Implicit.cg_steps", self.cg_steps, 1))
        tolerance = check_number("Implicit.tolerance", self.tolerance)
        object.__setattr__(self, "tolerance", tolerance)


def check_implicit(value: Any, optimizer: Optimizer, **others: Any) -> Implicit | None:
    """`value`, where it goes with the learner's other settings, or None.

    Raises:
        TypeError: it is no `Implicit`.
        ValueError: something else is set that it has no meaning for.
    """
    if value is None:
        return None
    if not isinstance(value, Implicit):
        raise TypeError(f"implicit: expected a pymeta.Implicit, got {type(value).__name__}")
    why = {
        "first_order": "it is of second order, and keeps no steps",
        "anchor": "the pull to the start is implicit's own strength",
        "anchor_rows": "the pull to the start is implicit's own strength",
        "task_clip": "it knows no task's share of the gradients that tasks share",
    }
    for name, given in others.items():
        if given:
            raise ValueError(f"{name}: expected none with implicit: {why[name]}; got {given}")
    if isinstance(optimizer.lr, LearnableLR):
        raise ValueError(
            "lr: expected a number with implicit: the minimum does not depend on the step size, so "
            "there is nothing to learn"
        )
    if optimizer.weight_decay:
        which = "decoupled " if isinstance(optimizer, Adam) and optimizer.decoupled else ""
        raise ValueError(
            f"optimizer: expected no {which}weight_decay with implicit, which moves the minimum, "
            f"got {optimizer.weight_decay}"
        )
    return value
