"""The emulated device, and what a GPU would say."""

import pytest
from helpers import mlp

import pymeta
from pymeta import native

pytestmark = pytest.mark.skipif(not native.emulates(), reason="a build without the emulated device")


def make(net=None, **options):
    options = {"loss": "mse", "lr": 0.1, "steps": 2, "backend": "native", **options}
    return pymeta.MAML(mlp(2, 4, 3) if net is None else net, **options)
