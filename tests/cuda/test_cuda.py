"""The CUDA executor on a GPU; skipped as a whole where there is none.

The same things are asked of it as of the CPU's executors in test_kernels.py and test_recipes.py,
by the same cases and the same bounds: close to the float64 reference, equal to the last bit
wherever that is promised. Beside these stands what only a GPU has (test_cuda_streams.py). What the
executor computes is tested without a GPU as well, on the emulated device; test_cuda_recipes.py
compares the two, to the last bit.
"""

import collections
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import FIXED, Case, Problem, Wanted, cases, is_kinked, meta_gradient, of_tasks
from cases import walk as walk_along
from cuda_help import DEVICE, ODD, WORKLOADS, classes, module_of, results, runs_natively
from helpers import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    DTYPES,
    EPS,
    PROFILE,
    same_bits,
)
from torch import nn

from pymeta import native

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
if native.cuda_reason() is not None:
    pytest.skip(f"no CUDA executor: {native.cuda_reason()}", allow_module_level=True)


# ---- against the reference ----------------------------------------------------------------------


def compare(case: Case, counts: collections.Counter) -> None:
    """One case in both dtypes; float32 only where no kink is within reach of its rounding."""
    problem, steepest, dtypes = Problem(case), 1.0, DTYPES
    modules = {dtype: module_of(problem, dtype) for dtype in dtypes}
    if not runs_natively(modules[torch.float64]):
        counts["unfit"] += 1
        return
    if is_kinked(case) or any(layer[0].endswith("norm") for layer in case.chain):
        nearest, steepest = walk_along(problem)
        if nearest < 64 * EPS[torch.float32]:
            dtypes = (torch.float64,)
    wanted = Wanted(problem, steepest)
    for dtype in dtypes:
        wrong = wanted.differences(results(problem, modules[dtype]), dtype)
        assert not wrong, "\n".join([f"{case} {dtype}", *wrong])
        counts[dtype] += 1


def test_random_cases_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=60)
    @given(cases())
    def check(case):
        compare(case, counts)

    check()
    assert counts[torch.float64] >= 45 and counts[torch.float32] >= 35, counts


@pytest.mark.parametrize("name", FIXED)
def test_fixed_cases_against_the_reference(name):
    counts = collections.Counter()
    compare(FIXED[name], counts)
    assert counts[torch.float64] == 1 or name.startswith("20 layers")


def test_the_comparison_can_fail():
    case = Case((("linear", 3, 8, True), ("tanh",), ("linear", 8, 2, True)), seed=4)
    wanted = Wanted(Problem(case))
    for change in ({"first_order": True}, {"steps": 1}):
        other = Problem(replace(case, **change))
        got = results(other, module_of(other, torch.float32))
        assert wanted.differences(got, torch.float32)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_benchmarks_networks_against_the_reference(name):
    """In float64, where their many ReLUs are no nearer to their kinks than rounding reaches."""
    case = replace(WORKLOADS[name], input_gradients=False)
    problem = Problem(case)
    wanted = Wanted(problem)
    module = module_of(problem, torch.float64)
    assert runs_natively(module)
    wrong = wanted.differences(results(problem, module), torch.float64)
    assert not wrong, wrong


# ---- wrong values, NaN --------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [4, -1, 2**40])
@pytest.mark.parametrize("side", [1, 3])
def test_a_wrong_label_spoils_its_task_alone(side, wrong):
    module, data = classes()
    before, models_before = module(*data), module.adapt(*data[:2])
    data[side][2, 1] = wrong
    after, models = module(*data), module.adapt(*data[:2])
    others = [0, 1, 3, 4, 5]
    assert after.task_losses[2].isnan() and after.loss.isnan()
    assert same_bits(after.task_losses[others], before.task_losses[others])
    assert same_bits(after.predictions[others], before.predictions[others])
    for n, v in models.parameters.items():
        assert same_bits(v[others], models_before.parameters[n][others])
        assert v[2].isnan().any() == (side == 1)
    assert models.status.tolist() == [0, 0, int(side == 1), 0, 0, 0]
    assert all(g.isnan().any() for g in gradients(after.loss, *module.parameters()))


@pytest.mark.parametrize("wrong", [4, -1, 2**40])
def test_a_wrong_label_is_of_no_class(wrong):
    """Gradients of row weights ask for the weight of each row's class."""
    module, data = classes(loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    weights = torch.ones(6, data[0].shape[1], device=DEVICE, requires_grad=True)
    (before,) = gradients(module(*data, support_weights=weights).loss, weights)
    data[1][2, 1] = wrong
    (after,) = gradients(module(*data, support_weights=weights).loss, weights)
    others = [0, 1, 3, 4, 5]
    assert after[2].isnan().any()
    assert same_bits(after[others], before[others])


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_a_wrong_weight_spoils_its_task_alone(wrong):
    module, data = classes()
    weights = torch.ones(6, data[0].shape[1], device=DEVICE)
    before = module(*data, support_weights=weights)
    weights[4, 0] = wrong
    after = module(*data, support_weights=weights)
    others = [0, 1, 2, 3, 5]
    assert after.task_losses[4].isnan()
    assert same_bits(after.task_losses[others], before.task_losses[others])


def test_checked_values_are_refused():
    """PYMETA_CHECK_VALUES=1, which is read at import."""
    program = """
import torch, pymeta
net = torch.nn.Linear(3, 4).cuda()
maml = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=1, backend="native")
x, y = torch.randn(2, 5, 3).cuda(), torch.zeros(2, 5, dtype=torch.int64).cuda()
assert maml(x, y, x, y).loss.isfinite()
y[1, 3] = 4
try:
    maml(x, y, x, y)
except ValueError as error:
    assert "task 1, row 3" in str(error), error
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYMETA_CHECK_VALUES": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout.strip() == "refused", done.stdout + done.stderr


@settings(PROFILE, max_examples=25)
@given(
    cases(tasks=(2, 5, 17, 33)),
    st.sampled_from([math.nan, math.inf, -math.inf, 3e38]),
    st.sampled_from(["xs", "ys", "xq"]),
    st.sampled_from(DTYPES),
)
def test_a_diverged_task_is_its_own_affair(case, poison, where, dtype):
    problem = Problem(case)
    side = problem.query if where == "xq" else problem.support
    spoiled = int(torch.randint(case.tasks, ()))
    others = [t for t in range(case.tasks) if t != spoiled]
    module = module_of(problem, dtype)
    if not runs_natively(module):
        return
    wanted = results(problem, module)
    values = side.y if where == "ys" and side.y.is_floating_point() else side.x
    values[spoiled] = poison
    got = results(problem, module)
    assert same_bits(of_tasks(got, others), of_tasks(wanted, others))
    for name in ("xs", "xq"):
        if case.input_gradients:
            assert same_bits(got[name][others], wanted[name][others])


def test_what_earlier_calls_left_in_memory_does_not_matter():
    """Working memory comes from torch's allocator with whatever is in it; here NaN."""
    problem = Problem(ODD)
    module = module_of(problem, torch.float32)
    wanted = results(problem, module)
    torch.cuda.empty_cache()
    for size in (1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26):
        for _ in range(4):
            torch.full((size,), math.nan, device=DEVICE)
    got = results(problem, module)
    assert same_bits(of_tasks(got, range(21)), of_tasks(wanted, range(21)))
    assert same_bits(meta_gradient(got), meta_gradient(wanted))
