"""A torch module called as a function: of parameters that are given, and without traces in it.

`applied(model)` is a block in which the model can be called with any tensors in the place of its
parameters. There

    batch and instance normalisation use the statistics of their input and leave running ones
    alone, in eval mode too;
    what has a wrong double backward in torch is written out in other operations (`_Rewritten`);
    what `torch.vmap` gets wrong, silently, raises under it, so that tasks are run one by one;
    buffers that a call changes (the vectors of spectral_norm) are a copy for each task, and what
    else a module keeps of a call is put back at the end.

Only one thread at a time may do so, because `functional_call` puts tensors into the module.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from pymeta.nn.norm import PerStepBatchNorm
from pymeta.spec.modules import fixed_among, one_at_a_time, running_statistics
from pymeta.spec.running import Measured, of_steps

Parameters: TypeAlias = dict[str, Tensor]


@contextmanager
def _left_as_it_was(model: nn.Module, fixed: frozenset[str]) -> Iterator[None]:
    """Let normalisations use their input's statistics, and put back what calls replace.

    Running statistics are out of the way in this block, but of the `fixed` layers, which use them.
    Tensors that a module holds as plain attributes are those of before at its end: the weight that
    torch.nn.utils.weight_norm works out for each call, say.
    """
    held: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (holder, {name: v for name, v in holder.items() if isinstance(v, Tensor)})
        for holder in (module.__dict__ for module in model.modules())
    ]
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _NormBase)]
    held += [(layer._buffers, dict(layer._buffers)) for _, layer in layers]
    modes: list[tuple[dict[str, Any], str, Any]] = [
        (layer.__dict__, "training", layer.training) for _, layer in layers
    ]
    modes += [(m.__dict__, "step", m.step) for _, m in layers if isinstance(m, PerStepBatchNorm)]
    try:
        for name, layer in layers:
            if name in fixed:
                layer.training = False
            else:
                layer._buffers.update(dict.fromkeys(layer._buffers))
                if isinstance(layer, nn.SyncBatchNorm):  # which insists on counting
                    layer._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long)
        yield
    finally:
        for holder, kept in held:
            holder.update(kept)
        for attributes, key, value in modes:
            attributes[key] = value


class _Measuring:
    """What batch normalisations measure in a forward pass, while it is on.

    torch calls it before the forward of every module of the process; other threads' are none of
    its business.
    """

    def __init__(self, norms: Sequence[nn.Module], mode: _Rewritten) -> None:
        self._numbers = {id(m): i for i, m in enumerate(norms)}
        self._mode = mode
        self._thread = threading.get_ident()
        self._found: dict[int, Measured] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The hook."""
        number = self._numbers.get(id(module))
        if self._found is None or number is None or threading.get_ident() != self._thread:
            return
        x = inputs[0].detach()
        x = x[: self._mode.by.counting_rows(x)]
        axes = (0, *range(2, x.ndim))
        n = x.numel() // x.shape[1]
        variance = (x - x.mean(axes, keepdim=True)).square().sum(axes) / (n - 1 or torch.nan)
        self._found[number] = (x.mean(axes), variance, x.new_full((), float(n)))

    def begin(self) -> None:
        """Forget what there was."""
        self._found = {}

    def end(self) -> dict[int, Measured]:
        """What each norm that ran since `begin` measured, the last time that it did."""
        found, self._found = self._found or {}, None
        return found


class By(NamedTuple):
    """What batch normalisation goes by: the first `counting` of all `rows`, where not by all.

    `single` says whether a single row may be normalised, to 0.
    """

    counting: int | None = None
    rows: int = 1
    single: bool = False

    def counting_rows(self, x: Tensor) -> int | None:
        """How many of the input's first rows count; None for all."""
        return None if self.counting is None else x.shape[0] * self.counting // self.rows


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float, rows: int | None = None) -> Tensor:
    """X by its own statistics; by those of its first `rows` where that is given."""
    centred = x - x[:rows].mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred[:rows].square().mean(axes, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, cudnn: bool = False, *, by: By,
) -> Tensor:  # fmt: skip
    channels = (1, -1, *[1] * (x.ndim - 2))
    if not training:
        assert running_mean is not None and running_var is not None, "torch asks for both"
        scaled = (x - running_mean.reshape(channels)) * torch.rsqrt(running_var + eps).reshape(
            channels
        )
        return _affine(scaled, weight, bias, channels)
    rows = by.counting_rows(x)
    if x[:rows].numel() == x.shape[1] and not by.single:
        raise ValueError(
            f"batch normalisation of one value per channel (input {list(x.shape)}): "
            f"expected at least two rows in a set"
        )
    return _affine(_normalised(x, (0, *range(2, x.ndim)), eps, rows), weight, bias, channels)


def _instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    channels = (1, -1, *[1] * (x.ndim - 2))
    if not use_input_stats and running_mean is not None:  # which here only a function has
        return _batch_norm(x, running_mean, running_var, weight, bias, by=By())
    return _affine(_normalised(x, tuple(range(2, x.ndim)), eps), weight, bias, channels)


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    axes = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalised(x, axes, eps), weight, bias, tuple(normalized_shape))


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    each = x.shape[1:].numel() // num_groups
    groups = _normalised(x.reshape(x.shape[0], num_groups, each), (2,), eps)
    return _affine(groups.reshape(x.shape), weight, bias, (1, -1, *[1] * (x.ndim - 2)))


class NotTogetherError(RuntimeError):
    """`torch.vmap` would silently compute something else than for each task by itself."""


def _check_embedding(
    x: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> None:  # fmt: skip
    """F.embedding: vmap keeps padding_idx for the first task only, and counts over all tasks."""
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq:
        raise NotTogetherError("embedding with padding_idx, max_norm or scale_grad_by_freq")


def _check_embedding_core(
    weight: Any, x: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> None:  # fmt: skip
    """torch.embedding, likewise; here -1 means no padding."""
    _check_embedding(
        x, weight, None if padding_idx < 0 else padding_idx, None, 2.0, scale_grad_by_freq
    )


class _Rewritten(TorchFunctionMode):
    """Functions of torch that are not what they should be here.

    Normalisations are written out in differentiable operations: torch's fused ones have a double
    backward that is wrong under vmap (silently; seen in 2.13, pytorch/functorch#534), and a
    meta-gradient is a double backward.

    Attributes:
        together: whether a vmap over tasks is going on, in which case what that gets wrong
            raises NotTogetherError.
        by: what batch normalisation goes by.
    """

    written_out: ClassVar[dict[Callable[..., Any], Callable[..., Tensor]]] = {
        F.instance_norm: _instance_norm,
        F.layer_norm: _layer_norm,
        F.group_norm: _group_norm,
        torch.instance_norm: lambda x, w, b, m, v, use, momentum, eps, cudnn: _instance_norm(
            x, m, v, w, b, use, momentum, eps
        ),
        torch.layer_norm: lambda x, shape, weight=None, bias=None, eps=1e-5, cudnn=False: (
            _layer_norm(x, shape, weight, bias, eps)
        ),
        torch.group_norm: lambda x, groups, weight=None, bias=None, eps=1e-5, cudnn=False: (
            _group_norm(x, groups, weight, bias, eps)
        ),
    }
    checked: ClassVar[dict[Callable[..., Any], Callable[..., None]]] = {
        F.embedding: _check_embedding,
        torch.embedding: _check_embedding_core,
    }

    def __init__(self) -> None:
        super().__init__()
        self.together = False
        self.by = By()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.together and function in self.checked:
            self.checked[function](*args, **kwargs)
        if function is F.batch_norm:
            return _batch_norm(*args, **kwargs, by=self.by)
        if function is torch.batch_norm:  # which has weight and bias before the statistics
            x, weight, bias, mean, var, *rest = args
            return _batch_norm(x, mean, var, weight, bias, *rest, **kwargs, by=self.by)
        chosen: Callable[..., Any] = self.written_out.get(function, function)
        return chosen(*args, **kwargs)


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


def _renormalised(model: nn.Module) -> set[int]:
    """The ids of parameters that a call changes in place: those of embeddings with max_norm."""
    bounded = [m for m in model.modules() if getattr(m, "max_norm", None) is not None]
    return {id(p) for m in bounded for p in m._parameters.values() if p is not None}


class Called:
    """A model as one task calls it; what a call changes in place is the task's own."""

    def __init__(
        self,
        model: nn.Module,
        mode: _Rewritten,
        places: Mapping[str, str],
        buffers: Parameters,
        norms: Sequence[nn.Module],
        measuring: _Measuring,
    ) -> None:
        """Hold what `Applied.of_a_task` gives."""
        self._model, self._mode, self._places = model, mode, places
        self.buffers = buffers
        self._norms, self._measuring = norms, measuring
        self._by_step = [m for m in model.modules() if isinstance(m, PerStepBatchNorm)]
        self.measured: list[dict[int, Measured]] = []  # of each inner step
        self.at_step(None)

    def at_step(self, step: int | None) -> None:
        """From now on the model is at an inner step; None: at the last one."""
        for module in self._by_step:
            module.step = step

    def statistics(self) -> Tensor:
        """Those of the inner steps that were made (pymeta/spec/running.py); [0] without norms."""
        return of_steps(self._norms, self.measured) if self._norms else torch.zeros(0)

    def step_with_buffers(
        self, parameters: Parameters, buffers: Parameters, x: Tensor
    ) -> tuple[Tensor, Parameters, dict[int, Measured]]:
        """As `with_buffers`, and what batch normalisations measured, for `measured`."""
        self._measuring.begin()
        try:
            outputs, buffers = self.with_buffers(parameters, buffers, x)
        finally:
            found = self._measuring.end()
        return outputs, buffers, found

    @contextmanager
    def normalising(self, by: By) -> Iterator[None]:
        """A block in which batch normalisation goes by other rows."""
        before, self._mode.by = self._mode.by, by
        try:
            yield
        finally:
            self._mode.by = before

    def of_all_rows(self, parameters: Parameters, x: Tensor, count: Tensor) -> Tensor:
        """The outputs for all rows, normalised by the statistics of those that count, bool [rows].

        No graph, and no trace in the task's buffers and parameters.
        """
        order = torch.cat([count.nonzero(), (~count).nonzero()])[:, 0]
        own = {name: p.detach().clone() for name, p in parameters.items()}
        buffers = {at: buffer.clone() for at, buffer in self.buffers.items()}
        by = By(int(count.sum()), len(count), single=True)
        with torch.no_grad(), self.normalising(by):
            outputs, _ = self.with_buffers(own, buffers, x.detach()[order])
        return outputs[order.argsort()]

    def beside(
        self, parameters: Parameters, buffers: Parameters, x: Tensor, counting: int
    ) -> Tensor:
        """The outputs for the rows behind the first `counting`, normalised by those alone.

        They leave no trace in buffers and parameters.
        """
        own = {name: p.clone() for name, p in parameters.items()}
        others = {at: buffer.clone() for at, buffer in buffers.items()}
        with self.normalising(By(counting, len(x), single=True)):
            return self.with_buffers(own, others, x)[0][counting:]

    def __call__(self, parameters: Parameters, x: Tensor) -> Tensor:
        """The outputs for rows x, with the task's buffers."""
        outputs, self.buffers = self.with_buffers(parameters, self.buffers, x)
        return outputs

    def with_buffers(
        self, parameters: Parameters, buffers: Parameters, x: Tensor
    ) -> tuple[Tensor, Parameters]:
        """The outputs, and the buffers after the call: a function without a state.

        torch.func wants buffers among the arguments of a function that changes them.
        """
        values = {at: parameters[name] for at, name in self._places.items()} | buffers
        outputs = torch.func.functional_call(self._model, values, (x,), tie_weights=False)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"model: expected it to return a tensor, got {type(outputs).__name__}")
        return outputs, {at: values[at] for at in buffers}


class Applied:
    """A model in the block of `applied`, to be called for one task after another."""

    def __init__(
        self,
        model: nn.Module,
        mode: _Rewritten,
        fixed: frozenset[str],
        norms: Sequence[nn.Module],
        measuring: _Measuring,
    ) -> None:
        """Find what the model holds."""
        self._model, self._mode, self._norms, self._measuring = model, mode, norms, measuring
        names = {id(p): name for name, p in model.named_parameters()}
        names |= {id(b): name for name, b in running_statistics(model, fixed).items()}
        held = _held(model)
        # where parameters are held -> what `named_parameters` calls them
        self._places = {at: names[id(p)] for at, p in held.items() if id(p) in names}
        self._buffers = {at: tensor for at, tensor in held.items() if at not in self._places}
        self._changed = {names[i] for i in _renormalised(model) if i in names}

    def of_a_task(self, parameters: Parameters) -> tuple[Called, Parameters]:
        """The model as one task calls it, and the parameters that the task begins with.

        Both are the given ones, but copies where a call would change them.
        """
        buffers = {at: buffer.clone() for at, buffer in self._buffers.items()}
        start = {n: p.clone() if n in self._changed else p for n, p in parameters.items()}
        called = Called(
            self._model, self._mode, self._places, buffers, self._norms, self._measuring
        )
        return called, start

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block in which the model is in eval mode: nothing is dropped."""
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training

    def together(self, one: Callable[..., Any], dims: tuple[Any, ...], *arguments: Any) -> Any:
        """`one` over all tasks at once by vmap, or None where that cannot be done.

        vmap refuses modules that branch on values or change what the tasks share, and is wrong
        about some others; task by task, they are fine.
        """
        self._mode.together = True
        try:
            return torch.func.vmap(one, in_dims=dims, randomness="different")(*arguments)
        except RuntimeError:  # and so NotTogetherError
            return None
        finally:
            self._mode.together = False


@contextmanager
def applied(
    model: nn.Module, names: Iterable[str], norms: Sequence[nn.Module] = ()
) -> Iterator[Applied]:
    """A block in which the model can be called as a function, free of side effects on it.

    `names` are of the tensors that it is called with: its parameters, and the running statistics
    of the layers that go by these. `norms` are batch normalisations that are to be measured.
    """
    # of torch's attention kernels only the plain one can be differentiated twice
    plain_attention = sdpa_kernel([SDPBackend.MATH])
    mode = _Rewritten()
    measuring = _Measuring(norms, mode)
    fixed = fixed_among(model, names)
    with ExitStack() as stack:
        stack.enter_context(one_at_a_time())
        stack.enter_context(_differentiable())
        if norms:
            stack.callback(register_module_forward_pre_hook(measuring).remove)
        stack.enter_context(_left_as_it_was(model, fixed))
        stack.enter_context(mode)
        stack.enter_context(plain_attention)
        yield Applied(model, mode, fixed, norms, measuring)


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
