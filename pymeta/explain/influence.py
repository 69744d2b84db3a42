"""Which support rows moved a prediction: its gradient by their weights, through the adaptation.

With theta(w) the weights adapted to a support set whose rows weigh w, and f a prediction,

    influence of row s on f  =  d f(theta(w)) / d w_s  at the w of now,

exact through all inner steps. It tells to first order what the row's presence does: f with the row,
less f without it, is about w_s times it (Koh, Liang 2017, arXiv:1703.04730, ask the same of a
minimum; here the steps themselves are differentiated, so that nothing has to have converged).
Where a loss is a weighted mean, the influences times the weights add up to 0 for each prediction:
more of one row is less of the others. `anchor_rows` counts the rows that count at the w of now, as
in the adaptation that is explained.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pymeta import functional
from pymeta.explain.outputs import chosen_outputs
from pymeta.explain.rows import Packed, as_array
from pymeta.models.adapter import Adapter
from pymeta.spec.optimizers import LearnableLR
from pymeta.spec.schedule import Schedule


def influence(
    learner: Any,
    xs: Any,
    ys: Any,
    xq: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    output: Any = None,
) -> Any:
    """By how much each support row moved each prediction, for all tasks at once.

    One native call over all tasks for each query row of the longest task. What runs in torch is
    differentiated there.

    Args:
        learner: a `pymeta.Adapter`, or a MAML, FineTune or Reptile that takes all rows in each
            step; or a learner of `pymeta.learners`, which is differentiated by autograd.
        xs: support inputs [T, rows, ...], or a list of T arrays or tensors [rows_t, ...].
        ys: support targets, as the learner takes them.
        xq: the rows whose predictions are asked about, likewise.
        weights: [T, rows] (or a list) of the support rows; 1 where left out. A row of weight 0 has
            an influence too: what it would do if it counted.
        offset: [T, rows, out] (or a list), added to the outputs on the support rows.
        output: which output: an integer, or integers [T, rows] of xq; None for the one that
            `default_outputs` picks.

    Returns:
        [T, query rows, support rows]; a list of [query rows_t, support rows_t] where xs or xq is
        one.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape or value, or a learner that takes minibatches, or that runs in
            torch and is no MAML.
    """
    query = Packed.of("xq", xq)
    adapter = learner if isinstance(learner, Adapter) else _adapter_of(learner)
    if adapter is None:
        found = _in_torch(learner, xs, ys, xq, query, weights, offset, output)
    else:
        found = _natively(adapter, xs, ys, query, weights, offset, output)
    support = Packed.of("xs", xs)
    if support.is_list or query.is_list:
        return _by_task(found, support.sizes, query.sizes)
    by_row = found.reshape(len(found), len(support.sizes), support.rows)
    return np.ascontiguousarray(by_row.swapaxes(0, 1))


def _adapter_of(learner: Any) -> Adapter | None:
    """What deploys the learner; None where it has to run in torch."""
    if not hasattr(learner, "adapter"):
        if hasattr(learner, "adapt") and hasattr(learner, "parameters"):
            return None
        raise TypeError(
            f"learner: expected a pymeta.Adapter or a learner, got {type(learner).__name__}"
        )
    try:
        made: Adapter = learner.adapter()
    except ValueError as error:
        if not hasattr(learner, "accumulate_grad"):  # which a MAML has
            raise ValueError(f"learner: {error}") from None
        return None
    return made


def _natively(
    adapter: Adapter, xs: Any, ys: Any, query: Packed, weights: Any, offset: Any, output: Any
) -> np.ndarray:
    """[longest, sum of support rows]."""
    xs, ys, weights, offset = (
        None if v is None else _arrays(n, v)
        for n, v in (("xs", xs), ("ys", ys), ("weights", weights), ("offset", offset))
    )
    xq = query.shaped(query.values)
    operator = _operator_of(adapter)
    support = Packed.of("xs", xs)
    factors = adapter.class_factors(xs, ys, weights).reshape(-1)
    given = factors * _row_weights(weights, support)
    outputs = adapter.adapt(xs, ys, weights=weights, offset=offset)(xq)
    predicted = np.concatenate(outputs) if isinstance(outputs, list) else _rows(outputs)
    chosen = chosen_outputs(output, adapter.loss, predicted, query)
    found = []
    for flows in _flows(query.sizes, chosen, predicted):
        product = functional.vjp(
            operator, adapter.parameters, xs, ys, xq,
            predictions=query.shaped(flows),
            wrt=("support_weights",),
            support_weights=support.shaped(given),
            support_offset=offset,
            rates=adapter.lr if isinstance(adapter.optimizer.lr, LearnableLR) else None,
        )  # fmt: skip
        slopes = product.input_gradients["support_weights"]
        flat = np.concatenate(slopes) if isinstance(slopes, list) else slopes.reshape(-1)
        found.append(flat * factors)
    return np.stack(found) if found else np.zeros((0, len(given)), predicted.dtype)


def _operator_of(adapter: Adapter) -> functional.Operator:
    """The adapter's inner loop; ValueError where it takes minibatches."""
    return functional.Operator(
        adapter.architecture,
        loss=adapter.loss,
        optimizer=adapter.optimizer,
        steps=_steps(adapter.schedule),
        adapt=adapter.adapted,
        anchor=adapter.anchor,
        anchor_rows=adapter.anchor_rows,
    )


def _steps(schedule: Schedule) -> int:
    if schedule.batch_size is not None:
        raise ValueError(
            f"learner: expected one that takes all rows in each step, because the weight of a row "
            f"that is drawn in some steps means another thing in each; got "
            f"batch_size={schedule.batch_size}"
        )
    steps = schedule.steps if schedule.epochs is None else schedule.epochs
    assert steps is not None
    return steps


def _row_weights(weights: Any, support: Packed) -> np.ndarray:
    """[N] of the weights that were given, or 1."""
    if weights is None:
        return np.ones(len(support.values), support.values.dtype)
    each = weights if isinstance(weights, list) else [weights]
    found = [as_array("weights", w) for w in each]
    axes = 1 if isinstance(weights, list) else 2
    if any(w.ndim != axes for w in found):
        raise ValueError("weights: expected one for each row, not for each target")
    return np.concatenate([w.reshape(-1) for w in found])


def _flows(sizes: np.ndarray, chosen: np.ndarray, outputs: np.ndarray) -> Any:
    """For row number 0, 1, ... of all tasks at once: 1 at that row's output, 0 elsewhere."""
    numbers = np.arange(len(chosen)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    for number in range(int(sizes.max(initial=0))):
        flows = np.zeros_like(outputs)
        at = np.flatnonzero(numbers == number)
        flows[at, chosen[at]] = 1
        yield flows


def _in_torch(
    learner: Any, xs: Any, ys: Any, xq: Any, query: Packed, weights: Any, offset: Any, output: Any
) -> np.ndarray:
    """As `_natively`, by autograd."""
    import torch

    support = Packed.of("xs", xs)
    like = next(learner.parameters())
    given = np.ones(len(support.values))
    if weights is not None:
        given = np.concatenate([as_array("weights", w).reshape(-1) for w in weights])
    flat = torch.tensor(given, dtype=like.dtype, device=like.device, requires_grad=True)
    shape = support.sizes.tolist()
    by_task: Any = (
        list(flat.split_with_sizes(shape)) if support.is_list else flat.view(len(shape), -1)
    )
    with torch.enable_grad():
        out = learner(xs, ys, xq, support_weights=by_task, support_offset=offset)
        outputs = out.predictions
        packed = torch.cat(outputs) if isinstance(outputs, list) else outputs.flatten(0, 1)
        predicted = packed.detach().cpu().numpy()
        chosen = chosen_outputs(output, _loss_of(learner), predicted, query)
        found = []
        for flows in _flows(query.sizes, chosen, predicted):
            total = (packed * torch.from_numpy(flows).to(packed)).sum()
            (grad,) = torch.autograd.grad(total, flat, retain_graph=True)
            found.append(grad.cpu().numpy())
    return np.stack(found) if found else np.zeros((0, len(given)))


def _loss_of(learner: Any) -> Any:
    """The description of what its outputs are judged by; that of a MAML inside where it has one."""
    return learner.loss if hasattr(learner, "loss") else learner.maml.loss


def _arrays(name: str, value: Any) -> Any:
    """A list's or a call's tensors as arrays."""
    if isinstance(value, (list, tuple)):
        return [as_array(f"{name}[{t}]", v) for t, v in enumerate(value)]
    return as_array(name, value)


def _rows(outputs: np.ndarray) -> np.ndarray:
    return outputs.reshape(-1, outputs.shape[-1])


def _by_task(found: np.ndarray, support: np.ndarray, query: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(support)
    return [
        found[:rows, end - count : end]
        for rows, count, end in zip(query, support, ends, strict=True)
    ]
