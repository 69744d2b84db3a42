"""Operators in a process that has no torch: against finite differences and a loop by hand.

This file imports no torch, so that it also runs where there is none (tests/installed.py).
"""

import os
import subprocess
import sys

import numpy as np
import pytest

import pymeta
from pymeta import functional as F

LAYERS = [("linear", 3, 4, True), ("tanh",), ("layer_norm", 4, 1e-5, True, True),
          ("linear", 4, 2, False)]  # fmt: skip


def problem(tasks: int = 3, **options):
    operator = F.Operator(LAYERS, **{"loss": "mse", "lr": 0.1, "steps": 3, **options})
    random = np.random.default_rng(0)
    parameters = {n: random.normal(size=s) for n, s in operator.shapes.items()}
    data = [random.normal(size=(tasks, n, w)) for n, w in ((6, 3), (6, 2), (4, 3), (4, 2))]
    return operator, parameters, data


def test_names_are_those_of_a_sequential():
    assert list(F.chain(LAYERS).names) == [
        "0.weight", "0.bias", "2.weight", "2.bias", "3.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("own", [(), ("0.weight", "2.bias")])
def test_gradients_are_finite_differences(own):
    operator, parameters, data = problem(lr=pymeta.LearnableLR(0.1, "parameter", per_step=True))
    random = np.random.default_rng(1)
    parameters |= {n: random.normal(size=(3, *parameters[n].shape)) for n in own}
    rates = random.uniform(0.05, 0.2, operator.rate_shape)
    wrt = ("parameters", "rates", "xs", "ys", "xq", "yq")

    def loss(parameters, rates, *data):
        return float(F.meta_gradient(operator, parameters, *data, rates=rates, wrt=()).loss)

    found = F.meta_gradient(operator, parameters, *data, rates=rates, wrt=wrt)
    groups = {**{n: (parameters, n) for n in parameters}}
    inputs = {"rates": rates, **dict(zip(("xs", "ys", "xq", "yq"), data, strict=True))}
    for name, value in [*parameters.items(), *inputs.items()]:
        grad = found.gradients[name] if name in groups else found.input_gradients[name]
        assert grad.shape == value.shape
        along, eps = random.normal(size=value.shape), 1e-6
        ends = []
        for sign in (1, -1):
            moved = value + sign * eps * along
            p = {**parameters, name: moved} if name in groups else parameters
            rest = {n: moved if n == name else v for n, v in inputs.items()}
            ends.append(loss(p, *rest.values()))
        slope = (ends[0] - ends[1]) / (2 * eps)
        # a central difference errs by eps^2 of the third derivative, and by rounding over eps
        assert abs(slope - float((grad * along).sum())) < 1e-8 * (1 + abs(slope))


def test_an_adapters_architecture_is_an_operator():
    operator, parameters, (xs, ys, xq, _) = problem()
    adapter = pymeta.Adapter(
        operator.architecture, parameters, adapted=operator.adapted, loss=operator.loss,
        optimizer=operator.optimizer, schedule=pymeta.Schedule(steps=3),
    )  # fmt: skip
    other = F.Operator(adapter.architecture, loss="mse", lr=0.1, steps=3)
    got = F.adapt_predict(other, parameters, xs, ys, xq)
    assert np.array_equal(got, adapter.adapt_predict(xs, ys, xq))
    models = adapter.adapt(xs, ys)
    adapted = F.adapt(operator, parameters, xs, ys)
    assert all(np.array_equal(adapted[n], models.parameters[n]) for n in operator.adapted)
    assert np.array_equal(F.predict(operator, adapted, xq), models(xq))


def test_sizes_of_arrays():
    operator, parameters, (xs, ys, xq, yq) = problem()
    sizes, queries = [6, 2, 0], np.array([4, 0, 3])
    options = {"support_sizes": sizes, "query_sizes": queries}
    padded = F.meta_gradient(operator, parameters, xs, ys, xq, yq, **options, wrt=["xs"])
    lists = [[v[t][:n] for t, n in enumerate(s)] for v, s in
             ((xs, sizes), (ys, sizes), (xq, queries), (yq, queries))]  # fmt: skip
    ragged = F.meta_gradient(operator, parameters, *lists, wrt=["xs"])
    assert np.array_equal(padded.task_losses, ragged.task_losses)
    for t, n in enumerate(sizes):
        got = padded.input_gradients["xs"][t]
        assert np.array_equal(got[:n], ragged.input_gradients["xs"][t]) and not got[n:].any()
    with pytest.raises(ValueError, match="support_sizes: expected None where xs is a list"):
        F.meta_gradient(operator, parameters, *lists, support_sizes=sizes)
    for wrong in ([6, 2], [6.0, 2.0, 0.0]):
        with pytest.raises(ValueError, match="support_sizes: expected 3 integers"):
            F.meta_gradient(operator, parameters, xs, ys, xq, yq, support_sizes=wrong)
    with pytest.raises(ValueError, match="support_sizes"):
        F.meta_gradient(operator, parameters, xs, ys, xq, yq, support_sizes=[7, 2, 0])


def test_nothing_is_cast():
    operator, parameters, (xs, ys, xq, _) = problem()
    with pytest.raises(TypeError, match="xs: expected float64 as the weights are, got float32"):
        F.adapt_predict(operator, parameters, xs.astype(np.float32), ys, xq)
    with pytest.raises(TypeError, match=r"rates: expected float64, got float32; cast it, as by"):
        F.adapt(operator, parameters, xs, ys, rates=np.ones(1, np.float32))
    mixed = {**parameters, "0.bias": parameters["0.bias"].astype(np.float32)}
    with pytest.raises(TypeError, match=r"parameters\['0.bias'\]: expected float32 or float64 as"):
        F.adapt(operator, mixed, xs, ys)


def test_gradients_by_weights_of_targets_and_offsets_are_differences():
    """The change of the loss when one entry changes, in float64."""
    operator, parameters, data = problem()
    parameters = {n: p.astype(np.float64) for n, p in parameters.items()}
    data = [v.astype(np.float64) for v in data]
    generator = np.random.default_rng(0)
    given = {
        "support_weights": generator.uniform(0.2, 1, data[1].shape),
        "query_weights": generator.uniform(0.2, 1, data[3].shape),
        "support_offset": generator.normal(size=data[1].shape),
        "query_offset": generator.normal(size=data[3].shape),
    }
    found = F.meta_gradient(operator, parameters, *data, **given, wrt=list(given))
    for name, value in given.items():
        at, step = (1, 2, 0), 1e-6
        losses = []
        for sign in (1, -1):
            moved = value.copy()
            moved[at] += sign * step
            losses.append(F.meta_gradient(operator, parameters, *data, **{**given, name: moved}))
        slope = (losses[0].loss - losses[1].loss) / (2 * step)
        assert abs(slope - found.input_gradients[name][at]) < 1e-8 < abs(slope)


CODE = """
import sys; sys.modules["torch"] = None
import numpy as np, pymeta
F = pymeta.functional
operator = F.Operator([("linear", 2, 3, True), ("relu",), ("linear", 3, 1, True)],
                      loss="mse", lr=0.1, steps=2)
parameters = {n: np.ones(s, np.float32) for n, s in operator.shapes.items()}
x, y = np.ones((4, 5, 2), np.float32), np.ones((4, 5, 1), np.float32)
found = F.meta_gradient(operator, parameters, x, y, x, y)
flow = F.vjp(operator, parameters, x, y, x, predictions=np.ones((4, 5, 1), np.float32))
adapted = F.adapt(operator, parameters, x, y)
assert np.array_equal(F.predict(operator, adapted, x), found.predictions)
print(sorted(found.gradients) == sorted(flow.gradients) == sorted(parameters))
"""


def test_a_process_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYMETA_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr
