"""Reptile: meta-learning a start by moving it towards the adapted weights.

Nichol, Achiam, Schulman 2018, "On First-Order Meta-Learning Algorithms" (arXiv:1803.02999),
algorithm 2. Each task t of a meta-batch is adapted from the start theta by some inner steps, with
the result theta_t; the start then moves towards the mean of them:

    theta <- theta + eps * (mean over t of theta_t - theta)

`out.loss.backward()` leaves theta - mean of theta_t in `.grad`, so that `torch.optim.SGD(lr=eps)`
makes exactly this step, and any other optimiser of torch one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pymeta import reference
from pymeta.algorithms.learner import Learner, Weights, check_minibatches
from pymeta.algorithms.native_call import NativeCall
from pymeta.algorithms.outcome import told_outcome
from pymeta.algorithms.settings import Checks, checks_of
from pymeta.backend import adapt as native_adapt
from pymeta.backend.gradients import NOTHING
from pymeta.backend.prepared_adapt import PreparedReptile, prepared
from pymeta.functional.anchors import Anchors, anchors_of, check_values_of
from pymeta.models.adapted import Adapted
from pymeta.spec import running
from pymeta.spec.optimizers import Optimizer
from pymeta.spec.schedule import LARGEST_SEED, Schedule, check_count
from pymeta.spec.transforms import in_transform
from pymeta.tasks.task_set import SUPPORT, Rows, Sizes, check_task_ids, task_set

_CALL = "call"  # with whether grad is enabled, the kind of a prepared call
_OF_ADAPT = 2**62  # the stream of all calls that are no training


class ReptileOutcome(NamedTuple):
    """What a Reptile call returns; only `loss` carries a graph.

    Attributes:
        loss: [], the mean over tasks of `task_losses`; its gradient is Reptile's direction.
        task_losses: [T], each task's mean over the inner steps of the loss of the step's rows
            before the step.
    """

    loss: Tensor
    task_losses: Tensor

    def __repr__(self) -> str:
        """The losses in figures."""
        return told_outcome(self)


class Reptile(Learner):
    """Reptile for `model`, by one native call for each meta-batch.

    Its parameters are the model's own. With a `batch_size` every call with grad enabled draws
    its minibatches anew, from a numbered stream of random numbers; the number is part of
    `state_dict()`, so that a run that is resumed goes on as it would have. A call captured in a
    CUDA graph draws the same ones at every replay.

    Args:
        model: maps [rows, ...] to [rows, out]. A chain of the layers that the native core
            knows runs there; everything else runs in torch, with one warning.
        loss: a name such as "mse" or "cross_entropy", the torch.nn module that means the same, a
            `pymeta.QuantileLoss` or `pymeta.StudentTNLLLoss`; or any function of one set's outputs
            and targets that gives one number for each row, or one in all, which runs in torch.
        optimizer: the inner one, `pymeta.SGD(...)`, `pymeta.Adam(...)` or `pymeta.RMSprop(...)`;
            its state starts afresh in each task. The paper uses Adam with betas=(0, 0.999).
        lr: instead of `optimizer`, the step size of plain SGD.
        steps: number of inner steps.
        batch_size: rows of each inner step, shuffled for each epoch as `pymeta.Schedule` says;
            None for all rows of the task.
        adapt: fnmatch patterns of the parameter names that the inner loop changes; None for
            all. The others, and those that do not require grad, stay as they are.
        anchor: the penalty anchor/2 |theta - start|^2 on what is adapted (L2-SP).
        anchor_rows: in its place: anchor_rows / n for a task of n rows that count.
        task_clip: the largest norm of one task's theta - theta_t, all parameters together, before
            the mean over tasks is taken; None for any. For robustness, and for differential
            privacy (`pymeta.privacy`).
        seed: of the shuffles.
        backend: "native", "torch", or "auto": native where possible (or what PYMETA_BACKEND
            says).
        precision: "float32" or "tf32x3", as for `MAML`.

    Raises:
        TypeError, ValueError: an argument is not as described; with backend="native", also
            where the native core cannot run the model (the message says why).
    """

    _checks: ClassVar[Checks] = checks_of("steps", "batch_size", "seed", "task_clip")

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Any,
        optimizer: Optimizer | None = None,
        lr: float | None = None,
        steps: int,
        batch_size: int | None = None,
        adapt: Sequence[str] | None = None,
        anchor: float = 0.0,
        anchor_rows: float | None = None,
        task_clip: float | None = None,
        seed: int = 0,
        backend: str = "auto",
        precision: str = "float32",
    ) -> None:
        super().__init__(
            model,
            loss=loss,
            lr=lr,
            optimizer=optimizer,
            adapt=adapt,
            backend=backend,
            precision=precision,
            anchor=anchor,
            anchor_rows=anchor_rows,
        )
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.task_clip = task_clip
        self._stream = 0
        self._look()

    @property
    def schedule(self) -> Schedule:
        """The inner steps of `adapt`."""
        return self._scheduled(None, _OF_ADAPT)

    # ---- calls --------------------------------------------------------------------------------

    def forward(
        self,
        xs: Rows,
        ys: Rows,
        *,
        steps: int | None = None,
        support_sizes: Sizes = None,
        support_weights: Weights = None,
        support_offset: Rows | None = None,
        task_ids: Sequence[int] | Tensor | None = None,
        anchor: Anchors = None,
    ) -> ReptileOutcome:
        """Adapt to every task; `outcome.loss.backward()` gives theta - mean of theta_t.

        Args:
            xs: inputs [T, rows, ...], or a list of T tensors [rows_t, ...]; tensors or arrays.
            ys: targets: class indices [T, rows] for cross_entropy; otherwise [T, rows, out],
                or [T, rows] where out is 1; a list where xs is one.
            steps: the number of inner steps, instead of the one given at construction.
            support_sizes: [T], how many of its rows each task uses, where xs is padded.
            support_weights: [T, rows] (or a list of [rows_t]) weights of the rows' losses; or
                in the shape of ys, of single targets.
            support_offset: [T, rows, out], [T, rows] where out is 1, or a list of single tasks':
                added to the model's outputs before the loss.
            task_ids: [T] integers >= 0 that set the shuffles of the tasks apart; left out,
                tasks of equal sizes are shuffled alike.
            anchor: [T], the strength of each task's pull towards the start, in place of the
                constructor's.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a wrong shape or device, a label, size or weight out of range, a batch
                of one row under batch normalisation, a normalisation layer that would use
                running statistics; with backend="native" also whatever only torch could run.
                CUDA tensors are not waited for, as in `MAML.forward`.
        """
        if torch.compiler.is_compiling():
            from pymeta.functional.compiled import outside_graphs

            named: dict[str, Any] = {
                "steps": steps, "support_sizes": support_sizes, "support_weights": support_weights,
                "support_offset": support_offset, "task_ids": task_ids, "anchor": anchor,
            }  # fmt: skip
            done: ReptileOutcome = outside_graphs(self, "forward", (xs, ys), named)
            return done
        trains = torch.is_grad_enabled()
        given = steps, support_sizes, support_weights, support_offset, task_ids, anchor
        plain = all(v is None for v in given)
        if plain and (again := self._prepared.find((_CALL, trains), (xs, ys))) is not None:
            self.__dict__["_last"] = again.note
            outcome = again.run(xs, ys, self._stream if trains else _OF_ADAPT)
            self.__dict__["_stream"] += trains
            return ReptileOutcome(*outcome)
        plan, parameters = self._current(xs)
        schedule = self._scheduled(steps, self._stream if trains else _OF_ADAPT)
        expected = plan.expected
        support = task_set(
            SUPPORT, xs, ys, support_sizes, support_weights, expected, support_offset
        )
        ids = check_task_ids(task_ids, support.tasks)
        anchors = anchors_of(anchor, support.tasks, plan)
        check_minibatches(plan, support, schedule)
        inner = self._inner(plan, schedule)
        reason = self._reason(plan, support)
        if reason is None:
            sizes = (support.tasks, support.rows)
            wanted = (trains and bool(plan.trainable), *NOTHING[1:])
            self._last = NativeCall(
                "reptile", schedule, *sizes, wanted=wanted, has_anchors=anchors is not None
            )
            outcome = native_adapt.reptile(
                plan, parameters, inner.lr, inner, support, ids, anchors, self.task_clip
            )
            if plain:
                of = plan, self._parameters, inner.lr, schedule, support, (xs, ys), self._last
                options: dict[str, Any] = {"wanted": wanted[0], "task_clip": self.task_clip}
                if (call := prepared(PreparedReptile, *of, **options)) is not None:
                    self._prepared.keep((_CALL, trains), (xs, ys), call)
        else:
            if in_transform():
                raise RuntimeError(
                    "Reptile's gradient is set to theta - mean of theta_t, which a transform of "
                    "torch.func (grad, vmap, ...) cannot derive: use out.loss.backward()"
                )
            plan.check_steps(schedule)
            self._to_torch(plan, reason, 5, support)
            named = dict(zip(plan.names, parameters, strict=True))
            check_values_of(anchors)
            numbers = None if ids is None else ids.tolist()
            loss, losses, statistics = reference.reptile(
                self.model, named, plan.adapted, inner, support, numbers, anchors, self.task_clip,
                plan.norms if trains and plan.trainable else (),
            )  # fmt: skip
            outcome = loss, losses
            if statistics is not None:
                running.update(plan.norms, statistics)
        if trains:
            self._stream += 1
        return ReptileOutcome(*outcome)

    def adapt(
        self,
        xs: Rows,
        ys: Rows,
        *,
        steps: int | None = None,
        support_sizes: Sizes = None,
        support_weights: Weights = None,
        support_offset: Rows | None = None,
        task_ids: Sequence[int] | Tensor | None = None,
        anchor: Anchors = None,
    ) -> Adapted:
        """The models adapted to T tasks, without any graph.

        Minibatches are drawn from a stream that training does not use, the same in each call.

        Args:
            xs: inputs, as in `forward`.
            ys: targets, as in `forward`.
            steps: the number of inner steps, instead of the one given at construction.
            support_sizes: as in `forward`.
            support_weights: as in `forward`.
            support_offset: as in `forward`.
            task_ids: as in `forward`.
            anchor: as in `forward`.

        Returns:
            T models, to be used as `models(xq)`, `models[t]`, `models.parameters`.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        sizes, weights, offset = support_sizes, support_weights, support_offset
        plain = all(v is None for v in (steps, sizes, weights, offset, task_ids, anchor))
        if plain and (again := self._adapted_again(xs, ys)) is not None:
            return again
        schedule = self._scheduled(steps, _OF_ADAPT)
        how = schedule, xs, ys, sizes, weights, task_ids, anchor, offset
        return self._adapted_to(*how, plain=plain)

    def _scheduled(self, steps: Any, stream: int) -> Schedule:
        steps = self.steps if steps is None else check_count("steps", steps)
        return Schedule(steps, None, self.batch_size, self.seed, stream)

    # ---- the state ----------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """What `state_dict` keeps besides the weights: the number of the next stream."""
        return {"stream": self._stream}

    def set_extra_state(self, state: Any) -> None:
        """Go on with the stream of a saved state; ValueError where it holds none."""
        if not isinstance(state, dict) or "stream" not in state:
            raise ValueError(f"state: expected the stream of a pymeta.Reptile, got {state!r}")
        self._stream = check_count("stream", state["stream"], most=LARGEST_SEED)
