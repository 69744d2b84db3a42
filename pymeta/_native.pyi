from collections.abc import Callable, Sequence
from typing import Any

# ordinal (-1: the emulated one), stream, address and bytes of the workspace. Calls with a device
# take addresses on it and return the workspace bytes that they need; with fewer they do nothing.
_Device = tuple[int, int, int, int]

_Buffer = Any  # a C-contiguous array

class _Type(type): ...  # pybind11's

__version__: str

def layer_forms() -> dict[str, str]: ...

class Network(metaclass=_Type):
    def __init__(self, layers: Sequence[tuple[Any, ...]]) -> None: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def statistics_size(self) -> int: ...
    @property
    def mixes_rows(self) -> bool: ...
    @property
    def parameter_shapes(self) -> list[tuple[int, ...]]: ...
    @property
    def parameter_sizes(self) -> list[int]: ...

class Loss(metaclass=_Type):
    def __init__(
        self,
        kind: str,
        *,
        delta: float = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        weight: Sequence[float] = (),
        pos_weight: Sequence[float] = (),
        levels: Sequence[float] = (),
        dof: float = 1.0,
    ) -> None: ...

class Optimizer(metaclass=_Type):
    def __init__(
        self,
        kind: str,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        beta1: float = 0.0,
        beta2: float = 0.0,
        eps: float = 0.0,
        alpha: float = 0.0,
        centered: bool = False,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        clip_norm: float = 0.0,
        anchor: float = 0.0,
        anchor_rows: float = 0.0,
    ) -> None: ...

class Problem(metaclass=_Type):
    def __init__(
        self,
        network: Network,
        loss: Loss,
        adapted: Sequence[bool],
        lr_groups: Sequence[int] | None = None,
        optimizer: Optimizer | None = None,
        query_loss: Loss | None = None,
        allows_tf32x3: bool = False,
    ) -> None: ...
    @property
    def has_tf32x3(self) -> bool: ...
    def plan(
        self,
        dtype: int,
        job: str,
        schedule: Schedule,
        tasks: int,
        support_rows: int,
        query_rows: int = 0,
        validation_rows: int = 0,
        second_order: bool = False,
        lr_rows: int = 1,
        # of parameters, lr, xs, xq, ys, yq, support and query weights, anchors, both offsets
        wanted: Sequence[bool] = [
            True,
            False,
            False,
            False,
            False,
            False,
            False,
            False,
            False,
            False,
            False,
        ],
        has_anchors: bool = False,
        # of tasks with as many rows each, and nothing besides
        is_plain: bool = False,
        device: int | None = None,
    ) -> dict[str, Any]: ...
    def unfit_for_device(self) -> str | None: ...

# Addresses are those of contiguous arrays that the caller keeps alive, 0 for what is absent.
# T: tasks.

# One set of rows of all tasks: x [total rows, in], y [total rows, out] or int64 [total rows],
# weights [total rows]; `rows` from one task to the next; starts, sizes int64 [T].
class Rows(metaclass=_Type):
    def __init__(
        self,
        x: int = 0,
        y: int = 0,
        weights: int = 0,
        rows: int = 0,
        starts: int = 0,
        sizes: int = 0,
        offset: int = 0,
        weight_columns: int = 1,
        has_distributions: bool = False,
        keeps_weightless: bool = False,  # gradients by weights of 0 are wanted
    ) -> None: ...

# values [rows, columns], or [T, rows, columns] of each task; step k uses row min(k, rows - 1).
class Rates(metaclass=_Type):
    def __init__(
        self, values: int, rows: int = 1, columns: int = 1, per_task: bool = False
    ) -> None: ...

# What flows into the losses [T], the predictions [total query rows, out], each adapted tensor
# [T, ...] and the losses of the steps [steps, T] on the way back, in place of the mean loss alone.
class Cotangents(metaclass=_Type):
    def __init__(
        self,
        losses: int = 0,
        predictions: int = 0,
        adapted: Sequence[int] = (),
        step_losses: int = 0,
    ) -> None: ...

# Either steps or epochs, the other is -1; batch_size 0: all rows; task_ids int64 [T].
class Schedule(metaclass=_Type):
    def __init__(
        self,
        steps: int = -1,
        epochs: int = -1,
        batch_size: int = 0,
        seed: int = 0,
        stream: int = 0,
        task_ids: int = 0,
    ) -> None: ...

# Where gradients go: of each parameter tensor ([T, ...] of an own start; 0 for none; empty: of none
# at all), of the rates, of the inputs, targets and weights of both sets, of the anchors, and of
# both offsets.
class Gradients(metaclass=_Type):
    def __init__(
        self,
        parameters: Sequence[int] = (),
        lr: int = 0,
        xs: int = 0,
        xq: int = 0,
        ys: int = 0,
        yq: int = 0,
        support_weights: int = 0,
        query_weights: int = 0,
        anchors: int = 0,
        support_offset: int = 0,
        query_offset: int = 0,
    ) -> None: ...

# Where everything else goes: mean_loss [1], losses [T], step_losses [steps, T],
# predictions [total query rows, out], adapted parameters [T, ...] each, status int8 [T], curves
# [T, epochs] and [T, epochs + 1], int64 [T] twice.
class Results(metaclass=_Type):
    mean_loss: int
    losses: int
    step_losses: int
    predictions: int
    statistics: int
    adapted: Sequence[int]
    status: int
    train_curves: int
    validation_curves: int
    best_epochs: int
    epochs_run: int
    def __init__(self) -> None: ...

class Call(metaclass=_Type):
    tasks: int
    start: Sequence[int]
    own_starts: Sequence[bool]  # which tensors of the start are [T, ...]; empty: none
    rates: Rates
    schedule: Schedule
    first_order: bool
    # whether the first rows of each query set are its support set, by which alone it is normalised
    by_support: bool
    step_weights: int  # [steps] of the query losses after each step; 0: the last alone
    task_clip: float  # largest norm of a task's share of the summed gradients; 0: any
    patience: int
    anchors: int  # [T] strengths of the pull towards the start, or 0: the optimizer's
    support: Rows
    query: Rows
    validation: Rows | None
    results: Results
    gradients: Gradients | None
    cotangents: Cotangents | None
    # job: "meta", "adapt", "reptile" or "predict"; dtype: 4 or 8
    def __init__(self, problem: Problem, dtype: int, job: str) -> None: ...
    def run(self, device: _Device | None = None) -> int: ...

# A meta-gradient that is made again and again with other arrays: a copy of the call, without its
# gradients and cotangents.
class RepeatedCall(metaclass=_Type):
    def __init__(self, call: Call) -> None: ...
    def run(
        self,
        start: Sequence[int],
        rates: int,
        xs: int,
        ys: int,
        xq: int,
        yq: int,
        mean_loss: int,
        losses: int,
        predictions: int,
        gradients: Gradients | None,
        step_losses: int = 0,
        statistics: int = 0,
        cotangents: Cotangents | None = None,
        device: _Device | None = None,
    ) -> int: ...

class Engine(metaclass=_Type):
    def __init__(
        self,
        problem: Problem,
        dtype: int,
        start: Sequence[int],
        rates: Rates,
        schedule: Schedule,
    ) -> None: ...
    def adapt_predict(
        self,
        xs: _Buffer,
        ys: _Buffer,
        xq: _Buffer,
        out: _Buffer,
        weights: _Buffer | None = None,
        offset: _Buffer | None = None,
        query_offset: _Buffer | None = None,
    ) -> None: ...

# The cell of a learned optimiser on `coordinates` numbers, those of all tasks; its equations are in
# csrc/core/call/cell.h. weights [4 hidden, 5 + hidden], gates [2, 4 + hidden]; gradients, theta,
# out and flows [coordinates], losses [tasks]; state [state_size], zeros before the first step.
class Cell(metaclass=_Type):
    def __init__(
        self,
        dtype: int,
        hidden: int,
        tasks: int,
        coordinates: int,
        p: float,
        weights: int,
        gates: int,
    ) -> None: ...
    @property
    def state_size(self) -> int: ...
    def step(self, gradients: int, losses: int, theta: int, state: int, out: int) -> None: ...
    # Of all steps: gradients [steps, coordinates], losses [steps, tasks], theta before the first.
    def back(
        self,
        steps: int,
        gradients: int,
        losses: int,
        theta: int,
        flows: int,
        to_theta: int,
        to_weights: int,
        to_gates: int,
    ) -> None: ...

# Arrays of these sizes laid end to end in a buffer; others elsewhere are given by their addresses.
# dtype: 4 or 8.
class Split(metaclass=_Type):
    def __init__(self, dtype: int, sizes: Sequence[int]) -> None: ...
    # To the .grad of tensors, which it returns; None, and nothing was added, where alike(*grads) is
    # not true.
    def add_to_grads(
        self, leaves: Sequence[Any], alike: Callable[..., bool], buffer: int
    ) -> list[Any] | None: ...
    def copy_to(self, arrays: Sequence[int], buffer: int) -> None: ...

def shuffle(
    seed: int,
    stream: int,
    task_ids: int,
    epoch: int,
    purpose: int,
    tasks: int,
    sizes: int,
    out: int,
) -> None: ...
def unchanged(
    places: tuple[Any, ...],  # a dictionary, a key, the object that is to be there, and so on
    truths: tuple[Any, ...],  # a dictionary, a key, whether what is there is to be true
    lengths: tuple[Any, ...],  # a container, its length
    types: tuple[Any, ...],  # an object, its class
    orders: tuple[Any, ...],  # a dictionary, the list of its keys
) -> bool: ...

# Whether an attribute of one of these objects is true.
def any_true(objects: Sequence[Any], names: tuple[str, ...]) -> bool: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def executor() -> str: ...
def set_executor(name: str) -> None: ...
def cuda_reason() -> str | None: ...
def devices() -> list[dict[str, Any]]: ...
def emulates() -> bool: ...
def block_threads() -> int: ...
def set_block_threads(n: int) -> None: ...
def block_families() -> list[str]: ...
def block_family() -> int: ...
def set_block_family(n: int) -> None: ...
def block_bytes() -> int: ...
def set_block_bytes(n: int) -> None: ...
def set_specialiser(
    compile: Callable[[str, int], str],  # source, capability -> path of what was made of it, or ""
    failed: Callable[[str, str], None],  # path, why it cannot be loaded
) -> None: ...
def clear_specialiser() -> None: ...
def specialises() -> bool: ...
def forget_special_kernels() -> None: ...
def free_memory() -> int: ...
def kept_bytes() -> int: ...
def set_kept_bytes(n: int) -> None: ...
def available_cores() -> int: ...
def cpu_quota(root: str = "") -> int: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def fma_peak(isa: str, dtype: int, seconds: float) -> float: ...
