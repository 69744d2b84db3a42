"""PerStepBatchNorm in plain torch: a BatchNorm for each inner step."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pymeta.nn import PerStepBatchNorm, at_step


def twins(steps: int, momentum: float | None):
    """A per-step normalisation, and an nn.BatchNorm1d for each of its steps, alike."""
    norm = PerStepBatchNorm(3, steps, momentum=momentum).double()
    torch.manual_seed(1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    singles = [nn.BatchNorm1d(3, momentum=momentum).double() for _ in range(steps)]
    for k, single in enumerate(singles):
        single.weight.data.copy_(norm.weight[k])
        single.bias.data.copy_(norm.bias[k])
    return norm, singles


@pytest.mark.parametrize("momentum", [0.1, None])
def test_each_step_is_a_batch_norm_of_its_own(momentum):
    norm, singles = twins(3, momentum)
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64) * 2 + 1
    for passes in x:
        for k, rows in enumerate(passes):
            with at_step(norm, k):
                single = singles[min(k, 2)] if k < 3 else None
                if single is None:
                    continue
                torch.testing.assert_close(norm(rows), single(rows))
    for k, single in enumerate(singles):
        torch.testing.assert_close(norm.running_mean[k], single.running_mean)
        torch.testing.assert_close(norm.running_var[k], single.running_var)
    norm.eval()
    for k, single in enumerate(singles):
        with at_step(norm, k):
            torch.testing.assert_close(norm(x[0, 0]), single.eval()(x[0, 0]))


def test_steps_beyond_the_rows_and_none_are_the_last_one():
    norm, _ = twins(2, 0.1)
    norm.eval()
    norm.running_mean.normal_()
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    found = []
    for step in (0, 1, 7, None):
        with at_step(nn.Sequential(norm), step):
            found.append(norm(x))
    assert norm.step is None
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[3])


def test_images_without_parameters_or_statistics():
    norm = PerStepBatchNorm(2, 4, affine=False, track_running_stats=False)
    assert not list(norm.parameters()) and norm.running_mean is None
    x = torch.randn(3, 2, 4, 5)
    wanted = nn.BatchNorm2d(2, affine=False)(x)
    torch.testing.assert_close(norm.eval()(x), wanted)


def test_a_state_goes_into_another_one():
    norm, _ = twins(2, 0.1)
    with at_step(norm, 1):
        norm(torch.randn(5, 3, dtype=torch.float64))
    other = PerStepBatchNorm(3, 2).double()
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other.running_var, norm.running_var)
    other.reset_running_stats()
    assert torch.equal(other.running_var, torch.ones(2, 3).double())


@pytest.mark.parametrize("steps", [0, 2.0, True])
def test_steps_are_counted(steps):
    with pytest.raises(ValueError, match=r"steps: expected an integer of at least 1"):
        PerStepBatchNorm(3, steps)


def test_the_inputs_shape_is_checked():
    with pytest.raises(ValueError, match=r"input: expected \[rows, 3\].*got \[2, 4\]"):
        PerStepBatchNorm(3, 1)(torch.zeros(2, 4))


def test_without_torch_the_extra_is_named():
    code = "import sys; sys.modules['torch'] = None; import pymeta.nn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pymeta.nn needs torch" in done.stderr and "pymeta-kernels[torch]" in done.stderr
