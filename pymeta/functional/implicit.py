"""Implicit gradients of adapted parameters: conjugate gradients for all tasks at once.

Rajeswaran et al. 2019 (arXiv:1909.04630). With phi the minimum of a task's loss L(phi) +
strength/2 |phi - start|^2, and v what flows into it,

    x      = (I + H / strength)^-1 v                  the gradient by the start
    w      = -(1 / strength) (d/dw grad L)^T x      that by anything else in L_t
    s      = -(1 / strength) x . (phi - start)        that by the strength

One step of gradient descent from phi, at rate r, has the derivative I - r H by phi and
-r (d/dw grad L)^T by w. So the operator at steps=1 is all that is needed: at r = -1/strength its
vector-Jacobian product is one of CG's products, and at r = 1/strength it is the line of w.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from pymeta import native, reference
from pymeta.backend.gradients import Extras, Wanted
from pymeta.backend.node import with_graph
from pymeta.backend.plan import Plan
from pymeta.backend.prepared import CHANGED, prepare, versions_of
from pymeta.backend.recipe import Recipe
from pymeta.spec.implicit import Implicit
from pymeta.spec.inner import InnerLoop
from pymeta.spec.schedule import Schedule
from pymeta.spec.show import counted
from pymeta.tasks.task_set import TaskSet, dense

IMPLICIT = "an implicit meta-gradient cannot be differentiated again"

# What flows into each adapted parameter [T, ...].
Vector: TypeAlias = list[Tensor]


class Minimum(NamedTuple):
    """Where the tasks were adapted to, and what of.

    Attributes:
        model: the module.
        plan: of it, with plain SGD and one step size, and without an anchor.
        shared: the parameters in order; any where tasks have their own.
        start: {name: [T, ...]} of what tasks have of their own.
        adapted: {name: [T, ...]} without a graph.
        support: T tasks.
        strengths: [T], or [] for all.
        in_torch: whether the reference computes.
    """

    model: nn.Module
    plan: Plan
    shared: list[Tensor]
    start: dict[str, Tensor]
    adapted: dict[str, Tensor]
    support: TaskSet
    strengths: Tensor
    in_torch: bool

    @property
    def operands(self) -> list[Tensor]:
        """The parameters in order, [T, ...] of what is adapted."""
        own = {**self.start, **self.adapted}
        return [own.get(n, p) for n, p in zip(self.plan.names, self.shared, strict=True)]

    def part(self, first: int, last: int) -> Minimum:
        """The tasks first .. last-1; views of this one's memory."""
        strengths = self.strengths
        return self._replace(
            start={n: p[first:last] for n, p in self.start.items()},
            adapted={n: p[first:last] for n, p in self.adapted.items()},
            support=self.support.part(first, last),
            strengths=strengths[first:last] if strengths.ndim else strengths,
        )

    @property
    def starts(self) -> dict[str, Tensor]:
        """Where what is adapted started, shared or [T, ...]."""
        named = dict(zip(self.plan.names, self.shared, strict=True))
        return {name: self.start.get(name, named[name]) for name in self.adapted}

    @property
    def sources(self) -> dict[str, Tensor]:
        """What the minimum depends on besides: other parameters by name, the rows' by ".xs"."""
        named = zip(self.plan.names, self.shared, strict=True)
        found = {n: self.start.get(n, p) for n, p in named if n not in self.adapted}
        s = self.support
        rows = {".xs": s.x, ".ys": s.y, ".support_weights": s.weights, ".support_offset": s.offset}
        return {**found, **{n: v for n, v in rows.items() if v is not None}}


def with_implicit_graph(minimum: Minimum, implicit: Implicit) -> dict[str, Tensor]:
    """The adapted parameters, with the implicit gradients' node where grad is enabled."""
    adapted = minimum.adapted
    if not torch.is_grad_enabled() or not adapted:
        return adapted
    call = Solve(minimum, implicit)
    if not call.inputs:
        return adapted
    outputs = with_graph(call, tuple(adapted.values()))
    return dict(zip(adapted, outputs, strict=True))


STRENGTHS = ".anchor"


class Solve:
    """What the node needs to go back through the minimum.

    Attributes:
        names: of what its gradients are by, in their order: parameters by name, the rows' by
            ".xs", the strengths of the pull by `STRENGTHS`.
        inputs: the same, themselves.
    """

    def __init__(
        self, minimum: Minimum, implicit: Implicit, wanted: Collection[str] | None = None
    ) -> None:
        """`wanted` names what gradients are wanted by; None for all that requires grad."""
        self.why_once = IMPLICIT
        self._minimum, self._implicit = minimum, implicit
        every = {**minimum.starts, **minimum.sources, STRENGTHS: minimum.strengths}
        if wanted is None:
            wanted = {name for name, value in every.items() if value.requires_grad}
        self._starts = {n: v for n, v in minimum.starts.items() if n in wanted}
        sources = minimum.sources
        self._sources = [name for name in sources if name in wanted]
        self._by_strength = STRENGTHS in wanted
        self.names = [*self._starts, *self._sources, *[STRENGTHS] * self._by_strength]
        self.inputs = [every[name] for name in self.names]
        self._read = [*minimum.adapted.values(), *sources.values()]
        self._versions = versions_of(self._read)

    @torch.no_grad()
    def backward(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor] | None:
        """The gradients of the inputs; None where no gradients come."""
        if all(g is None for g in gradients):
            return None
        if versions_of(self._read) != self._versions:
            raise RuntimeError(CHANGED)
        m = self._minimum
        v = [
            torch.zeros_like(phi) if g is None else dense(g.detach())
            for g, phi in zip(gradients, m.adapted.values(), strict=True)
        ]
        solved = self._solved(v)
        x = dict(zip(m.adapted, solved, strict=True))
        found = [x[n] if n in m.start else _sum_of_tasks(x[n], p) for n, p in self._starts.items()]
        if self._sources:
            by_name = _step(m, 1, self._sources).by_sources(solved)
            found += [by_name[name] for name in self._sources]
        if self._by_strength:
            found.append(self._by_strengths(solved))
        return found

    def _solved(self, v: Vector) -> Vector:
        """The solution for all tasks, in blocks whose vectors stay in cache."""
        tasks, m = len(v[0]), self._minimum
        size = sum(part[0].numel() for part in v) if tasks else 1
        block = max(32 * native.num_threads(), 16 * -(-_BLOCK // (16 * size)))
        if m.in_torch or m.plan.device is not None or tasks <= block:
            block = max(tasks, 1)
        solver, x = Solver(self._implicit), [torch.empty_like(part) for part in v]
        for first in range(0, tasks, block):
            last = min(first + block, tasks)
            product = _step(m.part(first, last), -1, []).by_start
            solver(product, [p[first:last] for p in v], [p[first:last] for p in x])
        solver.warn()
        return x

    def _by_strengths(self, x: Vector) -> Tensor:
        m = self._minimum
        pairs = zip(m.adapted.values(), m.starts.values(), strict=True)
        by = -dots(x, [phi - start.detach() for phi, start in pairs]) / m.strengths.detach()
        return by if m.strengths.ndim else by.sum()


_BLOCK = 2**19  # elements of a vector: a few of them fit into the last cache


def _sum_of_tasks(values: Tensor, like: Tensor) -> Tensor:
    """[T, ...] summed over the tasks in their order, on any number of threads."""
    if values.is_cpu:
        return torch.from_numpy(np.asarray(np.add.reduce(values.numpy(), axis=0))).view(like.shape)
    return values.sum(0).view(like.shape)


# ---- one step from the minimum ------------------------------------------------------------------


def _rates(minimum: Minimum, sign: int) -> tuple[Tensor, bool]:
    """Step sizes sign / strength, and whether they are each task's."""
    rates = sign / minimum.strengths.detach()
    return (rates.reshape(-1, 1, 1), True) if rates.ndim else (rates.reshape(1), False)


def _step(minimum: Minimum, sign: int, wanted: list[str]) -> _NativeStep | _TorchStep:
    """The step at the rate sign / strength."""
    make = _TorchStep if minimum.in_torch else _NativeStep
    with torch.enable_grad():  # rows whose weights' gradients are wanted count
        return make(minimum, sign, wanted)


class _NativeStep:
    """The step's vector-Jacobian products by the native core."""

    def __init__(self, minimum: Minimum, sign: int, wanted: list[str]) -> None:
        plan = minimum.plan
        rates, per_task = _rates(minimum, sign)
        own = (*minimum.adapted, *(n for n in minimum.start if n not in minimum.adapted))
        recipe = Recipe(1, False, own=own, per_task_lr=per_task)
        extras = [f".{name}" for name in Extras._fields]
        names = wanted or list(minimum.adapted)
        self._names = sorted(names, key=[*plan.names, *extras].index)  # as the core has them
        self._adapted = list(minimum.adapted)
        trains = [name in names for name in plan.names]
        by = cast(Wanted, (any(trains), *(name in names for name in extras)))
        operands = [p.detach() for p in minimum.operands]
        self._call, self._read = prepare(
            plan, recipe, operands, rates, minimum.support, None, by, trains
        )
        self._operands = operands

    def _back(self, u: Vector) -> dict[str, Tensor]:
        found = self._call.vjp(self._operands, self._read, None, None, u)
        return dict(zip(self._names, found, strict=True))

    def by_start(self, u: Vector) -> Vector:
        """The product by where the step begins."""
        found = self._back(u)
        return [found[name] for name in self._adapted]

    def by_sources(self, u: Vector) -> dict[str, Tensor]:
        """The products by the wanted sources."""
        return self._back(u)


class _TorchStep:
    """The same by the reference: one graph of the step, gone back through for each product."""

    def __init__(self, minimum: Minimum, sign: int, wanted: list[str]) -> None:
        m, plan = minimum, minimum.plan
        rates, per_task = _rates(minimum, sign)
        inner = InnerLoop(plan.expected.loss, rates, plan.rates, Schedule(1))
        self._at = {n: phi.detach().requires_grad_() for n, phi in m.adapted.items()}
        named = dict(zip(plan.names, m.shared, strict=True))
        done = reference.adapt(
            m.model, named, plan.adapted, inner, m.support, start={**m.start, **self._at},
            rates=rates if per_task else None,
        )  # fmt: skip
        self._stepped = [done.parameters[name] for name in m.adapted]
        self._sources = {name: m.sources[name] for name in wanted}

    def _by(self, tensors: Sequence[Tensor], u: Vector) -> list[Tensor]:
        return list(
            torch.autograd.grad(
                self._stepped, tensors, u, retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )
        )  # fmt: skip

    def by_start(self, u: Vector) -> Vector:
        """The product by where the step begins."""
        return self._by(list(self._at.values()), u)

    def by_sources(self, u: Vector) -> dict[str, Tensor]:
        """The products by the wanted sources."""
        found = self._by(list(self._sources.values()), u)
        return dict(zip(self._sources, found, strict=True))


# ---- conjugate gradients ------------------------------------------------------------------------


def dots(a: Vector, b: Vector) -> Tensor:
    """[T]: each task's inner product of two vectors.

    On the CPU by numpy, whose sum along a row does not depend on how many rows there are: a task's
    bits are its own.
    """
    total = a[0].new_zeros(len(a[0]))
    for p, q in zip(a, b, strict=True):
        p, q = p.reshape(len(p), -1), q.reshape(len(q), -1)
        if p.is_cpu:
            total = total + torch.from_numpy(np.einsum("ij,ij->i", p.numpy(), q.numpy()))
        else:
            total = total + (p * q).sum(1)
    return total


def _as(factor: Tensor, part: Tensor) -> Tensor:
    """[T] factors in a form that multiplies [T, ...]."""
    return factor.view(-1, *[1] * (part.ndim - 1))


class Solver:
    """Conjugate gradients (Hestenes and Stiefel 1952) for each of many tasks.

    Tasks go together, each with its own step lengths; one whose residual is small enough stays as
    it is. Where a direction p has p . A p <= 0, A is not positive definite: that task stops, with
    v itself (a gradient of first order) if it has nothing yet; `warn` says how many there were.
    """

    def __init__(self, implicit: Implicit) -> None:
        """Say how many steps there are, and how small a residual is to be."""
        self._implicit = implicit
        self._curved: list[Tensor] = []

    def __call__(self, product: Callable[[Vector], Vector], v: Vector, x: Vector) -> None:
        """X of A x = v.

        Args:
            product: A times a vector, of all tasks.
            v: [T, ...] each, contiguous.
            x: likewise; the result goes there.
        """
        r, p = [part.clone() for part in v], [part.clone() for part in v]
        norms = rest = dots(r, r)
        least = max(self._implicit.tolerance, torch.finfo(norms.dtype).eps)
        small = least * least * norms
        stopped = norms == 0
        curved, zero = torch.zeros_like(stopped), torch.zeros_like(norms)
        for to in x:
            to.zero_()
        for step in range(self._implicit.cg_steps):
            ap = product(p)
            along = dots(p, ap)
            bad = (along <= 0) & ~stopped
            curved, stopped = curved | bad, stopped | bad
            if step == 0 and not (bad.is_cpu and not bool(bad.any())):
                first = bad.to(norms.dtype)
                for to, part in zip(x, v, strict=True):
                    to.addcmul_(part, _as(first, part))
            alpha = torch.where(stopped, zero, rest / along)
            for to, part in zip(x, p, strict=True):
                to.addcmul_(part, _as(alpha, part))
            if step + 1 == self._implicit.cg_steps:
                break
            for to, part in zip(r, ap, strict=True):
                to.addcmul_(part, _as(alpha, part), value=-1)
            after = dots(r, r)
            stopped = stopped | (after <= small)
            if stopped.is_cpu and bool(stopped.all()):
                break
            beta = torch.where(stopped, zero, after / rest)
            for to, part in zip(p, r, strict=True):
                torch.addcmul(part, to, _as(beta, part), out=to)
            rest = after
        self._curved.append(curved)

    def warn(self) -> None:
        """Say of how many tasks the system was not positive definite; not on a device."""
        count = sum(int(c.sum()) for c in self._curved if c.is_cpu)
        if count:
            warnings.warn(
                f"implicit: the loss of {count} of "
                f"{counted(sum(map(len, self._curved)), 'task')}, with its "
                f"pull to the start, curves downwards where they were adapted to; a larger "
                f"strength, or more inner steps, make a minimum of it",
                UserWarning,
                stacklevel=2,
            )
