"""What MAML, Reptile and FineTune share: a model, a loss, an inner optimiser, a backend.

The life of a call is the same for all three: the inputs are checked and packed (`pymeta/tasks`),
the model is compared with the plan made of it (`backend/plan.py`), and then either the native core
is called (`backend/prepared.py`, `backend/adapt.py`), on the CPU or on the device where the tensors
are (`backend/device.py`), or the same is done in torch (`pymeta/reference`).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from pymeta import native, reference
from pymeta.algorithms import by_support
from pymeta.algorithms.divergence import check_reaction, reacted
from pymeta.algorithms.learned_anchor import LearnedAnchor
from pymeta.algorithms.native_call import NativeCall, explained
from pymeta.algorithms.settings import Checks, checks_of
from pymeta.backend import adapt as native_adapt
from pymeta.backend.plan import Plan
from pymeta.backend.prepared_adapt import PreparedAdapt, prepared
from pymeta.backend.repeat import Repeats
from pymeta.functional.anchors import Anchors, anchors_of, check_values_of
from pymeta.functional.own import OwnRates, Starts, rates_of, start_of
from pymeta.models.adapted import Adapted
from pymeta.spec.anchors import check_anchor
from pymeta.spec.history import History
from pymeta.spec.inner import Adaptation, InnerLoop
from pymeta.spec.losses import Loss
from pymeta.spec.modules import one_at_a_time
from pymeta.spec.optimizers import SGD, LearnableLR, Optimizer, check_lr
from pymeta.spec.schedule import Schedule
from pymeta.spec.settings import one_optimizer
from pymeta.spec.transforms import LACKS, in_transform
from pymeta.tasks.checks import Expected
from pymeta.tasks.task_set import SUPPORT, Rows, Sizes, TaskSet, check_task_ids, task_set
from pymeta.tasks.values import check_values

if TYPE_CHECKING:
    from pymeta.models.adapter import Adapter

Weights: TypeAlias = Rows | None

_ADAPT = "adapt"  # the key of a prepared call of `adapt`


def check_minibatches(plan: Plan, counts: Sequence[int] | TaskSet, schedule: Schedule) -> None:
    """Raise ValueError where a minibatch would be one row, which cannot be normalised.

    `counts` are the rows of the tasks.
    """
    size = schedule.batch_size
    if size is None or not plan.expected.batch_norm:
        return
    for t, rows in enumerate(counts.counts if isinstance(counts, TaskSet) else counts):
        if rows > size and (size == 1 or rows % size == 1):
            raise ValueError(
                f"batch_size: {size} leaves a minibatch of one row of the {rows} rows of task "
                f"{t}, which batch normalisation cannot normalise"
            )


def _all_on(device: torch.device, done: Adaptation) -> Adaptation:
    """An adaptation with its status and its history where its parameters are."""
    history = done.history and History.of(
        {name: values.to(device) for name, values in done.history.values().items()}
    )
    return Adaptation(done.parameters, done.status.to(device), history)


class Learner(nn.Module, ABC):
    """The base of the learners; not for use by itself.

    Attributes:
        model: the module that is adapted; its parameters are the learner's.
        loss: a description of the loss.
        lr: the inner step size: a number, or MAML's learnable one.
        backend: "native", "torch" or "auto".
        precision: "float32", or "tf32x3" where the native core may have it.

    All that the constructor takes may be set anew between calls, by the names of the attributes;
    it is checked as there, and the next call has it. What cannot be honoured raises.
    """

    # what a setting has to be: name -> (learner, value) -> what is kept
    _checks: ClassVar[Checks] = checks_of()
    # what the constructor takes and a learner keeps
    _fixed: ClassVar[Mapping[str, str]] = {
        "adapt": "it is the method that adapts; set adapted_patterns",
        "optimizer": "make a new learner for another one; its lr may be set as lr",
        "anchor": "make a new learner for another one",
        "anchor_rows": "make a new learner for another one",
    }
    # those that a plan is made of
    _of_the_plan: ClassVar[frozenset[str]] = frozenset(
        {"model", "loss", "adapted_patterns", "precision"}
    )

    lr: Any  # a float, or the learnable one: a Parameter [n], or [steps, n] where it is per step
    precision = "float32"
    query_loss: Any = None  # what query sets are judged by, where that is another loss

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Any,
        lr: float | LearnableLR | None,
        optimizer: Optimizer | None,
        adapt: Sequence[str] | None = None,
        backend: str = "auto",
        anchor: float = 0.0,
        anchor_rows: float | None = None,
        learns_lr: bool = False,
        precision: str = "float32",
    ) -> None:
        """Check what is common to the learners. `_look` has to follow.

        `learns_lr` says whether a `LearnableLR` is possible.
        """
        super().__init__()
        self._prepared = Repeats()
        self._learns: tuple[str, ...] | None = None
        self._plan: Plan | None = None
        self._warned = False
        self._fallback_reason: str | None = None
        self._shapes: dict[Any, tuple[int, ...] | None] = {}
        self._last: NativeCall | None = None
        self.model = model
        self.loss: Loss = loss  # __setattr__ makes one of it
        self.adapted_patterns = adapt
        self.backend = backend
        self.precision = precision
        self._anchor = check_anchor(anchor, anchor_rows)
        self.learned_anchor: LearnedAnchor | None = None
        self._rule = one_optimizer(lr, optimizer, learns_lr)
        rate = self._rule.lr
        self._per = rate.per if isinstance(rate, LearnableLR) else "network"
        if not isinstance(rate, LearnableLR):
            self.lr = rate

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a setting is checked, and what was made of the old one is dropped."""
        if name in self._fixed:
            raise AttributeError(f"{name} cannot be set: {self._fixed[name]}")
        check = self._checks.get(name)
        if check is not None:
            value = check(self, value)
        super().__setattr__(name, value)
        if name in self._of_the_plan:
            self._plan = None
            self._forget()
        elif check is not None:
            self._prepared.clear()

    def __delattr__(self, name: str) -> None:
        """Delete an attribute that is no setting."""
        if name in self._checks or name in self._fixed:
            raise AttributeError(
                f"{name} cannot be deleted: a {type(self).__name__} has no calls without it"
            )
        super().__delattr__(name)

    def _checked_lr(self, value: Any) -> Any:
        """A new step size: a number, or where it is learnable a parameter of the same shape."""
        if self._learns is None:
            if isinstance(value, (LearnableLR, Tensor)):
                raise TypeError(
                    f"lr: expected a number, got a {type(value).__name__}; give a LearnableLR to "
                    f"the constructor"
                )
            return check_lr("lr", value)
        now = self._parameters.get("lr")
        if not isinstance(value, nn.Parameter):
            raise TypeError(
                f"lr: expected a torch.nn.Parameter, because it is learnable, got "
                f"{type(value).__name__}; with torch.no_grad(), lr.fill_(...) sets its values"
            )
        if now is not None and value.shape != now.shape:
            raise ValueError(f"lr: expected shape {list(now.shape)}, got {list(value.shape)}")
        return value

    # ---- what the learner does with a task ----------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The inner optimiser as it is now; a learnable lr is there as its description."""
        lr = self.__dict__.get("lr")
        return self._rule if lr is None else replace(self._rule, lr=lr)

    @property
    def anchor(self) -> float:
        """The strength of the pull towards the start, where it is one for all tasks."""
        learned = self.learned_anchor
        return self._anchor.strength if learned is None or learned.of_rows else learned.value

    @property
    def anchor_rows(self) -> float | None:
        """What is divided by the number of a task's rows to be its strength; None: nothing is."""
        learned = self.learned_anchor
        return (
            learned.value if learned is not None and learned.of_rows else self._anchor.rows or None
        )

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """How many inner steps an adaptation makes, and on which rows."""

    def adapter(self) -> Adapter:
        """What to deploy: a copy of the start and the recipe, for numpy, without torch.

        Raises:
            ValueError: the native core cannot run the model, or an adapter not the recipe.
        """
        from pymeta.algorithms.deploy import from_learner

        return from_learner(self)

    def _inner(self, plan: Plan, schedule: Schedule, first_order: bool = False) -> InnerLoop:
        how = schedule, first_order, self._rule, self._anchor, self.query_loss
        return InnerLoop(self.loss, self._lr(plan), plan.rates, *how)

    def _adapt_tasks(
        self,
        plan: Plan,
        parameters: list[Tensor],
        schedule: Schedule,
        support: TaskSet,
        in_torch: bool,
        **options: Any,
    ) -> Adaptation:
        """Adapt to every task; the options are those of `reference.adapt`."""
        inner = self._inner(plan, schedule)
        if not in_torch:
            watched = options.get("validation")
            sizes = support.tasks, support.rows, 0, 0 if watched is None else watched.rows
            own = options.get("anchors") is not None
            last = NativeCall("adapt", schedule, *sizes, has_anchors=own)
            self.__dict__["_last"] = last  # past __setattr__, which takes its time
            return native_adapt.adapt(plan, parameters, inner.lr, inner, support, **options)
        plan.check_steps(schedule)
        named = {n: p.detach() for n, p in zip(plan.names, parameters, strict=True)}
        check_values_of(options.get("anchors"))
        return reference.adapt(self.model, named, plan.adapted, inner, support, **options)

    def _strengths(self, anchor: Anchors, support: TaskSet, plan: Plan) -> Tensor | None:
        """The tasks' own strengths of the pull [T]: a call's, or what is learned."""
        if anchor is None and self.learned_anchor is not None:
            if getattr(self, "task_clip", None) is not None:
                raise ValueError(
                    "task_clip: a LearnableAnchor's share of the meta-gradient is not clipped; "
                    "expected None, or an anchor that is a number"
                )
            return self.learned_anchor.strengths(support, plan)
        return anchors_of(anchor, support.tasks, plan)

    def _adapted_to(
        self,
        schedule: Schedule,
        xs: Rows,
        ys: Rows,
        sizes: Sizes,
        weights: Weights,
        task_ids: Sequence[int] | Tensor | None = None,
        anchor: Anchors = None,
        offset: Rows | None = None,
        start: Starts = None,
        lr: OwnRates = None,
        curves: bool = False,
        on_divergence: str | None = None,
        plain: bool = False,
    ) -> Adapted:
        """The models adapted to the support sets of T tasks; for `adapt` itself to call.

        `plain`: a call with xs and ys alone, which `_adapted_again` may make again.
        """
        with torch.no_grad():
            plan, parameters = self._current(xs)
            support = task_set(SUPPORT, xs, ys, sizes, weights, plan.expected, offset)
            ids = check_task_ids(task_ids, support.tasks)
            anchors = self._strengths(anchor, support, plan)
            reaction = check_reaction(on_divergence)
            check_minibatches(plan, support, schedule)
            reason = self._reason(plan, support)
            in_torch = reason is not None
            if reason is not None:
                self._to_torch(plan, reason, 4, support)
            options: dict[str, Any] = {
                "task_ids": ids,
                "anchors": anchors,
                "start": start_of(start, support.tasks, plan),
                "rates": rates_of(lr, support.tasks, plan),
            }
            if curves:  # an epoch of all rows is a step
                schedule = Schedule(None, schedule.steps)
                options["curves"] = True
            done = self._adapt_tasks(plan, parameters, schedule, support, in_torch, **options)
            if reaction is not None:
                reacted(self, plan, parameters, options["start"], support, done, reaction, in_torch)
            if plain and not in_torch and anchors is None and not self._by_support(plan):
                of = plan, self._parameters, self._lr(plan), schedule, support
                call = prepared(PreparedAdapt, *of, (xs, ys), self._last)
                if call is not None:
                    self._prepared.keep(_ADAPT, (xs, ys), call)
            if self._by_support(plan):
                how = (self._inner(plan, schedule), done, support, in_torch)
                plan, done = by_support.kept(self.model, plan, parameters, *how)
            return self._adapted(plan, parameters, done, support.tasks, in_torch)

    def _adapted_again(self, xs: Any, ys: Any) -> Adapted | None:
        """The models, where the last call of `adapt` was like one with these and nothing else."""
        before: PreparedAdapt | None = self._prepared.find(_ADAPT, (xs, ys))
        if before is None:
            return None
        self.__dict__["_last"] = before.note
        plan, done = before.plan, before.run(xs, ys)
        return self._adapted(plan, plan.parameters, done, len(done.status), False)

    def _by_support(self, plan: Plan) -> bool:
        return False  # MAML may say otherwise

    def _adapted(
        self,
        plan: Plan,
        parameters: list[Tensor],
        done: Adaptation,
        tasks: int,
        in_torch: bool,
    ) -> Adapted:
        """The models that an adaptation made."""
        if in_torch:
            done = _all_on(plan.expected.device, done)
        shared = {
            name: p.detach().clone()
            for name, p in zip(plan.names, parameters, strict=False)  # constants may be more
            if name not in done.parameters
        }
        return Adapted(
            self.model,
            plan,
            done.parameters,
            shared,
            tasks,
            not in_torch,
            status=done.status,
            history=done.history,
        )

    # ---- the torch backend --------------------------------------------------------------------

    def _reason(self, plan: Plan, *sets: TaskSet) -> str | None:
        """Why this call runs in torch; None where the native core does it."""
        if self.backend == "torch":
            return 'backend="torch" was asked for'
        if in_transform():
            return LACKS
        return plan.reason or next((s.reason for s in sets if s.reason is not None), None)

    def _to_torch(self, plan: Plan, reason: str, frames: int, *sets: TaskSet) -> Expected:
        """Get ready for the torch backend: the warning, and the checks that the core has itself.

        The warning names the line that is `frames` calls up from here, which is the user's.
        """
        self._fall_back(reason, frames + 1)
        expected = self._expected(plan, *sets)
        for s in sets:
            check_values(s, expected)
        return expected

    def _expected(self, plan: Plan, *sets: TaskSet) -> Expected:
        """What inputs are expected; for a model that is not a chain, find its output's width."""
        classes = any(s.loss is not None and s.loss.takes_classes for s in sets)
        if plan.expected.out_features is not None or not classes:
            return plan.expected
        shape = self._output_shape(plan, sets[0])
        if len(shape) != 1:
            return plan.expected
        return replace(plan.expected, in_features=None, out_features=shape[0])

    def _output_shape(self, plan: Plan, s: TaskSet) -> tuple[int, ...]:
        if plan.expected.out_features is not None:
            return (plan.expected.out_features,)
        features = tuple(s.x.shape[1 if s.starts is not None else 2 :])
        key = (features, s.x.dtype)
        if key not in self._shapes:
            self._shapes[key] = reference.output_shape(self.model, features, s.x.dtype)
        return self._shapes[key] or ()

    def _fall_back(self, reason: str, frames: int) -> None:
        """Note why torch runs: an error, a warning (once), or what was asked for."""
        if self.backend == "torch":
            return
        if self.backend == "native":
            raise ValueError(f'backend="native": {reason}')
        self._fallback_reason = reason
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"pymeta.{type(self).__name__} runs in torch, which is slower: {reason}",
                UserWarning,
                stacklevel=frames,
            )

    # ---- the model as it is now ---------------------------------------------------------------

    def _look(self) -> Plan:
        """Examine the model for the first time; ValueError where it cannot run as requested."""
        plan, _ = self._current()
        if self.backend == "native" and plan.reason is not None and not plan.unshaped:
            raise ValueError(f'backend="native": {plan.reason}')
        return plan

    def _current(self, x: Any = None) -> tuple[Plan, list[Tensor]]:
        """The plan for the model as it is now, and its parameters in order.

        `x` are the inputs of a call: a chain of convolutions has a plan for one shape of rows.
        """
        plan: Plan | None = self.__dict__["_plan"]
        if plan is not None and plan.watch.is_current() and plan.shape_for(x) is None:
            return plan, plan.parameters
        with one_at_a_time():
            return self._looked_at_anew(plan, x)

    def _looked_at_anew(self, plan: Plan | None, x: Any) -> tuple[Plan, list[Tensor]]:
        """As `_current`, under the lock: the model may have changed."""
        shape = None if plan is None else plan.shape_for(x) or plan.row_shape
        if plan is not None and plan.watch.is_current() and shape == plan.row_shape:
            return plan, plan.parameters
        plan = self._made_plan(shape)
        if (shape := plan.shape_for(x)) is not None:  # a model that was never looked at before
            plan = self._made_plan(shape)
        if plan.refuses:  # x has an error before it; what is known of other rows stays
            return plan, plan.parameters
        self._forget()
        if self._learns is not None and self._learns != plan.adapted:
            raise ValueError(
                f"model: a learnable lr was made for the adapted parameters "
                f"{', '.join(self._learns)}, but now they are {', '.join(plan.adapted)}"
            )
        self._plan = None if in_transform() else plan  # which would hold tensors of it
        return plan, plan.parameters

    def _made_plan(self, row_shape: tuple[int, ...] | None) -> Plan:
        return Plan(
            self.model, self.loss, self.adapted_patterns, self._per, self._rule, self._anchor,
            row_shape=row_shape, precision=self.precision,
        )  # fmt: skip

    def _forget(self) -> None:
        """Drop what was derived from the model."""
        self._prepared.clear()
        self._shapes = {}
        self._last = None

    def _lr(self, plan: Plan) -> Tensor:
        lr = self._parameters.get("lr")
        if lr is None:
            return plan.lr_tensor(self.__dict__["lr"])
        if lr.device != plan.expected.device:
            raise ValueError(
                f"lr: expected it on {plan.expected.device}, where the model's parameters are, "
                f"got {lr.device}"
            )
        return lr

    def explain(self) -> str:
        """Which path runs, and why: "native-cpu avx512 lanes: ..." or "torch: ..."."""
        plan, _ = self._current()
        if self.backend == "torch":
            return 'torch: backend="torch" was asked for'
        if plan.unshaped:
            return f"native-cpu {native.isa()} {native.executor()}: {plan.reason}"
        if plan.reason is not None:
            return f"torch: {plan.reason}"
        text = explained(plan, self._last_call(plan))
        if self._fallback_reason is not None:
            text += f"; some calls ran in torch: {self._fallback_reason}"
        return text

    def _last_call(self, plan: Plan) -> NativeCall | None:
        """The last native call, if there was one since the model was examined."""
        return self._last

    # ---- copies -------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle: everything but what is derived from the model."""
        state = self.__dict__.copy()
        state.update(_plan=None, _shapes={}, _last=None, _prepared=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled state."""
        restore: Any = super().__setstate__
        restore({**state, "_prepared": Repeats()})

    def extra_repr(self) -> str:
        """What `repr` shows besides the model."""
        lr = "learnable" if self._learns is not None else self.lr
        s = self.schedule
        parts = [f"loss={self.loss.name}", f"lr={lr}"]
        if not isinstance(self._rule, SGD) or self._rule != SGD(self._rule.lr):
            parts = [f"loss={self.loss.name}", f"optimizer={self.optimizer}"]
        parts.append(f"steps={s.steps}" if s.epochs is None else f"epochs={s.epochs}")
        if s.batch_size is not None:
            parts.append(f"batch_size={s.batch_size}")
        if self.precision != Learner.precision:
            parts.append(f"precision={self.precision}")
        return ", ".join([*parts, f"backend={self.backend}"])
