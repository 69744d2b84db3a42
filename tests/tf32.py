"""Cases of precision="tf32x3", and how near to the float64 reference they have to be."""

from collections.abc import Callable

import torch
from cases import Case, Problem, Wanted
from kernels import EPS, flat, largest
from kinks import is_kinked, walk

import pymeta

F32, LIN = torch.float32, "linear"
# Where a product or a sum in float32 is off by up to one EPS, an output is off by six of the sum of
# its products' sizes (3 x 2^-22), and by one for eight products that are added: at most seven.
GROWTH = 7

CASES = {
    "W3": Case(
        ((LIN, 24, 64, True), ("silu",), (LIN, 64, 64, True), ("silu",), (LIN, 64, 1, True)),
        "bce_with_logits", support=32, query=32, steps=5, input_gradients=False,
    ),
    "W3, first order": Case(
        ((LIN, 24, 64, True), ("tanh",), (LIN, 64, 64, True), ("tanh",), (LIN, 64, 1, True)),
        "bce_with_logits", support=32, query=32, steps=5, first_order=True, input_gradients=False,
    ),
    "ReLU": Case(
        ((LIN, 20, 32, True), ("relu",), (LIN, 32, 17, True), ("relu",), (LIN, 17, 2, True)),
        input_gradients=False, seed=3,
    ),
    "tasks of all sizes, odd widths": Case(
        ((LIN, 17, 33, True), ("gelu",), (LIN, 33, 18, False), ("tanh",), (LIN, 18, 3, True)),
        tasks=6, form="list", support=19, query=21, input_gradients=False,
    ),
    "wide outputs, narrow inputs": Case(
        ((LIN, 3, 16, True), ("tanh",), (LIN, 16, 35, True)), "huber", form="padded", tasks=5,
        support=9, query=11, steps=3, input_gradients=False,
    ),
    # Classes with weights, and rows with the label to ignore.
    "labels": Case(
        ((LIN, 18, 32, True), ("tanh",), (LIN, 32, 16, True), ("tanh",), (LIN, 16, 5, True)),
        "cross_entropy", tasks=4, support=12, query=20, input_gradients=False, loss_options=True,
    ),
    "weights of rows": Case(
        ((LIN, 18, 32, True), ("tanh",), (LIN, 32, 2, True)), "bce_with_logits", form="list",
        tasks=5, support=12, query=20, weights=True, input_gradients=False,
    ),
}  # fmt: skip


def with_tf32x3(problem: Problem) -> pymeta.MAML:
    module = problem.module(F32, "auto")
    module.precision = "tf32x3"
    return module


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Numbers as one TF32 each."""
    bits = x.to(F32).contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(F32).to(x.dtype)


def check_near(problem: Problem, module: pymeta.MAML, results: Callable[..., dict]) -> None:
    """Within the bound of float32, grown; far from what one rounding to TF32 costs.

    `results` makes the calls of a module (`Problem.results`). The problem is used up.
    """
    nearest, steepest = walk(problem)
    assert not is_kinked(problem.case) or nearest > 64 * GROWTH * EPS[F32]
    wanted = Wanted(problem, steepest)

    def errors(got: dict) -> dict[str, float]:
        return {n: largest(flat(got[n]) - flat(wanted.reference[n])) for n in wanted.magnitudes}

    found = errors(results(module))
    for group, error in found.items():
        assert error <= GROWTH * wanted.bound(group, F32), group
    # TF32 alone rounds all factors by 2^-12; here only those that a call is given are.
    for side in (problem.support, problem.query):
        side.x = rounded(side.x)
    for p in problem.net.parameters():
        p.data = rounded(p.data)
    of_one = errors(problem.results(problem.module(torch.float64, "torch")))
    for group in ("predictions", "gradients"):
        assert 100 * found[group] < of_one[group], group
