"""What is known of a model before a call: its chain, what is adapted, and the native Problem.

A `Plan` is made once and used by every call until the model is no longer what it was made from,
which its `watch` finds out in a few microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from pymeta import native
from pymeta.backend.device import Device, unusable
from pymeta.backend.repeat import Repeats
from pymeta.nn.norm import PerStepBatchNorm
from pymeta.spec.anchors import NO_ANCHOR, Anchor
from pymeta.spec.architecture import embedded_columns
from pymeta.spec.losses import Loss, OwnLoss, check_width, native_loss
from pymeta.spec.modules import Fixed, fixed_among, one_at_a_time, running_statistics
from pymeta.spec.network import Description, Unshaped, Unsupported, describe
from pymeta.spec.optimizers import Rates, native_optimizer, rates
from pymeta.spec.running import any_tracked, is_batch_norm
from pymeta.spec.settings import TF32X3, check_precision_of, matching
from pymeta.spec.watch import Place
from pymeta.tasks.checks import Expected, row_shape_of
from pymeta.tasks.task_set import dense

if TYPE_CHECKING:
    from pymeta.spec.optimizers import Optimizer
    from pymeta.spec.schedule import Schedule

DTYPE_CODES = {torch.float32: 4, torch.float64: 8}
_PARAMETER_TYPES = (nn.Parameter, Tensor)


def _check_parameters(parameters: Mapping[str, Tensor]) -> None:
    """Raise where no backend can work with these parameters."""
    devices = {p.device for p in parameters.values()}
    for name, p in parameters.items():
        if isinstance(p, UninitializedParameter):
            raise ValueError(
                f"model: parameter {name} is not initialised yet; run the model once first"
            )
        if p.dtype.is_complex:
            raise TypeError(f"model: parameter {name} is {p.dtype}; expected real numbers")
    if len(devices) > 1:
        found = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"model: expected all parameters on one device, got {found}")


def _unfit(parameters: Mapping[str, Tensor]) -> str | None:
    """Why the native core cannot read these parameters wherever they are, if it cannot."""
    dtypes = {p.dtype for p in parameters.values()}
    if len(dtypes) > 1:
        return f"parameters of different dtypes ({', '.join(sorted(map(str, dtypes)))})"
    for name, p in parameters.items():
        if p.dtype not in DTYPE_CODES:
            return f"parameter {name} is {p.dtype}; the native core has float32 and float64"
        if type(p) not in _PARAMETER_TYPES or p.layout is not torch.strided:
            return f"parameter {name} is not a plain dense tensor ({type(p).__name__})"
    return None


class Plan:
    """A model, a loss and what is adapted, prepared for many calls.

    Attributes:
        names: the parameters, in the order of `named_parameters()`, and the running statistics
            that layers normalise by, as constants behind them.
        parameters: themselves.
        constants: the names of those running statistics.
        fixed: the names of the layers that they are of.
        norms: the batch normalisations whose running statistics a call moves, in the order of the
            core's, those among them that have none to move; empty where none has any.
        least_steps: how many inner steps a call has to make at least (`PerStepBatchNorm`).
        watch: whether all of this is still what the model is.
        adapted: those the inner loop changes.
        rates: how lr values are laid out.
        expected: what inputs must be like.
        core_reason: why the native core cannot run this on any device; None where it can.
        reason: why it cannot where the parameters are; None where it can.
        device: what native calls run on; None for the CPU's own executors.
        precision: what products may be made in there.
        problem: the native Problem, where there is no `core_reason`.
        chain: for each parameter of the chain, in its order, the index into `names`.
        lr_order: permutes a row of per-element lr values into the chain's order, where needed;
            an index on the parameters' device.
        last: (tasks, support rows, query rows, steps, second order) of the last native call.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        patterns: Sequence[str] | None,
        per: str,
        optimizer: Optimizer | None = None,
        anchor: Anchor = NO_ANCHOR,
        query_loss: Loss | None = None,
        row_shape: tuple[int, ...] | None = None,
        fixed: Fixed = None,
        tracks: bool = True,
        precision: str = "float32",
    ) -> None:
        """Examine the model; TypeError or ValueError where no backend can run it.

        `row_shape` is the shape of a row of its inputs, as far as that is known (`shape_for`).
        `fixed` names the normalisations that use running statistics; None: those in eval mode do.
        `tracks` is whether calls move the running statistics of those in train mode.

        `optimizer` (plain SGD where left out) and `anchor` are what the native Problem steps by;
        `query_loss` is what query sets are judged by, if that is another one than the loss.
        `precision` is what products may be made in on a device.
        """
        with one_at_a_time():
            learned = dict(model.named_parameters())
            constants = running_statistics(model, fixed)
            named = {**learned, **constants}
            _check_parameters(named)
            self.description = describe(model, row_shape, fixed)
            places = [_place(model, name) for name in named]
            self.fixed = fixed_among(model, constants)
            self.set_norms = self._norms_of_sets(model)
            self.norms = self.set_norms if tracks and any_tracked(self.set_norms) else ()
            self.least_steps = _least_steps(model)
        self.constants = tuple(constants)
        self.names = tuple(named)
        self.parameters: list[Tensor] = list(named.values())
        places.append((vars(native), "emulating"))
        there = not all(p.is_cpu for p in self.parameters)
        self.watch = self.description.watch.and_also(places, self.parameters, there)
        self.dense = all(dense(p) is p for p in self.parameters)
        self.trainable = [n for n, p in named.items() if p.requires_grad]
        wanted = matching(patterns, tuple(learned))
        self.adapted = tuple(n for n in self.trainable if n in wanted)
        self.rates: Rates = rates(per, {n: named[n].numel() for n in self.adapted})
        self.expected = self._expected(loss, named)
        self.query_expected = self.expected
        if query_loss is not None:
            try:
                self.query_expected = self._expected(query_loss, named)
            except ValueError as error:
                raise ValueError(f"query_{error}") from None
        self.problem: Any = None
        self.chain: list[int] = []
        self.lr_order: Tensor | None = None
        self.last: tuple[Any, ...] | None = None
        self.lrs: dict[tuple[float, int], Tensor] = {}
        self.of_one_step: Plan | None = None  # functional/implicit_calls.py makes it
        self.predicts = Repeats()  # of PreparedPredict, which models/adapted.py makes
        self.optimizer = optimizer
        self.anchor = anchor
        self.precision = precision
        check_precision_of(precision, str(self.expected.dtype).removeprefix("torch."))
        self.device = Device.of(self.expected.device)
        self.core_reason = self._make_problem(loss, named)
        self.reason = self.core_reason or self._unfit_there()
        self._lay_out_gradients(named)

    def _expected(self, loss: Loss, named: Mapping[str, Tensor]) -> Expected:
        first = next(iter(named.values()), None)
        dtype = torch.get_default_dtype() if first is None else first.dtype
        device = torch.device("cpu") if first is None else first.device
        if isinstance(self.description, Unsupported):
            return Expected(loss, dtype, device, misfit=self.description.misfit)
        d = self.description
        check_width(loss, d.out_features)
        return Expected(
            loss, dtype, device, d.in_features, d.out_features, d.flattens, d.batch_norm,
            d.row_shape, embedded_columns(d.layers),
        )  # fmt: skip

    @property
    def normalises(self) -> bool:
        """Whether batch normalisations go by the statistics of sets."""
        return bool(self.set_norms)

    @property
    def unshaped(self) -> bool:
        """Whether this is a chain that waits for the shape of its rows."""
        return isinstance(self.description, Unshaped)

    def shape_for(self, x: Any) -> tuple[int, ...] | None:
        """The shape that a plan for these inputs has to know of; None where this one will do."""
        d = self.description
        if d.row_shape is None and not (isinstance(d, Unsupported) and d.by_shape):
            return None
        shape = row_shape_of(x)
        return None if shape == d.row_shape else shape

    @property
    def refuses(self) -> bool:
        """Whether no path runs rows of its shape, so that it is of no use beyond one call."""
        return self.expected.misfit is not None

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """The shape of rows that it was made for, where that matters."""
        return self.description.row_shape

    def _make_problem(self, loss: Loss, named: Mapping[str, Tensor]) -> str | None:
        """Make the native Problem; the reason why there is none, where there is none."""
        found = self.description
        reason = found.reason if isinstance(found, Unsupported) else _unfit(named)
        reason = reason or self._own_loss()
        if reason is not None:
            return reason
        assert isinstance(self.description, Description)
        lib = native.extension()
        chain, network = self.description.names, self.description.network
        if list(network.parameter_sizes) != [named[n].numel() for n in chain]:
            return "a parameter does not have the size that its layer says"
        self.problem = lib.Problem(
            network,
            native_loss(loss),
            [n in self.adapted for n in chain],
            self._lr_groups(chain, named),
            None if self.optimizer is None else native_optimizer(self.optimizer, self.anchor),
            native_loss(self.query_expected.loss),
            self.precision == TF32X3,
        )
        self.chain = [self.names.index(n) for n in chain]
        return None

    def _norms_of_sets(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Batch normalisations by the statistics of sets, in the core's order where it has one."""
        found = self.description
        if isinstance(found, Description):
            return found.norms
        named = model.named_modules()
        return tuple(m for n, m in named if is_batch_norm(m) and n not in self.fixed)

    def check_steps(self, schedule: Schedule) -> None:
        """Raise ValueError where fewer inner steps are made than a layer has rows for."""
        steps = schedule.steps if schedule.epochs is None else schedule.epochs
        assert steps is not None
        if steps < self.least_steps:
            what = "steps" if schedule.epochs is None else "epochs"
            raise ValueError(
                f"{what}: expected at least the {self.least_steps} inner steps that the model's "
                f"PerStepBatchNorm has rows for, got {steps}"
            )

    def _own_loss(self) -> str | None:
        """Why the native core cannot compute a loss, if it cannot."""
        for name, expected in (("loss", self.expected), ("query_loss", self.query_expected)):
            if isinstance(expected.loss, OwnLoss):
                return f"{name}: {expected.loss.name} is a function, which runs in torch"
        return None

    def _unfit_there(self) -> str | None:
        """Why the native core cannot run the problem where the parameters are, if it cannot."""
        reason = unusable(self.expected.device)
        if reason is None and self.device is not None:
            reason = self.problem.unfit_for_device()
        return reason

    def call(self, job: str) -> Any:
        """A native call, whose parts are to be filled in."""
        return native.extension().Call(self.problem, self.dtype_code, job)

    def runner(self, run: Callable[..., Any], *key: Hashable) -> Callable[..., Any]:
        """A call's `run` or `repeat`, to be made where the parameters are.

        Which bytes of workspace a device needs for it has to follow from `key`.
        """
        return run if self.device is None else partial(self.device.run, run, key)

    def _lr_groups(self, chain: Sequence[str], named: Mapping[str, Tensor]) -> list[int] | None:
        """Each chain parameter's column; None, and `lr_order` set, where elements have theirs."""
        if self.rates.groups is not None:
            return [self.rates.groups.get(n, 0) for n in chain]
        spans = [self.rates.spans[n] for n in chain if n in self.rates.spans]
        if spans != sorted(spans):
            order = [column for first, end in spans for column in range(first, end)]
            with torch.inference_mode(False):  # it outlives that
                self.lr_order = torch.tensor(order, device=self.expected.device)
        return None

    def _lay_out_gradients(self, named: Mapping[str, Tensor]) -> None:
        """One flat buffer for all gradients: where each parameter's begins, in its order."""
        self.in_order = self.chain == list(range(len(self.names)))
        self.trains = [p.requires_grad for p in named.values()]
        self.shapes = [tuple(named[n].shape) for n in self.trainable]
        sizes = [math.prod(shape) for shape in self.shapes]
        self.total = sum(sizes)
        self.layouts: dict[Any, Any] = {}  # fused.Layout, which is made there
        with torch.inference_mode(False):  # it outlives that
            self.scalar = torch.empty((), dtype=self.expected.dtype, device=self.expected.device)
        self.dtype_code = DTYPE_CODES.get(self.expected.dtype, 0)
        self.itemsize = itemsize = self.expected.dtype.itemsize
        offsets, end = {}, 0
        for name, size in zip(self.trainable, sizes, strict=True):
            offsets[name] = end * itemsize
            end += size
        self.offsets = [offsets.get(self.names[i], -1) for i in self.chain]

    def lr_tensor(self, value: float) -> Tensor:
        """A plain float lr as a [1] tensor of the parameters' dtype and device."""
        if self.device is None:
            stream = 0
        elif self.device.capturing():  # pymeta/backend/device.py says why
            return self.scalar.new_full((1,), value)
        else:
            stream = self.device.stream()
        tensor = self.lrs.get((value, stream))
        if tensor is None:
            with torch.inference_mode(False):  # it outlives that
                tensor = self.scalar.new_full((1,), value)
            self.lrs = {(value, stream): tensor}
        return tensor


def _place(model: nn.Module, name: str) -> Place:
    """Where a module holds its parameter or its running statistics."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key


def _least_steps(model: nn.Module) -> int:
    """As many steps as any `PerStepBatchNorm` has rows."""
    return max((m.steps for m in model.modules() if isinstance(m, PerStepBatchNorm)), default=0)
