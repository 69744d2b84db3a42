"""What float32 rounding can do to an inner loop: the loop in float64 with rounding errors drawn.

A bound that multiplies worst cases through 20 or 32 steps says nothing, least of all through Adam:
its first step is the sign of the gradient, so where a gradient cancels to within rounding, two
right answers step in opposite directions; and a ReLU's input within rounding of 0 switches a row's
share of a gradient. Both happen to some weights of some tasks. So the errors are drawn instead and
followed through the loop (Monte Carlo arithmetic; Parker, Pierce, Eggert 2000): the loop runs in
float64, and every sum of n products is moved by

    xi * n * u * (the sum of the products' absolute values),   u = 2^-24, xi uniform in [-1, 1],

which is as far as n roundings can move it at worst (Higham 2002, section 3.1). What an operation
makes of one number (an activation, a loss's derivative, an optimiser's update) is moved by
xi * `FEW` * u of it. Real errors are smaller: n of them add up like sqrt(n), and most are below
their bound. Each xi is the same for all tasks, as a systematic error's sign would be: a mean over
tasks does not average it away.

Without errors the same lines are an independent implementation of the inner loop, which
`bench/test_verify.py` holds against pymeta's reference, and which answers are compared with where
there is no torch. It is all numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pymeta.bench.cases import Case, Data

Array = NDArray[np.float64]

U = 2.0**-24  # the largest relative error of one rounding to float32
FEW = 8  # roundings, in units of the last place, that a function of one number may err by
CHUNK = 25  # tasks at once, which stay in the cache
BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's, as torch has them


class Errors:
    """Draws errors of relative size `size * U`; size 0 draws none."""

    def __init__(self, size: float, seed: int) -> None:
        """The errors of equal seeds are equal, whatever the number of tasks."""
        self.size = size
        self.generator = np.random.default_rng(seed)

    def moved(self, value: Array, bound: Array, roundings: float) -> Array:
        """`value` [T, ...], moved by xi * roundings * U * bound."""
        if not self.size:
            return value
        xi = 2 * self.generator.random(value.shape[1:]) - 1
        found: Array = value + self.size * U * roundings * xi * bound
        return found

    def product(self, a: Array, b: Array) -> Array:
        """The matrix products a @ b, [T, rows, n] and [T, n, columns]."""
        found: Array = a @ b
        if not self.size:
            return found
        return self.moved(found, np.abs(a) @ np.abs(b), a.shape[-1])

    def few(self, value: Array) -> Array:
        """The value of a function of one number."""
        return self.moved(value, np.abs(value), FEW) if self.size else value


def _loss(case: Case, z: Array, y: Array) -> tuple[Array, Array]:
    """Each task's mean loss [T], and its derivative by z [T, rows, 1]."""
    rows = z.shape[1]
    if case.loss == "mse":
        return np.square(z - y).mean((1, 2)), 2 * (z - y) / rows
    if case.loss != "bce_with_logits":
        raise ValueError(f"{case.name}: no {case.loss} here")
    small = np.exp(-np.abs(z))  # in (0, 1]: neither form overflows
    values = np.maximum(z, 0) + np.log1p(small) - z * y
    sigmoid = np.where(z >= 0, 1.0, small) / (1 + small)
    return values.mean((1, 2)), (sigmoid - y) / rows


def forward(case: Case, weights: list[Array], x: Array, errors: Errors) -> list[Array]:
    """The inputs of every layer, [T, rows, in], and behind them the network's outputs."""
    inputs, depth = [x], len(weights) // 2
    for i in range(depth):
        w, b = weights[2 * i : 2 * i + 2]
        z = errors.few(errors.product(inputs[-1], w.swapaxes(-1, -2)) + b)
        if i < depth - 1:
            z = np.maximum(z, 0) if case.activation == "relu" else errors.few(np.tanh(z))
        inputs.append(z)
    return inputs


def _gradients(
    case: Case, weights: list[Array], x: Array, y: Array, errors: Errors
) -> tuple[Array, list[Array]]:
    """Losses [T], and the gradients of every task's weights [T, out, in], biases [T, 1, out]."""
    inputs = forward(case, weights, x, errors)
    losses, delta = _loss(case, inputs.pop(), y)
    delta = errors.few(delta)
    found: list[Array] = []
    for i in reversed(range(len(inputs))):
        ones = np.broadcast_to(1.0, (len(delta), 1, delta.shape[1]))
        columns = delta.swapaxes(-1, -2)
        found = [errors.product(columns, inputs[i]), errors.product(ones, delta), *found]
        if i:
            slope = (inputs[i] > 0) if case.activation == "relu" else 1 - np.square(inputs[i])
            delta = errors.few(errors.product(delta, weights[2 * i]) * slope)
    return losses, found


def _adapt(case: Case, data: Data, errors: Errors) -> tuple[Array, list[Array]]:
    """The mean over steps of each task's loss [T], and its adapted weights in torch's shapes."""
    x, y = data.xs.astype(np.float64), data.ys.astype(np.float64)
    flat = [p.astype(np.float64) for p in data.parameters]
    weights: list[Array] = []
    for p in flat:
        matrix = p.reshape(-1, p.shape[-1])
        weights.append(np.broadcast_to(matrix, (len(x), *matrix.shape)))
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    total = np.zeros(len(x))
    for step in range(1, case.steps + 1):
        losses, gradients = _gradients(case, weights, x, y, errors)
        total = total + losses
        if case.optimizer == "adam":
            b1, b2 = BETAS
            first = [b1 * m + (1 - b1) * g for m, g in zip(first, gradients, strict=True)]
            second = [b2 * s + (1 - b2) * g * g for s, g in zip(second, gradients, strict=True)]
            gradients = [
                m / (1 - b1**step) / (np.sqrt(s) / (1 - b2**step) ** 0.5 + EPS)
                for m, s in zip(first, second, strict=True)
            ]
        moves = [case.lr * errors.few(g) for g in gradients]
        weights = [errors.moved(w - d, np.abs(w), 1) for w, d in zip(weights, moves, strict=True)]
    shaped = [w.reshape(-1, *p.shape) for w, p in zip(weights, flat, strict=True)]
    return total / case.steps, shaped


def adapted(case: Case, data: Data, size: float = 1.0, seed: int = 0) -> tuple[Array, list[Array]]:
    """Adapt every task of a case in float64 with errors drawn.

    Args:
        case: of plain layers, a loss of one output, no normalisation.
        data: its tasks.
        size: how many times worst-case float32 errors they are; 0 gives the exact answer.
        seed: of the errors.

    Returns:
        The mean over steps of each task's loss, [T]; the adapted parameters, each [T, ...] in the
        order and shapes of `Data.parameters`.
    """
    starts = range(0, len(data.xs), CHUNK)
    parts = [_adapt(case, data.of(slice(t, t + CHUNK)), Errors(size, seed)) for t in starts]
    losses = np.concatenate([p[0] for p in parts])
    return losses, [np.concatenate(ps) for ps in zip(*(p[1] for p in parts), strict=True)]
