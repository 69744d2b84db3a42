"""FineTune: T data sets, one start, and every one of the T models trained in the same call.

Nothing is meta-learned here. Each task is trained for some epochs by SGD, Adam or RMSprop (what
they do is defined in `pymeta/reference`), from a shared start or one of its own, with what small
data sets need: frozen parameters, a pull towards the start (L2-SP; Li, Grandvalet, Davoine 2018,
arXiv:1802.01483), weight decay, class weights, and held out rows with early stopping.

A run goes through the tasks in chunks. What a chunk needs besides inputs and outputs (copies of
rows where some are held out, weights of classes) is gone before the next one begins. The chunks of
a device are larger: it takes many tasks to fill it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pymeta.algorithms.chunks import columns_of, copy_into, part_of
from pymeta.algorithms.divergence import check_reaction, layer_rates, reacted
from pymeta.algorithms.held_out import (
    check_classes,
    held_out_counts,
    hold_out,
    table_of,
    validation_set,
    weighted,
)
from pymeta.algorithms.learner import Learner, Weights, check_minibatches
from pymeta.algorithms.progress import Bar, Callback, check_callback, check_progress
from pymeta.algorithms.settings import Checks, checks_of
from pymeta.algorithms.starts import Start, own_start
from pymeta.backend import adapt as native_adapt
from pymeta.backend.plan import Plan
from pymeta.functional.anchors import Anchors, anchors_of, check_values_of
from pymeta.models.adapted import Adapted
from pymeta.spec.class_weights import ClassWeights, check_class_count, check_class_weights
from pymeta.spec.losses import Loss
from pymeta.spec.optimizers import LearnableLR, Optimizer, check_number
from pymeta.spec.schedule import Schedule, check_count
from pymeta.spec.settings import check_patterns
from pymeta.tasks.checks import Expected, Names
from pymeta.tasks.task_set import Rows, Sizes, TaskSet, check_task_ids, task_set
from pymeta.tasks.values import check_values, weighing_rows

_TRAIN = Names("xs", "ys", "sizes", "weights", "offset")
_CHUNK_WORK = 4e10  # multiplications and additions of a chunk: some tenths of a second
_DEVICE_CHUNK_WORK = 1e12  # likewise
_LARGEST_CHUNK = 4096
_LARGEST_DEVICE_CHUNK = 65536
_LARGEST_TORCH_CHUNK = 512


def _check_no_patterns(value: Any) -> None:
    if value is not None:
        raise AttributeError("adapted_patterns cannot be set: set freeze, which names the others")


def _check_fraction(value: Any) -> float:
    check_number("validation", value)
    if value >= 1:
        raise ValueError(f"validation: expected a fraction >= 0 and < 1, got {value}")
    return float(value)


def _check_validation_rows(value: Any) -> str:
    if value not in ("random", "last"):
        raise ValueError(f'validation_rows: expected "random" or "last", got {value!r}')
    return str(value)


class FineTune(Learner):
    """Fine-tune `model` to many tasks, each independently.

    The model's own parameters are the start and stay as they are.

    Memory: for each task the result holds the parameters that are not frozen (of 24-64-64-1,
    5,825 numbers), one byte of status, and with `curves` up to two numbers for each epoch and
    three more. Each thread needs working memory, which `explain()` reports, and where rows are held
    out, one chunk's rows are copied. Inputs are not copied, except lists, which are joined, and
    tensors that are not contiguous. `stream` takes any number of tasks.

    Args:
        model: maps [rows, ...] to [rows, out]. A chain of the layers that the native core
            knows runs there; everything else runs in torch, with one warning.
        loss: a name such as "mse" or "cross_entropy", the torch.nn module that means the same, a
            `pymeta.QuantileLoss` or `pymeta.StudentTNLLLoss`; or any function of one set's outputs
            and targets that gives one number for each row, or one in all, which runs in torch.
        optimizer: `pymeta.SGD(...)`, `pymeta.Adam(...)` or `pymeta.RMSprop(...)`; its state is
            each task's own.
        lr: instead of `optimizer`, the step size of plain SGD.
        epochs: passes over each task's rows.
        batch_size: rows of a step, shuffled for each epoch as `pymeta.Schedule` says; None for all
            rows at once.
        anchor: the penalty anchor/2 |theta - start|^2 on what is adapted (L2-SP).
        anchor_rows: in its place: anchor_rows / n for a task that trains on n rows that count, so
            that the start is worth as much as so many rows.
        freeze: fnmatch patterns of parameter names that stay as they are in the start; so do
            parameters that do not require grad.
        class_weights: None, or what the weights of the rows are multiplied by: a number for each
            class, or "balanced", n / (k * count) in a task of n rows with k classes in it, of
            which the row's one has `count` rows. For cross_entropy, and for bce_with_logits with
            one output (classes 0 and 1). They count in validation as well.
        validation: the fraction of each task's rows that is held out, rounded down. After each
            epoch the loss on them is measured, in eval mode (without dropout), and the weights
            (or the start) that had the lowest are the result. A task with none held out, or only
            rows of weight 0, is trained for all epochs.
        validation_rows: "random", or "last" for the last rows of each task, as for rows in the
            order of time.
        patience: stop a task after so many epochs in a row without a lower validation loss.
        seed: of the shuffles and of the choice of rows held out.
        on_divergence: what becomes of a task whose loss on the rows it trained on is greater at
            the end than at its start, or not finite: "start", it returns there; "keep"; or
            "raise", an ArithmeticError. Its status is then 2 (1 where weights are not finite).
            None: nobody looks, which saves two passes forward, and status knows of 1 alone.
        layer_lr: step sizes in place of the optimiser's, one for each module that owns free
            parameters, in their order: as `MAML(lr=LearnableLR(per="layer"))` learned them, say.
        backend: "native", "torch", or "auto": native where possible (or what PYMETA_BACKEND
            says).
        precision: "float32" or "tf32x3", as for `MAML`.

    Raises:
        TypeError, ValueError: an argument is not as described; with backend="native", also
            where the native core cannot run the model (the message says why).
    """

    _checks: ClassVar[Checks] = checks_of(
        "epochs",
        "batch_size",
        "seed",
        adapted_patterns=lambda self, value: _check_no_patterns(value),
        freeze=lambda self, value: check_patterns("freeze", value),
        class_weights=lambda self, value: check_class_weights(value, self.loss),
        validation=lambda self, value: _check_fraction(value),
        validation_rows=lambda self, value: _check_validation_rows(value),
        patience=lambda self, v: None if v is None else check_count("patience", v, 1),
        on_divergence=lambda self, value: check_reaction(value),
    )
    _of_the_plan: ClassVar[frozenset[str]] = Learner._of_the_plan | {"freeze"}
    _fixed: ClassVar[Mapping[str, str]] = {
        **Learner._fixed,
        "layer_lr": "make a new learner for other ones",
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Any,
        optimizer: Optimizer | None = None,
        lr: float | None = None,
        epochs: int,
        batch_size: int | None = None,
        anchor: float = 0.0,
        anchor_rows: float | None = None,
        freeze: Sequence[str] | None = None,
        class_weights: str | Sequence[float] | None = None,
        validation: float = 0.0,
        validation_rows: str = "random",
        patience: int | None = None,
        seed: int = 0,
        on_divergence: str | None = None,
        layer_lr: Sequence[float] | np.ndarray | Tensor | None = None,
        backend: str = "auto",
        precision: str = "float32",
    ) -> None:
        super().__init__(
            model,
            loss=loss,
            lr=lr,
            optimizer=optimizer,
            backend=backend,
            precision=precision,
            anchor=anchor,
            anchor_rows=anchor_rows,
        )
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.freeze = freeze
        self.class_weights: ClassWeights = class_weights  # type: ignore[assignment]
        self.validation, self.validation_rows = validation, validation_rows
        self.patience = patience
        self.on_divergence = on_divergence
        self._layer_lr = None if layer_lr is None else layer_rates(layer_lr)
        if layer_lr is not None:
            self._per = "layer"
        plan = self._look()
        self._lr(plan)
        check_class_count(self.class_weights, self.loss, plan.expected.out_features)

    @property
    def schedule(self) -> Schedule:
        """The epochs, and how each goes through the rows."""
        return Schedule(None, self.epochs, self.batch_size, self.seed)

    @property
    def layer_lr(self) -> Tensor | None:
        """The step sizes of the layers [layers]; None where there is one for all."""
        return self._layer_lr

    @property
    def optimizer(self) -> Optimizer:
        """As in the base class; step sizes of layers are there as a description."""
        if self._layer_lr is None:
            return super().optimizer
        return replace(self._rule, lr=LearnableLR(float(self._layer_lr.mean()), per="layer"))

    def _lr(self, plan: Plan) -> Tensor:
        if self._layer_lr is None:
            return super()._lr(plan)
        columns = plan.rates.columns
        if self._layer_lr.shape != (columns,):
            raise ValueError(
                f"layer_lr: expected {columns}, one for each layer with free parameters, "
                f"got {len(self._layer_lr)}"
            )
        return self._layer_lr.to(plan.expected.device, plan.expected.dtype)

    def _made_plan(self, row_shape: tuple[int, ...] | None) -> Plan:
        names = [name for name, _ in self.model.named_parameters()]
        frozen: set[str] = set()
        for pattern in self.freeze or ():
            hits = [name for name in names if fnmatchcase(name, pattern)]
            if not hits:
                raise ValueError(
                    f"freeze: the pattern {pattern!r} matches no parameter; "
                    f"there are {', '.join(names) or 'none'}"
                )
            frozen.update(hits)
        free = [escape(name) for name in names if name not in frozen]
        how = free, self._per, self._rule, self._anchor
        return Plan(self.model, self.loss, *how, row_shape=row_shape, precision=self.precision)

    # ---- calls --------------------------------------------------------------------------------

    def forward(
        self,
        xs: Rows,
        ys: Rows,
        *,
        start: Start | None = None,
        sizes: Sizes = None,
        weights: Weights = None,
        offset: Rows | None = None,
        validation_data: Sequence[Rows | None] | None = None,
        task_ids: Sequence[int] | Tensor | None = None,
        anchor: Anchors = None,
        curves: bool = False,
        progress: bool | None = None,
        callback: Callback | None = None,
    ) -> Adapted:
        """Fine-tune T tasks; the models carry no graph.

        Args:
            xs: inputs [T, rows, ...], or a list of T tensors [rows_t, ...]; tensors or arrays.
            ys: targets: class indices [T, rows] for cross_entropy; otherwise [T, rows, out],
                or [T, rows] where out is 1; a list where xs is one.
            start: where the tasks begin, in place of the model's parameters: the result of an
                earlier call, or {name: [T, ...]} for some of the parameters, frozen ones too.
            sizes: [T], how many of its rows each task uses, where xs is padded.
            weights: [T, rows] (or a list of [rows_t]) weights of the rows' losses; or in the
                shape of ys, of single targets, of which those of weight 0 contribute nothing.
            offset: [T, rows, out], [T, rows] where out is 1, or a list of single tasks': added
                to the model's outputs before the loss.
            validation_data: (x, y), (x, y, weights) or (x, y, weights, offset) like xs, ys,
                weights, offset, to validate on instead of rows held out; weights or None.
            task_ids: [T] integers >= 0 that set the shuffles of the tasks apart; left out,
                tasks of equal sizes are shuffled alike.
            anchor: [T], the strength of each task's pull towards its start, in place of the
                constructor's.
            curves: whether the models get a `history` of the epochs' losses.
            progress: True for a bar on stderr; None for one if the run turns out to be long and
                stderr is a terminal. For CUDA tensors it counts what was queued.
            callback: called as callback(done, T) after each chunk of tasks, from this thread; an
                exception that it raises ends the run.

        Returns:
            T models; `status` tells which of them diverged.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a wrong shape or device, a label, size or weight out of range, a batch
                of one row under batch normalisation, a normalisation layer that would use
                running statistics; with backend="native" also whatever only torch could run.
            ArithmeticError: a task diverged, with on_divergence="raise".
        """
        options: dict[str, Any] = {"start": start, "sizes": sizes, "weights": weights}
        options |= {"offset": offset, "validation_data": validation_data, "task_ids": task_ids}
        options |= {"anchor": anchor, "curves": curves}
        if torch.compiler.is_compiling():
            from pymeta.functional.compiled import outside_graphs

            options |= {"progress": progress, "callback": callback}
            done: Adapted = outside_graphs(self, "forward", (xs, ys), options)
            return done
        return self._tuned(xs, ys, progress, 7, callback=callback, **options)

    def stream(
        self,
        tasks: Iterable[Sequence[Any]],
        chunk: int = 1024,
        *,
        task_ids: Iterable[int] | None = None,
        curves: bool = False,
        progress: bool | None = None,
        callback: Callback | None = None,
    ) -> Iterator[Adapted]:
        """Fine-tune any number of tasks, in memory that does not grow with their number.

        Args:
            tasks: single ones, (x, y), (x, y, weights) or (x, y, weights, offset) with x
                [rows, ...] as tensors or arrays; weights and offsets in all or in none.
            chunk: how many of them are taken at a time.
            task_ids: an integer >= 0 for each task, as for a call.
            curves: as for a call.
            progress: as for a call.
            callback: as for a call, as callback(done, None) after each `chunk`.

        Returns:
            An iterator over the models of the next up to `chunk` tasks.

        Raises:
            TypeError, ValueError: as a call; for what is wrong with a task it is the iterator that
                raises, and the message says in which tasks.
        """
        check_count("chunk", chunk, 1)
        check_progress(progress)
        check_callback(callback)
        ids = None if task_ids is None else iter(task_ids)
        return self._streamed(iter(tasks), chunk, ids, curves, progress, callback)

    def _streamed(
        self,
        iterator: Iterator[Sequence[Any]],
        chunk: int,
        ids: Iterator[int] | None,
        curves: bool,
        progress: bool | None,
        callback: Callback | None,
    ) -> Iterator[Adapted]:
        first = 0
        with Bar(None, progress, callback) as bar:
            while group := list(itertools.islice(iterator, chunk)):
                of_group = None if ids is None else list(itertools.islice(ids, len(group)))
                try:
                    x, y, weights, offset = columns_of(group)
                    options: dict[str, Any] = {"weights": weights, "offset": offset}
                    options |= {"task_ids": of_group, "curves": curves}
                    models = self._tuned(x, y, False, 5, **options)
                except (TypeError, ValueError) as error:
                    where = f"tasks {first} to {first + len(group) - 1} of the stream"
                    raise type(error)(f"{where} (numbered from 0 here): {error}") from None
                first += len(group)
                bar.advance(len(group))
                yield models

    # ---- the run ------------------------------------------------------------------------------

    @torch.no_grad()
    def _tuned(
        self,
        xs: Rows,
        ys: Rows,
        progress: bool | None,
        frames: int,
        *,
        callback: Callback | None = None,
        start: Start | None = None,
        sizes: Sizes = None,
        weights: Weights = None,
        offset: Rows | None = None,
        validation_data: Sequence[Rows | None] | None = None,
        task_ids: Sequence[int] | Tensor | None = None,
        anchor: Anchors = None,
        curves: bool = False,
    ) -> Adapted:
        """The call, its warnings naming the line `frames` calls up from here."""
        if not isinstance(curves, bool):
            raise TypeError(f"curves: expected a bool, got {type(curves).__name__}")
        plan, parameters = self._current(xs)
        support = task_set(_TRAIN, xs, ys, sizes, weights, plan.expected, offset)
        held = validation_set(
            validation_data, self.validation, self.patience, support, plan.expected
        )
        ids = check_task_ids(task_ids, support.tasks)
        anchors = anchors_of(anchor, support.tasks, plan)
        tasks = support.tasks
        own, parameters = own_start(start, plan, parameters, tasks)
        sets = (support,) if held is None else (support, held)
        reason = self._reason(plan, *sets)
        in_torch = reason is not None
        expected = plan.expected
        if reason is not None:
            expected = self._to_torch(plan, reason, frames, *sets)
        self._check_data(plan, expected, sets)
        check_values_of(anchors)
        validated = held is not None or self.validation > 0
        out = native_adapt.memory(plan, parameters, tasks, self.schedule, curves, validated)
        rows = sum(support.counts)
        with Bar(tasks, progress, callback) as bar:
            for first, last in self._chunks(plan, tasks, rows, in_torch):
                part_ids = None if ids is None else ids[first:last]
                part, watched = self._parted(
                    support.part(first, last),
                    None if held is None else held.part(first, last),
                    part_ids,
                    expected,
                )
                on_host = in_torch or plan.device is None  # where values may be read
                if self.validation and plan.expected.batch_norm and on_host:
                    _check_halves(part, watched, self.loss, first)
                view = part_of(out, first, last)
                options: dict[str, Any] = {} if in_torch else {"out": view}
                done = self._adapt_tasks(
                    plan,
                    parameters,
                    self.schedule,
                    part,
                    in_torch,
                    start={n: v[first:last] for n, v in own.items()},
                    validation=watched,
                    patience=self.patience,
                    curves=curves,
                    task_ids=part_ids,
                    anchors=None if anchors is None else anchors[first:last],
                    **options,
                )
                if in_torch:
                    copy_into(done, view)
                if self.on_divergence is not None:
                    begin = {n: v[first:last] for n, v in own.items()}
                    reacted(
                        self, plan, parameters, begin, part, view, self.on_divergence, in_torch,
                        first,
                    )  # fmt: skip
                bar.advance(last - first)
        call = self._last
        if call is not None:  # not the last chunk alone
            self._last = call._replace(tasks=tasks)
        out.parameters |= {n: v.clone() for n, v in own.items() if n not in plan.adapted}
        return self._adapted(plan, parameters, out, tasks, in_torch)

    def _check_data(self, plan: Plan, expected: Expected, sets: Sequence[TaskSet]) -> None:
        """Raise for wrong values before the first chunk, not in the middle of the run."""
        for s in sets:
            check_values(s, expected)
        if self.class_weights is not None:
            check_class_weights(self.class_weights, self.loss)  # which may have been set since
            check_class_count(self.class_weights, self.loss, expected.out_features)
            for s in sets:
                check_classes(s, self.loss)
        if plan.expected.batch_norm:
            self._check_single_rows(plan, sets[0])

    def _check_single_rows(self, plan: Plan, s: TaskSet) -> None:
        """Raise where batch normalisation would meet a single row."""
        counts = torch.tensor(s.counts, dtype=torch.int64, device="cpu")
        held = held_out_counts(counts, self.validation)
        for sizes in (counts - held, held):
            if self.validation and bool((sizes == 1).any()):
                task = int((sizes == 1).nonzero()[0])
                raise ValueError(
                    f"validation: of the {int(counts[task])} rows of task {task}, "
                    f"{int(held[task])} would be held out, and batch normalisation cannot "
                    f"normalise one row"
                )
        check_minibatches(plan, (counts - held).tolist(), self.schedule)

    def _parted(
        self, part: TaskSet, watched: TaskSet | None, ids: Tensor | None, expected: Expected
    ) -> tuple[TaskSet, TaskSet | None]:
        """What to train and what to validate on: with class weights, without the rows held out."""
        if self.class_weights is not None:
            table = table_of(part, self.class_weights, self.loss, expected.out_features)
            part = weighted(part, table, expected)
            watched = None if watched is None else weighted(watched, table, expected)
        if self.validation:
            last = self.validation_rows == "last"
            return hold_out(part, self.validation, last, self.seed, ids)
        return part, watched

    def _chunks(
        self, plan: Plan, tasks: int, rows: int, in_torch: bool
    ) -> Iterator[tuple[int, int]]:
        """First and last task of each chunk of `tasks` tasks with `rows` rows in all."""
        most_work, most_tasks = _CHUNK_WORK, _LARGEST_CHUNK
        if in_torch:
            most_tasks = _LARGEST_TORCH_CHUNK
        elif plan.device is not None:
            most_work, most_tasks = _DEVICE_CHUNK_WORK, _LARGEST_DEVICE_CHUNK
        weights = sum(p.numel() for p in plan.parameters)
        work = 6 * weights * self.epochs * rows / max(tasks, 1)
        size = int(most_work / max(work, 1.0)) // 16 * 16
        size = min(max(size, 16), most_tasks)
        for first in range(0, tasks, size):
            yield first, min(first + size, tasks)


# ---- pieces -----------------------------------------------------------------------------------


def _check_halves(train: TaskSet, held: TaskSet | None, loss: Loss, first: int) -> None:
    """Raise where batch normalisation would meet a single row that counts after the split.

    `first` is the number of the first task.
    """
    for s, what in ((train, "to train on"), (held, "to validate on")):
        counts = [] if s is None else weighing_rows(s, loss)
        if 1 in counts:
            raise ValueError(
                f"validation: task {first + counts.index(1)} has one row that counts {what}, "
                f"which batch normalisation cannot normalise"
            )
