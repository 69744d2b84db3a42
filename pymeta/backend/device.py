"""Native calls on a device: its stream, its memory, and CUDA graphs.

A `Device` is a GPU, or the emulated one: the CUDA executor's own code on threads of the host, which
tensors on the CPU go to after `native.set_executor("emulated")`. A call on a device

    runs on the stream that torch has current for it when the call is made, and returns at once;
    works in memory that torch allocates for it on that stream, and frees on it;
    has no other memory but its arguments and results.

So torch's ordinary rules for streams are all there is to know. What pymeta keeps between calls
(gradients that no graph holds any more, the tensor of a step size) is used again only on the stream
that it was made on.

While a CUDA graph is captured nothing is taken from what is kept, and nothing is added to it. The
graph writes to the addresses of its capture at every replay, when no call knows of it; so they have
to be its own. torch allocates from the graph's own pool during a capture, and the pool lives as
long as the graph. What was kept before may be given up, or be in use elsewhere, when the graph is
replayed, and a tensor made in the capture holds nothing before the first replay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from pymeta import native

try:  # what torch's own compiled code asks; the public way makes an object each time
    from torch._C import _cuda_getCurrentRawStream as _raw_stream
except ImportError:  # a torch without CUDA

    def _raw_stream(device: int) -> int:
        return int(torch.cuda.current_stream(device).cuda_stream)


_EMULATED = -1
_OLDEST = (8, 0)  # the compute capability that csrc/cuda is built for at least
_NEEDS_KEPT = 64
_WITHOUT_WAITING = 64 << 10  # bytes that the driver copies from any memory and returns at once


def unusable(device: torch.device) -> str | None:
    """Why the native core cannot work with tensors on `device`; None where it can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"the parameters are on {device}; the native core runs on the CPU and on CUDA"
    reason = native.cuda_reason()
    if reason is None:
        capability = str(native.devices()[device.index or 0]["capability"])
        if tuple(map(int, capability.split("."))) >= _OLDEST:
            return None
        reason = f"it has compute capability {capability}; {'.'.join(map(str, _OLDEST))} is needed"
    return f"the parameters are on {device}, where the native core cannot run: {reason}"


class Device:
    """Where the native calls of a plan run, if not on the CPU's own executors.

    Attributes:
        device: that of the tensors.
        ordinal: the number of the GPU; -1 for the emulated device.
    """

    def __init__(self, device: torch.device) -> None:
        """`device` is a CUDA device, or the CPU for the emulated one."""
        self.device = device
        self.ordinal = _EMULATED if device.type == "cpu" else device.index or 0
        self._needs: dict[Hashable, int] = {}

    @staticmethod
    def of(device: torch.device) -> Device | None:
        """The one for tensors on `device`; None where they go to the CPU's executors."""
        if device.type == "cuda" or (device.type == "cpu" and native.emulating):
            return Device(device)
        return None

    @property
    def name(self) -> str:
        """As in "native-cuda sm_90": the architecture, or "emulated"."""
        if self.ordinal == _EMULATED:
            return "emulated"
        capability = str(native.devices()[self.ordinal]["capability"])
        return "sm_" + capability.replace(".", "")

    def stream(self) -> int:
        """The address of torch's current stream."""
        return 0 if self.ordinal == _EMULATED else _raw_stream(self.ordinal)

    def capturing(self) -> bool:
        """Whether what is queued now becomes part of a CUDA graph."""
        if self.ordinal == _EMULATED:
            return False
        if torch.cuda.current_device() == self.ordinal:
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(self.ordinal):
            return torch.cuda.is_current_stream_capturing()

    def upload(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the CPU on the device, without waiting for it.

        Raises:
            RuntimeError: a CUDA graph is being captured, whose replays could not know that the
                tensor, called `name`, has gone.
        """
        if self.capturing():
            raise RuntimeError(
                f"{self.device}: {name} cannot be part of a CUDA graph, because each call copies "
                f"it from the host: give all tasks the same number of rows, without sizes and "
                f"task_ids"
            )
        if self.ordinal != _EMULATED and tensor.nbytes > _WITHOUT_WAITING:
            tensor = tensor.pin_memory()  # from other memory the copy would wait for the stream
        return tensor.to(self.device, non_blocking=True)

    def run(
        self, method: Callable[..., int], key: Hashable, *arguments: Any, **options: Any
    ) -> None:
        """Queue a native call.

        Args:
            method: `run` or `repeat` of one; it returns how many bytes of workspace it needs, and
                does nothing but that where it is given fewer.
            key: what its need depends on. Needs are remembered by it; a wrong one costs time only.
            arguments: of the method.
            options: likewise, by name.
        """
        stream, given = self.stream(), -1
        needed = self._needs.get(key) or method(
            *arguments, device=(self.ordinal, stream, 0, 0), **options
        )
        while given < needed:
            given = max(needed, 1)
            workspace = torch.empty(given, dtype=torch.uint8, device=self.device)
            where = self.ordinal, stream, workspace.data_ptr(), given
            needed = method(*arguments, device=where, **options)
        if len(self._needs) >= _NEEDS_KEPT:
            self._needs.clear()
        self._needs[key] = given
