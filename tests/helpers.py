"""Small models and tasks for the tests, and gradients laid side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LOSSES = ("mse", "huber", "cross_entropy", "bce_with_logits")
MORE_LOSSES = ("l1", "quantile", "poisson_nll", "qlike", "gaussian_nll", "student_t_nll")


def mlp(*widths: int, act: type[nn.Module] = nn.Tanh, dtype: torch.dtype = torch.float64):
    """A chain of Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def targets(loss: str, *lead: int, out: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random targets [*lead, out] that suit a loss: classes [*lead], 0/1 values, or numbers."""
    if loss == "cross_entropy":
        return torch.randint(0, out, lead)
    values = torch.randn(*lead, out, dtype=dtype)
    if loss == "bce_with_logits":
        return (values > 0).to(dtype)
    if loss == "poisson_nll":
        return values.abs().mul(2).floor()
    return values.square() if loss == "qlike" else values


def batch(
    loss: str = "mse",
    tasks: int = 3,
    support: int = 5,
    query: int = 4,
    inputs: int = 2,
    out: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(xs, ys, xq, yq) of tasks of equal sizes."""
    return (
        torch.randn(tasks, support, inputs, dtype=dtype),
        targets(loss, tasks, support, out=out, dtype=dtype),
        torch.randn(tasks, query, inputs, dtype=dtype),
        targets(loss, tasks, query, out=out, dtype=dtype),
    )


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Gradients of a loss, zeros where it does not depend on a tensor."""
    found = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def assert_close(got, wanted, terms: int = 1000) -> None:
    """Equal up to the rounding of sums of `terms` products, relative to the largest entry.

    A sum of n rounded terms has a relative error of at most n eps against the sum of the terms'
    magnitudes; the statistical growth is its square root, and a chain of a few such sums
    multiplies that by a small number, for which 32 stands.
    """
    got = [got] if isinstance(got, Tensor) else list(got)
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    assert len(got) == len(wanted) > 0
    got, wanted = [g.detach() for g in got], [w.detach() for w in wanted]
    scale = max((float(w.abs().max()) for w in wanted if w.numel()), default=0.0)
    for g, w in zip(got, wanted, strict=True):
        assert g.shape == w.shape
        eps = max(torch.finfo(g.dtype).eps, torch.finfo(w.dtype).eps)
        bound = 32 * math.sqrt(terms) * eps * scale
        assert torch.isfinite(g).all()
        error = float((g.double() - w.double()).abs().max()) if g.numel() else 0.0
        assert error <= bound, f"differs by {error:.2e}, bound {bound:.2e}"


def loop_meta_loss(net, loss_fn, lr, steps, xs, ys, xq, yq, first_order=False) -> Tensor:
    """MAML written once more, by plain torch.autograd over tasks; an oracle of the oracle."""
    total = []
    for x, y, qx, qy in zip(xs, ys, xq, yq, strict=True):
        fast = dict(net.named_parameters())
        for _ in range(steps):
            inner = loss_fn(torch.func.functional_call(net, fast, (x,)), y)
            found = torch.autograd.grad(
                inner, list(fast.values()), create_graph=True, materialize_grads=True
            )  # 0 for what the loss does not depend on
            if first_order:
                found = [g.detach() for g in found]
            fast = {n: p - lr * g for (n, p), g in zip(fast.items(), found, strict=True)}
        total.append(loss_fn(torch.func.functional_call(net, fast, (qx,)), qy))
    return torch.stack(total).mean()


def torch_loss(name: str):
    """The torch function that a loss name stands for."""
    f = nn.functional
    return {
        "mse": f.mse_loss,
        "huber": f.huber_loss,
        "l1": f.l1_loss,
        "poisson_nll": f.poisson_nll_loss,
        "cross_entropy": f.cross_entropy,
        "bce_with_logits": f.binary_cross_entropy_with_logits,
    }[name]


def assert_promised(got, wanted, backend: str, terms: int = 1000) -> None:
    """The same bits where they are our own, and as close as rounding where torch computed them.

    The native path promises bits; torch promises none, not even for the same call twice.
    """
    if backend != "native":
        assert_close(got, wanted, terms)
        return
    got, wanted = ([v] if isinstance(v, Tensor) else list(v) for v in (got, wanted))
    assert len(got) == len(wanted) > 0
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w), f"other bits: {g} is not {w}"


def skip_before_torch(major: int, minor: int, lacks: str) -> None:
    """Leave the test out where torch is older, and say what that lacks."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (major, minor):
        pytest.skip(f"{lacks} before torch {major}.{minor}")


def in_threads(work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
    """What ``work(*one)`` gives for each of the arguments, all at once, each in its own thread."""
    every = list(arguments)
    with ThreadPoolExecutor(len(every)) as pool:
        return list(pool.map(lambda one: work(*one), every))
