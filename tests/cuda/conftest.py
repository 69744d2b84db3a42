"""Cases on a device, for the tests of the CUDA executor."""

import pytest

from pymeta import native


@pytest.fixture(autouse=True)
def _fallbacks_are_errors(recwarn):
    """No test passes by running in torch."""
    yield
    fallen = [str(w.message) for w in recwarn if "runs in torch" in str(w.message)]
    assert not fallen, fallen


@pytest.fixture
def blocks():
    """Sets threads and shared memory of a block; both are put back."""
    extension = native.extension()

    def choose(threads: int = 0, memory: int = 0) -> None:
        native.set_block_threads(threads)
        extension.set_block_bytes(memory)

    before = native.block_threads(), extension.block_bytes()
    yield choose
    choose(*before)
