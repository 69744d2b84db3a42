"""MAML under torch.compile: the native call as one operator of torch.library.

Eager calls never come here (they go straight to the binding). While torch.compile traces, the
call becomes the operator `pymeta::meta_gradient`, which names its MAML module by a handle, does
at run time what an eager call does, and returns the gradients next to the loss; its registered
backward only scales them. The operator is registered once for all devices, and so is its fake: it
makes its results where xs is. What the native core cannot run there is left to eager mode, at the
price of a graph break (an error under fullgraph=True).
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from pymeta.backend.plan import Plan
from pymeta.backend.prepared import PreparedCall, Recipe, prepare
from pymeta.spec.modules import Function, outside_graphs
from pymeta.spec.once import NATIVE
from pymeta.tasks.checks import Names
from pymeta.tasks.task_set import QUERY, SUPPORT, TaskSet, check_same_tasks, dense, task_set


class Owner(Protocol):
    """What the operator asks of a `pymeta.MAML`."""

    model: nn.Module
    lr: Any
    steps: int
    first_order: bool
    task_clip: float | None
    backend: str
    _handle: str

    def _current(self) -> tuple[Plan, list[Tensor]]:
        """The plan for the model as it is now, and its parameters."""

    def forward(self, *data: Any, **options: Any) -> Any:
        """The call in eager mode."""


_modules: weakref.WeakValueDictionary[str, Owner] = weakref.WeakValueDictionary()
_handles = itertools.count(1)

Side: TypeAlias = tuple[Any, Any, Any, Any]  # one side's x, y, sizes and weights, in some order


def register(maml: Owner) -> str:
    """A handle by which the operator finds `maml`, for as long as that lives.

    It is a string, because torch.compile before 2.7 takes an integer that differs from module to
    module for a variable.
    """
    handle = f"maml-{next(_handles)}"
    _modules[handle] = maml
    return handle


# ---- the operator -----------------------------------------------------------------------------


def _side(
    names: Names,
    maml: Owner,
    x: Tensor,
    y: Tensor,
    w: Tensor | None,
    sizes: Tensor | None,
    packed: bool,
) -> TaskSet:
    """The task set of what the operator got: packed rows came from a list."""
    plan = maml._current()[0]
    expected = plan.query_expected if names is QUERY else plan.expected
    if not packed:
        return task_set(names, x, y, sizes, w, expected)
    assert sizes is not None
    lengths = sizes.tolist()
    lists = [None if v is None else list(v.split_with_sizes(lengths)) for v in (x, y, w)]
    return task_set(names, lists[0], lists[1], None, lists[2], expected)


# Written out, because torch 2.4 cannot infer it from annotations that are strings.
_SCHEMA = (
    "(str handle, Tensor[] parameters, Tensor? lr, Tensor xs, Tensor ys, "
    "Tensor? support_weights, Tensor? support_sizes, Tensor xq, Tensor yq, "
    "Tensor? query_weights, Tensor? query_sizes, bool[] packed, SymInt steps, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("pymeta::meta_gradient", mutates_args=(), schema=_SCHEMA)
def meta_gradient(
    handle: str,
    parameters: list[Tensor],
    lr: Tensor | None,
    xs: Tensor,
    ys: Tensor,
    support_weights: Tensor | None,
    support_sizes: Tensor | None,
    xq: Tensor,
    yq: Tensor,
    query_weights: Tensor | None,
    query_sizes: Tensor | None,
    packed: list[bool],
    steps: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], task losses [T], predictions, and the flat gradient of the loss.

    `packed` says whether support and query came as lists; `wanted` of which of parameters, lr,
    xs, xq the gradient is wanted. The flat gradient holds them in that order.
    """
    maml = _modules[handle]
    plan, _ = maml._current()
    support = _side(SUPPORT, maml, xs, ys, support_weights, support_sizes, packed[0])
    query = _side(QUERY, maml, xq, yq, query_weights, query_sizes, packed[1])
    check_same_tasks(support, query)
    reason = plan.reason or support.reason or query.reason
    if [(p.shape, p.dtype) for p in parameters] != [(p.shape, p.dtype) for p in plan.parameters]:
        reason = "its parameters have other shapes or dtypes"
    if reason is not None:
        raise RuntimeError(f"the model is not what was compiled: {reason}")
    rate = plan.lr_tensor(maml.lr) if lr is None else lr
    of_extras = (wanted[1], wanted[2], wanted[3], False, False, False, False)
    recipe = Recipe(steps, maml.first_order, task_clip=maml.task_clip or 0.0)
    call, extras = prepare(
        plan, recipe, parameters, rate, support, query,
        (wanted[0] and bool(plan.trainable), *of_extras),
    )  # fmt: skip
    memory = call.memory()
    loss, losses, predictions, _ = call.run([dense(p) for p in parameters], extras, memory)
    assert loss is not None and losses is not None
    flat = losses.new_empty(0) if memory is None else _in_given_order(call, memory.flat, lr)
    predictions = predictions.flatten(0, 1) if _flat(query, packed[1]) else predictions
    return loss, losses, predictions, flat


def _flat(query: TaskSet, packed: bool) -> bool:
    """Whether a list's rows came to be stored as [T, rows, out] and are wanted as [sum, out]."""
    return packed and query.starts is None


def _in_given_order(call: PreparedCall, flat: Tensor, lr: Tensor | None) -> Tensor:
    """The flat gradient, with that of lr in lr's own order (the core may have it permuted)."""
    order = call.plan.lr_order
    layout = call.layout
    if order is None or layout is None or not layout.wanted[1] or lr is None:
        return flat
    first = layout.parameter_total
    part = flat[first : first + lr.numel()].view(lr.shape)
    restored = torch.empty_like(part)
    restored.index_copy_(-1, order, part)
    return torch.cat([flat[:first], restored.flatten(), flat[first + lr.numel() :]])


@meta_gradient.register_fake
def _(
    handle: str, parameters: list[Tensor], lr: Tensor | None, xs: Tensor, ys: Tensor,
    support_weights: Tensor | None, support_sizes: Tensor | None, xq: Tensor, yq: Tensor,
    query_weights: Tensor | None, query_sizes: Tensor | None, packed: list[bool], steps: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan, _ = _modules[handle]._current()
    dtype = plan.expected.dtype
    lead = xq.shape[:1] if packed[1] else xq.shape[:2]
    tasks: int | torch.SymInt = xq.shape[0]
    if packed[1]:
        assert query_sizes is not None
        tasks = query_sizes.shape[0]
    total = plan.total if wanted[0] else 0
    for value, is_wanted in zip((lr, xs, xq), wanted[1:], strict=True):
        if is_wanted and value is not None:
            total = total + value.numel()
    out = plan.expected.out_features
    assert out is not None
    return (
        xs.new_empty((), dtype=dtype),
        xs.new_empty((tasks,), dtype=dtype),
        xs.new_empty((*lead, out), dtype=dtype),
        xs.new_empty((total,), dtype=dtype),
    )


@torch.library.custom_op(
    "pymeta::scaled_once",
    mutates_args=(),
    schema="(Tensor flat, Tensor gradient, Tensor[] origins) -> Tensor",
)
def scaled_once(flat: Tensor, gradient: Tensor, origins: list[Tensor]) -> Tensor:
    """The flat gradient times the incoming scalar; its derivative raises.

    `origins` are what it depends on. They are arguments so that a compiled backward keeps them:
    only then does autograd find that it would have to differentiate it, and refuse.
    """
    return flat * gradient


@scaled_once.register_fake
def _(flat: Tensor, gradient: Tensor, origins: list[Tensor]) -> Tensor:
    return torch.empty_like(flat)


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(NATIVE)


scaled_once.register_autograd(_refuse)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (_, parameters, lr, xs, _, _, _, xq, _, _, _, _, _, wanted) = inputs
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.wanted = wanted
    trains = _modules[inputs[0]]._current()[0].trains if wanted[0] else [False] * len(parameters)
    ctx.trains = trains
    ctx.by = [p for p, t in zip(parameters, trains, strict=True) if t]
    ctx.by += [v for v, w in zip((lr, xs, xq), wanted[1:], strict=True) if w]


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    parameters: list[Tensor | None] = [None] * len(ctx.trains)
    extras: list[Tensor | None] = [None, None, None]
    if gradient is not None:
        (flat,) = ctx.saved_tensors
        parts = scaled_once(flat, gradient, ctx.by).split_with_sizes([by.numel() for by in ctx.by])
        views = iter(part.view(by.shape) for part, by in zip(parts, ctx.by, strict=True))
        parameters = [next(views) if trains else None for trains in ctx.trains]
        extras = [next(views) if wanted else None for wanted in ctx.wanted[1:]]
    lr, xs, xq = extras
    return (None, parameters, lr, xs, *[None] * 3, xq, *[None] * 6)


meta_gradient.register_autograd(_backward, setup_context=_setup)


# ---- what torch.compile traces ----------------------------------------------------------------


def _constant(function: Function) -> Function:
    """`function` for torch.compile: called while it traces, and its result taken as it is."""
    assume: Any = torch.compiler.assume_constant_result
    assumed: Function = assume(function)
    return assumed


@_constant
def _runs_native(handle: str) -> bool:
    maml = _modules[handle]
    return maml.backend != "torch" and maml._current()[0].reason is None


def _rows(values: Any, lengths: list[int]) -> Tensor | None:
    """A list's tensors one after another; they must have the given numbers of rows."""
    if values is None:
        return None
    if len(values) != len(lengths) or [v.shape[0] for v in values] != lengths:
        raise ValueError(f"expected {len(lengths)} tensors of {lengths} rows, as the inputs are")
    return torch.cat(list(values))


def _traced_side(x: Any, y: Any, sizes: Any, weights: Any) -> tuple[Side, list[int] | None]:
    """One side's arguments as tensors (x, y, weights, sizes), and the lengths of lists."""
    if isinstance(x, (list, tuple)):
        lengths = [v.shape[0] for v in x]
        packed = _rows(x, lengths), _rows(y, lengths), _rows(weights, lengths)
        return (*packed, torch.tensor(lengths, device="cpu")), lengths
    if isinstance(sizes, (list, tuple)):
        sizes = torch.tensor(sizes, device="cpu")
    return (x, y, weights, sizes), None


@outside_graphs
def _eagerly(maml: Owner, support: Side, query: Side, steps: int | None, **eager: Any) -> Any:
    names = ("support_sizes", "support_weights", "query_sizes", "query_weights")
    options = dict(zip(names, (*support[2:], *query[2:]), strict=True))
    return maml.forward(*support[:2], *query[:2], steps=steps, **eager, **options)


def forward(maml: Owner, support: Side, query: Side, steps: int | None, **eager: Any) -> Any:
    """`MAML.forward` while torch.compile traces; sides are (x, y, sizes, weights).

    A call with one of the options `eager`, or without query targets, is left to eager mode.

    Returns what goes into an `Outcome`.
    """
    special = query[1] is None or any(value is not None for value in eager.values())
    if special or not _runs_native(maml._handle):
        return _eagerly(maml, support, query, steps, **eager)
    (xs, ys, ws, ss), support_lengths = _traced_side(*support)
    (xq, yq, wq, sq), query_lengths = _traced_side(*query)
    parameters = list(maml.model.parameters())
    lr = maml.lr if isinstance(maml.lr, Tensor) else None
    grad = torch.is_grad_enabled()
    wanted = [
        grad and any(p.requires_grad for p in parameters),
        grad and lr is not None and lr.requires_grad,
        grad and xs.requires_grad,
        grad and xq.requires_grad,
    ]
    packed = [support_lengths is not None, query_lengths is not None]
    loss, losses, predictions, _ = torch.ops.pymeta.meta_gradient(
        maml._handle, parameters, lr, xs, ys, ws, ss, xq, yq, wq, sq, packed,
        maml.steps if steps is None else steps, wanted,
    )  # fmt: skip
    predictions = predictions.detach()
    if query_lengths is not None:
        return loss, losses.detach(), list(predictions.split(query_lengths))
    return loss, losses.detach(), predictions
