"""What pymeta computes, in plain torch.func: the fallback for any module, and the oracle.

For each task t, starting at the shared parameters theta (or at ones of its own), the inner loop is

    theta_0   = theta
    g_k       = grad L(theta_k; batch k of support_t)              k = 0 .. steps-1
    theta_k+1 = theta_k - lr_k * direction(g_0 .. g_k)

with the batches of `schedule.py` (all rows, where there are none) and the direction of SGD or Adam
(`_direction`). Three algorithms use it:

    MAML       loss = mean over t of L(theta_steps; query_t)       Finn et al. 2017, 1703.03400
    Reptile    gradient = theta - mean over t of theta_steps       Nichol et al. 2018, 1803.02999
    FineTune   g_k += anchor * (theta_k - theta_0), and validation after every epoch

MAML's gradient by theta, lr and the inputs is what autograd makes of exactly these lines: inner
gradients are differentiated through (second order), or grad L is taken as constant where
`first_order` is set. Only the adapted parameters change in the inner loop.

Tasks of equal sizes run under `torch.func.vmap`; ragged ones, and modules that vmap cannot
express, run one by one, as do tasks that are validated or have shuffles of their own. Any
`nn.Module`, device and dtype will do.

Two rules on normalisation layers and empty sets make every task a function of its own data:
batch normalisation uses the set's own statistics and leaves running ones alone, and a set without
rows has loss 0 and gradient 0, so a task without support rows is not adapted.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from pymeta.losses import Loss
from pymeta.once import REPTILE, once
from pymeta.optimizers import SGD, Adam, Optimizer, Rates
from pymeta.schedule import Batch, Schedule
from pymeta.stacked import History
from pymeta.task_loss import task_loss
from pymeta.tasks import TaskSet

Parameters: TypeAlias = dict[str, Tensor]
Set: TypeAlias = tuple[Tensor, Tensor, Tensor | None]  # one task's x, y, row weights
Apply: TypeAlias = Callable[[Parameters, Tensor], Tensor]

_PLAIN = SGD(1.0)
_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held the old one did not survive the fork


if hasattr(os, "register_at_fork"):  # where there are forks
    os.register_at_fork(after_in_child=_new_lock)


def one_at_a_time() -> AbstractContextManager[Any]:
    """The lock that is held while `functional_call` has other tensors put into a module.

    Whoever reads a module's parameters under it reads the module's own.
    """
    return _lock


@dataclass(frozen=True)
class InnerLoop:
    """How one task is adapted.

    Attributes:
        loss: what is made small.
        lr: [columns] or [rows, columns] values laid out by `rates`.
        rates: their layout.
        schedule: how many steps, and on which rows.
        first_order: take the gradients of the loss as constants.
        optimizer: the rule of a step; its lr is not looked at, `lr` takes its place.
        anchor: pulls towards the start, by the penalty anchor/2 |theta - start|^2.
    """

    loss: Loss
    lr: Tensor
    rates: Rates
    schedule: Schedule
    first_order: bool = False
    optimizer: Optimizer = _PLAIN
    anchor: float = 0.0


@dataclass
class Adaptation:
    """What became of T tasks.

    Attributes:
        parameters: {name: [T, ...]} of what was adapted, or was each task's own from the start.
        status: [T] int8, 1 where an adapted value is not finite, otherwise 0.
        history: the learning curves, where they were asked for.
    """

    parameters: Parameters
    status: Tensor
    history: History | None = None


def uses_running_statistics(model: nn.Module) -> str | None:
    """The name of a normalisation layer that would use running statistics, if there is one."""
    for name, module in model.named_modules():
        evaluates = isinstance(module, _NormBase) and not module.training
        if evaluates and module.running_mean is not None:
            return name or type(module).__name__
    return None


@contextmanager
def _own_statistics(model: nn.Module) -> Iterator[None]:
    """Let every batch normalisation use its input's statistics, and keep none, in this block."""
    layers = [m for m in model.modules() if isinstance(m, _NormBase)]
    buffers = [dict(m._buffers) for m in layers]
    try:
        for layer in layers:
            layer._buffers.update(dict.fromkeys(layer._buffers))
        yield
    finally:
        for layer, kept in zip(layers, buffers, strict=True):
            layer._buffers.update(kept)


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    channels = (1, -1, *[1] * (x.ndim - 2))
    if not training:
        assert running_mean is not None and running_var is not None, "torch asks for both"
        scaled = (x - running_mean.reshape(channels)) * torch.rsqrt(running_var + eps).reshape(
            channels
        )
        return _affine(scaled, weight, bias, channels)
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"batch normalisation of one value per channel (input {list(x.shape)}): "
            f"expected at least two rows in a set"
        )
    return _affine(_normalised(x, (0, *range(2, x.ndim)), eps), weight, bias, channels)


def _instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    channels = (1, -1, *[1] * (x.ndim - 2))
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _affine(_normalised(x, tuple(range(2, x.ndim)), eps), weight, bias, channels)


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    axes = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalised(x, axes, eps), weight, bias, tuple(normalized_shape))


class _PlainNormalisation(TorchFunctionMode):
    """Normalisations written out in differentiable operations.

    torch's fused ones have a double backward that is wrong under vmap (silently; seen in 2.13,
    pytorch/functorch#534), and a meta-gradient is a double backward.
    """

    written_out: ClassVar[dict[Callable[..., Any], Callable[..., Tensor]]] = {
        F.batch_norm: _batch_norm,
        F.instance_norm: _instance_norm,
        F.layer_norm: _layer_norm,
        torch.batch_norm: lambda x, w, b, m, v, training, momentum, eps, cudnn: _batch_norm(
            x, m, v, w, b, training, momentum, eps
        ),
        torch.instance_norm: lambda x, w, b, m, v, use, momentum, eps, cudnn: _instance_norm(
            x, m, v, w, b, use, momentum, eps
        ),
        torch.layer_norm: lambda x, shape, weight=None, bias=None, eps=1e-5, cudnn=False: (
            _layer_norm(x, shape, weight, bias, eps)
        ),
    }

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        chosen: Callable[..., Any] = self.written_out.get(function, function)
        return chosen(*args, **(kwargs or {}))


def _held(model: nn.Module) -> Parameters:
    """{name: tensor} of all parameters and buffers, once for each module that holds one.

    A tensor that two modules share has two names here, and a module that is there twice has one
    for each tensor. `functional_call` with these names and tie_weights=False leaves the model as
    it was; left to find the names by itself, it puts back the wrong tensors into a module that is
    there twice (torch 2.13).
    """
    return {
        f"{path}.{key}" if path else key: tensor
        for path, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


@contextmanager
def _differentiable() -> Iterator[None]:
    """Leave inference_mode, under which torch.func.grad is 0 in torch up to 2.6 (silently)."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def applied(model: nn.Module) -> Iterator[Apply]:
    """`apply(parameters, x) -> outputs` for a model, free of side effects on the model."""
    names: dict[str, str] = {}  # where parameters are held -> what `named_parameters` calls them

    def apply(parameters: Parameters, x: Tensor) -> Tensor:
        values = {place: parameters[name] for place, name in names.items()}
        outputs = torch.func.functional_call(model, values, (x,), tie_weights=False)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"model: expected it to return a tensor, got {type(outputs).__name__}")
        return outputs

    # of torch's attention kernels only the plain one can be differentiated twice
    plain_attention = sdpa_kernel([SDPBackend.MATH])
    plain = _PlainNormalisation()
    with one_at_a_time(), _differentiable(), _own_statistics(model), plain, plain_attention:
        called = {id(p): name for name, p in model.named_parameters()}
        names |= {at: called[id(p)] for at, p in _held(model).items() if id(p) in called}
        yield apply


# ---- one step ---------------------------------------------------------------------------------


class Moments(NamedTuple):
    """What an optimiser remembers of the gradients: running means, and Adam's of squares."""

    first: Parameters
    second: Parameters


def _root(square: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is taken as 0.

    A dead unit's gradients are exactly 0, where autograd alone would make NaN of it.
    """
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _clipped(gradient: Parameters, norm: float | None) -> Parameters:
    """As `torch.nn.utils.clip_grad_norm_`."""
    if norm is None or not gradient:
        return gradient
    total = _root(torch.stack([g.square().sum() for g in gradient.values()]).sum())
    factor = (norm / (total + 1e-6)).clamp(max=1.0)
    return {name: g * factor for name, g in gradient.items()}


def _direction(
    rule: Optimizer, step: int, theta: Parameters, gradient: Parameters, moments: Moments
) -> tuple[Parameters, Moments]:
    """The direction d of theta <- theta - lr d, as torch.optim.SGD, Adam and AdamW have it."""
    g, (first, second) = _clipped(gradient, rule.clip_norm), moments
    decoupled = isinstance(rule, Adam) and rule.decoupled
    if rule.weight_decay and not decoupled:
        g = {n: g[n] + rule.weight_decay * p for n, p in theta.items()}
    if isinstance(rule, SGD):
        if not rule.momentum:
            return g, moments
        first = {n: rule.momentum * m + g[n] for n, m in first.items()}
        ahead = {n: g[n] + rule.momentum * m for n, m in first.items()} if rule.nesterov else first
        return ahead, Moments(first, second)
    beta1, beta2 = rule.betas
    first = {n: beta1 * m + (1 - beta1) * g[n] for n, m in first.items()}
    second = {n: beta2 * s + (1 - beta2) * g[n].square() for n, s in second.items()}
    unbias1, unbias2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
    d = {
        n: m / unbias1 / (_root(second[n]) / math.sqrt(unbias2) + rule.eps)
        for n, m in first.items()
    }
    if decoupled:
        d = {n: d[n] + rule.weight_decay * p for n, p in theta.items()}
    return d, Moments(first, second)


# ---- one task ---------------------------------------------------------------------------------


def _rows(task: Set, batch: Batch) -> Set:
    """A batch's rows of a task."""
    if batch.rows is None:
        return task
    x, y, weights = task
    index = torch.from_numpy(batch.rows).to(x.device)
    return x[index], y[index], None if weights is None else weights[index]


def adapt_task(
    apply: Apply,
    inner: InnerLoop,
    start: Parameters,
    fixed: Parameters,
    support: Set,
    task_id: int = 0,
    watch: Callable[[Parameters], bool] | None = None,
) -> tuple[Parameters, list[Tensor]]:
    """The inner loop.

    Args:
        apply: the model.
        inner: how to adapt.
        start: the parameters to adapt.
        fixed: all others.
        support: the task's rows.
        task_id: tells the task's shuffles from others'.
        watch: is shown the parameters after each epoch; ends the loop by returning True.

    Returns:
        The adapted parameters, and the loss of each step's batch before that step.
    """
    theta, losses = start, []
    zeros = {name: torch.zeros_like(p) for name, p in start.items()}
    moments = Moments(zeros, zeros)
    for step, batch in enumerate(inner.schedule.batches(support[0].shape[0], task_id)):
        x, y, weights = _rows(support, batch)

        def batch_loss(parameters: Parameters, x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
            return task_loss(inner.loss, apply({**fixed, **parameters}, x), y, w)

        gradient, loss = torch.func.grad_and_value(batch_loss)(theta, x, y, weights)
        losses.append(loss)
        if inner.first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        if inner.anchor:
            gradient = {n: g + inner.anchor * (theta[n] - start[n]) for n, g in gradient.items()}
        direction, moments = _direction(inner.optimizer, step, theta, gradient, moments)
        theta = {
            name: p - inner.rates.of(inner.lr, step, name, p.shape) * direction[name]
            for name, p in theta.items()
        }
        if batch.ends_epoch and watch is not None and watch(theta):
            break
    return theta, losses


def task_outcome(
    apply: Apply,
    inner: InnerLoop,
    adapted: Parameters,
    fixed: Parameters,
    support: Set,
    query: Set,
) -> tuple[Tensor, Tensor]:
    """One task: adapt on the support set; (loss on the query set [], outputs [rows, out])."""
    adapted, _ = adapt_task(apply, inner, adapted, fixed, support)
    x, y, weights = query
    outputs = apply({**fixed, **adapted}, x)
    return task_loss(inner.loss, outputs, y, weights), outputs


def _weighs(loss: Loss, task: Set) -> bool:
    """Whether any of a task's rows weighs anything, so that there is a loss to judge by."""
    _, y, weights = task
    counts = torch.ones(len(y), device=y.device) if weights is None else weights
    if loss.takes_classes:
        kept = y != loss.ignore_index
        of_class = counts.new_tensor(loss.weight)[torch.where(kept, y, 0)] if loss.weight else 1
        counts = counts * kept * of_class
    return bool(counts.sum() > 0)


class _Validation:
    """Looks at a validation set after each epoch, keeps the best weights, and says when to stop.

    Attributes:
        best: the weights of the lowest loss so far; those of the start until an epoch is better.
        best_epoch: when that was; 0 is the start.
        curve: the loss at the start and after each epoch.
    """

    def __init__(
        self, loss: Callable[[Parameters], Tensor], start: Parameters, patience: int | None
    ) -> None:
        self.loss, self.patience = loss, patience
        self.best, self.best_epoch = start, 0
        self.curve = [loss(start)]

    def __call__(self, theta: Parameters) -> bool:
        """Take note of an epoch; whether it is the last one."""
        lowest = self.curve[self.best_epoch]
        self.curve.append(self.loss(theta))
        epoch = len(self.curve) - 1
        if bool(self.curve[epoch] < lowest):  # NaN never is
            self.best, self.best_epoch = theta, epoch
        return self.patience is not None and epoch - self.best_epoch >= self.patience


# ---- all tasks --------------------------------------------------------------------------------


def _loop(one: Callable[..., Any], sets: Sequence[TaskSet], tasks: int) -> list[Any]:
    return [one(*(s.of_task(t) for s in sets)) for t in range(tasks)]


def _vmapped(
    one: Callable[..., Any], sets: Sequence[TaskSet], own: Parameters | None = None
) -> Any:
    """`one` over all tasks at once, or None where that cannot be done.

    vmap refuses modules that branch on values; looped, they are fine.
    `own` is {name: [T, ...]}, a last argument of `one`, where it has one.
    """
    if not all(s.uniform for s in sets):
        return None
    arguments: tuple[Any, ...] = tuple((s.x, s.y, s.weights) for s in sets)
    dims: tuple[Any, ...] = tuple(tuple(None if v is None else 0 for v in a) for a in arguments)
    if own is not None:
        arguments, dims = (*arguments, own), (*dims, 0 if own else None)
    try:
        return torch.func.vmap(one, in_dims=dims, randomness="different")(*arguments)
    except RuntimeError:
        return None


def _connected_zero(parameters: Mapping[str, Tensor], lr: Tensor, *inputs: Tensor) -> Tensor:
    """A 0 whose gradient by all of these is 0: the loss over no tasks."""
    parts = [v.flatten()[:0].sum().to(lr.dtype) for v in (*parameters.values(), lr, *inputs)]
    return torch.stack(parts).sum()


def _split(parameters: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Parameters, Parameters]:
    adapted = {name: parameters[name] for name in names}
    return adapted, {n: p for n, p in parameters.items() if n not in adapted}


def meta_loss(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    query: TaskSet,
) -> tuple[Tensor, Tensor, list[Tensor] | Tensor]:
    """The mean query loss over tasks, differentiable by everything that went in.

    Args:
        model: any module that maps [rows, ...] to [rows, out].
        parameters: {name: value} for all of its parameters.
        names: those that the inner loop adapts.
        inner: loss, lr, steps.
        support: T tasks.
        query: T tasks.

    Returns:
        The loss [], task losses [T] and predictions: [T, rows, out] where all tasks have equal
        sizes, otherwise a list of T tensors [rows_t, out].
    """
    adapted, fixed = _split(parameters, names)
    if support.tasks == 0:
        zero = _connected_zero(parameters, inner.lr, support.x, query.x)
        return zero, inner.lr.new_zeros(0), []
    with applied(model) as apply:

        def one(support_set: Set, query_set: Set) -> tuple[Tensor, Tensor]:
            return task_outcome(apply, inner, adapted, fixed, support_set, query_set)

        done = _vmapped(one, (support, query))
        if done is not None:
            each_loss, predictions = cast(tuple[Tensor, Tensor], done)
            return each_loss.mean(), each_loss, predictions
        each = _loop(one, (support, query), support.tasks)
    losses = torch.stack([loss for loss, _ in each])
    return losses.mean(), losses, [outputs for _, outputs in each]


class _Tasks(NamedTuple):
    """T adapted tasks: their parameters [T, ...], the losses of their steps, their validation."""

    parameters: Parameters
    losses: Sequence[Tensor]
    validations: Sequence[_Validation | None]


def _adapt_one(
    apply: Apply,
    inner: InnerLoop,
    names: Sequence[str],
    parameters: Parameters,
    support: Set,
    task_id: int = 0,
    validation: Set | None = None,
    patience: int | None = None,
) -> tuple[Parameters, Tensor, _Validation | None]:
    """One task's adapted parameters, losses of its steps [steps], and validation."""
    start, fixed = _split(parameters, names)
    watch = None
    if validation is not None and _weighs(inner.loss, validation):
        x, y, weights = validation

        def validation_loss(theta: Parameters) -> Tensor:
            return task_loss(inner.loss, apply({**fixed, **theta}, x), y, weights)

        watch = _Validation(validation_loss, start, patience)
    theta, losses = adapt_task(apply, inner, start, fixed, support, task_id, watch)
    if watch is not None:
        theta = watch.best
    # vmap wants every output to be a new tensor, also after no step at all
    theta = {name: value.clone() for name, value in theta.items()}
    return theta, torch.stack(losses) if losses else inner.lr.new_zeros(0), watch


def _adapt_tasks(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    own: Parameters,
    task_ids: Sequence[int] | None,
    validation: TaskSet | None = None,
    patience: int | None = None,
) -> _Tasks:
    """Adapt to every task; `own` is {name: [T, ...]} of what they do not share."""
    tasks = support.tasks
    with applied(model) as apply:

        def one(support_set: Set, mine: Parameters) -> tuple[Parameters, Tensor]:
            return _adapt_one(apply, inner, names, {**parameters, **mine}, support_set)[:2]

        alike = validation is None and task_ids is None and tasks > 0
        done = _vmapped(one, (support,), own) if alike else None
        if done is not None:
            stacked, losses = cast(tuple[Parameters, Tensor], done)
            return _Tasks(stacked, losses.unbind(0), [None] * tasks)
        each = []
        for t in range(tasks):
            mine = {name: values[t] for name, values in own.items()}
            task_id = 0 if task_ids is None else int(task_ids[t])
            watched = None if validation is None else cast(Set, validation.of_task(t))
            whole = {**parameters, **mine}
            support_set = cast(Set, support.of_task(t))  # support sets have targets
            each.append(
                _adapt_one(apply, inner, names, whole, support_set, task_id, watched, patience)
            )
    stacked = {name: parameters[name].new_empty(0, *parameters[name].shape) for name in names}
    if tasks:
        stacked = {name: torch.stack([theta[name] for theta, _, _ in each]) for name in names}
    return _Tasks(stacked, [losses for _, losses, _ in each], [watch for _, _, watch in each])


def _history(schedule: Schedule, support: TaskSet, tasks: _Tasks, dtype: torch.dtype) -> History:
    """The learning curves of T tasks; NaN where an epoch did not run."""
    assert schedule.epochs is not None
    shape = (support.tasks, schedule.epochs)
    train = support.x.new_full(shape, torch.nan, dtype=dtype)
    validation = train.new_full((shape[0], shape[1] + 1), torch.nan)
    best, ran = torch.zeros(2, support.tasks, dtype=torch.int64, device="cpu")
    for t, (rows, losses) in enumerate(zip(support.counts, tasks.losses, strict=True)):
        count = schedule.batch_count(rows)
        if losses.numel():
            sizes = torch.full((count,), schedule.batch_size or rows, device=train.device)
            sizes[-1] = rows - int(sizes[:-1].sum())
            means = (losses.view(-1, count) * sizes).sum(1) / rows
            train[t, : len(means)] = means
            ran[t] = best[t] = len(means)
        watch = tasks.validations[t]
        if watch is not None:
            validation[t, : len(watch.curve)] = torch.stack(watch.curve)
            best[t] = watch.best_epoch
    return History(train, validation, best, ran)


def not_finite(parameters: Iterable[Tensor], tasks: int) -> Tensor:
    """[tasks] int8: 1 where any of a task's values, in tensors [tasks, ...], is not finite."""
    status = torch.zeros(tasks, dtype=torch.int8, device="cpu")
    for values in parameters:
        if tasks:
            status[~values.isfinite().reshape(tasks, -1).all(1).cpu()] = 1
    return status


def adapt(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    *,
    start: Mapping[str, Tensor] | None = None,
    validation: TaskSet | None = None,
    patience: int | None = None,
    curves: bool = False,
    task_ids: Sequence[int] | None = None,
) -> Adaptation:
    """Adapt to every task.

    With a validation set, a task gets the weights of the epoch (or the start) at which its loss
    on it was lowest; without one, or where the task has no rows in it, the last ones.

    Args:
        model: any module that maps [rows, ...] to [rows, out].
        parameters: {name: value} for all of its parameters.
        names: those that are adapted.
        inner: how.
        support: T tasks.
        start: {name: [T, ...]}, what each task has of its own, in place of `parameters`.
        validation: T tasks, looked at after each epoch.
        patience: stop a task after so many epochs in a row without a lower validation loss.
        curves: whether a history is wanted (where the schedule has epochs).
        task_ids: [T], tell the tasks' shuffles from each other's; all 0 where left out.
    """
    own = dict(start or {})
    tasks = _adapt_tasks(
        model, dict(parameters), names, inner, support, own, task_ids, validation, patience
    )
    history = None
    if curves:
        history = _history(inner.schedule, support, tasks, inner.lr.dtype)
        if validation is None:
            history = replace(history, validation=None, best_epochs=None)
    status = not_finite(tasks.parameters.values(), support.tasks)
    return Adaptation({**own, **tasks.parameters}, status, history)


class _Towards(torch.autograd.Function):
    """A loss whose gradient by given parameters is set."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *by: Tensor) -> Tensor:
        """The loss."""
        ctx.gradients, ctx.by = gradients, by
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times the incoming scalar."""
        scaled = [scale * g for g in ctx.gradients]
        return None, None, *once(REPTILE, scaled, (scale, *ctx.by))


def reptile(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    task_ids: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Reptile's direction as the gradient of a loss (Nichol et al. 2018, algorithm 2).

    Args:
        model: any module that maps [rows, ...] to [rows, out].
        parameters: {name: value} for all of its parameters.
        names: those that are adapted.
        inner: how.
        support: T tasks.
        task_ids: [T], as for `adapt`.

    Returns:
        The mean [] of the task losses, whose gradient by each parameter theta is theta - mean
        over t of theta_t (0 for those not adapted); and the task losses [T], each the mean loss
        of the inner steps' batches.
    """
    with torch.no_grad():
        at = {name: p.detach() for name, p in parameters.items()}
        tasks = _adapt_tasks(model, at, names, inner, support, {}, task_ids)
        losses = inner.lr.new_zeros(support.tasks)
        for t, steps in enumerate(tasks.losses):
            losses[t] = steps.mean() if steps.numel() else 0.0
        mean = losses.mean() if support.tasks else losses.sum()
        moved = {name: torch.zeros_like(p) for name, p in at.items()}
        if support.tasks:
            moved |= {name: at[name] - p.mean(0) for name, p in tasks.parameters.items()}
    directions = tuple(moved.values())
    towards = cast(Callable[..., Tensor], _Towards.apply)  # torch has no annotation for it
    return towards(mean, directions, *parameters.values()), losses


def predict(
    model: nn.Module,
    stacked: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    query: TaskSet,
) -> list[Tensor] | Tensor:
    """Each task's outputs on its own rows: [T, rows, out], or a list of them where ragged.

    Args:
        model: the module.
        stacked: {name: [T, ...]} the parameters that each task has of its own.
        shared: {name: [...]} all others.
        query: T tasks; targets and weights are not looked at.
    """
    if query.tasks == 0:
        return []
    with applied(model) as apply:

        def one(own: Parameters, x: Tensor) -> Tensor:
            return apply({**shared, **own}, x)

        if query.uniform:
            try:
                return torch.func.vmap(one, randomness="different")(dict(stacked), query.x)
            except RuntimeError:
                pass  # as in _vmapped
        return [
            one({n: p[t] for n, p in stacked.items()}, query.of_task(t)[0])
            for t in range(query.tasks)
        ]


def output_shape(
    model: nn.Module, features: Sequence[int], dtype: torch.dtype
) -> tuple[int, ...] | None:
    """The shape of a row of the model's output for rows of shape `features`.

    Runs the model on the meta device, where nothing is computed. None where the model does not
    run there, or does not return one output row for each input row.
    """
    rows = 3
    with one_at_a_time(), torch.no_grad():
        values = {name: tensor.detach().to("meta") for name, tensor in _held(model).items()}
        try:
            x = torch.empty((rows, *features), dtype=dtype, device="meta")
            shape = torch.func.functional_call(model, values, (x,), tie_weights=False).shape
        except Exception:  # whatever a stranger's forward raises on the meta device
            return None
    return tuple(shape[1:]) if len(shape) and shape[0] == rows else None
