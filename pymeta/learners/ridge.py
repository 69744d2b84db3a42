"""`RidgeHead`: features by a network, the last layer exact for each task.

Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers" (arXiv:1805.08136):
ridge regression (R2-D2) and logistic regression by Newton's method (LR-D2). Here the last layer W
of a task has a prior, learned over tasks: a mean W0 and a precision for each feature,

    ridge     min_W  1/2 sum_r w_r |y_r - W' f_r|^2 + 1/2 sum_i p_i |W_i - W0_i|^2
    newton    min_W      sum_r w_r loss(W' f_r, y_r) + 1/2 sum_i p_i |W_i - W0_i|^2

so that a task of few rows stays near W0, and one of many is free: with an identity for an encoder
this is empirical Bayes (Vasicek's betas). Ridge solves the normal equations, or their dual for
tasks of fewer rows than features, by Cholesky of all such tasks at once. Which of them depends on
the task alone: the normal equations of few rows lose digits as 1 / p. Newton's method runs without
a graph until it stands; one more step, with the graph, has exactly the gradient of the minimum (its
implicit derivative), whatever the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pymeta.learners.base import EncodedLearner, State, check_loss
from pymeta.learners.rows import Flat, columns, grouped, merged, times_own
from pymeta.spec.losses import Loss
from pymeta.spec.show import counted

_MOST_STEPS = 50
_HALVINGS = 30


class RidgeHead(EncodedLearner):
    """A network's features, and for each task the best last layer on top.

    Args:
        encoder: maps rows [N, ...] to features [N, features].
        features: how many there are.
        outputs: how many outputs: numbers, logits, or classes.
        loss: "mse", "bce_with_logits" or "cross_entropy".
        solver: "ridge" or "newton"; None for "ridge" with mse, else "newton". Ridge for classes is
            R2-D2: the regression of their indicators, scaled and shifted (both learned) to logits.
        precision: the prior's, at the beginning; more keeps tasks nearer to the prior mean.
        bias: whether there is a feature that is always 1.
        learn_prior: whether mean and precision are learned; False for 0 and `precision` as it is.

    Attributes:
        prior_mean: [features (+ 1), outputs], W0.
        log_precision: [features (+ 1)].

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch
        >>> from pymeta.learners import RidgeHead
        >>> head = RidgeHead(torch.nn.Identity(), features=1, outputs=1, loss="mse", bias=False)
        >>> x = torch.tensor([[[1.0], [2.0]]])
        >>> head.adapt(x, 3 * x)(x).round(decimals=2)      # 3 * 5 / (5 + 1): drawn towards 0
        tensor([[[2.5000],
                 [5.0000]]])
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        features: int,
        outputs: int,
        loss: str | nn.Module,
        solver: str | None = None,
        precision: float = 1.0,
        bias: bool = True,
        learn_prior: bool = True,
    ) -> None:
        """Check the arguments and make the prior."""
        described = check_loss(loss, ("mse", "bce_with_logits", "cross_entropy"))
        super().__init__(encoder, described)
        if solver is None:
            solver = "ridge" if described.kind == "mse" else "newton"
        if solver not in ("ridge", "newton"):
            raise ValueError(f"solver: expected 'ridge', 'newton' or None, got {solver!r}")
        if solver == "newton" and described.kind == "mse":
            raise ValueError("solver: expected 'ridge' with mse, which it solves exactly")
        if not precision > 0 or not math.isfinite(precision):
            raise ValueError(f"precision: expected a number > 0, got {precision!r}")
        self.features, self.outputs = _count("features", features), _count("outputs", outputs)
        self.solver, self.bias = solver, bool(bias)
        rows = self.features + self.bias
        self.prior_mean = nn.Parameter(torch.zeros(rows, self.outputs), learn_prior)
        self.log_precision = nn.Parameter(torch.full((rows,), math.log(precision)), learn_prior)
        if solver == "ridge" and described.kind != "mse":
            self.scale = nn.Parameter(torch.ones(()))
            self.shift = nn.Parameter(torch.zeros(()))

    def _out_features(self) -> int:
        return self.outputs

    def _fit(self, features: Tensor, support: Flat) -> State:
        f = with_bias(self, features)
        w = support.row_weights(f)
        assert support.y is not None
        p, w0 = self.log_precision.exp(), self.prior_mean
        if self.solver == "ridge":
            y = _indicators(self.loss, support.y, self.outputs, f)
            if support.offset is not None:
                y = y - self._linear_offset(support.offset)
            return {"weights": ridge(support, f, y, w, p, w0)}
        problem = _Classes if self.loss.takes_classes else _Logits
        return {"weights": _newton(problem(support, f, support.y, w, p, w0))}

    def _predict(
        self, state: State, features: Tensor, task: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        outputs = times_own(with_bias(self, features), state["weights"], task)
        if self.solver == "ridge" and self.loss.kind != "mse":
            outputs = self.scale * outputs + self.shift
        return outputs, None

    def _linear_offset(self, offset: Tensor) -> Tensor:
        """The offset in what is regressed on; logits are none of that."""
        if self.loss.kind != "mse":
            raise ValueError(
                f"support_offset: expected None with solver='ridge' and {self.loss.kind}, whose "
                f"indicators have no logits; use solver='newton'"
            )
        return offset


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    return value


def with_bias(head: RidgeHead | nn.Module, features: Tensor) -> Tensor:
    """The features, and behind them one that is 1, where the head has that."""
    wanted = head.features
    if features.shape[1] != wanted:
        raise ValueError(f"encoder: expected {counted(wanted, 'feature')}, got {features.shape[1]}")
    if not head.bias:
        return features
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


def _indicators(loss: Loss, y: Tensor, outputs: int, like: Tensor) -> Tensor:
    """What is regressed on: numbers as they are; classes as -1 and 1."""
    if loss.takes_classes:
        return 2 * shares(y, outputs, like) - 1
    y = columns(y)
    return 2 * y - 1 if loss.kind == "bce_with_logits" else y


def shares(y: Tensor, classes: int, like: Tensor) -> Tensor:
    """Labels [N] as shares of the classes [N, classes]; distributions as they are."""
    return y if y.is_floating_point() else F.one_hot(y, classes).to(like.dtype)


def ridge(rows: Flat, f: Tensor, y: Tensor, w: Tensor, p: Tensor, w0: Tensor) -> Tensor:
    """The minimum for each task: [T, d, out].

    Args:
        rows: whose each row is.
        f: [N, d], features.
        y: [N, out].
        w: [N], weights.
        p: [d], the prior's precision.
        w0: [d, out], its mean.
    """
    root = w.sqrt().unsqueeze(-1)

    def dual(g: Tensor, residual: Tensor) -> Tensor:  # as many equations as rows
        scaled = g / p
        inner = scaled @ g.mT + torch.eye(g.shape[1], dtype=f.dtype, device=f.device)
        return w0 + scaled.mT @ solve(inner, residual)

    def primal(g: Tensor, residual: Tensor) -> Tensor:
        return w0 + solve(g.mT @ g + torch.diag(p), g.mT @ residual)

    return _Sizes(rows, len(p)).either(dual, primal, root * f, root * (y - f @ w0))


class _Sizes:
    """Which tasks have fewer rows than there are features.

    What is chosen by that is chosen for each task by itself: its neighbours do not matter.
    """

    def __init__(self, rows: Flat, features: int) -> None:
        self.rows = grouped(rows.task, rows.tasks)  # without gaps where rows do not count
        sizes = torch.bincount(rows.task, minlength=rows.tasks)
        self.few = sizes < features
        self.some, self.all = bool(self.few.any()), bool(self.few.all())
        self.most = int(sizes[self.few].max()) if self.some else 0

    def either(
        self, few: Callable[..., Tensor], many: Callable[..., Tensor], *values: Tensor
    ) -> Tensor:
        """[T, ...]: by `few` or `many`, which take values of the rows [N, ...] as [T', R, ...]."""
        return self.of_tasks(few, many, *(self.rows.padded(v) for v in values))

    def of_tasks(
        self, few: Callable[..., Tensor], many: Callable[..., Tensor], *padded: Tensor
    ) -> Tensor:
        """Likewise, of what is [T, R, ...] already."""
        if self.all or not self.some:
            return (few if self.all else many)(*padded)
        found = few(*(v[self.few][:, : self.most] for v in padded))
        return merged(self.few, found, many(*(v[~self.few] for v in padded)))


class Unsolvable(ValueError):
    """A task's equations have no solution in the dtype they are in."""


def cholesky(matrices: Tensor) -> Tensor:
    """The lower factors of positive definite matrices [..., n, n]; NaN of one that is not finite.

    Raises:
        Unsolvable: one that is finite has none, for its eigenvalues are too far apart.
    """
    factors: Tensor
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if not bool(failed.any()):
        return factors
    lacks = (failed != 0)[..., None, None]
    if bool((lacks & matrices.isfinite().all(-1, True).all(-2, True)).any()):
        raise Unsolvable(
            f"xs: a task's equations have no solution in {str(matrices.dtype).split('.')[-1]}: its "
            f"features are too large for the prior's precision; make them smaller, begin with a "
            f"larger precision=, or use float64"
        )
    return factors.masked_fill(lacks, math.nan)


def solve(matrices: Tensor, right: Tensor) -> Tensor:
    """Solutions with positive definite matrices [T, n, n] of right sides [T, n, m]."""
    return torch.cholesky_solve(right, cholesky(matrices))


# ---- Newton's method --------------------------------------------------------------------------


class _Logits:
    """Independent logits, a problem for each task and output: [T * out] of d unknowns."""

    def __init__(self, rows: Flat, f: Tensor, y: Tensor, w: Tensor, p: Tensor, w0: Tensor) -> None:
        self.sizes, offset = _Sizes(rows, len(p)), rows.offset
        rows = self.sizes.rows
        self.tasks, self.outputs = rows.tasks, w0.shape[1]
        self.f, self.w = rows.padded(f), rows.padded(w)  # [T, R, d], [T, R]
        self.y = rows.padded(columns(y))  # [T, R, out]
        self.offset = 0.0 if offset is None else rows.padded(offset)
        self.p = p
        self.prior = w0.T.expand(self.tasks, -1, -1)  # [T, out, d]

    def start(self) -> Tensor:
        return self.prior.reshape(-1, self.prior.shape[-1])

    def value(self, flat: Tensor) -> Tensor:
        v = flat.view(self.prior.shape)
        z = self.f @ v.mT + self.offset
        each = F.binary_cross_entropy_with_logits(z, self.y, reduction="none")
        pull = (self.p * (v - self.prior).square()).sum(-1) / 2
        return ((self.w.unsqueeze(-1) * each).sum(1) + pull).reshape(-1)

    def step(self, flat: Tensor) -> Tensor:
        v = flat.view(self.prior.shape)
        chance = (self.f @ v.mT + self.offset).sigmoid()
        slope = self.w.unsqueeze(-1) * (chance - self.y)  # [T, R, out]
        gradient = slope.mT @ self.f + self.p * (v - self.prior)  # [T, out, d]
        curve = self.w.unsqueeze(-1) * chance * (1 - chance)
        return self._solved(curve.detach(), gradient).reshape(flat.shape)

    def _solved(self, curve: Tensor, right: Tensor) -> Tensor:
        """The inverse Hessian of curves [T, R, out] times [T, out, d]; it is a constant."""
        p = self.p.detach()

        def primal(curve: Tensor, f: Tensor, right: Tensor) -> Tensor:
            hessian = torch.einsum("tro,tri,trj->toij", curve, f, f) + torch.diag(p)
            return solve(hessian, right.unsqueeze(-1)).squeeze(-1)

        def dual(curve: Tensor, f: Tensor, right: Tensor) -> Tensor:  # as many equations as rows
            root = curve.mT.sqrt()
            alike = (f / p) @ f.mT
            inner = root.unsqueeze(-1) * root.unsqueeze(-2) * alike.unsqueeze(1)
            inner = inner + torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
            own = right / p
            solved = solve(inner, (root * (own @ f.mT)).unsqueeze(-1)).squeeze(-1)
            return own - (root * solved) @ f / p

        rights = right.unsqueeze(1)  # [T, 1, out, d]: its rows are no rows of the task
        return self.sizes.of_tasks(
            lambda c, f, r: dual(c, f, r[:, 0]), lambda c, f, r: primal(c, f, r[:, 0]),
            curve, self.f.detach(), rights,
        )  # fmt: skip

    def weights(self, flat: Tensor) -> Tensor:
        return flat.view(self.prior.shape).mT


class _Classes:
    """The softmax over classes, a problem for each task: [T] of d * out unknowns."""

    def __init__(self, rows: Flat, f: Tensor, y: Tensor, w: Tensor, p: Tensor, w0: Tensor) -> None:
        self.tasks = rows.tasks
        self.f, self.w = rows.padded(f), rows.padded(w)
        self.y = rows.padded(shares(y, w0.shape[1], f))
        self.offset = 0.0 if rows.offset is None else rows.padded(rows.offset)
        self.p, self.prior = p, w0  # [d], [d, out]

    def start(self) -> Tensor:
        return self.prior.reshape(-1).expand(self.tasks, -1)

    def value(self, flat: Tensor) -> Tensor:
        v = self.weights(flat)
        each = -(self.y * (self.f @ v + self.offset).log_softmax(-1)).sum(-1)
        pull = (self.p.unsqueeze(-1) * (v - self.prior).square()).sum((1, 2)) / 2
        return (self.w * each).sum(1) + pull

    def step(self, flat: Tensor) -> Tensor:
        v = self.weights(flat)
        chance = (self.f @ v + self.offset).softmax(-1)
        slope = self.w.unsqueeze(-1) * (chance - self.y)
        gradient = self.f.mT @ slope + self.p.unsqueeze(-1) * (v - self.prior)
        known, f = chance.detach(), self.f.detach()  # the Hessian is a constant
        curve = torch.diag_embed(known) - known.unsqueeze(-1) * known.unsqueeze(-2)
        curve = self.w.detach()[..., None, None] * curve  # [T, R, out, out]
        hessian = torch.einsum("trab,tri,trj->tiajb", curve, f, f)
        n = flat.shape[1]
        prior = torch.diag(self.p.detach().repeat_interleave(v.shape[-1]))
        full = hessian.reshape(self.tasks, n, n) + prior
        return solve(full, gradient.reshape(self.tasks, n, 1)).squeeze(-1)

    def weights(self, flat: Tensor) -> Tensor:
        return flat.view(self.tasks, *self.prior.shape)


def _minimum(problem: _Logits | _Classes) -> Tensor:
    """Newton's method with backtracking, all problems at once, until none moves."""
    at = problem.start().clone()
    value = problem.value(at)
    limit = torch.finfo(at.dtype).eps ** 0.75
    for _ in range(_MOST_STEPS):
        step = problem.step(at)
        if not bool((step.abs().amax(-1) > limit * (1 + at.abs().amax(-1))).any()):
            break
        share = torch.ones_like(value)
        for _ in range(_HALVINGS):
            there = problem.value(at - share.unsqueeze(-1) * step)
            worse = ~(there <= value) & value.isfinite()  # what is not never gets better
            if not bool(worse.any()):
                break
            share = torch.where(worse, share / 2, share)
        better = there < value
        at = torch.where(better.unsqueeze(-1), at - share.unsqueeze(-1) * step, at)
        value = torch.where(better, there, value)
        if not bool(better.any()):
            break
    return at


def _newton(problem: _Logits | _Classes) -> Tensor:
    """The minimum, and through the last step its derivative: [T, d, out].

    There the gradient is 0, so that of the step H^-1 g nothing is left of H's derivative.
    """
    with torch.no_grad():
        at = _minimum(problem)
    found: Tensor = _Once.apply(problem.weights(at - problem.step(at)))  # type: ignore[no-untyped-call]
    return found


class _Once(torch.autograd.Function):
    """The same tensor; to differentiate it twice is an error, for its derivative is that alone."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
