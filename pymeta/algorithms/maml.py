"""MAML: meta-learning the point from which a few gradient steps adapt a model to a task.

Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks"
(arXiv:1703.03400), with exact second order gradients (or first order ones), ANIL (`adapt=`),
Meta-SGD and LSLR (`LearnableLR`). What is computed is written down in `pymeta/reference`.

A call goes the way that `learner.py` describes. A native call like the one before it skips all of
that but the core (`backend/prepared.py`). Calls with CUDA tensors of equal numbers of rows read no
value, so that, after a first one, they can be captured in a `torch.cuda.CUDAGraph`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymeta import reference
from pymeta.algorithms import by_support, implicitly
from pymeta.algorithms.learned_anchor import numbers_of
from pymeta.algorithms.learner import Learner, Weights
from pymeta.algorithms.native_call import NativeCall
from pymeta.algorithms.outcome import Outcome
from pymeta.algorithms.settings import Checks, checks_of
from pymeta.backend import adapt as native_adapt
from pymeta.backend.gradients import has_hooks
from pymeta.backend.plan import Plan
from pymeta.backend.prepared import PreparedCall, prepare
from pymeta.functional.anchors import Anchors, check_values_of
from pymeta.functional.evaluation import in_torch, lacks_forward_mode, undifferentiated
from pymeta.functional.handles import register
from pymeta.functional.own import Own, OwnRates, Starts, StepWeights, own_of
from pymeta.spec.anchors import LearnableAnchor
from pymeta.spec.implicit import Implicit, check_implicit
from pymeta.spec.optimizers import LearnableLR, Optimizer
from pymeta.spec.schedule import Schedule, check_count
from pymeta.spec.settings import check_query_loss, check_query_statistics, one_optimizer
from pymeta.tasks.task_set import SUPPORT, Rows, Sizes, TaskSet, check_same_tasks, shaped, task_set

# The keys of prepared calls: whether grad is enabled; without query targets, that behind this; and
# that of `accumulate_grad`.
_UNJUDGED, _ACCUMULATED = "unjudged", "accumulated"


class MAML(Learner):
    """Model-agnostic meta-learning of `model` by one native call for each meta-batch.

    Its parameters are the model's own, and `lr` where that is learnable.

    Args:
        model: maps [rows, ...] to [rows, out]. A chain of the layers that the native core
            knows runs there; everything else runs in torch, with one warning.
        loss: a name such as "mse" or "cross_entropy", the torch.nn module that means the same, a
            `pymeta.QuantileLoss` or `pymeta.StudentTNLLLoss`; or any function of one set's outputs
            and targets that gives one number for each row, or one in all, which runs in torch.
        lr: inner step size, a number or a `LearnableLR`.
        steps: number of inner steps.
        query_loss: what query sets are judged by, where that is another loss; likewise.
        first_order: take inner gradients as constants (FOMAML; Finn et al. 2017, section 5.2).
        adapt: fnmatch patterns of the parameter names that the inner loop changes; None for
            all. Parameters that do not require grad are neither adapted nor given gradients.
        optimizer: `pymeta.SGD(...)`, `pymeta.Adam(...)` or `pymeta.RMSprop(...)`, instead of `lr`,
            which alone means plain SGD. The meta-gradient goes through its momentum and clipping
            too.
        anchor: the penalty anchor/2 |theta - start|^2 on what is adapted (L2-SP); the
            meta-gradient goes through it, at both of its ends. A number, or a `LearnableAnchor`.
        anchor_rows: in its place: anchor_rows / n for a task of n rows that count, so that the
            start is worth as much as so many rows.
        query_statistics: what batch normalisations in train mode normalise query sets by: "own",
            the set's own rows, which makes predictions depend on each other, or "support", the
            task's support rows with the weights of then. Gradients go through either.
        task_clip: the largest norm of one task's share of the meta-gradient, all parameters and
            a learnable lr together, before the mean over tasks is taken; None for any. For
            robustness, and for differential privacy (Abadi et al. 2016, of tasks in place of
            rows).
        implicit: a `pymeta.Implicit`: the inner loop is pulled to its start by that strength, and
            the meta-gradient is that of its minimum (iMAML), whatever the number of steps.
        backend: "native", "torch", or "auto": native where possible (or what PYMETA_BACKEND
            says).
        precision: "tf32x3" allows the CUDA executor to make products of linear layers on tensor
            cores, each in three parts: nearly as exact as in float32, with other bits
            (docs/gpu.md). Predictions of adapted models, the CPU and torch have float32.

    Raises:
        TypeError, ValueError: an argument is not as described; with backend="native", also
            where the native core cannot run the model (the message says why).
    """

    _checks: ClassVar[Checks] = checks_of(
        "steps",
        "first_order",
        "task_clip",
        query_loss=lambda self, value: check_query_loss(value),
        query_statistics=lambda self, value: check_query_statistics(value),
    )
    _of_the_plan: ClassVar[frozenset[str]] = Learner._of_the_plan | {
        "query_loss",
        "query_statistics",
    }
    _fixed: ClassVar[Mapping[str, str]] = {
        **Learner._fixed,
        "implicit": "make a new learner for another one",
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Any,
        lr: float | LearnableLR | None = None,
        steps: int,
        query_loss: Any = None,
        first_order: bool = False,
        adapt: Sequence[str] | None = None,
        optimizer: Optimizer | None = None,
        anchor: float | LearnableAnchor = 0.0,
        anchor_rows: float | LearnableAnchor | None = None,
        query_statistics: str = "own",
        task_clip: float | None = None,
        implicit: Implicit | None = None,
        backend: str = "auto",
        precision: str = "float32",
    ) -> None:
        rule = one_optimizer(lr, optimizer, learnable=True)
        alone = {"first_order": first_order, "task_clip": task_clip}
        pull = {"anchor": anchor, "anchor_rows": anchor_rows}
        implicit = check_implicit(implicit, rule, **alone, **pull)
        numbers, learned = numbers_of(anchor, anchor_rows)
        super().__init__(
            model,
            loss=loss,
            lr=lr,
            optimizer=optimizer,
            adapt=adapt,
            backend=backend,
            precision=precision,
            **(numbers if implicit is None else {"anchor": implicit.strength}),
            learns_lr=True,
        )
        self._implicit = implicit
        self.steps = steps
        self.first_order = first_order
        self.query_loss = query_loss
        self.query_statistics = query_statistics
        self.task_clip = task_clip
        plan = self._look()
        if isinstance(self._rule.lr, LearnableLR):
            self._make_lr(self._rule.lr, plan)
        self.learned_anchor = None if learned is None else learned.to(plan.scalar)
        self._handle = register(self)

    def _make_lr(self, rate: LearnableLR, plan: Plan) -> None:
        """Make the learnable lr a parameter, one column for each value of a step."""
        columns = plan.rates.columns
        shape = (max(self.steps, 1), columns) if rate.per_step else (columns,)
        self._learns = plan.adapted
        self.lr = nn.Parameter(plan.scalar.new_full(shape, float(rate.initial)))

    # ---- calls --------------------------------------------------------------------------------

    def forward(
        self,
        xs: Rows,
        ys: Rows,
        xq: Rows,
        yq: Rows | None = None,
        *,
        steps: int | None = None,
        support_sizes: Sizes = None,
        query_sizes: Sizes = None,
        support_weights: Weights = None,
        query_weights: Weights = None,
        support_offset: Rows | None = None,
        query_offset: Rows | None = None,
        anchor: Anchors = None,
        start: Starts = None,
        lr: OwnRates = None,
        step_weights: StepWeights = None,
    ) -> Outcome:
        """Adapt to every task's support set and evaluate on its query set.

        Where grad is enabled and something requires it, the results are differentiable by the
        parameters (or the tasks' own start), by lr, and by the inputs, targets and row weights of
        both sets: the exact meta-gradient. On the native backend it cannot be differentiated
        again. That of `loss` is computed here already; any other costs a native call in backward,
        for which nothing of this one may have been changed in place.

        Args:
            xs: support inputs [T, rows, ...], or a list of T tensors [rows_t, ...].
            ys: support targets: class indices [T, rows] for cross_entropy, or distributions
                over the classes [T, rows, out]; otherwise [T, rows, out], or [T, rows] where out
                is 1; a list where xs is one. Where the loss has several outputs for each target,
                there are as many columns as targets.
            xq: query inputs, like xs, with their own number of rows.
            yq: query targets, like ys; None for predictions alone.
            steps: the number of inner steps, instead of the one given at construction.
            support_sizes: [T], how many of its rows each task uses, where xs is padded.
            query_sizes: [T], likewise for xq.
            support_weights: [T, rows] (or a list of [rows_t]) weights of the rows' losses; or
                in the shape of ys, weights of single targets. What weighs 0 contributes nothing,
                whatever it holds. The gradient by a weight of 0 is that of the row's own loss,
                normalised by the rows that count; 0 where the row is not finite.
            query_weights: likewise for the query rows.
            support_offset: [T, rows, out], [T, rows] where out is 1, or a list of single tasks':
                added to the model's outputs before the loss.
            query_offset: likewise for the query rows, and part of the predictions.
            anchor: [T], the strength of each task's pull towards the start, in place of the
                constructor's.
            start: {name: [T, ...]} of parameters that each task starts from its own value of, in
                place of the model's.
            lr: [T], each task's step size in place of the constructor's, or [T, layers] where
                that is `LearnableLR(per="layer")`.
            step_weights: [steps]: the loss is the sum of the query losses after each step times
                these (Antoniou et al. 2019, section 4.1), in place of the last one.

        Returns:
            The `Outcome`.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a wrong shape or device, a label, size or weight out of range, a set of
                one row under batch normalisation, a normalisation layer that would use running
                statistics; with backend="native" also whatever only torch could run.
                CUDA tensors are not waited for: a label or weight out of range makes the loss
                of its task NaN, and all that depends on it (PYMETA_CHECK_VALUES=1 raises).
        """
        plain = (
            steps is None and anchor is None and support_sizes is None and query_sizes is None
            and support_weights is None and query_weights is None and support_offset is None
            and query_offset is None and start is None and lr is None and step_weights is None
            and self.learned_anchor is None
        )  # fmt: skip
        if torch.compiler.is_compiling():
            options = {
                "steps": steps, "support_sizes": support_sizes, "query_sizes": query_sizes,
                "support_weights": support_weights, "query_weights": query_weights,
                "support_offset": support_offset, "query_offset": query_offset, "anchor": anchor,
                "start": start, "lr": lr, "step_weights": step_weights,
            }  # fmt: skip
            from pymeta.functional import compiled

            return Outcome(*compiled.forward(self, (xs, ys, xq, yq), options))
        kind: Any = torch.is_grad_enabled()
        data: tuple[Any, ...] = xs, ys, xq, yq
        if yq is None:
            kind, data = (_UNJUDGED, kind), data[:3]
        if plain:
            before: PreparedCall | None = self._prepared.find(kind, data)
            if before is not None:
                results = before(before.plan.parameters, before.again(*data))
                return Outcome._make(results)
        plan, parameters = self._current(xs)
        steps = self.steps if steps is None else check_count("steps", steps)
        support = task_set(
            SUPPORT, xs, ys, support_sizes, support_weights, plan.expected, support_offset
        )
        apart, sides = self._by_support(plan), (xq, yq, query_sizes, query_weights)
        query = by_support.queries(sides, query_offset, step_weights, plan, apart)
        check_same_tasks(support, query)
        anchors = self._strengths(anchor, support, plan)
        how = own_of(plan, support.tasks, steps, anchors, start, lr, step_weights)
        reason = self._reason(plan, support, query)
        if self._implicit is not None:
            return implicitly.outcome(self, plan, parameters, steps, support, query, how, reason)
        if reason is None and apart:
            reason = by_support.lacking(support, query)
        if reason is not None:
            return self._in_torch(plan, parameters, steps, support, query, reason, how)
        operands = how.operands(plan, parameters)
        rates = self._lr(plan) if how.rates is None else how.rates
        if apart:
            recipe = how.recipe(self, steps)
            results = by_support.results(plan, recipe, operands, rates, support, query)
            return Outcome(*results)._replace(predictions=shaped(results.predictions, query))
        call, extras = prepare(plan, how.recipe(self, steps), operands, rates, support, query)
        results = call(operands, extras)
        if query.lengths is not None:
            return Outcome(*results)._replace(predictions=shaped(results.predictions, query))
        if (
            plain
            and extras.lr is rates
            and call.remember(self._parameters, data, support, query, rates)
        ):
            self._prepared.keep(kind, data, call)
        return Outcome(*results)

    def accumulate_grad(self, xs: Rows, ys: Rows, xq: Rows, yq: Rows, **options: Any) -> Outcome:
        """Add the meta-gradient of the mean loss to the parameters' `.grad`, without autograd.

        The same gradient as that of `forward(...).loss.backward()`, for training loops in which
        autograd's share of a call counts: parameters and a learnable lr get it, inputs do not.
        Hooks on parameters are called as there. Inference mode and no_grad change nothing.

        Args:
            xs: support inputs, as in `forward`.
            ys: support targets, as in `forward`.
            xq: query inputs, as in `forward`.
            yq: query targets, as in `forward`.
            options: those of `forward` but `start` and `lr`, which are of the tasks.

        Returns:
            The `Outcome`, without a graph.

        Raises:
            TypeError, ValueError: as `forward`; an option is not one of these.
        """
        if yq is None:
            raise ValueError("yq: expected query targets, got None: there is no loss without them")
        if torch.is_inference_mode_enabled():  # whose gradients could not be added to behind it
            with torch.inference_mode(False):
                return self.accumulate_grad(xs, ys, xq, yq, **options)
        if options:
            wrong = sorted(set(options) & {"start", "lr"})
            if wrong:
                raise TypeError(
                    f"{wrong[0]}: accumulate_grad adds to the gradients of parameters; "
                    f"differentiate the loss of a call for that of a task's own"
                )
        data = xs, ys, xq, yq
        before: PreparedCall | None = None
        if not options:
            before = self._prepared.find(_ACCUMULATED, data)
        if before is not None and not has_hooks(before.leaves):
            return Outcome._make(before.accumulate(before.again(*data)))
        return self._accumulated(data, options)

    def _accumulated(self, data: tuple[Any, Any, Any, Any], options: dict[str, Any]) -> Outcome:
        """As `accumulate_grad`, for a call that is not like the one before."""
        with torch.enable_grad():
            out = self.forward(*data, **options)
        # It may be of data by which gradients are wanted, as these are not.
        call: PreparedCall | None = self._prepared.of_shape(True, data)
        if call is not None and not call.of_data:
            self._prepared.keep(_ACCUMULATED, data, call)
        by = [p for p in self.parameters() if p.requires_grad]
        if out.loss.requires_grad and by:
            torch.autograd.backward(out.loss, inputs=by)
        return out.detached()

    def _by_support(self, plan: Plan) -> bool:
        """Whether there is anything that support rows normalise query rows by."""
        return self.query_statistics == "support" and plan.normalises

    def adapt(
        self,
        xs: Rows,
        ys: Rows,
        *,
        steps: int | None = None,
        support_sizes: Sizes = None,
        support_weights: Weights = None,
        support_offset: Rows | None = None,
        anchor: Anchors = None,
        start: Starts = None,
        lr: OwnRates = None,
        curves: bool = False,
        on_divergence: str | None = None,
        create_graph: bool = False,
    ) -> Any:
        """The models adapted to T tasks.

        Args:
            xs: support inputs, as in `forward`.
            ys: support targets, as in `forward`.
            steps: the number of inner steps, instead of the one given at construction.
            support_sizes: as in `forward`.
            support_weights: as in `forward`.
            support_offset: as in `forward`.
            anchor: as in `forward`.
            start: as in `forward`.
            lr: as in `forward`.
            curves: whether the models get a `history`, whose `train` [T, steps] are the support
                losses before each step.
            on_divergence: as for `pymeta.FineTune`.
            create_graph: return the adapted parameters themselves, differentiable as the results
                of `forward` are.

        Returns:
            T models without any graph, to be used as `models(xq)`, `models[t]`,
            `models.parameters`; with `create_graph` {name: [T, ...]} of what is adapted.

        Raises:
            TypeError, ValueError: as `forward`.
            ArithmeticError: a task diverged, with on_divergence="raise".
        """
        plain = (
            steps is None and support_sizes is None and support_weights is None
            and support_offset is None and anchor is None and start is None and lr is None
            and curves is False and on_divergence is None and not create_graph
        )  # fmt: skip
        if plain and (again := self._adapted_again(xs, ys)) is not None:
            return again
        steps = self.steps if steps is None else check_count("steps", steps)
        sides = (xs, ys, support_sizes, support_weights)
        own: dict[str, Any] = {"anchor": anchor, "start": start, "lr": lr}
        if create_graph:
            return self._adapted_with_graph(sides, support_offset, steps, own)
        own |= {"curves": curves, "on_divergence": on_divergence, "plain": plain}
        return self._adapted_to(Schedule(steps), *sides, offset=support_offset, **own)

    def _adapted_with_graph(
        self, sides: tuple[Any, Any, Any, Any], offset: Any, steps: int, own: dict[str, Any]
    ) -> dict[str, Tensor]:
        plan, parameters = self._current(sides[0])
        support = task_set(SUPPORT, *sides, plan.expected, offset)
        anchors = self._strengths(own.pop("anchor"), support, plan)
        how = own_of(plan, support.tasks, steps, anchors, **own)
        inner = self._inner(plan, Schedule(steps), self.first_order)
        reason = self._reason(plan, support)
        if self._implicit is not None:
            return implicitly.adapted(self, plan, parameters, steps, support, how, reason, 4)
        if reason is None:
            rates = inner.lr if how.rates is None else how.rates
            recipe = how.recipe(self, steps)
            return native_adapt.adapt_with_graph(
                plan, recipe, parameters, rates, inner, support, how.start
            )
        plan.check_steps(Schedule(steps))
        self._to_torch(plan, reason, 4, support)
        check_values_of(how.anchors)
        named = dict(zip(plan.names, parameters, strict=True))
        done = reference.adapt(
            self.model, named, plan.adapted, inner, support,
            start=how.start, anchors=how.anchors, rates=how.rates,
        )  # fmt: skip
        found = {name: done.parameters[name] for name in plan.adapted}
        if self.task_clip is None:
            return found
        return {name: undifferentiated(value) for name, value in found.items()}

    def extra_repr(self) -> str:
        """What `repr` shows besides the model."""
        text = super().extra_repr()
        return text if self._implicit is None else f"{text}, implicit={self._implicit}"

    @property
    def implicit(self) -> Implicit | None:
        """How the implicit meta-gradient is found; None where the steps are gone back through."""
        return self._implicit

    @property
    def schedule(self) -> Schedule:
        """As many steps as `steps` says, each on all rows."""
        return Schedule(self.steps)

    # ---- the torch backend --------------------------------------------------------------------

    def _in_torch(
        self,
        plan: Plan,
        parameters: list[Tensor],
        steps: int,
        support: TaskSet,
        query: TaskSet,
        reason: str,
        how: Own,
    ) -> Outcome:
        """The call by `pymeta/reference`."""
        self._to_torch(plan, reason, 6, support, query)
        inner = self._inner(plan, Schedule(steps), self.first_order)
        out = () if query.tasks else self._output_shape(plan, query)
        sets = support, query
        found = in_torch(
            self.model, plan, parameters, inner, *sets, how, self.task_clip, out,
            self._by_support(plan),
        )  # fmt: skip
        return Outcome(*found)  # type: ignore[arg-type]  # None without query targets

    def _reason(self, plan: Plan, *sets: TaskSet) -> str | None:
        """As the base class has it; the native core has no forward mode."""
        tensors = [*plan.parameters, self._parameters.get("lr")]
        return super()._reason(plan, *sets) or lacks_forward_mode(tensors, sets)

    def _made_plan(self, row_shape: tuple[int, ...] | None) -> Plan:
        return Plan(
            self.model,
            self.loss,
            self.adapted_patterns,
            self._per,
            self._rule,
            self._anchor,
            query_loss=self.query_loss,
            row_shape=row_shape,
            precision=self.precision,
        )

    def _last_call(self, plan: Plan) -> NativeCall | None:
        if plan.last is None:  # what the calls leave, but not `adapt`
            return self._last
        tasks, support, query, steps, *how = plan.last
        return NativeCall("meta", Schedule(steps), tasks, support, query, 0, *how)

    # ---- torch.compile, copies ----------------------------------------------------------------

    def _plan_for(self, dtype: torch.dtype, device: torch.device, x: Any) -> Plan:
        return self._current(x)[0]

    def _module_for(self, dtype: torch.dtype, device: torch.device, x: Any) -> nn.Module:
        return self.model

    def _adapted_shapes(self) -> dict[str, tuple[int, ...]]:
        plan = self._current()[0]
        named = zip(plan.names, plan.parameters, strict=True)
        return {n: tuple(p.shape) for n, p in named if n in plan.adapted}

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle: everything but what is derived from the model."""
        return {**super().__getstate__(), "_handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled state."""
        super().__setstate__(state)
        self._handle = register(self)
