"""How near the results of a case are to a kink, and how steep its normalisations: see `walk`."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from kernels import ACTIVATIONS
from torch import nn

from pymeta.nn import PerStepBatchNorm, at_step

if TYPE_CHECKING:
    from cases import Case, Problem

# Where a module's value, slope or curvature jumps.
KINKS = {
    nn.ReLU: lambda m: 0.0,
    nn.LeakyReLU: lambda m: 0.0,
    nn.ELU: lambda m: 0.0,
    nn.Softplus: lambda m: m.threshold / m.beta,
}


MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d)
OF_SETS = (nn.BatchNorm1d, nn.BatchNorm2d, PerStepBatchNorm)
NORMS = (*OF_SETS, nn.LayerNorm, nn.GroupNorm, *INSTANCE)


def is_kinked(case: Case) -> bool:
    names = {layer[0] for layer in case.layers}
    kinked = {n for n, make in ACTIVATIONS.items() if type(make()) in KINKS}
    kinked |= {"max_pool", "adaptive_max_pool"}
    return bool(names & kinked) or case.loss in ("huber", "l1", "quantile")


def as_normalised(norm: nn.Module, z: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What a normalisation takes the statistics of, and over which axes."""
    if isinstance(norm, nn.LayerNorm):
        return z.flatten(-len(norm.normalized_shape)), (-1,)
    if isinstance(norm, nn.GroupNorm):
        return z.reshape(len(z), norm.num_groups, z[0].numel() // norm.num_groups), (2,)
    if isinstance(norm, INSTANCE):
        return z.flatten(2), (2,)
    return z, (0, *range(2, z.ndim))


def gaps_in_windows(z: torch.Tensor, pool: nn.Module) -> list[float]:
    """How far the largest number of a window is above the next one, where they differ."""
    two = isinstance(pool, (nn.MaxPool2d, nn.AdaptiveMaxPool2d))
    z = z if two else z[:, :, None]
    if isinstance(pool, (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)):
        rows, columns = pool.output_size if two else (1, *pool.output_size)
        pool = nn.MaxPool2d((z.shape[2] // rows, z.shape[3] // columns))
        two = True
    k, s, p, d = (
        v if isinstance(v, tuple) else ((v, v) if two else (one, v))
        for v, one in (
            (pool.kernel_size, 1), (pool.stride, 1), (pool.padding, 0), (pool.dilation, 1)
        )
    )  # fmt: skip
    z = nn.functional.pad(z, (p[1], p[1], p[0], p[0]), value=-math.inf)
    columns = nn.functional.unfold(z.flatten(0, 1)[:, None].nan_to_num(), k, dilation=d, stride=s)
    if columns.shape[1] < 2:
        return []
    best = columns.topk(2, 1).values
    gaps = (best[:, 0] - best[:, 1]).flatten()
    return gaps[gaps > 0].tolist()


def by_counting(norm: nn.Module, state: dict[str, Any]) -> None:
    """Let a normalisation of sets go by the rows that count, which `state` has."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if bool(state["counts"].all()):
            return type(norm).forward(norm, x)
        var, mean = torch.var_mean(x[state["counts"]], (0, *range(2, x.ndim)), correction=0)
        scale = norm.weight, norm.bias
        if isinstance(norm, PerStepBatchNorm):
            row = norm.steps - 1 if norm.step is None else min(norm.step, norm.steps - 1)
            scale = tuple(None if v is None else v[row] for v in scale)
        return nn.functional.batch_norm(x, mean, var, *scale, False, 0.0, norm.eps)

    norm.forward = forward


def walk(problem: Problem) -> tuple[float, float]:
    """What the reference meets on its way: (how near a kink, how steep a normalisation).

    The first is the smallest |z - kink| / max |z|: on the two sides of a kink derivatives differ
    however exact the arithmetic. An exact hit, as the zeros behind a ReLU are for the next one, is
    the same for everybody and does not count. The second is the largest |mean| / std, at least 1.
    """
    case, found = problem.case, {"nearest": math.inf, "steepest": 1.0}
    state: dict[str, Any] = {}

    def look_for_kinks(z: torch.Tensor, kink: float) -> None:
        gaps = (z.detach().abs() if kink == 0 else (z.detach() - kink).abs()).flatten()
        gaps = gaps[gaps > 0]
        if gaps.numel():
            gap = float(gaps.min() / max(float(z.abs().max()), abs(kink)))
            found["nearest"] = min(found["nearest"], gap)

    def look_for_ties(z: torch.Tensor, pool: nn.Module) -> None:
        for gap in gaps_in_windows(z.detach(), pool):
            found["nearest"] = min(found["nearest"], gap / max(float(z.abs().max()), 1e-300))

    def look_at_means(norm: nn.Module, z: torch.Tensor) -> None:
        z = z[state["counts"]] if isinstance(norm, OF_SETS) else z
        z, axis = as_normalised(norm, z)
        std = (z.var(axis, unbiased=False) + norm.eps).sqrt()
        found["steepest"] = max(found["steepest"], float((z.mean(axis).abs() / std).max()))

    module = problem.module(torch.float64)
    net = copy.deepcopy(module.model)
    for layer in net.modules():
        if type(layer) in KINKS:
            kink = KINKS[type(layer)](layer)
            layer.register_forward_pre_hook(
                lambda m, args, kink=kink: look_for_kinks(args[0], kink)
            )
        elif isinstance(layer, MAX_POOLS):
            layer.register_forward_pre_hook(lambda m, args: look_for_ties(args[0], m))
        elif isinstance(layer, NORMS) and (layer.training or isinstance(layer, INSTANCE)):
            layer.register_forward_pre_hook(lambda m, args: look_at_means(m, args[0].detach()))
            if isinstance(layer, OF_SETS):
                by_counting(layer, state)
    support, query = problem.support.to(torch.float64), problem.query.to(torch.float64)
    arguments, options = problem.arguments(support, query)
    options = {k: v for k, v in options.items() if not k.startswith("query")}
    module.adapt(*arguments[:2], **options)  # from here on the shape of rows is known
    plan, _ = module._current()
    plan.least_steps = 0  # of the steps of a PerStepBatchNorm the first alone, too
    for step in range(case.steps + 1):
        models = module.adapt(*arguments[:2], steps=step, **options)
        for side in (support, query) if step == case.steps else (support,):
            judged = side is support or problem.judges
            for t, rows in enumerate(side.sizes):
                if rows == 0:
                    continue
                counts = side.counting(case, t)
                state["counts"] = counts if judged else torch.ones_like(counts)
                values = {n: v[t] for n, v in models.parameters.items()}
                with at_step(net, step):
                    y = torch.func.functional_call(net, values, (side.x[t, :rows],))
                if side.offset is not None:
                    y = y + side.offset[t, :rows]
                if case.loss == "huber":
                    delta = problem.loss.delta if case.loss_options else 1.0
                    look_for_kinks((y - side.y[t, :rows]).abs(), delta)
                if case.loss in ("l1", "quantile"):
                    each = y.shape[1] // side.y.shape[-1]
                    look_for_kinks(y - side.y[t, :rows].repeat(1, each), 0.0)
    return found["nearest"], found["steepest"]
