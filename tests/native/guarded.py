"""Arrays that end, or begin, where a page without any access does.

A load past an end of such an array is a fault on the spot, however few bytes it is past; so is a
store into one that is only to be read. Two tests use it: test_faults.py, in processes that may die.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

NO_ACCESS, READ = 0, 1
_libc = ctypes.CDLL(None, use_errno=True)


def _protect(address: int, size: int, access: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), access) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


class Pages:
    """Makes arrays between pages without access, at the "end" or the "start" of theirs."""

    def __init__(self, at: str) -> None:
        self.at = at
        self._maps: list[Any] = []

    def array(self, values: Any, *, writable: bool = False) -> np.ndarray:
        """A copy of the values; nobody may write to it unless it is to be writable."""
        values = np.ascontiguousarray(values)
        page = mmap.PAGESIZE
        inside = -(-values.nbytes // page) * page or page
        room = mmap.mmap(-1, inside + 2 * page)
        whole = np.frombuffer(room, np.uint8)
        whole[:] = 0xFF  # NaN
        first = page + (inside - values.nbytes if self.at == "end" else 0)
        found = whole[first : first + values.nbytes].view(values.dtype).reshape(values.shape)
        found[...] = values
        address = whole.__array_interface__["data"][0]
        _protect(address, page, NO_ACCESS)
        _protect(address + page + inside, page, NO_ACCESS)
        if not writable:
            _protect(address + page, inside, READ)
        self._maps.append(room)
        return found

    def room(self, shape: Any, dtype: Any) -> np.ndarray:
        """An array for results."""
        return self.array(np.zeros(shape, dtype), writable=True)
