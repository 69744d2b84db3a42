"""What an operator is made of, described once, without parameters and without torch."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from pymeta import native
from pymeta.functional.handles import register
from pymeta.spec.anchors import Anchor, check_anchor
from pymeta.spec.architecture import Architecture, tensors_of
from pymeta.spec.implicit import Implicit, check_implicit
from pymeta.spec.losses import Loss, OwnLoss, check_width, describe_loss
from pymeta.spec.optimizers import LearnableLR, Optimizer, rates
from pymeta.spec.schedule import check_count
from pymeta.spec.settings import (
    check_clip,
    check_flag,
    check_patterns,
    check_precision,
    check_query_loss,
    matching,
    one_optimizer,
)
from pymeta.spec.show import counted

if TYPE_CHECKING:
    from pymeta.functional.arrays import Arrays
    from pymeta.functional.tensors import Tensors

Shapes: TypeAlias = dict[str, tuple[int, ...]]


class Operator:
    """An inner loop, described once for any number of calls; it holds no parameters.

    Args:
        network: a torch.nn.Module, of which a copy is kept for its structure; or, without torch,
            layers as `chain` takes them, or a `pymeta.Adapter`'s `architecture`.
        loss: as for `pymeta.MAML`.
        lr: inner step size; a `LearnableLR` where calls give `rates`.
        steps: number of inner steps.
        query_loss: what query sets are judged by, where that is another loss.
        first_order: take inner gradients as constants.
        adapt: fnmatch patterns of the names of the parameters that are adapted; None for all
            (but those of a module that do not require grad).
        optimizer: in place of `lr`, as for `pymeta.MAML`.
        anchor: strength of the pull towards the start, as for `pymeta.MAML`.
        anchor_rows: as for `pymeta.MAML`.
        task_clip: largest norm of a task's share of the gradients that tasks share; None for any.
        implicit: a `pymeta.Implicit`, as for `pymeta.MAML`: the pull to the start has its
            strength, and gradients are those of the minimum. The network is then a module.
        backend: "native", "torch" or "auto".
        precision: "float32" or "tf32x3", as for `pymeta.MAML`.

    Raises:
        TypeError, ValueError: an argument is not as described; with backend="native", also where
            the native core cannot run the network.

    Attributes:
        shapes: {name: shape} of the parameters, in order.
        adapted: the names of those that are adapted.
        rate_shape: the shape of `rates`: [columns], or [steps, columns] where each step has its
            own.
    """

    def __init__(
        self,
        network: Any,
        *,
        loss: Any,
        steps: int,
        lr: float | LearnableLR | None = None,
        query_loss: Any = None,
        first_order: bool = False,
        adapt: Sequence[str] | None = None,
        optimizer: Optimizer | None = None,
        anchor: float = 0.0,
        anchor_rows: float | None = None,
        task_clip: float | None = None,
        implicit: Implicit | None = None,
        backend: str = "auto",
        precision: str = "float32",
    ) -> None:
        """Check the arguments and look at the network."""
        self.loss: Loss = describe_loss(loss)
        self.query_loss = check_query_loss(query_loss)
        self.steps = check_count("steps", steps)
        self.first_order = check_flag("first_order", first_order)
        self.optimizer: Optimizer = one_optimizer(lr, optimizer, learnable=True)
        self.task_clip = check_clip("task_clip", task_clip)
        alone = {"first_order": first_order, "task_clip": task_clip}
        pull = {"anchor": anchor, "anchor_rows": anchor_rows}
        self.implicit = check_implicit(implicit, self.optimizer, **alone, **pull)
        self.pull = check_anchor(**pull)
        if self.implicit is not None:
            self.pull = Anchor(self.implicit.strength)
        self.backend = native.backend(backend)
        self.precision = check_precision(precision)
        patterns = check_patterns("adapt", adapt)
        self.architecture: Architecture | None = None
        self.tensors: Tensors | None = None
        self._arrays: Arrays | None = None
        self._warned = False
        if _is_module(network):
            self._look_at(network, patterns)
        else:
            self._take(_architecture_of(network), patterns)
        self.rates = rates(self.per, {n: math.prod(self.shapes[n]) for n in self.adapted})
        columns = self.rates.columns
        per_step = isinstance(self.optimizer.lr, LearnableLR) and self.optimizer.lr.per_step
        self.rate_shape = (max(self.steps, 1), columns) if per_step else (columns,)
        self.handle = register(self)

    def _look_at(self, module: Any, patterns: tuple[str, ...] | None) -> None:
        """Keep the structure of a module."""
        from pymeta.functional.tensors import Tensors

        named = dict(module.named_parameters())
        self.shapes: Shapes = {n: tuple(p.shape) for n, p in named.items()}
        wanted = matching(patterns, tuple(named))
        self.adapted = tuple(n for n, p in named.items() if p.requires_grad and n in wanted)
        self.tensors = Tensors(self, module)
        self.architecture = self.tensors.architecture()

    def _take(self, architecture: Architecture, patterns: tuple[str, ...] | None) -> None:
        """Keep an architecture, which needs no torch."""
        for name, loss in (("loss", self.loss), ("query_loss", self.judge)):
            if isinstance(loss, OwnLoss):
                raise ValueError(f"{name}: {loss.name} is a function, which needs a torch module")
            check_width(loss, architecture.out_features)
        if self.implicit is not None:
            raise ValueError("implicit: expected a torch.nn.Module as the network with it")
        if self.backend == "torch":
            raise ValueError('backend: expected a torch.nn.Module as the network with "torch"')
        self.architecture = architecture
        self.shapes = architecture.shapes()
        wanted = matching(patterns, tuple(self.shapes))
        self.adapted = tuple(
            n for n in self.shapes if n in wanted and n not in architecture.constants
        )

    @property
    def judge(self) -> Loss:
        """The loss of query sets."""
        return self.loss if self.query_loss is None else self.query_loss

    @property
    def per(self) -> str:
        """What an lr value is of: the "network", a "layer" or an element of a "parameter"."""
        rate = self.optimizer.lr
        return rate.per if isinstance(rate, LearnableLR) else "network"

    @property
    def first_rate(self) -> float:
        """The step size where a call gives no `rates`."""
        rate = self.optimizer.lr
        return rate.initial if isinstance(rate, LearnableLR) else rate

    def arrays(self) -> Arrays | None:
        """What runs calls with numpy arrays without torch; None where nothing does."""
        native_too = self.backend != "torch" and self.implicit is None
        if self._arrays is None and self.architecture is not None and native_too:
            from pymeta.functional.arrays import Arrays

            self._arrays = Arrays(self, self.architecture)
        return self._arrays

    def fall_back(self, reason: str) -> None:
        """Say that torch runs a call: an error, a warning (once), or what was asked for."""
        if self.backend == "torch":
            return
        if self.backend == "native":
            raise ValueError(f'backend="native": {reason}')
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"pymeta.functional runs in torch, which is slower: {reason}",
                UserWarning,
                stacklevel=_frames_to_the_caller(),
            )

    def __repr__(self) -> str:
        """What it does, in a line."""
        what = self.architecture or "a module"
        return (
            f"Operator({what}; {self.loss.name}, {self.optimizer}, {counted(self.steps, 'step')})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle: everything but what is derived."""
        return {**self.__dict__, "_arrays": None, "handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled state."""
        self.__dict__.update({"precision": "float32", **state})
        self.handle = register(self)

    # ---- what the operators of torch.library ask ----------------------------------------------

    def _plan_for(self, dtype: Any, device: Any, x: Any) -> Any:
        assert self.tensors is not None
        return self.tensors._plan(dtype, device, x)[1]

    def _module_for(self, dtype: Any, device: Any, x: Any) -> Any:
        assert self.tensors is not None
        return self.tensors._plan(dtype, device, x)[0]

    def _lr(self, plan: Any) -> Any:
        assert self.tensors is not None
        return self.tensors._rates(None, plan)

    def _adapted_shapes(self) -> Shapes:
        return {name: self.shapes[name] for name in self.adapted}


def chain(layers: Sequence[Sequence[Any]]) -> Architecture:
    """Layers as plain data, with the names that their parameters have in an nn.Sequential.

    Args:
        layers: such as [("linear", 1, 40, True), ("relu",), ("linear", 40, 1, True)]: names and
            settings as in `pymeta.Adapter.architecture.layers`.

    Raises:
        TypeError: one is no tuple or list that begins with a name.
        ValueError: there is no such layer, or they do not fit each other.
    """
    names: list[str] = []
    forms = native.extension().layer_forms()
    for i, layer in enumerate(layers):
        if isinstance(layer, str) or not isinstance(layer, Sequence) or not layer:
            raise TypeError(
                f"layers: {i}: expected a tuple such as ('linear', 1, 40, True), got {layer!r}"
            )
        form = forms.get(layer[0])
        if form is None or len(layer) != 1 + len(form):
            given = repr(tuple(layer))
            if form is None:
                expected = "one of " + ", ".join(forms)
            else:
                expected = f"{len(form)} settings after {layer[0]!r}"
                given = f"{len(layer) - 1} in {given}"
            raise ValueError(f"layers: {i}: expected {expected}, got {given}")
        names += [f"{i}.{n}" for n in tensors_of(layer)]
    found = Architecture(tuple(map(tuple, layers)), tuple(names), tuple(names), False)
    found.shapes()  # they fit each other
    return found


def _architecture_of(network: Any) -> Architecture:
    if isinstance(network, Architecture):
        return network
    if isinstance(network, Sequence) and not isinstance(network, str):
        return chain(network)
    raise TypeError(
        f"network: expected a torch.nn.Module, an Architecture or a list of layers, "
        f"got {type(network).__name__}"
    )


def _is_module(network: Any) -> bool:
    """Whether it is a torch.nn.Module; that there is one means that torch is imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(network, torch.nn.Module)


def _frames_to_the_caller() -> int:
    """How many frames up from the caller of this one the first one outside of pymeta is."""
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pymeta."):
        frame, count = frame.f_back, count + 1
    return count


def split(parameters: Any, shapes: Mapping[str, tuple[int, ...]], tasks: int) -> tuple[str, ...]:
    """The names of the parameters of which each of the tasks has its own.

    Raises:
        TypeError: it is no mapping.
        ValueError: a name is missing or unknown, or a shape fits neither way.
    """
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters: expected {{name: array}}, got {type(parameters).__name__}")
    missing = [n for n in shapes if n not in parameters]
    unknown = [n for n in parameters if n not in shapes]
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"there is no {unknown[0]!r}"
        raise ValueError(f"parameters: {what}; there are {', '.join(shapes) or 'none'}")
    own = []
    for name, shape in shapes.items():
        got = tuple(parameters[name].shape)
        if got == (tasks, *shape) and got != shape:
            own.append(name)
        elif got != shape:
            raise ValueError(
                f"parameters[{name!r}]: expected shape {list(shape)}, or {[tasks, *shape]} where "
                f"each task has its own, got {list(got)}"
            )
    return tuple(own)
