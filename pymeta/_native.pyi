from collections.abc import Sequence
from typing import Any

# x, y, weights: pointers; rows per task; starts, sizes: pointers to int64 [T], or 0
Rows = tuple[int, int, int, int, int, int]

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

class Problem:
    def __init__(
        self,
        network: Network,
        loss: Loss,
        adapted: Sequence[bool],
        lr_groups: Sequence[int] | None = None,
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
    ) -> None: ...
    def adapt(
        self,
        dtype: int,
        parameters: Sequence[int],
        lr: int,
        lr_rows: int,
        lr_columns: int,
        steps: int,
        tasks: int,
        support: Rows,
        adapted: Sequence[int],
    ) -> None: ...
    def predict(
        self,
        dtype: int,
        parameters: Sequence[int],
        per_task: Sequence[bool],
        tasks: int,
        query: Rows,
        predictions: int,
    ) -> None: ...
    def plan(
        self,
        dtype: int,
        steps: int,
        tasks: int,
        support_rows: int,
        query_rows: int,
        second_order: bool,
    ) -> dict[str, Any]: ...

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def executor() -> str: ...
def set_executor(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def fma_peak(isa: str, dtype: int, seconds: float) -> float: ...
