"""Adapters and models to be written, and files of them."""

import pytest
from file_help import random_adapter, random_models


@pytest.fixture(params=["adapter", "models"])
def kind(request):
    return request.param


@pytest.fixture
def path(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    (random_adapter() if kind == "adapter" else random_models()).save(path)
    return path
