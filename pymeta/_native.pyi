from collections.abc import Sequence
from typing import Any

# x, y, weights: pointers; rows per task; starts, sizes: pointers to int64 [T], or 0
Rows = tuple[int, int, int, int, int, int]

# steps, epochs (one of them -1), batch size (0: all rows), seed, stream, pointer to int64 [T] or 0
Schedule = tuple[int, int, int, int, int, int]

# ordinal (-1: the emulated one), stream, address and bytes of the workspace. Calls with a device take addresses on it and
# return the workspace bytes that they need; with fewer they do nothing else.
Device = tuple[int, int, int, int]

Buffer = Any  # a C-contiguous array

__version__: str

class Network:
    def __init__(self, layers: Sequence[tuple[Any, ...]]) -> None: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def parameter_sizes(self) -> list[int]: ...

class Loss:
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

class Optimizer:
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

class Problem:
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
        support: Rows,
        query: Rows,
        losses: int,
        predictions: int,
        gradients: Sequence[int] | None,
        lr_gradient: int = 0,
        xs_gradient: int = 0,
        xq_gradient: int = 0,
        mean_loss: int = 0,
        device: Device | None = None,
    ) -> int: ...
    def adapt(
        self,
        dtype: int,
        parameters: Sequence[int],
        per_task: Sequence[bool],
        lr: int,
        lr_rows: int,
        lr_columns: int,
        schedule: Schedule,
        tasks: int,
        support: Rows,
        adapted: Sequence[int],
        *,
        validation: Rows | None = None,
        patience: int = -1,
        status: int = 0,
        train_curves: int = 0,
        validation_curves: int = 0,
        best_epochs: int = 0,
        epochs_run: int = 0,
        device: Device | None = None,
    ) -> int: ...
    def reptile(
        self,
        dtype: int,
        parameters: Sequence[int],
        lr: int,
        lr_rows: int,
        lr_columns: int,
        schedule: Schedule,
        tasks: int,
        support: Rows,
        losses: int,
        mean_loss: int,
        gradients: Sequence[int] | None,
        device: Device | None = None,
    ) -> int: ...
    def predict(
        self,
        dtype: int,
        parameters: Sequence[int],
        per_task: Sequence[bool],
        tasks: int,
        query: Rows,
        predictions: int,
        device: Device | None = None,
    ) -> int: ...
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
        device: int | None = None,
    ) -> dict[str, Any]: ...
    def unfit_for_device(self) -> str | None: ...

class Engine:
    def __init__(
        self,
        problem: Problem,
        dtype: int,
        parameters: Sequence[int],
        lr: int,
        lr_rows: int,
        lr_columns: int,
        schedule: Schedule,
    ) -> None: ...
    def adapt_predict(
        self, xs: Buffer, ys: Buffer, xq: Buffer, out: Buffer, weights: Buffer | None = None
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
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def fma_peak(isa: str, dtype: int, seconds: float) -> float: ...
