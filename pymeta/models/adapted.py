"""The adapted models of T tasks: stacked parameters that can be called all at once.

`Adapted` is what the learners return. What it has in common with its twin without torch,
`pymeta.AdaptedArrays`, is in `stacked.py`: choosing tasks, putting objects together, files.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pymeta import native as native_module
from pymeta import reference
from pymeta.backend import adapt as native_adapt
from pymeta.backend.plan import Plan
from pymeta.backend.prepared_adapt import PreparedPredict, prepare_predict
from pymeta.models.file import Path, Raw, errors_about
from pymeta.models.given import check_stacked, in_form_of
from pymeta.models.saved import DTYPES, RAW_DTYPES, check_structure
from pymeta.models.stacked import Stacked, load, positions
from pymeta.nn.norm import PerStepBatchNorm
from pymeta.nn.tabular import TabularInput
from pymeta.spec.architecture import Architecture
from pymeta.spec.history import History
from pymeta.spec.losses import describe_loss
from pymeta.spec.modules import (
    drop_running_statistics,
    fixed_among,
    one_at_a_time,
    running_statistics,
)
from pymeta.spec.network import Description
from pymeta.spec.show import counted
from pymeta.spec.transforms import in_transform
from pymeta.tasks.checks import Names
from pymeta.tasks.task_set import QUERY, Rows, Sizes, TaskSet, dense, shaped, task_set
from pymeta.tasks.values import check_values

_NAMES = Names("xq", "", QUERY.sizes, "", "offset")


def architecture(plan: Plan) -> Architecture | None:
    """The chain of layers of a plan's model; None where the model is not a chain."""
    d = plan.description
    if not isinstance(d, Description):
        return None
    return Architecture(d.layers, plan.names, d.names, d.flattens)


class Adapted(Stacked[Tensor]):
    """T models of one structure, each with its own weights; what `adapt` and fine-tuning return.

    Nothing here carries a graph. The structure (and buffers) are those of the meta-learned
    model, which is referred to, not copied; the parameters are this object's own.

        models(xq)                     all models, each on its own rows, in one native call
        models[3]                      task 3 as a module: a copy of the model with its weights
        models[10:20], models[mask]    an `Adapted` of some of the tasks; a slice is a view
        Adapted.concatenate([a, b])    of the tasks of both
        models.save(path), Adapted.load(path, model)

    Attributes:
        parameters: {name: [T, ...]}, the layout of `torch.func.stack_module_state`; those that
            were not adapted are expanded views of one tensor. `from_stacked` is the way back.
        status: [T] int8, 1 where a task's own weights are not finite, 2 where its loss grew and
            `on_divergence` was to look, else 0. It and the history are on the parameters' device.
        loss: a description of the loss they were adapted by.
        history: the learning curves (`pymeta.History`), where they were asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        stacked: dict[str, Tensor],
        shared: dict[str, Tensor],
        tasks: int,
        native: bool,
        status: Tensor | None = None,
        history: History | None = None,
    ) -> None:
        """Called by the learners; `from_stacked` is for everybody."""
        super().__init__(plan.names, plan.expected.loss, stacked, shared, tasks, status, history)
        self._model = model
        self._made: Plan | None = plan
        self._native = native

    @classmethod
    def from_stacked(
        cls, model: nn.Module, parameters: Mapping[str, Tensor], *, loss: str | nn.Module
    ) -> Adapted:
        """Models of parameters in the layout of `torch.func.stack_module_state`.

        The tensors are held, not copied; one that is expanded along the task axis (stride 0)
        counts as shared by all tasks. `Adapted.from_stacked(model, models.parameters,
        loss=models.loss)` is `models` again.

        Args:
            model: gives the structure; its own parameters are not used.
            parameters: {name: [T, ...]} for each of its parameters.
            loss: as for the learners; tells what `predict_proba` has to do.

        Raises:
            TypeError, ValueError: names, shapes, dtypes or devices are not the model's.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        fixed = fixed_among(model, parameters if isinstance(parameters, Mapping) else ())
        plan = Plan(model, describe_loss(loss), None, "network", fixed=fixed)
        tasks = check_stacked(_tensors_of(model, fixed), parameters)
        stacked, shared = {}, {}
        for name in plan.names:
            value = parameters[name].detach()
            if tasks > 1 and value.stride(0) == 0:
                shared[name] = value[0]
            else:
                stacked[name] = value
        return cls(model, plan, stacked, shared, tasks, _chosen(plan))

    @classmethod
    def load(cls, path: Path, model: nn.Module, *, verify: bool = False) -> Adapted:
        """The models of a file that `save` (or `AdaptedArrays.save`) wrote, memory-mapped.

        Nothing but the header is read before it is needed. Writing into the parameters changes
        neither the file nor what others see of it. For a model on another device than the CPU
        all is read and copied there.

        Args:
            path: of the file.
            model: gives the structure; its own parameters are not used.
            verify: read all of it now and compare it with its checksum.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: `model` is no module.
            ValueError: the file is damaged, of another kind, or of a newer version, or its
                models are not of this model's structure.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        saved = load(path, verify)
        with errors_about(os.fspath(path)):
            shape = None if saved.architecture is None else saved.architecture.row_shape
            fixed = fixed_among(model, saved.shapes())
            plan = Plan(model, saved.loss, None, "network", row_shape=shape, fixed=fixed)
            check_structure(saved, _tensors_of(model, plan.fixed), architecture(plan))
        device = plan.expected.device

        def tensors(raws: Mapping[str, Raw]) -> dict[str, Tensor]:
            return {name: _tensor(raw).to(device) for name, raw in raws.items()}

        history = tensors(saved.history)
        return cls(
            model,
            plan,
            tensors(saved.stacked),
            tensors(saved.shared),
            saved.tasks,
            _chosen(plan),
            _tensor(saved.status).to(device),
            History.of(history) if history else None,
        )

    @property
    def _plan(self) -> Plan:
        """The plan of the model; a copy makes its own, and must still have the same shapes."""
        if self._made is None:
            plan = self._plan_for(None)
            own = {n: p.shape[1:] for n, p in self.parameters.items()}
            if own != {n: p.shape for n, p in zip(plan.names, plan.parameters, strict=True)} or any(
                p.dtype != plan.expected.dtype for p in self.parameters.values()
            ):
                raise ValueError("the model has changed since these were adapted from it")
            self._made = plan
        return self._made

    def _plan_for(self, row_shape: tuple[int, ...] | None) -> Plan:
        fixed = fixed_among(self._model, self._names)
        return Plan(self._model, self.loss, None, "network", row_shape=row_shape, fixed=fixed)

    @property
    def constants(self) -> frozenset[str]:
        """The names of running statistics among `parameters`: of layers adapted in eval mode."""
        return frozenset(self._names) - {name for name, _ in self._model.named_parameters()}

    @property
    def mixes_rows(self) -> bool:
        """Whether a prediction depends on the other rows of its call, as with batch norm."""
        fixed = fixed_among(self._model, self._names)
        return any(
            isinstance(module, (nn.modules.batchnorm._BatchNorm, PerStepBatchNorm))
            and name not in fixed
            for name, module in self._model.named_modules()
        )

    @property
    def has_categories(self) -> bool:
        """Whether some columns of a row are numbers of categories, which have no gradient."""
        kinds = (TabularInput, nn.Embedding, nn.EmbeddingBag)
        return any(isinstance(module, kinds) for module in self._model.modules())

    def __repr__(self) -> str:
        """How many models of what, and what is known of them."""
        return self._told(type(self._model).__name__)

    def __getitem__(self, task: Any) -> Any:
        """One task's model, or the models of some tasks.

        Args:
            task: an integer for a module: a copy of the meta-learned one with the task's
                weights. Its batch and instance normalisation use their input's statistics in
                eval mode too, as the models do here. A slice (a view), or integers or a mask of
                T bools as a list, array or tensor (a copy), for an `Adapted`.

        Raises:
            TypeError: `task` is none of these.
            IndexError: there is no such task, or the mask is not of T bools.
        """
        if isinstance(task, Tensor):
            task = task.cpu()
        where = positions(task, self._tasks)
        if not isinstance(where, int):
            return self._at(where)
        with one_at_a_time():
            model = copy.deepcopy(self._model)
        fixed = fixed_among(model, self._names)
        drop_running_statistics(model, fixed)
        own = self._of_task(where)
        with torch.no_grad():
            for name, tensor in _tensors_of(model, fixed).items():
                tensor.copy_(own[name])
                tensor.grad = None
        return model

    def __iter__(self) -> Iterator[nn.Module]:
        """All tasks' models, one after another."""
        return (self[t] for t in range(self._tasks))

    def state_dict(self, task: int) -> dict[str, Tensor]:
        """One task's state for `module.load_state_dict`: copies of its parameters and the rest.

        Running statistics are there as the model has them; adaptation does not learn any, so that
        a module with them has to be used in train mode. `models[task]` has none.

        Raises:
            TypeError: `task` is no integer.
            IndexError: there is no such task.
        """
        own = self._of_task(self._number(task))
        with one_at_a_time():
            given = self._model.state_dict(keep_vars=True)
            fixed = fixed_among(self._model, self._names)
            values = {id(p): own[name] for name, p in _tensors_of(self._model, fixed).items()}
        copies: dict[int, Any] = {}  # what has two names there has them here
        for value in given.values():
            taken = values.get(id(value), value)
            tensor = isinstance(taken, Tensor)
            copies[id(value)] = taken.detach().clone() if tensor else copy.deepcopy(taken)
        return {name: copies[id(value)] for name, value in given.items()}

    def __call__(self, xq: Rows, query_sizes: Sizes = None, *, offset: Rows | None = None) -> Any:
        """Every model's raw outputs on its own rows.

        Args:
            xq: [T, rows, ...], or a list of T tensors [rows_t, ...].
            query_sizes: [T], how many of its rows each task uses, where xq is padded.
            offset: [T, rows, out], [T, rows] where out is 1, or a list of single tasks': added
                to the outputs.

        Returns:
            [T, rows, out]; a list of [rows_t, out] where xq is a list.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a wrong shape, size or device, or another number of tasks.
        """
        plan = self._made
        if query_sizes is None and offset is None and plan is not None and self._native:
            found = self._predicted_again(plan, xq)
            if found is not None:
                return found
        with torch.no_grad():
            return self._predicted(xq, query_sizes, offset)

    def _predicted_again(self, plan: Plan, xq: Any) -> Tensor | None:
        """The predictions, where a call of models like these was like this one."""
        of = (*self._stacked,), (*self._shared,)
        tensors = [*self._stacked.values(), *self._shared.values()]
        before: PreparedPredict | None = plan.predicts.find(of, (*tensors, xq))
        if before is None or before.tasks != self._tasks:
            return None
        return before.run(tensors, xq)

    def _predicted(self, xq: Any, query_sizes: Sizes, offset: Any) -> Any:
        plan, query = self._queries(xq, query_sizes, offset)
        if self._runs_natively(plan, query):
            of = plan, self._stacked, self._shared, query
            predictions = shaped(native_adapt.predict(*of), query)
            if query_sizes is None and offset is None and isinstance(xq, Tensor):
                prepare_predict(*of, xq)
            return predictions
        check_values(query, plan.expected)
        if query.tasks == 0:
            out = () if plan.expected.out_features is None else (plan.expected.out_features,)
            return query.x.new_zeros(0, query.rows, *out)
        return shaped(reference.predict(self._model, self._stacked, self._shared, query), query)

    def _queries(
        self, xq: Any, sizes: Any, offset: Any, names: Names = _NAMES
    ) -> tuple[Plan, TaskSet]:
        """The rows of a call, and the plan for rows of their shape."""
        plan = self._plan
        shape = plan.shape_for(xq)
        if shape is not None:
            plan = self._plan_for(shape)
            self._made = self._made if plan.refuses else plan
        query = task_set(names, xq, None, sizes, None, plan.expected, offset)
        if query.tasks != self._tasks:
            raise ValueError(
                f"xq: expected {counted(self._tasks, 'task')}, one for each model, got "
                f"{query.tasks}"
            )
        return plan, query

    def _runs_natively(self, plan: Plan, query: TaskSet) -> bool:
        return self._native and not (plan.reason or query.reason or in_transform())

    @torch.no_grad()
    def input_gradients(self, xq: Rows, cotangents: Rows) -> Any:
        """The gradient of every model's sum(cotangents * outputs) by its rows.

        One native call for all of them (`pymeta.explain` makes attributions of it).

        Args:
            xq: as for a call.
            cotangents: in the shape of a call's result.

        Returns:
            In the shape of xq; a list where that is one.

        Raises:
            TypeError, ValueError: as a call.
        """
        names = _NAMES._replace(offset="cotangents")
        plan, query = self._queries(xq, None, cotangents, names)  # they have the outputs' shape
        flows, query.offset = query.offset, None
        if flows is None:
            raise TypeError("cotangents: expected a number for each output, got None")
        if self._runs_natively(plan, query):
            make = native_adapt.input_gradients
            found = make(plan, self._stacked, self._shared, query, flows)
        else:
            check_values(query, plan.expected)
            of = (self._model, self._stacked, self._shared)
            found = reference.input_gradients(*of, query, shaped(flows, query))
        return in_form_of(xq, shaped(found, query))

    @torch.no_grad()
    def predict_proba(
        self, xq: Rows, query_sizes: Sizes = None, *, offset: Rows | None = None
    ) -> Any:
        """Every model's probabilities on its own rows.

        For cross_entropy the softmax of the outputs over the classes; for bce_with_logits the
        sigmoid of each output. Neither overflows, however large the outputs are. A single
        output's [..., 1] is the probability of class 1; `torch.cat([1 - p, p], -1)` has a column
        for each of the two classes.

        Args:
            xq: as for a call.
            query_sizes: as for a call; rows beyond them are 0.
            offset: as for a call.

        Returns:
            [T, rows, out]; a list of [rows_t, out] where xq is a list.

        Raises:
            TypeError: the models were adapted by a loss that knows no probabilities; and as a
                call.
            ValueError: as a call.
        """
        self._check_classifies()
        outputs = self(xq, query_sizes, offset=offset)
        if isinstance(outputs, list):
            return [self._probabilities(o) for o in outputs]
        out = self._probabilities(outputs)
        if query_sizes is not None:
            sizes = torch.as_tensor(query_sizes, device=out.device).unsqueeze(-1)
            out[torch.arange(out.shape[1], device=out.device) >= sizes] = 0
        return out

    def _probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1) if self.loss.takes_classes else outputs.sigmoid()

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle; the model goes along, the tasks a slice left out do not."""
        status = None if self._status is None else _alone(self._status)
        history = self.history and History.of(_each_alone(self.history.values()))
        own = {"_stacked": _each_alone(self._stacked), "_shared": _each_alone(self._shared)}
        return {**self.__dict__, **own, "_status": status, "history": history, "_made": None}

    # ---- what `Stacked` needs to know of tensors ----------------------------------------------

    def _architecture(self) -> Architecture | None:
        return architecture(self._plan)

    def _difference(self, other: Adapted) -> str | None:
        mine, its = self._architecture(), other._architecture()
        if mine != its or (mine is None and str(self._model) != str(other._model)):
            return f"its model is {other._model if its is None else its}"
        if other._device() != self._device():
            return f"its parameters are on {other._device()}"
        return super()._difference(other)

    def _device(self) -> torch.device:
        held = [*self._stacked.values(), *self._shared.values()]
        return held[0].device if held else torch.device("cpu")

    @staticmethod
    def _index(where: np.ndarray) -> Tensor:
        return torch.from_numpy(where)

    @staticmethod
    def _expanded(value: Tensor, tasks: int) -> Tensor:
        return value.expand(tasks, *value.shape)

    @staticmethod
    def _joined(values: list[Tensor]) -> Tensor:
        return torch.cat(values)

    @staticmethod
    def _widened(value: Tensor, width: int) -> Tensor:
        return nn.functional.pad(value, (0, width - value.shape[1]), value=torch.nan)

    @staticmethod
    def _same(a: Tensor, b: Tensor) -> bool:
        return a is b or torch.equal(a, b)

    @staticmethod
    def _not_finite(values: Iterable[Tensor], tasks: int) -> Tensor:
        values = list(values)
        device = values[0].device if values else torch.device("cpu")
        status = torch.zeros(tasks, dtype=torch.int8, device=device)
        for value in values:
            finite = value.isfinite().flatten(1).all(1) if value.ndim > 1 else value.isfinite()
            status[~finite] = 1
        return status

    @staticmethod
    def _to_raw(value: Tensor) -> Raw:
        code = RAW_DTYPES.get(value.dtype)
        if code is None:
            raise TypeError(f"save: a parameter is {value.dtype}, which these files do not hold")
        bytes_ = dense(value.detach().cpu()).reshape(-1).view(torch.uint8)
        return Raw(code, tuple(value.shape), bytes_.numpy())


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a view of more, all of which torch would pickle."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _each_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _alone(tensor) for name, tensor in tensors.items()}


def _tensor(raw: Raw) -> Tensor:
    """A view of what is in a file."""
    if not raw.data.size:  # which torch cannot view as another dtype
        return torch.empty(raw.shape, dtype=DTYPES[raw.dtype], device="cpu")
    return torch.from_numpy(raw.data).view(DTYPES[raw.dtype]).reshape(raw.shape)


def _chosen(plan: Plan) -> bool:
    """Whether models that were not just adapted run natively; a warning where they cannot."""
    if native_module.backend("auto") == "torch":
        return False
    if plan.unshaped:  # which the first call decides
        return True
    if plan.reason is not None:
        warnings.warn(
            f"pymeta.Adapted runs in torch, which is slower: {plan.reason}",
            UserWarning,
            stacklevel=3,
        )
    return plan.reason is None


def _tensors_of(model: nn.Module, fixed: frozenset[str]) -> dict[str, Tensor]:
    """A model's parameters, and the running statistics that its fixed layers go by."""
    return {**dict(model.named_parameters()), **running_statistics(model, fixed)}
