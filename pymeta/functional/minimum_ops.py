"""Implicit gradients as custom operators of torch.library, for torch.compile.

    pymeta::minimum        the adapted parameters, as a function of all that their minimum is of
    pymeta::minimum_vjp    from what flows into them to the flat gradient

They are to a call with an `Implicit` what `pymeta::adapt` is to one without. Query sets are then
evaluated by `pymeta::evaluate` with no steps, as in eager mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pymeta.backend.gradients import Extras
from pymeta.functional import implicit_calls
from pymeta.functional.handles import owner_of
from pymeta.functional.implicit import Solve
from pymeta.functional.implicit_calls import ImplicitCall, minimum_of
from pymeta.functional.ops import (
    INPUTS,
    Inputs,
    checked,
    inner_of,
    maker,
    operands_of,
    parts_of,
    refuse,
    save,
    saved,
    shared_of,
    wanted_total,
)


@torch.enable_grad()  # rows whose weights' gradients are wanted count
def _call(i: Inputs) -> ImplicitCall:
    found = checked(i)
    implicit_calls.check(found.plan, found.own)
    first = next(iter(i.parameters), i.xs)
    model = found.owner._module_for(first.dtype, first.device, i.xs)
    how = shared_of(found), inner_of(i, found), found.support, found.own
    return ImplicitCall(model, found.plan, *how, found.owner.implicit, in_torch=False)


@torch.library.custom_op("pymeta::minimum", mutates_args=(), schema=f"({INPUTS}) -> Tensor[]")
def minimum(*arguments: Any) -> list[Tensor]:
    """The adapted parameters [T, ...], those of the owner that are adapted in their order."""
    return list(minimum_of(_call(Inputs(*arguments))).adapted.values())


@minimum.register_fake
def _(*arguments: Any) -> list[Tensor]:
    i = Inputs(*arguments)
    make = maker(i)
    return [make(i.tasks, *shape) for shape in owner_of(i.handle)._adapted_shapes().values()]


@torch.library.custom_op(
    "pymeta::minimum_vjp",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor[] phi, Tensor[] flows) -> Tensor",
)
def minimum_vjp(*arguments: Any) -> Tensor:
    """The flat gradient of what flows into the adapted parameters `phi`."""
    *inputs, phi, flows = arguments
    i = Inputs(*inputs)
    call = _call(i)
    learned = [n for n in call.plan.names if n not in call.plan.constants]
    every = zip((*learned, *(f".{n}" for n in Extras._fields)), operands_of(i),
                i.wanted, strict=True)  # fmt: skip
    names = [name for name, tensor, wanted in every if wanted and tensor is not None]
    solve = Solve(minimum_of(call, phi), call.implicit, names)
    found = dict(zip(solve.names, solve.backward(flows) or (), strict=True))
    parts = [found[name].reshape(-1) for name in names]
    return torch.cat(parts) if parts else i.xs.new_empty(0)


@minimum_vjp.register_fake
def _(*arguments: Any) -> Tensor:
    i = Inputs(*arguments[:-2])
    made: Tensor = maker(i)(wanted_total(i))
    return made


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    save(ctx, Inputs(*inputs), *output)


def _back(ctx: Any, flows: list[Tensor]) -> tuple[Any, ...]:
    i, phi = saved(ctx)
    return parts_of(i, torch.ops.pymeta.minimum_vjp(*i, phi, flows))


minimum_vjp.register_autograd(refuse)
minimum.register_autograd(_back, setup_context=_setup)
