"""Meta-training with task-level differential privacy (DP-SGD of Abadi et al. 2016, for tasks).

A step draws each of N tasks with probability q, whatever the others are (a Poisson sample), bounds
each one's share of the gradient to norm C, adds the shares, adds Gaussian noise of standard
deviation z C to the sum, and divides by q N, the number of tasks that is expected: a division by
the number that was drawn would tell it. An empty sample makes a step of noise alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pymeta.privacy.accounting import check_integer, check_number, epsilon
from pymeta.privacy.noise import Randomness
from pymeta.privacy.shares import ClippedSum, count_tasks
from pymeta.spec.show import counted

_OF_A_TASK = (
    "support_sizes",
    "query_sizes",
    "support_weights",
    "query_weights",
    "support_offset",
    "query_offset",
    "anchor",
    "task_ids",
)


class PrivateTraining:
    """Makes private steps of a learner's training, and accounts for them.

    What is protected is a task as a whole, all of its rows (one customer's, say): the trained
    parameters are hardly likelier with it than without it. What is not protected: anything else
    that is looked at, such as training losses (which is why `step` returns none), validation
    scores, and models adapted to a task's own rows, which see them without noise.

    Args:
        learner: a `pymeta.MAML` or `pymeta.Reptile`, whose `task_clip` becomes `clip`, or a
            learner of `pymeta.learners`; heads on an encoder are differentiated sixteen tasks at a
            time, others one after another.
        optimizer: torch's, of the learner's parameters and no others.
        tasks: how many tasks there are to train on. It counts as public.
        sampling_rate: the probability with which a step draws each task.
        clip: the largest norm of one task's share of the gradient.
        noise_multiplier: the noise's standard deviation over `clip`; 0 for none, which is not
            private. `noise_multiplier_for` finds it for an epsilon.
        seed: None for the operating system's cryptographic generator; an integer for numbers that
            come out the same each time, which are not secure: for tests and experiments.

    Attributes:
        steps: how many steps were made.

    Raises:
        TypeError, ValueError: an argument is not as described, or batch normalisation in a
            learner's encoder lets tasks see each other.

    Example:
        >>> import torch, pymeta
        >>> from pymeta.privacy import PrivateTraining
        >>> _ = torch.manual_seed(0)
        >>> maml = pymeta.MAML(torch.nn.Linear(3, 1), loss="mse", lr=0.1, steps=2)
        >>> xs, ys = torch.randn(50, 8, 3), torch.randn(50, 8, 1)
        >>> optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
        >>> private = PrivateTraining(maml, optimizer, tasks=50, sampling_rate=0.2, clip=1.0,
        ...                           noise_multiplier=1.0, seed=0)
        >>> for some in private.samples(5):
        ...     private.step(xs[some], ys[some], xs[some], ys[some])
        >>> private.steps
        5
    """

    def __init__(
        self,
        learner: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        tasks: int,
        sampling_rate: float,
        clip: float,
        noise_multiplier: float,
        seed: int | None = None,
    ) -> None:
        """Check the arguments."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected torch's, got {type(optimizer).__name__}")
        tasks = check_integer("tasks", tasks, 1)
        infinity = float("inf")
        self._rate = check_number("sampling_rate", sampling_rate, 0, 1, open_at="least")
        self._clip = check_number("clip", clip, 0, infinity, open_at="least")
        self._noise = check_number("noise_multiplier", noise_multiplier, 0, infinity)
        self._tasks, self._optimizer, self.steps = tasks, optimizer, 0
        self._random = Randomness(seed)
        self._parameters = _learned(learner, optimizer)
        self._sum = ClippedSum(learner, self._clip, self._parameters)
        self._drawn: np.ndarray | None = None

    def sample(self) -> np.ndarray:
        """The numbers of the tasks of the next step, int64, ascending; maybe none.

        Raises:
            RuntimeError: the last sample was not used by a step: to choose among samples is not
                private.
        """
        if self._drawn is not None:
            raise RuntimeError(
                "sample: the tasks drawn before have to be used first, by step(): to choose among "
                "samples is not private"
            )
        self._drawn = np.flatnonzero(self._random.uniform(self._tasks) < self._rate)
        return self._drawn

    def samples(self, steps: int) -> Iterator[np.ndarray]:
        """`sample` for each of so many steps."""
        return (self.sample() for _ in range(steps))

    def step(self, *data: Any, **options: Any) -> None:
        """One private step on the tasks that `sample` drew.

        Nothing is returned, because a loss of training tasks is not private.

        Args:
            data: the learner's arguments, for the tasks drawn: xs, ys, xq, yq (for Reptile xs, ys).
                May be left out where none was drawn.
            options: sizes, weights, offsets, strengths and numbers of the tasks, as the learner
                takes them.

        Raises:
            RuntimeError: `sample` was not called, or the learner's `task_clip` was changed.
            TypeError: an option is not of each task.
            ValueError: not as many tasks as were drawn; and as the learner.
        """
        if self._drawn is None:
            raise RuntimeError("step: expected tasks that sample() drew; call it before each step")
        wrong = sorted(options.keys() - set(_OF_A_TASK))
        if wrong:
            raise TypeError(f"{wrong[0]}: expected one of {', '.join(_OF_A_TASK)}")
        drawn, given = len(self._drawn), count_tasks(data[0]) if data else 0
        if given != drawn:
            raise ValueError(
                f"xs: expected the {counted(drawn, 'task')} that were drawn, got {given}"
            )
        self._take(self._sum(data, options) if drawn else self._sum.nothing())

    def _take(self, shares: list[Tensor]) -> None:
        """Noise, division, and the optimiser's step."""
        expected = self._rate * self._tasks
        for parameter, share in zip(self._parameters, shares, strict=True):
            noise = self._random.normal(share.numel()) * (self._noise * self._clip)
            noisy = share + torch.from_numpy(noise).reshape(share.shape).to(share.device)
            parameter.grad = (noisy / expected).to(parameter.dtype)
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        self._drawn = None
        self.steps += 1

    def epsilon(self, delta: float, *, accountant: str = "pld") -> float:
        """The epsilon of all steps so far.

        Args:
            delta: the probability with which the bound may fail; well below 1 / tasks.
            accountant: "pld" (tighter) or "rdp" (quicker).

        Returns:
            Epsilon; infinity without noise.

        Raises:
            ImportError: dp-accounting is not installed.
            TypeError, ValueError: an argument is not as described.
        """
        return epsilon(
            delta=delta,
            noise_multiplier=self._noise,
            sampling_rate=self._rate,
            steps=self.steps,
            accountant=accountant,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed goes on from, besides learner and optimiser."""
        return {"steps": self.steps, "random": self._random.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; ValueError where it is of another kind of random numbers."""
        self._random.go_on(state["random"])
        self.steps, self._drawn = int(state["steps"]), None


def _learned(learner: Any, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What the learner learns; TypeError or ValueError where the optimiser's are others."""
    if not isinstance(learner, nn.Module):
        raise TypeError(f"learner: expected a learner of pymeta, got {type(learner).__name__}")
    learned = [p for p in learner.parameters() if p.requires_grad]
    known = {id(p) for p in learner.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "optimizer: expected the learner's parameters alone; others would be moved without "
            "clipping and noise"
        )
    return learned
