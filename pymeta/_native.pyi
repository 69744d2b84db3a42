from collections.abc import Sequence
from typing import Any

# x, y, weights: pointers; rows per task; starts, sizes: pointers to int64 [T], or 0
_Rows = tuple[int, int, int, int, int, int]

# steps, epochs (one of them -1), batch size (0: all rows), seed, stream, pointer to int64 [T] or 0
_Schedule = tuple[int, int, int, int, int, int]

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
        weight_decay: float = 0.0,
        decoupled: bool = False,
        clip_norm: float = 0.0,
        anchor: float = 0.0,
    ) -> None: ...

class Problem(metaclass=_Type):
    def __init__(
        self,
        network: Network,
        loss: Loss,
        adapted: Sequence[bool],
        lr_groups: Sequence[int] | None = None,
        optimizer: Optimizer | None = None,
    ) -> None: ...
    def meta_gradient(
        self,
        dtype: int,
        parameters: Sequence[int],
        lr: int,
        lr_rows: int,
        lr_columns: int,
        steps: int,
        first_order: bool,
        tasks: int,
        support: _Rows,
        query: _Rows,
        losses: int,
        predictions: int,
        gradients: Sequence[int] | None,
        lr_gradient: int = 0,
        xs_gradient: int = 0,
        xq_gradient: int = 0,
        mean_loss: int = 0,
        device: _Device | None = None,
    ) -> int: ...
    def adapt(
        self,
        dtype: int,
        parameters: Sequence[int],
        per_task: Sequence[bool],
        lr: int,
        lr_rows: int,
        lr_columns: int,
        schedule: _Schedule,
        tasks: int,
        support: _Rows,
        adapted: Sequence[int],
        *,
        validation: _Rows | None = None,
        patience: int = -1,
        status: int = 0,
        train_curves: int = 0,
        validation_curves: int = 0,
        best_epochs: int = 0,
        epochs_run: int = 0,
        device: _Device | None = None,
    ) -> int: ...
    def reptile(
        self,
        dtype: int,
        parameters: Sequence[int],
        lr: int,
        lr_rows: int,
        lr_columns: int,
        schedule: _Schedule,
        tasks: int,
        support: _Rows,
        losses: int,
        mean_loss: int,
        gradients: Sequence[int] | None,
        device: _Device | None = None,
    ) -> int: ...
    def predict(
        self,
        dtype: int,
        parameters: Sequence[int],
        per_task: Sequence[bool],
        tasks: int,
        query: _Rows,
        predictions: int,
        device: _Device | None = None,
    ) -> int: ...
    def plan(
        self,
        dtype: int,
        job: str,
        schedule: _Schedule,
        tasks: int,
        support_rows: int,
        query_rows: int = 0,
        validation_rows: int = 0,
        second_order: bool = False,
        device: int | None = None,
    ) -> dict[str, Any]: ...
    def unfit_for_device(self) -> str | None: ...

class Engine(metaclass=_Type):
    def __init__(
        self,
        problem: Problem,
        dtype: int,
        parameters: Sequence[int],
        lr: int,
        lr_rows: int,
        lr_columns: int,
        schedule: _Schedule,
    ) -> None: ...
    def adapt_predict(
        self, xs: _Buffer, ys: _Buffer, xq: _Buffer, out: _Buffer, weights: _Buffer | None = None
    ) -> None: ...

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
def block_bytes() -> int: ...
def set_block_bytes(n: int) -> None: ...
def free_memory() -> int: ...
def kept_bytes() -> int: ...
def set_kept_bytes(n: int) -> None: ...
def available_cores() -> int: ...
def cpu_quota(root: str = "") -> int: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def fma_peak(isa: str, dtype: int, seconds: float) -> float: ...
