"""Fuzz target: what `pymeta._native` does with any values, tuples and buffers.

The bytes are a small program: make networks, losses, optimisers, problems and engines, and call
them, with arguments that are mostly right and sometimes anything. Addresses are the one thing that
is not drawn: the core trusts them, because the Python layer makes them of arrays that it checked,
so here they are addresses of arrays of the size that goes with them. What those hold, labels,
weights, sizes and NaN among it, is drawn.

Everything wrong must be a ValueError, TypeError, OverflowError or MemoryError. An argument may
raise an error of its own while it is read as a sequence: of those drawn here, a memoryview of
several axes does, NotImplementedError.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace as Held
from typing import Any

import numpy as np
from source import Source

from pymeta import native

ALLOWED = (ValueError, TypeError, OverflowError, MemoryError, NotImplementedError)
ACTIVATIONS = (("relu",), ("tanh",), ("sigmoid",), ("silu",), ("gelu",), ("gelu_tanh",),
               ("leaky_relu", 0.1), ("elu", 1.0), ("softplus", 1.0, 20.0))  # fmt: skip
LOSSES = (
    "mse", "huber", "cross_entropy", "bce_with_logits", "l1", "quantile", "poisson_nll", "qlike",
    "gaussian_nll", "student_t_nll",
)  # fmt: skip
WIDTHS = (1, 2, 3, 5, 8, 17)
MOST_STEPS = 6

lib = native.extension()


def emulates() -> bool:
    """Whether this build has the emulated device."""
    return getattr(lib, "emulates", lambda: False)()


class Model:
    """A network with what describes it, where it was made of right values."""

    def __init__(self, layers: list[Any]) -> None:
        self.native = lib.Network(layers)
        self.sizes = list(self.native.parameter_sizes)
        self.inputs, self.outputs = self.native.in_features, self.native.out_features

    @property
    def small(self) -> bool:
        return sum(self.sizes) < 5000 and self.inputs < 100 and self.outputs < 100


class Made:
    """A problem and what it was made of."""

    def __init__(self, model: Model, kind: str, problem: Any, adapted: list, groups: Any) -> None:
        self.model, self.loss, self.native = model, kind, problem
        self.adapted, self.groups = adapted, groups

    def lr(self, source: Source, real: type) -> np.ndarray:
        columns = sum(n for n, a in zip(self.model.sizes, self.adapted, strict=True) if a)
        if self.groups is not None:
            columns = max([1, *(g + 1 for g in self.groups)])
        return np.full((1 + source.below(3), columns), source.pick((0.1, 0.0, -1.0, 1e30)), real)


def odd(source: Source, value: Any) -> Any:
    """The value; now and then anything else."""
    return source.anything() if source.chance(6) else value


def odd_dtype(source: Source, code: int) -> Any:
    """Not the other dtype: the arrays would be too short for it."""
    value = odd(source, code)
    return code if value in (4, 8) else value


def odd_count(source: Source, count: int) -> Any:
    """Of steps: none that the core would take and not be done with."""
    value = odd(source, count)
    try:
        steps = operator.index(value)  # an array of one integer is one as well
    except TypeError:
        return value
    return count if MOST_STEPS < steps <= 2**30 else value


def odd_addresses(source: Source, found: list[int] | None) -> Any:
    """Too few, too many, or of a wrong type."""
    if found is None or not source.chance(6):
        return found
    return source.pick((found[:-1] or [0, 0], [*found, 0], "no", 7, [None], [-1], [2**64]))


def layers(source: Source) -> list[Any]:
    found: list[Any] = []
    width = source.pick(WIDTHS)
    for _ in range(1 + source.below(5)):
        kind = source.below(5)
        if kind == 0 and found:
            found.append(source.pick(ACTIVATIONS))
        elif kind == 1:
            name = source.pick(("layer_norm", "batch_norm"))
            found.append((name, width, 1e-5, not source.below(2), not source.below(2)))
        else:
            out = source.pick(WIDTHS)
            found.append(("linear", width, out, not source.below(2)))
            width = out
    return [tuple(odd(source, v) for v in layer) for layer in found]


def a_model(source: Source) -> Model:
    return Model(odd(source, layers(source)))


def a_loss(source: Source, outputs: int) -> tuple[str, Any]:
    kind = odd(source, source.pick(LOSSES))
    options: dict[str, Any] = {}
    if kind == "quantile":
        options["levels"] = odd(source, [source.pick((0.5, 0.1, source.number()))])
    for name in ("delta", "label_smoothing", "dof"):
        if source.chance(64):
            options[name] = odd(source, source.number())
    if source.chance(64):
        options["ignore_index"] = odd(source, source.integer())
    for name in ("weight", "pos_weight"):
        if source.chance(64):
            count = source.pick((outputs, 1, 0, 3)) if outputs < 100 else 1
            options[name] = odd(source, [source.number() for _ in range(count)])
    return kind, lib.Loss(kind, **options)


def an_optimizer(source: Source) -> Any:
    names = ("momentum", "beta1", "beta2", "eps", "alpha", "weight_decay", "clip_norm", "anchor")
    options = {
        n: odd(source, source.pick((0.5, 0.1, source.number()))) for n in names if source.chance(64)
    }
    for name in ("nesterov", "decoupled", "centered"):
        if source.chance(64):
            options[name] = odd(source, bool(source.below(2)))
    return lib.Optimizer(odd(source, source.pick(("sgd", "adam", "rmsprop"))), **options)


def a_problem(source: Source) -> Made:
    model = a_model(source)
    kind, loss = a_loss(source, model.outputs)
    tensors = len(model.sizes)
    adapted = [not source.chance(64) for _ in range(tensors)]
    groups = None
    if not source.chance(128):
        groups = [source.pick((0, 0, 0, 1, 2)) for _ in range(tensors)]
    optimizer = an_optimizer(source) if source.chance(160) else None
    problem = lib.Problem(
        model.native, loss, odd(source, adapted), odd(source, groups), odd(source, optimizer)
    )
    return Made(model, kind, problem, adapted, groups)


def a_schedule(source: Source, ids: np.ndarray | None = None, *, steps_only: bool = False) -> Any:
    """Few steps or epochs, for their number alone decides how long a call runs."""
    count = source.below(MOST_STEPS)
    by_epochs = not steps_only and bool(source.below(2))
    steps, epochs = (-1, count) if by_epochs else (count, -1)
    batch = source.pick((0, 0, 1, 2, 3, 100))
    if source.chance(6):
        batch = source.integer()
    if source.chance(6):
        steps, epochs = source.pick(((-1, -1), (0, 0), (2, 2), (-(2**31), 1), (2**31, -1)))
    seed, stream = (source.pick((0, 1, 2**63, 2**64 - 1)) for _ in range(2))
    where = 0 if ids is None else ids.ctypes.data
    return lib.Schedule(steps, epochs, batch, seed, stream, where), epochs


class Set:
    """One set of tasks in arrays of the right size."""

    def __init__(
        self, source: Source, made: Made, tasks: int, real: type, trusted: bool = False
    ) -> None:
        """`trusted`: with sizes that are right, where nobody will look at them."""
        model, self.rows = made.model, source.below(6)
        self.x = np.random.default_rng(source.byte()).normal(size=(tasks, self.rows, model.inputs))
        self.x = self.x.astype(real)
        if made.loss == "cross_entropy":
            self.y = np.zeros((tasks, self.rows), np.int64)
            self.y[...] = source.below(max(1, model.outputs))
        else:
            self.y = np.full((tasks, self.rows, model.outputs), source.pick((0.5, 1.0)), real)
        if self.y.size and source.chance(32):
            value = source.integer() if self.y.dtype.kind == "i" else source.number()
            with np.errstate(over="ignore"):
                self.y.flat[source.below(self.y.size)] = min(max(value, -(2**63)), 2**63 - 1)
        if self.x.size and source.chance(32):
            with np.errstate(over="ignore"):
                self.x.flat[source.below(self.x.size)] = source.number()
        self.weights = self.sizes = None
        if source.chance(64):
            self.weights = np.ones((tasks, self.rows), real)
            if self.weights.size and source.chance(64):
                with np.errstate(over="ignore"):
                    self.weights.flat[source.below(self.weights.size)] = source.number()
        if source.chance(64):
            self.sizes = np.array([source.below(self.rows + 1) for _ in range(tasks)], np.int64)
            if tasks and source.chance(32) and not trusted:
                self.sizes[source.below(tasks)] = min(max(source.integer(), -(2**63)), 2**63 - 1)

    def native(self) -> Any:
        def of(array: np.ndarray | None) -> int:
            return 0 if array is None else array.ctypes.data

        return lib.Rows(of(self.x), of(self.y), of(self.weights), self.rows, 0, of(self.sizes))


def run(source: Source, on_device: bool, call: Callable[..., Any]) -> None:
    """Make a call here, or on the emulated device with as much workspace as it asks for."""
    if not on_device:
        call()
        return
    needed = call(device=(-1, 0, 0, 0))
    room = np.empty(needed + 256, np.uint8)
    at = room.ctypes.data + -room.ctypes.data % 256
    given = needed - 1 if needed and source.chance(32) else needed
    assert call(device=(-1, 0, at, given)) == needed


def put(source: Source, target: Any, **parts: Any) -> None:
    """Set the parts of a call; now and then one is anything (but arrays stay what they are)."""
    for name, value in parts.items():
        odd_ones = ("first_order", "patience", "own_starts", "rates", "schedule")
        setattr(target, name, odd(source, value) if name in odd_ones else value)


def addresses(arrays: list[np.ndarray]) -> list[int]:
    return [a.ctypes.data for a in arrays]


def call(source: Source, made: Made) -> None:
    """One of the four jobs, on arrays of the right size."""
    if not made.model.small:
        return
    real = source.pick((np.float32, np.float64))
    device = source.chance(32) and emulates()  # slow: every thread of a block is one of the host
    code, tasks = np.dtype(real).itemsize, source.pick((1, 2, 0, 3, *(() if device else (17, 33))))
    support, query = (Set(source, made, tasks, real, device) for _ in range(2))
    random = np.random.default_rng(source.byte())
    start = [random.normal(size=n).astype(real) for n in made.model.sizes]
    lr = rates = made.lr(source, real)
    ids = np.arange(tasks)
    losses, mean = np.empty(tasks, real), np.empty(1, real)
    predictions = np.empty((tasks, query.rows, made.model.outputs), real)
    sinks = [np.empty_like(p) for p in start] if source.below(2) else []
    gradients = odd_addresses(source, addresses(sinks)) if sinks else []
    name = source.pick(("meta", "adapt", "reptile", "predict"))
    native_call = lib.Call(made.native, odd_dtype(source, code), name)
    put(
        source, native_call, tasks=tasks, start=odd_addresses(source, addresses(start)),
        rates=lib.Rates(lr.ctypes.data, *lr.shape), support=support.native(), query=query.native(),
        first_order=bool(source.below(2)),
    )  # fmt: skip
    results = native_call.results
    arrays: list[Any] = []  # live until the call is over
    if name == "meta":
        targets = [np.empty((tasks, s.rows, made.model.outputs), real) for s in (support, query)]
        weights, offsets = ([np.empty_like(y) for y in targets] for _ in range(2))
        many = np.tile(lr, (max(tasks, 1), 1, 1))  # so much is there for rates of each task, too
        extra = [np.empty_like(many), np.empty_like(support.x), np.empty_like(query.x)]
        extra += [*targets, *weights, np.empty(tasks, real), *offsets]  # of anchors before them
        wanted = [a.ctypes.data if source.chance(96) else 0 for a in extra]
        steps = odd_count(source, source.below(MOST_STEPS))
        put(source, native_call, schedule=lib.Schedule(steps=steps),
            gradients=lib.Gradients(gradients, *wanted))  # fmt: skip
        results.predictions = predictions.ctypes.data
        after, flowing = flows(source, made, native_call, tasks, predictions)
        arrays += [many, extra, after, *flowing]
        if source.chance(64):
            own = [np.tile(p, (max(tasks, 1), 1)) for p in start]
            sinks = [np.empty_like(p) for p in own]
            arrays += [own, sinks]
            stacked = [bool(source.chance(64)) for _ in start]
            put(source, native_call, start=addresses(own), own_starts=stacked)
            native_call.gradients = lib.Gradients(addresses(sinks), *wanted)
        if source.chance(64):
            shape = lr.shape if source.chance(128) else (1, 1)
            native_call.rates = lib.Rates(many.ctypes.data, *shape, True)
            rates = many
    elif name == "adapt":
        schedule, epochs = a_schedule(source, ids if source.below(2) else None)
        held = Set(source, made, tasks, real, device) if epochs >= 0 and source.below(2) else None
        epochs = max(epochs, 0)
        made_of = [np.empty((tasks, p.size), real) for p in start]
        curves = np.empty((tasks, epochs)), np.empty((tasks, epochs + 1))
        counts = [np.empty(tasks, np.int64) for _ in range(2)]
        status = np.empty(tasks, np.int8)
        stacked = [bool(source.chance(32)) for _ in start]
        # All of them, for which of them are stacked may come out otherwise.
        own = [np.tile(p, (max(tasks, 1), 1)) for p in start]
        arrays += [held, made_of, curves, counts, status, own]
        put(source, native_call, start=addresses(own), own_starts=stacked, schedule=schedule,
            validation=None if held is None else held.native(),
            patience=source.pick((-1, 0, 1, 2**31 - 1)))  # fmt: skip
        results.adapted, results.status = addresses(made_of), status.ctypes.data
        results.train_curves = curves[0].ctypes.data if epochs else 0
        results.validation_curves = curves[1].ctypes.data if held else 0
        results.best_epochs, results.epochs_run = (c.ctypes.data for c in counts)
    elif name == "reptile":
        put(source, native_call, schedule=a_schedule(source, ids, steps_only=True)[0],
            gradients=lib.Gradients(gradients))  # fmt: skip
    else:
        results.predictions = predictions.ctypes.data
    if name in ("meta", "reptile"):
        results.losses, results.mean_loss = losses.ctypes.data, mean.ctypes.data
    run(source, device, native_call.run)
    if name == "meta" and not device:
        written = [losses, mean, predictions, *sinks, *extra, after]
        repeat(random, native_call, rates, (support, query), written)


def repeat(
    random: np.random.Generator,
    native_call: Any,
    rates: np.ndarray,
    sets: tuple[Set, Set],
    written: list[np.ndarray],
) -> None:
    """The call again and again as a `RepeatedCall`: each time what a new call of the same writes.

    Between times change what may: values, step sizes, the options of the process, and whether there
    are gradients and cotangents. (What is drawn here is not the source's: its bytes keep meaning
    what they did before there were repeats.)
    """
    again = lib.RepeatedCall(native_call)
    support, query = sets
    given, flow, results = native_call.gradients, native_call.cotangents, native_call.results
    for _ in range(3):
        if random.random() < 0.5:
            rates[...] = random.choice((0.1, 0.0, -1.0, 1e-30, 1e30, np.nan))
        if random.random() < 0.5:
            support.x[...] = random.normal(size=support.x.shape)
        if random.random() < 0.3:
            set_options(Source(random.bytes(20)))
        native_call.gradients = given if random.random() < 0.8 else None
        native_call.cotangents = flow if random.random() < 0.8 else None
        arguments = (
            native_call.start, *addresses([rates, support.x, support.y, query.x, query.y]),
            results.mean_loss, results.losses, results.predictions, native_call.gradients,
            results.step_losses, results.statistics, native_call.cotangents,
        )  # fmt: skip
        found = []
        for made in (native_call.run, partial(again.run, *arguments)):
            for array in written:
                array.fill(0)
            with suppress(*ALLOWED):
                made()
            found.append([array.tobytes() for array in written])
        assert found[0] == found[1], "a repeated call has other results"


def flows(
    source: Source, made: Made, native_call: Any, tasks: int, predictions: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """What flows back into the results, and weights of the steps.

    Returns where losses after each step go, and the other arrays.
    """
    real = predictions.dtype
    into = [np.full(tasks, 0.5, real), np.full_like(predictions, 0.5)]
    adapted = [np.full((tasks, n), 0.5, real) for n in made.model.sizes]
    steps, after = np.full(MOST_STEPS + 1, 0.3, real), np.empty((MOST_STEPS + 1, tasks), real)
    of_steps = np.full((MOST_STEPS + 1, tasks), 0.5, real)
    if source.chance(96):
        given = [a.ctypes.data if source.below(2) else 0 for a in into]
        own = odd_addresses(source, addresses(adapted)) if source.below(2) else []
        flow = of_steps.ctypes.data if source.chance(64) else 0
        native_call.cotangents = lib.Cotangents(*given, own, flow)
    if source.chance(64):
        native_call.step_weights = steps.ctypes.data
        native_call.results.step_losses = after.ctypes.data
    if source.chance(64):
        native_call.task_clip = odd(source, source.pick((0.5, 0.0, source.number())))
    return after, [*into, *adapted, of_steps, steps]


def use_engine(source: Source, made: Made) -> None:
    """An Engine, and what it does with any buffers."""
    if not made.model.small:
        return
    real = source.pick(("f4", "f8"))
    lr = made.lr(source, np.dtype(real).type)
    start = [np.full(n, 0.1, real) for n in made.model.sizes]
    engine = lib.Engine(
        made.native, odd_dtype(source, np.dtype(real).itemsize), addresses(start),
        odd(source, lib.Rates(lr.ctypes.data, *lr.shape)), odd(source, a_schedule(source)[0]),
    )  # fmt: skip
    for _ in range(1 + source.below(3)):
        rows, queries = source.below(7), source.below(7)
        inputs, outputs = made.model.inputs, made.model.outputs
        y = ((rows,), "i8") if made.loss == "cross_entropy" else ((rows, outputs), real)
        arguments = [
            source.array((rows, inputs), real),
            source.array(*y),
            source.array((queries, inputs), real),
            source.array((queries, outputs), real),
        ]
        if source.chance(64):
            arguments.append(source.array((rows,), real))
        with suppress(*ALLOWED):  # after any of them the engine must be as good as before
            engine.adapt_predict(*(odd(source, a) for a in arguments))


def split(source: Source) -> None:
    """Arrays of one buffer, to others of their sizes."""
    sizes = [source.pick((0, 1, 3, 70)) for _ in range(source.below(4))]
    real = source.pick(("f4", "f8"))
    arrays = [np.zeros(n, real) for n in sizes]
    if source.chance(64):
        lib.Split(odd(source, 4), [odd(source, n) for n in sizes])
        return
    parts = lib.Split(np.dtype(real).itemsize, sizes)
    buffer = np.ones(sum(sizes), real)
    parts.copy_to(odd_addresses(source, addresses(arrays)), buffer.ctypes.data)
    places = odd_addresses(source, addresses(arrays))
    leaves = [Held(grad=Held(data_ptr=lambda a=a: a)) for a in places]
    parts.add_to_grads(leaves, lambda *_: True, buffer.ctypes.data)


def look_at_plan(source: Source, made: Made) -> None:
    found = made.native.plan(
        odd(source, source.pick((4, 8))), odd(source, source.pick(("meta", "adapt", "reptile"))),
        lib.Schedule(source.integer(), source.integer(), source.integer())
        if source.chance(128) else a_schedule(source)[0],
        source.integer(), *(source.integer() for _ in range(3)), bool(source.below(2)),
        odd(source, source.pick((1, 2, 3))),
        odd(source, [bool(source.below(2)) for _ in range(11)]),
        bool(source.below(2)),
        **({"device": odd(source, -1)} if emulates() and source.below(2) else {}),
    )  # fmt: skip
    assert found["threads"] >= 1


def set_options(source: Source) -> None:
    """The process-wide options: any value; right ones are kept for the calls that follow."""
    value = source.anything() if source.chance(64) else None
    kind = source.below(3)
    if kind == 0:
        lib.set_isa(source.pick(lib.isas()) if value is None else value)
    elif kind == 1:
        lib.set_executor(
            source.pick(("auto", "rows", "lanes", "mixed", "stacked")) if value is None else value
        )
    else:
        lib.set_num_threads(source.pick((1, 2, 3)) if value is None else value)


def one_input(data: bytes) -> None:
    """Run the program that the bytes are."""
    source = Source(data)
    before = lib.isa(), lib.executor(), lib.num_threads()
    made: list[Made] = []
    try:
        for _ in range(8):
            if not source.rest():
                break
            step = source.below(7)
            with suppress(*ALLOWED):
                if step == 0 or not made:
                    made.append(a_problem(source))
                if step == 1:
                    set_options(source)
                elif step == 2:
                    look_at_plan(source, made[-1])
                elif step == 3:
                    use_engine(source, made[-1])
                elif step == 4:
                    split(source)
                elif step > 4:
                    call(source, made[-1])
    finally:
        lib.set_isa(before[0])
        lib.set_executor(before[1])
        lib.set_num_threads(before[2])
