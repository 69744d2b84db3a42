"""Where numpy arrays lie, whatever they are, and which are copied for the core."""

import numpy as np
import pytest

from pymeta.tasks.arrays import address, dense

WHOLE = np.arange(12.0).reshape(3, 4)


def frozen():
    array = WHOLE.copy()
    array.flags.writeable = False
    return array


def unaligned():
    return np.frombuffer(bytearray(33), np.uint8)[1:].view(np.float64)


@pytest.mark.parametrize(
    "array, stays",
    [
        (WHOLE, True), (WHOLE[1:], True), (frozen(), True), (np.zeros((0, 3)), True),
        (np.array(2.0), True), (np.ones(3, np.int8), True), (WHOLE.T, False), (WHOLE[:, 1:], False),
        (WHOLE[::-1], False), (np.broadcast_to(np.ones(4), (3, 4)), False), (unaligned(), False),
    ],
)  # fmt: skip
def test_they_are_numpys(array, stays):
    assert address(array) == array.__array_interface__["data"][0]
    core = dense(array)
    assert (core is array) == stays
    assert core.flags.c_contiguous and core.flags.aligned and np.array_equal(core, array)
    assert address(core) == core.__array_interface__["data"][0]


def test_none_is_nowhere():
    assert address(None) == 0
