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
`bench/test_verify.py` holds against pymeta's reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case, Data

U = 2.0**-24  # the largest relative error of one rounding to float32
FEW = 8  # roundings, in units of the last place, that a function of one number may err by
CHUNK = 25  # tasks at once, which stay in the cache
BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's, as torch has them


class Errors:
    """Draws errors of relative size `size * U`; size 0 draws none."""

    def __init__(self, size: float, seed: int) -> None:
        """The errors of equal seeds are equal, whatever the number of tasks."""
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)

    def moved(self, value: Tensor, bound: Tensor, roundings: float) -> Tensor:
        """`value` [T, ...], moved by xi * roundings * U * bound."""
        if not self.size:
            return value
        shape = value.shape[1:]
        xi = 2 * torch.rand(shape, generator=self.generator, dtype=torch.float64) - 1
        return value + self.size * U * roundings * xi * bound

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix products a @ b, [T, rows, n] and [T, n, columns]."""
        found = a @ b
        if not self.size:
            return found
        return self.moved(found, a.abs() @ b.abs(), a.shape[-1])

    def few(self, value: Tensor) -> Tensor:
        """The value of a function of one number."""
        return self.moved(value, value.abs(), FEW)


def _loss(case: Case, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each task's mean loss [T], and its derivative by z [T, rows, 1]."""
    rows = z.shape[1]
    if case.loss == "mse":
        return (z - y).square().mean((1, 2)), 2 * (z - y) / rows
    assert case.loss == "bce_with_logits", case.loss
    values = torch.nn.functional.softplus(z) - z * y
    return values.mean((1, 2)), (torch.sigmoid(z) - y) / rows


def _gradients(
    case: Case, weights: list[Tensor], x: Tensor, y: Tensor, errors: Errors
) -> tuple[Tensor, list[Tensor]]:
    """Losses [T], and the gradients of every task's weights [T, out, in], biases [T, 1, out]."""
    inputs, depth = [x], len(weights) // 2
    for i in range(depth):
        w, b = weights[2 * i : 2 * i + 2]
        z = errors.few(errors.product(inputs[-1], w.mT) + b)
        if i < depth - 1:
            z = z.relu() if case.activation == "relu" else errors.few(z.tanh())
        inputs.append(z)
    losses, delta = _loss(case, inputs.pop(), y)
    delta = errors.few(delta)
    found: list[Tensor] = []
    for i in reversed(range(depth)):
        ones = delta.new_ones(1, 1, delta.shape[1]).expand(len(delta), -1, -1)
        found = [errors.product(delta.mT, inputs[i]), errors.product(ones, delta), *found]
        if i:
            slope = (inputs[i] > 0) if case.activation == "relu" else 1 - inputs[i].square()
            delta = errors.few(errors.product(delta, weights[2 * i]) * slope)
    return losses, found


def _adapt(case: Case, data: Data, errors: Errors) -> tuple[Tensor, list[Tensor]]:
    """The mean over steps of each task's loss [T], and its adapted weights in torch's shapes."""
    x, y = torch.from_numpy(data.xs).double(), torch.from_numpy(data.ys).double()
    flat = [torch.from_numpy(p).double() for p in data.parameters]
    weights = [p.reshape(-1, p.shape[-1]).expand(len(x), -1, -1) for p in flat]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    total = x.new_zeros(len(x))
    for step in range(1, case.steps + 1):
        losses, gradients = _gradients(case, weights, x, y, errors)
        total = total + losses
        if case.optimizer == "adam":
            b1, b2 = BETAS
            first = [b1 * m + (1 - b1) * g for m, g in zip(first, gradients, strict=True)]
            second = [b2 * s + (1 - b2) * g * g for s, g in zip(second, gradients, strict=True)]
            gradients = [
                m / (1 - b1**step) / (s.sqrt() / (1 - b2**step) ** 0.5 + EPS)
                for m, s in zip(first, second, strict=True)
            ]
        moves = [case.lr * errors.few(g) for g in gradients]
        weights = [errors.moved(w - d, w.abs(), 1) for w, d in zip(weights, moves, strict=True)]
    shaped = [w.reshape(-1, *p.shape) for w, p in zip(weights, flat, strict=True)]
    return total / case.steps, shaped


def adapted(
    case: Case, data: Data, size: float = 1.0, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
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
    losses = torch.cat([p[0] for p in parts])
    return losses, [torch.cat(ps) for ps in zip(*(p[1] for p in parts), strict=True)]
