"""The native calls as custom operators of torch.library, for torch.compile.

    pymeta::evaluate       losses, predictions, and the flat gradient of the mean loss
    pymeta::adapt          the adapted parameters
    pymeta::evaluate_vjp   from what flows into losses and predictions to the flat gradient
    pymeta::adapt_vjp      from what flows into the adapted parameters

Each names its learner or `Operator` by a handle, does at run time what an eager call does, and is
registered once for all devices, and so is its fake: it makes its results where xs is. A flat
gradient holds those of the wanted inputs one after another: of parameters, then in the order of
the backend's `Extras`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pymeta.backend import adapt as native_adapt
from pymeta.backend.gradients import Extras, Wanted
from pymeta.backend.plan import Plan
from pymeta.backend.prepared import PreparedCall, prepare
from pymeta.functional.anchors import anchors_of
from pymeta.functional.evaluation import QUERIES
from pymeta.functional.handles import owner_of
from pymeta.functional.own import Own, rates_of, start_of, step_weights_of
from pymeta.spec.inner import InnerLoop
from pymeta.spec.once import NATIVE
from pymeta.spec.schedule import Schedule
from pymeta.tasks.checks import Names
from pymeta.tasks.task_set import QUERY, SUPPORT, TaskSet, check_same_tasks, dense, task_set

# Written out, because torch 2.4 cannot infer schemas from annotations that are strings.
INPUTS = (
    "str handle, Tensor[] parameters, Tensor? lr, Tensor xs, Tensor ys, Tensor? support_weights, "
    "Tensor? support_sizes, Tensor? support_offset, Tensor? xq, Tensor? yq, "
    "Tensor? query_weights, Tensor? query_sizes, Tensor? query_offset, Tensor? anchor, "
    "Tensor? step_weights, str[] own, bool[] how, SymInt steps, SymInt out, bool[] wanted"
)


class Inputs(NamedTuple):
    """What the operators take, in the order of their schema.

    Attributes:
        handle: of the learner or `Operator`.
        parameters: in order; [T, ...] of those in `own`.
        lr: all tasks' or each task's; None for the owner's number.
        xs: and the others, as for `pymeta.MAML`; those of lists one after another.
        own: the names of the parameters that tasks have of their own.
        how: whether support and query came as lists, lr is each task's, and task_clip counts.
        steps: how many inner steps.
        out: columns of the outputs.
        wanted: of which parameters, and then of which others, a gradient is wanted.
    """

    handle: str
    parameters: list[Tensor]
    lr: Tensor | None
    xs: Tensor
    ys: Tensor
    support_weights: Tensor | None
    support_sizes: Tensor | None
    support_offset: Tensor | None
    xq: Tensor | None
    yq: Tensor | None
    query_weights: Tensor | None
    query_sizes: Tensor | None
    query_offset: Tensor | None
    anchor: Tensor | None
    step_weights: Tensor | None
    own: list[str]
    how: list[bool]
    steps: int
    out: int
    wanted: list[bool]

    @property
    def tasks(self) -> Any:
        """T, which may be symbolic."""
        if not self.how[0]:
            return self.xs.shape[0]
        assert self.support_sizes is not None
        return self.support_sizes.shape[0]


# Functions and no properties: torch.compile of torch 2.9 traces none of a named tuple.


def operands_of(i: Inputs) -> list[Tensor | None]:
    """What gradients may be of, in their order: the parameters, and the extras."""
    return [*i.parameters, *[getattr(i, name) for name in Extras._fields]]


def wanted_of(i: Inputs) -> list[Tensor]:
    """What gradients are wanted by, in their order."""
    pairs = zip(operands_of(i), i.wanted, strict=True)
    return [tensor for tensor, wanted in pairs if wanted and tensor is not None]


def views_of(flat: Tensor, i: Inputs) -> list[Tensor]:
    """The wanted gradients, out of the flat one."""
    by = wanted_of(i)
    parts = flat.split_with_sizes([tensor.numel() for tensor in by])
    return [part.view(tensor.shape) for part, tensor in zip(parts, by, strict=True)]


# ---- what an eager call does ------------------------------------------------------------------


def _listed(values: Sequence[Tensor | None], sizes: Tensor | None) -> list[Any]:
    """Packed rows as lists again."""
    assert sizes is not None
    lengths = sizes.tolist()
    return [None if v is None else list(v.split_with_sizes(lengths)) for v in values]


class Checked(NamedTuple):
    """A call whose arguments are checked; `named` are all parameters in the plan's order."""

    owner: Any
    plan: Plan
    named: dict[str, Tensor]
    own: Own
    support: TaskSet
    query: TaskSet | None


class _Ready(NamedTuple):
    """A call that is prepared."""

    checked: Checked
    call: PreparedCall
    operands: list[Tensor]
    extras: Extras


_WEIGHTS = [Extras._fields.index(f"{side}_weights") for side in ("support", "query")]


def _side(
    names: Names, plan: Plan, values: Sequence[Any], sizes: Any, packed: bool, keeps: bool
) -> TaskSet:
    expected = plan.expected if names is SUPPORT else plan.query_expected
    if packed:
        values, sizes = _listed(values, sizes), None
    x, y, weights, offset = values
    found = task_set(names, x, y, sizes, weights, expected, offset)
    if keeps and found.weights is not None:  # what an operator gets requires no grad
        found.weights = found.weights.detach().requires_grad_()
    return found


@torch.enable_grad()  # rows whose weights' gradients are wanted count
def checked(i: Inputs) -> Checked:
    """The call's sets and what tasks have of their own; RuntimeError where it was compiled anew."""
    owner = owner_of(i.handle)
    side = (i.xs, i.ys, i.support_weights, i.support_offset)
    x = _listed([i.xs], i.support_sizes)[0] if i.how[0] else i.xs
    first = next(iter(i.parameters), i.xs)
    plan: Plan = owner._plan_for(first.dtype, first.device, x)
    of_weights = [i.wanted[len(i.parameters) + at] for at in _WEIGHTS]
    support = _side(SUPPORT, plan, side, i.support_sizes, i.how[0], of_weights[0])
    query = None
    if i.xq is not None:
        names = QUERIES if i.yq is None else QUERY
        side = (i.xq, i.yq, i.query_weights, i.query_offset)  # type: ignore[assignment]
        query = _side(names, plan, side, i.query_sizes, i.how[1], of_weights[1])
        check_same_tasks(support, query)
    # running statistics are the module's own, as they are now
    there = dict(zip(plan.names, plan.parameters, strict=True))
    learned = [n for n in plan.names if n not in plan.constants]
    named = {**there, **dict(zip(learned, i.parameters, strict=True))}
    per_task = i.how[2]
    own = Own(
        anchors_of(i.anchor, support.tasks, plan),
        start_of({n: named[n] for n in i.own}, support.tasks, plan),
        rates_of(i.lr, support.tasks, plan) if per_task else None,
        step_weights_of(i.step_weights, i.steps, plan),
    )
    reason = plan.reason or support.reason or (None if query is None else query.reason)
    like = {n: (p.shape, p.dtype) for n, p in there.items() if n not in i.own}
    if {n: (named[n].shape, named[n].dtype) for n in like} != like:
        reason = "its parameters have other shapes or dtypes"
    if reason is not None:
        raise RuntimeError(f"the model is not what was compiled: {reason}")
    return Checked(owner, plan, named, own, support, query)


@torch.enable_grad()
def _ready(i: Inputs) -> _Ready:
    found = checked(i)
    owner, plan, named, own, support, query = found
    rates = own.rates
    if rates is None:
        rates = owner._lr(plan).detach() if i.lr is None else i.lr
    recipe = own.recipe(owner, i.steps)
    if not i.how[3]:
        recipe = recipe._replace(task_clip=0.0)
    learned = [n for n in plan.names if n not in plan.constants]
    trained = dict(zip(learned, i.wanted, strict=False))
    trains = [trained.get(name, False) for name in plan.names]
    wanted = cast(Wanted, (any(trains), *i.wanted[len(i.parameters) :]))
    operands = own.operands(plan, [dense(p) for p in named.values()])
    call, extras = prepare(plan, recipe, operands, rates, support, query, wanted, trains)
    return _Ready(found, call, operands, extras)


def _flat(i: Inputs, call: PreparedCall, gradients: list[Tensor]) -> Tensor:
    """Gradients in the order and forms of what they are by, in one tensor."""
    found = list(gradients)
    count = len(i.parameters)
    if i.wanted[count] and i.lr is not None:
        at = sum(i.wanted[:count])
        grad = call.in_given_order(found[at])
        if grad.numel() != i.lr.numel():  # one rate of each task, which all layers had
            grad = grad.reshape(len(i.lr), -1).sum(-1)
        found[at] = grad
    return torch.cat([g.reshape(-1) for g in found]) if found else i.xs.new_empty(0)


# ---- forward ----------------------------------------------------------------------------------


@torch.library.custom_op(
    "pymeta::evaluate",
    mutates_args=(),
    schema=f"({INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def evaluate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], task losses [T], predictions, losses of the steps, and the loss's flat gradient.

    Without query targets the losses and the gradient are empty, as are those of the steps without
    weights of them.
    """
    i = Inputs(*arguments)
    ready = _ready(i)
    call, query = ready.call, ready.checked.query
    assert query is not None
    call.plan.last = call.last
    memory = None if i.yq is None else call.memory()
    loss, losses, predictions, steps = call.run(ready.operands, ready.extras, memory)
    if i.how[1] and query.starts is None:  # a list's rows came to be stored as [T, rows, out]
        predictions = predictions.flatten(0, 1)

    def there(tensor: Tensor | None) -> Tensor:
        return predictions.new_empty(0) if tensor is None else tensor

    flat = None if memory is None else _flat(i, call, memory.tensors)
    return there(loss), there(losses), predictions, there(steps), there(flat)


def wanted_total(i: Inputs) -> Any:
    """The size of the flat gradient."""
    return sum((tensor.numel() for tensor in wanted_of(i)), 0)


@evaluate.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    i = Inputs(*arguments)
    assert i.xq is not None
    lead = i.xq.shape[:1] if i.how[1] else i.xq.shape[:2]
    targets = i.yq is not None
    make = maker(i)
    return (
        make() if targets else make(0),
        make(i.tasks) if targets else make(0),
        make(*lead, i.out),
        make(0) if i.step_weights is None else make(i.steps, i.tasks),
        make(wanted_total(i)) if targets else make(0),
    )


def maker(i: Inputs) -> Any:
    """What makes the tensors of a fake, of the given shape."""
    dtype = next(iter(i.parameters), i.xs).dtype
    return lambda *shape: i.xs.new_empty(shape, dtype=dtype)


def shared_of(found: Checked) -> list[Tensor]:
    """The parameters that all tasks share, in order; the model's own where tasks have theirs."""
    named = zip(found.named.items(), found.plan.parameters, strict=True)
    return [p if n in found.own.start else dense(q) for (n, q), p in named]


def inner_of(i: Inputs, found: Checked) -> InnerLoop:
    """How tasks are adapted."""
    plan = found.plan
    lr = found.owner._lr(plan) if i.lr is None or i.how[2] else i.lr
    return InnerLoop(plan.expected.loss, lr, plan.rates, Schedule(i.steps))


@torch.library.custom_op("pymeta::adapt", mutates_args=(), schema=f"({INPUTS}) -> Tensor[]")
def adapt(*arguments: Any) -> list[Tensor]:
    """The adapted parameters [T, ...], those of the owner that are adapted in their order."""
    i = Inputs(*arguments)
    found = checked(i)
    inner = inner_of(i, found)
    done = native_adapt.adapt(
        found.plan,
        shared_of(found),
        inner.lr,
        inner,
        found.support,
        start=found.own.start,
        anchors=found.own.anchors,
        rates=found.own.rates,
    )
    return [done.parameters[n] for n in found.plan.adapted]


@adapt.register_fake
def _(*arguments: Any) -> list[Tensor]:
    i = Inputs(*arguments)
    make, found = maker(i), []
    for shape in owner_of(i.handle)._adapted_shapes().values():
        found.append(make(i.tasks, *shape))
    return found


# ---- backward ---------------------------------------------------------------------------------


def _is_zero(tensor: Tensor | None) -> bool:
    """Whether nothing flows; what is on a device is not looked at."""
    return tensor is None or (tensor.is_cpu and not bool(tensor.count_nonzero()))


@torch.library.custom_op(
    "pymeta::evaluate_vjp",
    mutates_args=(),
    schema=(
        f"({INPUTS}, Tensor flat, Tensor? of_loss, Tensor? of_losses, Tensor? of_predictions, "
        f"Tensor? of_steps) -> Tensor"
    ),
)
def evaluate_vjp(*arguments: Any) -> Tensor:
    """The flat gradient of what flows into loss, losses, predictions and losses of the steps.

    `flat` is that of the loss, which is all that is needed where nothing else flows: compiled code
    has zeros flow into what nobody differentiated.
    """
    *inputs, flat, loss, losses, predictions, steps = arguments
    i = Inputs(*inputs)
    alone = all(map(_is_zero, (losses, predictions, steps)))
    if alone and (loss is None or flat.numel()):
        return torch.zeros_like(flat) if loss is None else flat * loss
    ready = _ready(i)
    tasks = ready.checked.support.tasks
    if loss is not None:
        mean = (loss / max(tasks, 1)).expand(tasks)
        losses = mean if losses is None else losses + mean
    if predictions is not None and ready.call.predicted is not None:
        predictions = predictions.reshape(ready.call.predicted)
    found = ready.call.vjp(
        ready.operands, ready.extras, losses, predictions,
        step_losses=None if i.step_weights is None else steps,
    )  # fmt: skip
    return _flat(i, ready.call, found)


@evaluate_vjp.register_fake
def _(*arguments: Any) -> Tensor:
    i = Inputs(*arguments[:-5])
    made: Tensor = maker(i)(wanted_total(i))
    return made


@torch.library.custom_op(
    "pymeta::adapt_vjp", mutates_args=(), schema=f"({INPUTS}, Tensor[] flows) -> Tensor"
)
def adapt_vjp(*arguments: Any) -> Tensor:
    """The flat gradient of what flows into the adapted parameters."""
    *inputs, flows = arguments
    i = Inputs(*inputs)
    ready = _ready(i)
    found = ready.call.vjp(ready.operands, ready.extras, None, None, flows)
    return _flat(i, ready.call, found)


@adapt_vjp.register_fake
def _(*arguments: Any) -> Tensor:
    i = Inputs(*arguments[:-1])
    made: Tensor = maker(i)(wanted_total(i))
    return made


def refuse(ctx: Any, *_: Any) -> Any:
    """The derivative of an operator of the way back, which there is none of."""
    raise RuntimeError(NATIVE)


evaluate_vjp.register_autograd(refuse)
adapt_vjp.register_autograd(refuse)


# ---- autograd ---------------------------------------------------------------------------------
#
# The operators of the way back take all inputs, so that autograd, asked for a second derivative,
# finds that it would have to differentiate them, and refuses.


def save(ctx: Any, i: Inputs, *more: Tensor) -> None:
    """Keep the inputs and more tensors for the way back."""
    tensors = [*i.parameters, *(v for v in i if v is None or isinstance(v, Tensor)), *more]
    ctx.save_for_backward(*tensors)
    others = i._replace(parameters=[])
    ctx.rest = [None if v is None or isinstance(v, Tensor) else v for v in others]
    ctx.count = len(i.parameters)


def saved(ctx: Any) -> tuple[Inputs, list[Tensor]]:
    """What `save` kept."""
    tensors = list(ctx.saved_tensors)
    parameters, rest = tensors[: ctx.count], iter(tensors[ctx.count :])
    values = [next(rest) if v is None else v for v in ctx.rest]
    return Inputs(*values)._replace(parameters=parameters), list(rest)


def parts_of(i: Inputs, flat: Tensor) -> tuple[Any, ...]:
    """The gradients of all inputs of an operator, out of the flat one."""
    views = iter(views_of(flat, i))
    found: list[Any] = [
        next(views) if wanted and tensor is not None else None
        for tensor, wanted in zip(operands_of(i), i.wanted, strict=True)
    ]
    count = len(i.parameters)
    gradients: dict[str, Any] = dict.fromkeys(Inputs._fields)
    gradients |= {
        "parameters": found[:count],
        **dict(zip(Extras._fields, found[count:], strict=True)),
    }
    gradients["own"] = None if i.own else []  # which torch takes for a list of tensors
    return tuple(gradients.values())


_STEP_WEIGHTS = Inputs._fields.index("step_weights")


def _setup_evaluate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[3 if inputs[_STEP_WEIGHTS] is None else 4 :])
    if output[0].numel() == 0:  # without query targets
        ctx.mark_non_differentiable(*output[:2])
    ctx.set_materialize_grads(False)
    save(ctx, Inputs(*inputs), output[4])


def _back_through_evaluate(ctx: Any, *flows: Tensor | None) -> tuple[Any, ...]:
    i, (flat,) = saved(ctx)
    if all(flow is None for flow in flows[:4]):
        wanted = [False] * len(i.wanted)
        return parts_of(i._replace(wanted=wanted), flat[:0])
    return parts_of(i, torch.ops.pymeta.evaluate_vjp(*i, flat, *flows[:4]))


def _setup_adapt(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    save(ctx, Inputs(*inputs))


def _back_through_adapt(ctx: Any, flows: list[Tensor]) -> tuple[Any, ...]:
    i, _ = saved(ctx)
    return parts_of(i, torch.ops.pymeta.adapt_vjp(*i, flows))


evaluate.register_autograd(_back_through_evaluate, setup_context=_setup_evaluate)
adapt.register_autograd(_back_through_adapt, setup_context=_setup_adapt)
