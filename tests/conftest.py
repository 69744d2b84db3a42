"""Every test begins with the same random numbers, one torch thread and torch's default dtype."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
