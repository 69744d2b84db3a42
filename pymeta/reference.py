"""What pymeta computes, in plain torch.func: the fallback for any module, and the oracle.

MAML (Finn et al. 2017, arXiv:1703.03400, algorithm 2). For each task t, starting at the shared
parameters theta:

    theta_0   = theta
    theta_k+1 = theta_k - lr_k * grad L(theta_k; support_t)        k = 0 .. steps-1
    loss      = mean over t of L(theta_steps; query_t)

The gradient of `loss` by theta, lr and the inputs is what autograd makes of exactly these lines:
inner gradients are differentiated through (second order), or taken as constants where
`first_order` is set. Only the adapted parameters change in the inner loop.

Tasks of equal sizes run under `torch.func.vmap`; ragged ones, and modules that vmap cannot
express, run one by one. Any `nn.Module`, device and dtype will do.

Two rules on normalisation layers and empty sets make every task a function of its own data:
batch normalisation uses the set's own statistics and leaves running ones alone, and a set without
rows has loss 0 and gradient 0, so a task without support rows is not adapted.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from pymeta.losses import Loss, task_loss
from pymeta.optimizers import Rates
from pymeta.tasks import TaskSet

Parameters: TypeAlias = dict[str, Tensor]
Set: TypeAlias = tuple[Tensor, Tensor, Tensor | None]  # one task's x, y, row weights
Apply: TypeAlias = Callable[[Parameters, Tensor], Tensor]

_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held the old one did not survive the fork


os.register_at_fork(after_in_child=_new_lock)


def one_at_a_time() -> AbstractContextManager:
    """The lock that is held while `functional_call` has other tensors put into a module.

    Whoever reads a module's parameters under it reads the module's own.
    """
    return _lock


@dataclass(frozen=True)
class InnerLoop:
    """How one task is adapted; `lr` is [columns] or [rows, columns] values laid out by `rates`."""

    loss: Loss
    lr: Tensor
    rates: Rates
    steps: int
    first_order: bool = False


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
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):  # fmt: skip
    channels = (1, -1, *[1] * (x.ndim - 2))
    if not training:
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
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
    momentum=0.1, eps=1e-5,
):  # fmt: skip
    channels = (1, -1, *[1] * (x.ndim - 2))
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _affine(_normalised(x, tuple(range(2, x.ndim)), eps), weight, bias, channels)


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalised(x, axes, eps), weight, bias, tuple(normalized_shape))


class _PlainNormalisation(TorchFunctionMode):
    """Normalisations written out in differentiable operations.

    torch's fused ones have a double backward that is wrong under vmap (silently; seen in 2.13,
    pytorch/functorch#534), and a meta-gradient is a double backward.
    """

    written_out = {  # noqa: RUF012
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

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.written_out.get(function, function)(*args, **(kwargs or {}))


@contextmanager
def applied(model: nn.Module) -> Iterator[Apply]:
    """`apply(parameters, x) -> outputs` for a model, free of side effects on the model."""

    def apply(parameters: Parameters, x: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, parameters, (x,))
        if not isinstance(outputs, Tensor):
            raise TypeError(f"model: expected it to return a tensor, got {type(outputs).__name__}")
        return outputs

    # of torch's attention kernels only the plain one can be differentiated twice
    plain_attention = sdpa_kernel([SDPBackend.MATH])
    with one_at_a_time(), _own_statistics(model), _PlainNormalisation(), plain_attention:
        yield apply


# ---- one task ---------------------------------------------------------------------------------


def adapt_task(
    apply: Apply, inner: InnerLoop, adapted: Parameters, fixed: Parameters, support: Set
) -> Parameters:
    """The inner loop: the adapted parameters after `inner.steps` steps on one support set."""
    x, y, weights = support
    if x.shape[0] == 0:
        return adapted

    def support_loss(parameters: Parameters) -> Tensor:
        return task_loss(inner.loss, apply({**fixed, **parameters}, x), y, weights)

    for step in range(inner.steps):
        gradient = torch.func.grad(support_loss)(adapted)
        if inner.first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        adapted = {
            name: p - inner.rates.of(inner.lr, step, name, p.shape) * gradient[name]
            for name, p in adapted.items()
        }
    return adapted


def task_outcome(
    apply: Apply,
    inner: InnerLoop,
    adapted: Parameters,
    fixed: Parameters,
    support: Set,
    query: Set,
) -> tuple[Tensor, Tensor]:
    """One task: adapt on the support set; (loss on the query set [], outputs [rows, out])."""
    adapted = adapt_task(apply, inner, adapted, fixed, support)
    x, y, weights = query
    outputs = apply({**fixed, **adapted}, x)
    return task_loss(inner.loss, outputs, y, weights), outputs


# ---- all tasks --------------------------------------------------------------------------------


def _loop(one: Callable, sets: Sequence[TaskSet], tasks: int) -> list:
    return [one(*(s.of_task(t) for s in sets)) for t in range(tasks)]


def _vmapped(one: Callable, sets: Sequence[TaskSet]) -> object | None:
    """`one` over all tasks at once, or None where that cannot be done.

    vmap refuses modules that branch on values or write to buffers; looped, they are fine.
    """
    if not all(s.uniform for s in sets):
        return None
    arguments = tuple((s.x, s.y, s.weights) for s in sets)
    dims = tuple(tuple(None if v is None else 0 for v in a) for a in arguments)
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


def adapt(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
) -> Parameters:
    """The adapted parameters of every task: {name: [T, ...]} for the names adapted."""
    adapted, fixed = _split(parameters, names)
    if support.tasks == 0 or not adapted:
        return {n: p.expand(support.tasks, *p.shape).clone() for n, p in adapted.items()}
    with applied(model) as apply:

        def one(support_set: Set) -> Parameters:
            out = adapt_task(apply, inner, adapted, fixed, support_set)
            # vmap wants every output to be a new tensor, also after no step at all
            return {name: value.clone() for name, value in out.items()}

        done = _vmapped(one, (support,))
        if isinstance(done, dict):
            return done
        each = _loop(one, (support,), support.tasks)
    return {name: torch.stack([task[name] for task in each]) for name in adapted}


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
    values = {name: p.detach().to("meta") for name, p in model.named_parameters()}
    values |= {name: b.to("meta") for name, b in model.named_buffers()}
    with one_at_a_time(), torch.no_grad():
        try:
            x = torch.empty((rows, *features), dtype=dtype, device="meta")
            shape = torch.func.functional_call(model, values, (x,)).shape
        except Exception:  # whatever a stranger's forward raises on the meta device
            return None
    return tuple(shape[1:]) if len(shape) and shape[0] == rows else None
