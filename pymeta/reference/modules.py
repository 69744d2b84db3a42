"""A torch module called as a function: of parameters that are given, and without traces in it.

`applied(model)` is a block in which the model can be called with any tensors in the place of its
parameters. There

    batch and instance normalisation use the statistics of their input and leave running ones alone;
    what has a wrong double backward in torch is written out in other operations (`_Rewritten`);
    what `torch.vmap` gets wrong, silently, raises under it, so that tasks are run one by one;
    buffers that a call changes (the vectors of spectral_norm) are a copy for each task, and what
    else a module keeps of a call is put back at the end.

Only one thread at a time may do so, because `functional_call` puts tensors into the module.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

Parameters: TypeAlias = dict[str, Tensor]
Apply: TypeAlias = Callable[[Parameters, Tensor], Tensor]

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
