"""Values out of bytes: what a fuzzer's input means. Any bytes mean something; too few read as 0."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

INTEGERS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 17, -1, -2, 127, 128, 255, 256, 1000, 2**16, 2**24,
            2**24 + 1, 2**30, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1, 2**63,
            -(2**63), 2**64 - 1, 2**64, 10**400)  # fmt: skip
NUMBERS = (0.0, -0.0, 0.1, 0.5, 0.9, 1.0, 2.0, -1.0, 1e-8, 1e-45, 5e-324, 3e38, 1e39, 1e308,
           float("inf"), float("-inf"), float("nan"))  # fmt: skip
WORDS = ("", "linear", "relu", "softplus", "layer_norm", "batch_norm", "mse", "adam", "meta",
         "\0", "\ud800", "é", "x" * 300)  # fmt: skip
DTYPES = ("f4", "f8", "i8", "i4", "u8", "q", "f2", "g", "c8", "?", ">f4", ">i8", "S3", "U2",
          "M8[s]", "V8", "f4,f4", "O")  # fmt: skip


class Source:
    """Reads the bytes from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def rest(self) -> int:
        return max(0, len(self._data) - self._at)

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        self._at += count
        return found.ljust(count, b"\0")

    def byte(self) -> int:
        return self.take(1)[0]

    def below(self, n: int) -> int:
        return (self.byte() if n <= 256 else int.from_bytes(self.take(4), "little")) % n

    def chance(self, of_256: int) -> bool:
        """True for the highest bytes only, so that zeros (the end of the data) are tame."""
        return self.byte() >= 256 - of_256

    def pick(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def integer(self) -> int:
        if self.chance(64):
            return int.from_bytes(self.take(8), "little", signed=True)
        return self.pick(INTEGERS)

    def number(self) -> float:
        if self.chance(64):
            return struct.unpack("<d", self.take(8))[0]
        return self.pick(NUMBERS)

    def text(self) -> str:
        if self.chance(64):
            return self.take(self.below(8)).decode("latin-1")
        return self.pick(WORDS)

    def anything(self, depth: int = 2) -> Any:
        """Any Python value."""
        kind = self.below(16 if depth else 12)
        if kind < 3:
            return self.integer()
        if kind < 5:
            return self.number()
        if kind < 7:
            return self.text()
        simple: tuple[Any, ...] = (None, True, False, b"bytes", bytearray(8))
        if kind < 12:
            return simple[kind - 7]
        if kind == 15:
            return self.array()
        inside = [self.anything(depth - 1) for _ in range(self.below(5))]
        return (inside, tuple(inside), {str(i): v for i, v in enumerate(inside)})[kind - 12]

    def array(self, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> Any:
        """A buffer: of the given shape and dtype if the bytes want it, and any other if not."""
        if shape is None or self.chance(48):
            shape = tuple(
                self.pick((0, 1, 2, 3, 4, 5, 2**24 + 1, 2**40)) for _ in range(self.below(5))
            )
        if dtype is None or self.chance(32):
            dtype = self.pick(DTYPES)
        elements = int(np.prod([min(n, 2**20) for n in shape], dtype=object))
        if elements > 4096:  # as large as it says only where it has no elements
            shape = tuple(min(n, 3) for n in shape)
            elements = int(np.prod(shape, dtype=np.int64))
        if dtype == "O":
            return np.full(shape, None, object)
        kind = np.dtype(dtype)
        values = self._values(kind, elements)
        return self._form(np.frombuffer(bytearray(values), kind, elements).reshape(shape))

    def _values(self, kind: np.dtype, elements: int) -> bytes:
        """The bytes of an array; fewer given bytes than needed are repeated."""
        if kind.kind == "i" and not self.chance(96):
            return np.arange(elements).astype(kind).tobytes() or b"\0"
        if kind.kind == "f" and not self.chance(128):
            return np.linspace(-1, 1, elements).astype(kind).tobytes() or b"\0"
        given = self.take(min(elements * kind.itemsize, 64)) or b"\0"
        return (given * (elements * kind.itemsize // len(given) + 1))[: elements * kind.itemsize]

    def _form(self, array: np.ndarray) -> Any:
        """The same values lying in memory in another way, or behind another type."""
        if not self.chance(64) or max(array.shape, default=0) > 1000:
            return array
        form = self.below(10)
        if form == 0:
            return np.asfortranarray(array)
        if form == 1:
            return np.repeat(array, 2, axis=0)[::2] if array.ndim else array
        if form == 2:
            return array[::-1] if array.ndim else array
        if form == 3:
            array.flags.writeable = False
            return array
        if form == 4:  # not aligned
            room = bytearray(array.nbytes + 1)
            room[1:] = array.tobytes()
            return np.frombuffer(room, array.dtype, array.size, offset=1).reshape(array.shape)
        if form == 5:
            return array.tobytes()
        if form == 6:
            return bytearray(array.tobytes())
        if form == 7:
            return array.tolist()
        if form == 8:
            return np.ma.masked_array(array)
        try:
            return memoryview(array)
        except (ValueError, BufferError):  # numpy lends no such dtype
            return array
