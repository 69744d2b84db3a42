"""MAML: meta-learning the point from which a few gradient steps adapt a model to a task.

Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks"
(arXiv:1703.03400), with exact second order gradients (or first order ones), ANIL (`adapt=`),
Meta-SGD and LSLR (`LearnableLR`). What is computed is written down in `pymeta/reference.py`.

The life of a call: the inputs are checked and packed (`tasks.py`), the model is compared with the
plan made of it (`plan.py`), and then either the native core is called once (`fused.py`) or the
same is done in torch (`reference.py`). A native call like the one before it skips all of that but
the core (`repeat.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pymeta import fused, native, reference
from pymeta.adapted import Adapted, shaped
from pymeta.losses import describe_loss
from pymeta.optimizers import SGD, LearnableLR, check_lr
from pymeta.plan import Plan, check_statistics
from pymeta.repeat import Repeat
from pymeta.tasks import (
    QUERY,
    SUPPORT,
    Expected,
    Rows,
    Sizes,
    TaskSet,
    check_same_tasks,
    check_steps,
    check_values,
    task_set,
)

Weights: TypeAlias = Tensor | Sequence[Tensor] | None


class Outcome(NamedTuple):
    """What a MAML call returns; only `loss` carries a graph.

    Attributes:
        loss: [], the mean over tasks of `task_losses`.
        task_losses: [T], each task's mean query loss after adaptation.
        predictions: [T, rows, out], the network's raw outputs on the query set; a list of
            [rows_t, out] where xq came as a list; rows beyond a task's query size are 0.
    """

    loss: Tensor
    task_losses: Tensor
    predictions: Tensor | list[Tensor]


def _one_optimizer(lr: Any, optimizer: Any) -> float | LearnableLR:
    """The step size given by exactly one of `lr` and `optimizer`."""
    if (lr is None) == (optimizer is None):
        both = "neither" if lr is None else "both"
        raise ValueError(f"lr, optimizer: expected exactly one of them, got {both}")
    if optimizer is not None:
        if not isinstance(optimizer, SGD):
            raise TypeError(f"optimizer: expected pymeta.SGD, got {type(optimizer).__name__}")
        lr = optimizer.lr
    return lr if isinstance(lr, LearnableLR) else check_lr("lr", lr)


def _patterns(adapt: Any) -> tuple[str, ...] | None:
    if adapt is None:
        return None
    if isinstance(adapt, str) or not all(isinstance(p, str) for p in adapt):
        raise TypeError(
            f"adapt: expected a list of patterns such as ['4.*'], got {type(adapt).__name__}"
        )
    return tuple(adapt)


class MAML(nn.Module):
    """Model-agnostic meta-learning of `model` by one native call for each meta-batch.

    Its parameters are the model's own, and `lr` where that is learnable.

    Args:
        model: maps [rows, ...] to [rows, out]. A chain of the layers that the native core
            knows runs there; everything else runs in torch, with one warning.
        loss: "mse", "huber", "cross_entropy", "bce_with_logits", or the torch.nn loss module.
        lr: inner step size, a number or a `LearnableLR`.
        steps: number of inner steps.
        first_order: take inner gradients as constants (FOMAML; Finn et al. 2017, section 5.2).
        adapt: fnmatch patterns of the parameter names that the inner loop changes; None for
            all. Parameters that do not require grad are neither adapted nor given gradients.
        optimizer: `pymeta.SGD(lr)`, instead of `lr`.
        backend: "native", "torch", or "auto": native where possible (or what PYMETA_BACKEND
            says).

    Raises:
        TypeError, ValueError: an argument is not as described; with backend="native", also
            where the native core cannot run the model (the message says why).
    """

    lr: Any  # a float, or the learnable one: a Parameter [n], or [steps, n] where it is per step

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str | nn.Module,
        lr: float | LearnableLR | None = None,
        steps: int,
        first_order: bool = False,
        adapt: Sequence[str] | None = None,
        optimizer: SGD | None = None,
        backend: str = "auto",
    ) -> None:
        """Check the arguments and look at the model."""
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(first_order, bool):
            raise TypeError(f"first_order: expected a bool, got {type(first_order).__name__}")
        rate = _one_optimizer(lr, optimizer)
        self.model = model
        self.loss = describe_loss(loss)
        self.steps = check_steps(steps)
        self.first_order = first_order
        self.adapted_patterns = _patterns(adapt)
        self.backend = native.backend(backend)
        self._per = rate.per if isinstance(rate, LearnableLR) else "network"
        self._plan: Plan | None = None
        self._repeats: dict[bool, Repeat | None] = {}  # by whether grad is enabled
        self._warned = False
        self._fallback_reason: str | None = None
        self._shapes: dict[Any, tuple[int, ...] | None] = {}
        self._learns: tuple[str, ...] | None = None
        plan, _ = self._current()
        if isinstance(rate, LearnableLR):
            self._make_lr(rate, plan)
        else:
            self.lr = rate
        if self.backend == "native" and plan.reason is not None:
            raise ValueError(f'backend="native": {plan.reason}')
        self._handle = _register(self)

    def _make_lr(self, rate: LearnableLR, plan: Plan) -> None:
        """Make the learnable lr a parameter, one column for each value of a step."""
        columns = plan.rates.columns
        shape = (max(self.steps, 1), columns) if rate.per_step else (columns,)
        initial = torch.full(shape, float(rate.initial), dtype=plan.expected.dtype)
        self.lr = nn.Parameter(initial.to(plan.expected.device))
        self._learns = plan.adapted

    # ---- calls --------------------------------------------------------------------------------

    def forward(
        self,
        xs: Rows,
        ys: Rows,
        xq: Rows,
        yq: Rows,
        *,
        steps: int | None = None,
        support_sizes: Sizes = None,
        query_sizes: Sizes = None,
        support_weights: Weights = None,
        query_weights: Weights = None,
    ) -> Outcome:
        """Adapt to every task's support set and evaluate on its query set.

        Where grad is enabled and something requires it, `loss.backward()` gives the exact
        meta-gradient to the parameters, to a learnable lr, and to xs and xq. On the native
        backend that gradient is computed here already, and cannot be differentiated again.

        Args:
            xs: support inputs [T, rows, ...], or a list of T tensors [rows_t, ...].
            ys: support targets: class indices [T, rows] for cross_entropy; otherwise
                [T, rows, out], or [T, rows] where out is 1; a list where xs is one.
            xq: query inputs, like xs, with their own number of rows.
            yq: query targets, like ys.
            steps: the number of inner steps, instead of the one given at construction.
            support_sizes: [T], how many of its rows each task uses, where xs is padded.
            query_sizes: [T], likewise for xq.
            support_weights: [T, rows] (or a list of [rows_t]) weights of the rows' losses.
            query_weights: likewise for the query rows.

        Returns:
            The `Outcome`.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a wrong shape or device, a label, size or weight out of range, a set of
                one row under batch normalisation, a normalisation layer that would use running
                statistics; with backend="native" also whatever only torch could run.
        """
        if torch.compiler.is_compiling():
            return self._compiled(
                (xs, ys, support_sizes, support_weights),
                (xq, yq, query_sizes, query_weights),
                steps,
            )
        plain = steps is support_sizes is query_sizes is support_weights is query_weights is None
        if plain:
            repeat = self._repeats.get(torch.is_grad_enabled())
            results = None if repeat is None else repeat(self.__dict__, xs, ys, xq, yq)
            if results is not None:
                return Outcome(*results)
        plan, parameters = self._current()
        steps = self.steps if steps is None else check_steps(steps)
        support = task_set(SUPPORT, xs, ys, support_sizes, support_weights, plan.expected)
        query = task_set(QUERY, xq, yq, query_sizes, query_weights, plan.expected)
        check_same_tasks(support, query)
        reason = self._reason(plan, support, query)
        if reason is not None:
            return self._in_torch(plan, parameters, steps, support, query, reason)
        lr = self._lr(plan)
        call, native_lr = fused.prepared(plan, lr, steps, self.first_order, support, query)
        results = call(
            parameters, native_lr, support.x, query.x, native.rows(support), native.rows(query)
        )
        if query.lengths is not None:
            loss, losses, predictions = results
            return Outcome(loss, losses, shaped(predictions, query))
        if plain and native_lr is lr:
            data = (xs, ys, xq, yq)
            repeat = Repeat.of(call, support, query, data, lr, self.__dict__)
            self._repeats[torch.is_grad_enabled()] = repeat
        return Outcome(*results)

    def adapt(
        self,
        xs: Rows,
        ys: Rows,
        *,
        steps: int | None = None,
        support_sizes: Sizes = None,
        support_weights: Weights = None,
    ) -> Adapted:
        """The models adapted to T tasks, without any graph.

        Args:
            xs: support inputs, as in `forward`.
            ys: support targets, as in `forward`.
            steps: the number of inner steps, instead of the one given at construction.
            support_sizes: as in `forward`.
            support_weights: as in `forward`.

        Returns:
            T models: `models(xq)`, `models[t]`, `models.parameters`.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        with torch.no_grad():
            plan, parameters = self._current()
            steps = self.steps if steps is None else check_steps(steps)
            support = task_set(SUPPORT, xs, ys, support_sizes, support_weights, plan.expected)
            reason = self._reason(plan, support)
            lr = self._lr(plan)
            if reason is None:
                stacked = fused.adapt(plan, parameters, lr, steps, support)
            else:
                check_statistics(self.model)
                self._fall_back(reason, 3)
                expected = self._expected(plan, support)
                check_values(support, expected)
                named = {n: p.detach() for n, p in zip(plan.names, parameters, strict=True)}
                inner = reference.InnerLoop(self.loss, lr, plan.rates, steps)
                stacked = reference.adapt(self.model, named, plan.adapted, inner, support)
            shared = {
                name: p.detach().clone()
                for name, p in zip(plan.names, parameters, strict=True)
                if name not in stacked
            }
            return Adapted(self.model, plan, stacked, shared, support.tasks, reason is None)

    # ---- the torch backend --------------------------------------------------------------------

    def _in_torch(
        self,
        plan: Plan,
        parameters: list[Tensor],
        steps: int,
        support: TaskSet,
        query: TaskSet,
        reason: str,
    ) -> Outcome:
        """The call by `reference.py`."""
        check_statistics(self.model)
        self._fall_back(reason, 6)
        expected = self._expected(plan, support)
        check_values(support, expected)
        check_values(query, expected)
        named = dict(zip(plan.names, parameters, strict=True))
        inner = reference.InnerLoop(self.loss, self._lr(plan), plan.rates, steps, self.first_order)
        loss, losses, predictions = reference.meta_loss(
            self.model, named, plan.adapted, inner, support, query
        )
        if query.tasks == 0:
            out = self._output_shape(plan, query)
            predictions = query.x.new_zeros(0, query.rows, *out, dtype=expected.dtype)
        return Outcome(loss, losses.detach(), shaped(predictions, query))

    def _expected(self, plan: Plan, s: TaskSet) -> Expected:
        """What the inputs must be like; for a model that is no chain, find its output's width."""
        if plan.expected.out_features is not None or not plan.expected.loss.takes_classes:
            return plan.expected
        shape = self._output_shape(plan, s)
        if len(shape) != 1:
            return plan.expected
        e = plan.expected
        return Expected(e.loss, e.dtype, e.device, None, shape[0], e.flattens, e.batch_norm)

    def _output_shape(self, plan: Plan, s: TaskSet) -> tuple[int, ...]:
        if plan.expected.out_features is not None:
            return (plan.expected.out_features,)
        features = tuple(s.x.shape[1 if s.starts is not None else 2 :])
        key = (features, s.x.dtype)
        if key not in self._shapes:
            self._shapes[key] = reference.output_shape(self.model, features, s.x.dtype)
        return self._shapes[key] or ()

    def _fall_back(self, reason: str, frames: int) -> None:
        """Note why torch runs: an error, a warning (once), or what was asked for.

        `frames` is how many calls lie between here and the user's, for the warning to name it.
        """
        if self.backend == "torch":
            return
        if self.backend == "native":
            raise ValueError(f'backend="native": {reason}')
        self._fallback_reason = reason
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"pymeta.MAML runs in torch, which is slower: {reason}",
                UserWarning,
                stacklevel=frames,
            )

    # ---- the model as it is now ---------------------------------------------------------------

    def _current(self) -> tuple[Plan, list[Tensor]]:
        """The plan for the model as it is now, and its parameters in order."""
        plan = self.__dict__["_plan"]
        if plan is not None:
            parameters = plan.current_parameters()
            if parameters is not None:
                return plan, parameters
        with reference.one_at_a_time():
            return self._looked_at_anew(plan)

    def _looked_at_anew(self, plan: Plan | None) -> tuple[Plan, list[Tensor]]:
        """As `_current`, where the model may have changed and nobody is just calling it."""
        parameters = None if plan is None else plan.current_parameters()
        if plan is not None and parameters is not None:
            return plan, parameters
        self._shapes, self._repeats = {}, {}
        plan = Plan(self.model, self.loss, self.adapted_patterns, self._per)
        if self._learns is not None and self._learns != plan.adapted:
            raise ValueError(
                f"model: a learnable lr was made for the adapted parameters "
                f"{', '.join(self._learns)}, but now they are {', '.join(plan.adapted)}"
            )
        self._plan = plan
        return plan, plan.parameters

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

    def _reason(self, plan: Plan, *sets: TaskSet) -> str | None:
        """Why this call runs in torch; None where the native core does it."""
        if self.backend == "torch":
            return 'backend="torch" was asked for'
        if plan.reason is not None:
            return plan.reason
        for s in sets:
            if s.reason is not None:
                return s.reason
            if torch.is_grad_enabled():
                for name, value in ((s.names.y, s.y), (s.names.weights, s.weights)):
                    if value is not None and value.requires_grad:
                        return f"{name} requires grad, which the native core has no gradient for"
        return None

    def explain(self) -> str:
        """Which path runs, and why: "native-cpu avx512 lanes: ..." or "torch: ..."."""
        plan, _ = self._current()
        if self.backend == "torch":
            return 'torch: backend="torch" was asked for'
        if plan.reason is not None:
            return f"torch: {plan.reason}"
        chain = " ".join(str(layer[0]) for layer in plan.description.layers)  # type: ignore
        text = f"native-cpu {native.isa()}"
        if plan.last is None:
            text += f" {native.executor()}: {chain}"
        else:
            tasks, support, query, steps, second = plan.last
            p = plan.problem.plan(plan.dtype_code, steps, tasks, support, query, second)
            text = (
                f"native-cpu {p['isa']} {p['executor']}: {chain}; the last call had {tasks} "
                f"tasks, {steps} steps, {p['threads']} threads, "
                f"{p['workspace_bytes']} bytes of workspace each"
            )
        if self._fallback_reason is not None:
            text += f"; some calls ran in torch: {self._fallback_reason}"
        return text

    # ---- torch.compile, copies ----------------------------------------------------------------

    def _compiled(self, support: tuple, query: tuple, steps: int | None) -> Outcome:
        from pymeta import compiled

        return compiled.forward(self, support, query, steps)

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle: everything but what is derived from the model."""
        state = self.__dict__.copy()
        state.update(_plan=None, _repeats={}, _handle=None, _shapes={})
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled state."""
        super().__setstate__(state)
        self._handle = _register(self)

    def extra_repr(self) -> str:
        """What `repr` shows besides the model."""
        lr = "learnable" if self._learns is not None else self.lr
        return f"loss={self.loss.kind}, lr={lr}, steps={self.steps}, backend={self.backend}"


def _register(maml: MAML) -> int:
    from pymeta import compiled

    return compiled.register(maml)
