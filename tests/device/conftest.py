"""The emulated device, and what a GPU would say."""

import pytest
from kernels import using

from pymeta import native
from pymeta.backend.device import Device


@pytest.fixture(autouse=True)
def emulated():
    """The emulated device, with few threads: they are the host's."""
    before = native.block_threads(), native.block_bytes()
    with using(executor="emulated"):
        native.set_block_threads(4)
        try:
            yield
        finally:
            native.set_block_threads(before[0])
            native.set_block_bytes(before[1])
            native.set_check_values(False)


@pytest.fixture
def calls(monkeypatch):
    """The names of the core's methods that were called on a device."""
    seen, original = [], Device.run

    def spy(self, method, key, *arguments, **options):
        seen.append(key[0])
        return original(self, method, key, *arguments, **options)

    monkeypatch.setattr(Device, "run", spy)
    return seen


class Fakes:
    """What a GPU would say of streams and captures."""

    stream, capturing = 0, False


@pytest.fixture
def gpu(monkeypatch):
    fakes = Fakes()
    monkeypatch.setattr(Device, "stream", lambda self: fakes.stream)
    monkeypatch.setattr(Device, "capturing", lambda self: fakes.capturing)
    return fakes
