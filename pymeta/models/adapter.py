"""`Adapter`: a learned start and how to adapt from it, deployed. numpy in, numpy out, no torch.

    adapter = maml.adapter()                      # or reptile's, or finetune's
    adapter.save("m.safetensors")
    ...                                           # in another process, without torch
    adapter = pymeta.Adapter.load("m.safetensors")
    adapter.adapt_predict(xs, ys, xq, out=out)    # one task, in microseconds
    models = adapter.adapt(xs, ys)                # or many at once: a pymeta.AdaptedArrays

The results are bitwise those of the learner it was made from: the same native core takes the
same steps. One task goes through a native `Engine`, which keeps everything it needs between
calls; many tasks go through the same calls as the learners'.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from pymeta import native
from pymeta.models import by_support
from pymeta.models.arrays import (
    AdaptedArrays,
    array_of,
    checked_parameters,
    frozen,
    predictor,
    raw_of,
)
from pymeta.models.file import Contents, Path, read, write
from pymeta.models.one_task import as_engines_want, weights_by_name
from pymeta.models.row_weights import class_factors
from pymeta.spec.anchors import check_anchor
from pymeta.spec.architecture import Architecture, read_architecture
from pymeta.spec.class_weights import (
    ClassWeights,
    check_class_count,
    check_class_weights,
    read_class_weights,
)
from pymeta.spec.fields import Fields
from pymeta.spec.losses import Loss, check_width, loss_fields, native_loss, read_loss
from pymeta.spec.optimizers import (
    LearnableLR,
    Optimizer,
    described_optimizer,
    native_optimizer,
    rates,
    read_optimizer,
)
from pymeta.spec.schedule import Schedule, check_count, described_schedule, read_schedule
from pymeta.spec.show import brief, counted
from pymeta.tasks.arrays import (
    DTYPE_CODES,
    Gathered,
    Rows,
    address,
    dense,
    expected_of,
    gather,
    gather_queries,
    ids_of,
    need_array,
)
from pymeta.tasks.checks import Names, cure, of_table

_SUPPORT = Names("xs", "ys", "", "weights", "offset")


class Adapter:
    """A start, and the recipe by which tasks are adapted from it. It does not change.

    It may be used from many threads at once: every call gives bitwise what it gives alone, and
    none holds the GIL while it computes.

    Attributes:
        architecture: the chain of layers.
        in_features: columns of xs and xq.
        out_features: columns of the outputs.
        dtype: of all inputs (but classes, which are integers) and outputs.
        loss: a description of the loss.
        optimizer: `pymeta.SGD`, `pymeta.Adam` or `pymeta.RMSprop`.
        lr: its step sizes [columns] or [steps, columns], as the learner had them.
        schedule: how many steps, on which rows.
        anchor: the strength of the pull towards the start.
        anchor_rows: in its place, None or what is divided by a task's rows to be its strength.
        class_weights: what weighs rows by their class: None, "balanced", or one for each class.
        predicting: the chain of layers of the models that it makes, where it differs: one with
            statistics of the support rows in the place of batch normalisations (a learner's
            `query_statistics="support"`); or None.
        adapted: the names of the parameters that are adapted.
        parameters: {name: array} the start, read-only.
    """

    def __init__(
        self,
        architecture: Architecture,
        parameters: Mapping[str, np.ndarray],
        *,
        adapted: Sequence[str],
        loss: Loss,
        optimizer: Optimizer,
        schedule: Schedule,
        lr: np.ndarray | None = None,
        anchor: float = 0.0,
        anchor_rows: float | None = None,
        class_weights: ClassWeights = None,
        predicting: Architecture | None = None,
    ) -> None:
        """Copy the arguments; use a learner's `adapter()` or `load` rather than this.

        `lr` are the values of a `LearnableLR`, in the learner's layout; None where the optimiser
        has a number.

        Raises:
            TypeError, ValueError: it does not fit together, or a step size is not finite.
        """
        self.architecture = architecture
        self.loss = loss
        self.optimizer = optimizer
        self.schedule = schedule
        self.anchor, self.anchor_rows = anchor, anchor_rows
        self.class_weights = check_class_weights(class_weights, loss)
        self.adapted = tuple(adapted)
        self.in_features = architecture.in_features
        self.out_features = architecture.out_features
        check_width(loss, self.out_features)
        check_class_count(self.class_weights, loss, self.out_features)
        pull = check_anchor(anchor, anchor_rows)
        self.parameters = checked_parameters(architecture, parameters)
        self.dtype = next(iter(self.parameters.values())).dtype
        if isinstance(optimizer.lr, LearnableLR) == (lr is None):
            raise ValueError("lr: expected values exactly where the optimiser's are learnable")
        self.lr = frozen(np.array([optimizer.lr], self.dtype) if lr is None else lr)
        self.predicting = predicting
        self._measured = by_support.of(architecture, predicting)
        self._expected = expected_of(architecture, loss, self.dtype)
        self._predicted = expected_of(predicting or architecture, loss, self.dtype)
        self._row_shape = architecture.row_shape
        self._one_task = 1 + len(self._row_shape or (1,))  # axes of one task's rows
        groups = self._lay_out_lr()
        lib = native.extension()
        self._problem = lib.Problem(
            architecture.network(),
            native_loss(loss),
            [name in self.adapted for name in architecture.chain],
            groups,
            native_optimizer(optimizer, pull),
        )
        self._start = [self.parameters[name] for name in architecture.chain]
        # what is the same in all calls
        shapes = architecture.shapes()
        self._made_of = [(n, shapes[n], math.prod(shapes[n])) for n in self.adapted]
        self._addresses = [address(p) for p in self._start]
        self._all_rates = lib.Rates(address(self._native_lr), *self._native_lr.shape)
        self._predictor = predictor(predicting or architecture, loss)
        self._engine = lib.Engine(
            self._problem,
            DTYPE_CODES[self.dtype],
            self._addresses,
            self._all_rates,
            native.schedule(schedule),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse: the native engine is made of what there was at first."""
        if "_engine" in self.__dict__:
            raise AttributeError(
                f"{name}: an Adapter does not change; change the learner and call its adapter()"
            )
        super().__setattr__(name, value)

    def _lay_out_lr(self) -> list[int] | None:
        """Make `_native_lr`: [rows, columns], what the chain's order asks for; its groups."""
        chain, shapes = self.architecture.chain, self.architecture.shapes()
        unknown = [name for name in self.adapted if name not in shapes]
        if unknown or list(self.adapted) != [n for n in shapes if n in self.adapted]:
            raise ValueError(f"adapted: expected some of {', '.join(shapes)} in their order")
        rate = self.optimizer.lr
        per = rate.per if isinstance(rate, LearnableLR) else "network"
        layout = rates(per, {name: math.prod(shapes[name]) for name in self.adapted})
        lr = np.atleast_2d(self.lr)
        if self.lr.ndim not in (1, 2) or lr.shape[1] != layout.columns or not lr.shape[0]:
            raise ValueError(
                f"lr: expected shape [{layout.columns}] or [steps, {layout.columns}], "
                f"got {list(self.lr.shape)}"
            )
        if self.lr.dtype != self.dtype or not np.isfinite(lr).all():
            raise ValueError(f"lr: expected finite values of {self.dtype}")
        if layout.groups is not None:
            self._native_lr = dense(lr)
            return [layout.groups.get(name, 0) for name in chain]
        spans = [layout.spans[name] for name in chain if name in layout.spans]
        columns = [column for first, end in spans for column in range(first, end)]
        self._native_lr = dense(lr[:, columns])
        return None

    # ---- use ----------------------------------------------------------------------------------

    def adapt(
        self,
        xs: Rows,
        ys: Rows,
        *,
        weights: Rows | None = None,
        offset: Rows | None = None,
        steps: int | None = None,
        task_ids: Sequence[int] | np.ndarray | None = None,
    ) -> AdaptedArrays:
        """The models adapted to T tasks.

        Args:
            xs: [T, rows, in] arrays of `dtype`, or a list of T arrays [rows_t, in]. Arrays that
                are not contiguous are copied.
            ys: [T, rows] classes for cross_entropy, or distributions over them [T, rows, out];
                otherwise values [T, rows, out], or [T, rows] where out is 1; a list where xs is
                one. Where the loss has several outputs for each target, as many columns as targets.
            weights: [T, rows] weights of the rows' losses, or a list of [rows_t]; or in the shape
                of ys, of single targets, of which those of weight 0 contribute nothing.
            offset: [T, rows, out] ([T, rows] where out is 1), or a list: added to the outputs
                before the loss.
            steps: instead of the recipe's, where that counts steps.
            task_ids: [T] numbers that set the tasks' shuffles apart; all 0 if left out.

        Raises:
            TypeError: an argument is no array, or has a mask, or another dtype. Nothing is cast.
            ValueError: a wrong shape, or a label or weight out of range.
        """
        support = self._weighted(gather(_SUPPORT, xs, ys, weights, self._expected, offset))
        return self._adapt(support, self._scheduled(steps), ids_of(task_ids, support.tasks))

    def adapt_predict(
        self,
        xs: Rows,
        ys: Rows,
        xq: Rows,
        out: np.ndarray | None = None,
        *,
        weights: Rows | None = None,
        offset: Rows | None = None,
        query_offset: Rows | None = None,
    ) -> Any:
        """Adapt, and predict with what was adapted: the raw outputs.

        One task (xs of two dimensions) is the fast way: given `out` and contiguous arrays, it
        allocates nothing after the first call with that many rows (but where `predicting` is not
        None, which takes three calls). The rows of one task have one
        axis of features also where the model begins with Flatten.

        Args:
            xs: one task's [rows, in], or [rows, *row_shape]; or tasks, as for `adapt`.
            ys: one task's [rows] or [rows, out]; or as for `adapt`.
            xq: [rows, in]; or [T, rows, in], or a list.
            out: [rows, out], or [T, rows, out], contiguous: where the result goes. None for new
                memory, and where xq is a list.
            weights: one task's [rows], or in the shape of its ys; or as for `adapt`.
            offset: one task's [rows, out] ([rows] where out is 1); or as for `adapt`.
            query_offset: likewise for xq, and part of the result.

        Returns:
            `out`; a list of [rows_t, out] where xq is a list.

        Raises:
            TypeError, ValueError: as `adapt`.
        """
        if not type(xs) is type(ys) is type(xq) is np.ndarray:
            xs = of_table("xs", xs)
            if not isinstance(xs, np.ndarray):
                return self._many(xs, ys, xq, out, weights, offset, query_offset)
            if xs.ndim == self._one_task:  # tables, or arrays with a mask
                xs, ys, xq = need_array("xs", xs), need_array("ys", ys), need_array("xq", xq)
        if xs.ndim != self._one_task:
            return self._many(xs, ys, xq, out, weights, offset, query_offset)
        if self._measured is not None:
            return self._alone(xs, ys, xq, out, weights, offset, query_offset)
        if weights is not None:
            weights = need_array("weights", weights)
        offsets: tuple[Any, ...] = ()
        if offset is not None or query_offset is not None:
            given = ("offset", offset), ("query_offset", query_offset)
            offsets = tuple(None if v is None else need_array(n, v) for n, v in given)
        if out is None:
            out = np.empty((*np.shape(xq)[:1], self.out_features), self.dtype)
        if self.class_weights is not None:
            weights = self._weighted(self._one(xs, ys, weights)).weights
            weights = None if weights is None else weights[0]
        if self._row_shape is not None:
            xs, xq = self._as_features("xs", xs), self._as_features("xq", xq)
        try:
            self._engine.adapt_predict(xs, ys, xq, out, weights, *offsets)
        except (TypeError, ValueError):
            # what only lies in memory in another way is copied; all else raises again
            lying_well = as_engines_want(xs, ys, xq, out, weights, *offsets)
            with weights_by_name(), self._curing():
                self._engine.adapt_predict(*lying_well)
        return out

    def _as_features(self, name: str, x: Any) -> np.ndarray:
        """One task's rows of images or sequences as the engine reads them: a view."""
        want, got = list(self._row_shape or ()), list(x.shape[1:])
        if want != got:
            raise ValueError(f"{name}: expected rows of shape {want}, got {got}")
        return dense(x).reshape(len(x), self.in_features)

    @contextmanager
    def _curing(self) -> Iterator[None]:
        """Let the engine's messages about dtypes end with what to do."""
        try:
            yield
        except TypeError as error:
            wrong = re.match(rf"\w+: expected {self.dtype}, got", str(error))
            raise TypeError(f"{error}; {cure(None, self.dtype)}" if wrong else error) from None

    def _weighted(self, support: Gathered) -> Gathered:
        """The tasks with class weights worked into the rows' weights."""
        if self.class_weights is None:
            return support
        factors = class_factors(support, self.loss, self.out_features, self.class_weights)
        weights = factors if support.weights is None else support.weights * factors
        return support._replace(weights=weights)

    def class_factors(self, xs: Rows, ys: Rows, weights: Rows | None = None) -> np.ndarray:
        """What `class_weights` multiply the rows' weights by: [T, rows], or [sum of rows] of lists.

        The arguments are those of `adapt`.

        Raises:
            TypeError, ValueError: as `adapt`.
        """
        support = gather(_SUPPORT, xs, ys, weights, self._expected)
        if self.class_weights is None:
            return np.ones(support.x.shape[: 1 if support.starts is not None else 2], self.dtype)
        return class_factors(support, self.loss, self.out_features, self.class_weights)

    def _one(self, xs: Any, ys: Any, weights: Any) -> Gathered:
        """One task as a batch."""
        ys = need_array("ys", ys)[None]
        weights = None if weights is None else need_array("weights", weights)[None]
        return gather(_SUPPORT, xs[None], ys, weights, self._expected)

    def _many(
        self, xs: Any, ys: Any, xq: Any, out: Any, weights: Any, offset: Any, query_offset: Any
    ) -> Any:
        """`adapt_predict` for many tasks; all arguments are checked before anything is run."""
        expected = self._expected
        support = self._weighted(gather(_SUPPORT, xs, ys, weights, expected, offset))
        why, name = "as xs has", "query_offset"
        query = gather_queries(xq, support.tasks, why, self._predicted, query_offset, name)
        out = query.room(out, self.out_features)
        return self._adapt(support, self.schedule, None)._predict(query, out)

    def _alone(
        self, xs: Any, ys: Any, xq: Any, out: Any, weights: Any, offset: Any, query_offset: Any
    ) -> Any:
        """`adapt_predict` for one task as a batch."""
        given = {"ys": ys, "xq": xq, "out": out, "weights": weights, "offset": offset}
        given["query_offset"] = query_offset
        alone = [None if v is None else need_array(n, v)[None] for n, v in given.items()]
        found = self._many(xs[None], *alone)
        return found[0] if out is None else out

    def _adapt(
        self, support: Gathered, schedule: Schedule, ids: np.ndarray | None
    ) -> AdaptedArrays:
        made = self._room(support.tasks)
        status = np.zeros(support.tasks, np.int8)
        call = native.extension().Call(self._problem, DTYPE_CODES[self.dtype], "adapt")
        call.tasks = support.tasks
        call.start, call.rates = self._addresses, self._all_rates
        call.schedule = native.schedule(schedule, address(ids))
        call.support = support.native_rows()
        call.results.adapted = [address(made.get(name)) for name in self.architecture.chain]
        call.results.status = address(status)
        with weights_by_name():
            call.run()
        shared = {n: p for n, p in self.parameters.items() if n not in made}
        architecture = self.predicting or self.architecture
        if self._measured is not None:
            start = {n: made.get(n, p) for n, p in self.parameters.items()}
            columns = self._native_lr.shape[1]
            made |= self._measured.of(self._problem, columns, start, self.adapted, support)
        how = self.loss, made, shared, support.tasks, status
        return AdaptedArrays(architecture, *how, problem=self._predictor)

    def _room(self, tasks: int) -> dict[str, np.ndarray]:
        """{name: [tasks, ...]} of what is adapted, without values: views of one array."""
        sizes = [tasks * size for _, _, size in self._made_of]
        ends = [*itertools.accumulate(sizes)]
        whole = np.empty(ends[-1] if ends else 0, self.dtype)
        return {
            name: whole[end - size : end].reshape(tasks, *shape)
            for (name, shape, _), size, end in zip(self._made_of, sizes, ends, strict=True)
        }

    def _scheduled(self, steps: Any) -> Schedule:
        if steps is None:
            return self.schedule
        if self.schedule.steps is None:
            raise ValueError("steps: expected None, because the recipe counts epochs")
        return replace(self.schedule, steps=check_count("steps", steps))

    def __repr__(self) -> str:
        """What it does, in a line."""
        s = self.schedule
        turns = counted(s.steps, "step") if s.epochs is None else counted(s.epochs, "epoch")
        size = f"{counted(sum(p.size for p in self._start), 'parameter', form=',')}, {self.dtype}"
        recipe = f"{self.loss.kind}, {brief(self.optimizer)}, {turns}"
        return f"Adapter({self.architecture}; {size}; {recipe})"

    # ---- files, copies ------------------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        names = ("architecture", "parameters", "adapted", "loss", "optimizer", "schedule")
        pull = ("anchor", "anchor_rows")
        rest = ("class_weights", "predicting")
        parts = {name: getattr(self, name) for name in (*names, *pull, *rest)}
        return {**parts, "lr": self._learned_lr()}

    def _learned_lr(self) -> np.ndarray | None:
        return self.lr if isinstance(self.optimizer.lr, LearnableLR) else None

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle."""
        return self._parts()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled state."""
        self.__init__(**state)  # type: ignore[misc]

    def save(self, path: Path) -> None:
        """Write it into a safetensors file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        described = {
            "architecture": self.architecture.described(),
            "loss": loss_fields(self.loss),
            "recipe": {
                "adapted": list(self.adapted),
                "optimizer": described_optimizer(self.optimizer),
                "schedule": described_schedule(self.schedule),
                "anchor": self.anchor,
                # only where there is one: files without it are read by earlier versions, too
                **({} if self.anchor_rows is None else {"anchor_rows": self.anchor_rows}),
                "class_weights": self.class_weights,
                **({} if self.predicting is None else {"predicting": self.predicting.described()}),
            },
        }
        learned = self._learned_lr()
        tensors = self.parameters if learned is None else {**self.parameters, ".lr": learned}
        write(path, "adapter", described, {name: raw_of(a) for name, a in tensors.items()})

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """The adapter of a file that `save` wrote. All of it is read and checked.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another kind, or of a newer version; the message begins
                with the path.
        """
        contents = read(path, "adapter", verify=True)
        try:
            return cls(**_read_parts(contents))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{contents.path}: {error}") from None


# ---- reading a file ---------------------------------------------------------------------------


def _read_parts(contents: Contents) -> dict[str, Any]:
    """The constructor's arguments, of what is in a file."""
    described = Fields("metadata", contents.described)
    architecture = read_architecture(described.take("architecture", dict, "an object"))
    loss = read_loss(described.object("loss"))
    recipe = described.object("recipe")
    described.end()
    parts = {
        "architecture": architecture,
        "loss": loss,
        "adapted": recipe.list_of("adapted", str),
        "optimizer": read_optimizer(recipe.object("optimizer")),
        "schedule": read_schedule(recipe.object("schedule")),
        "anchor": recipe.number("anchor"),
        "anchor_rows": recipe.number("anchor_rows") if "anchor_rows" in recipe else None,
        "class_weights": read_class_weights(recipe),
    }
    if "predicting" in recipe:
        parts["predicting"] = read_architecture(recipe.take("predicting", dict, "an object"))
    recipe.end()
    for name, raw in contents.tensors.items():
        if raw.dtype not in ("F32", "F64"):
            raise ValueError(f"tensor {name} is {raw.dtype}, expected F32 or F64")
    tensors = {name: array_of(raw) for name, raw in contents.tensors.items()}
    return {**parts, "lr": tensors.pop(".lr", None), "parameters": tensors}
