"""Rows that do not fit a model, in torch neither: which layer refuses them, and the cure.

The native core does not run all that torch runs, such as a linear layer along the last axis of
images; there torch is the fallback. Rows that torch refuses, too, or would take for the channels of
a single row, fit no path, and the call is an error. `misfit` tells which of the two it is, by
letting torch run a few rows of zeros; `told` puts torch's own error into words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymeta.spec.chain import untouched
from pymeta.spec.graph import Step
from pymeta.spec.layers import (
    FLATTEN,
    SQUEEZE,
    UNSQUEEZE,
    VIEW,
    axes_of,
    is_known,
    known,
    label_of,
)
from pymeta.spec.order import PERMUTE, axes_of_permuted
from pymeta.spec.show import counted
from pymeta.spec.slices import PART
from pymeta.spec.transforms import in_transform

# what changes how many axes rows have, or which these are
_RESHAPES = (*FLATTEN, "unflatten", SQUEEZE, UNSQUEEZE, VIEW, PART, PERMUTE)


def is_refusal(error: BaseException) -> bool:
    """Whether an error of a forward may be torch's refusal of what it was given.

    What torch raises comes out of one of its files, or of a function that a mode of torch.overrides
    calls. A subclass of these types is about something else: memory, or a missing forward.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or type(error) not in (RuntimeError, ValueError, IndexError):
        return False
    frame = last.tb_frame
    in_torch = str(frame.f_globals.get("__name__")).startswith("torch.")
    return in_torch or frame.f_code.co_name == "__torch_function__"


# ---- what a layer takes -----------------------------------------------------------------------


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes


def _least(m: Any, axes: int) -> tuple[int, ...]:
    """The fewest positions along each axis on which a module's window fits."""
    padding = getattr(m, "padding", 0)
    if not hasattr(m, "kernel_size") or padding == "same":
        return (1,) * axes
    sides = (0,) * axes if padding == "valid" else _each(padding, axes)
    windows = zip(
        _each(m.kernel_size, axes), _each(getattr(m, "dilation", 1), axes), sides, strict=True
    )
    return tuple(max(1, d * (k - 1) + 1 - 2 * side) for k, d, side in windows)


def _channels(m: Any) -> int | None:
    """How many channels, or features, a module is made for; None: any number."""
    names = ("in_channels", "num_features", "num_channels")
    return next((int(getattr(m, name)) for name in names if hasattr(m, name)), None)


def _other_width(noun: str, takes: int, got: int, first: bool) -> str:
    """The cure for rows of another number of channels or features."""
    if first:
        return f"give rows of {counted(takes, noun)}, or a model that is made for {got}"
    return f"give rows of the shape that the model is made for, or make this layer for {got}"


def _at_positions(m: Any, axes: int, got: Sequence[int], first: bool) -> tuple[str, str] | None:
    """What a layer of so many axes of positions takes, and the cure for what it got."""
    channels, least = _channels(m), _least(m, axes)
    names = ("length",) if axes == 1 else ("height", "width")
    sizes = [n if k == 1 else f"{n} >= {k}" for n, k in zip(names, least, strict=True)]
    takes = f"rows of shape [{', '.join([str(channels or 'channels'), *sizes])}]"
    if len(got) != axes + 1:
        cure = f"each row has to have {counted(axes + 1, 'axis')}, its channels first"
        if len(got) == axes and channels in (1, None):
            cure = f"x.unsqueeze({-axes - 1}) puts in the axis of channels"
    elif channels not in (got[0], None):
        assert channels is not None
        cure = _other_width("channel", channels, got[0], first)
        if first and got[-1] == channels:
            cure = f"x.movedim(-1, {-axes - 1}) puts channels first"
    elif any(n < k for n, k in zip(got[1:], least, strict=True)):
        cure = "give larger rows, or a model of smaller windows or with padding"
    else:
        return None
    return takes, cure


def _along_the_last(takes: list[int], got: list[int], first: bool) -> tuple[str, str, str] | None:
    """As `_conflict`, of a layer that takes the last axes to be of these sizes."""
    if not got or got[-len(takes) :] == takes:
        return None
    if len(takes) > 1:
        return f"rows of shape {takes}", str(got), "give rows of that shape, or a model for these"
    cure = _other_width("feature", takes[0], got[-1], first)
    if len(got) == 1:
        return counted(takes[0], "feature"), str(got[0]), cure
    if math.prod(got) == takes[0]:
        cure = "put an nn.Flatten() before it"
    return f"{counted(takes[0], 'feature')} along the last axis", f"rows of shape {got}", cure


def _conflict(m: nn.Module, given: Any, first: bool) -> tuple[str, str, str] | None:
    """What a module takes, what it got, and the cure; None where these do not conflict.

    `first`: whether the module is the first that says what a row is like.
    """
    if not isinstance(given, Tensor) or given.ndim < 1:
        return None
    got = list(given.shape[1:])
    if isinstance(m, nn.Embedding):
        seen = given.numel() > 0 and not in_transform()  # under which there are no values
        found = (int(given.min()), int(given.max())) if seen else (0, 0)
        if 0 <= found[0] <= found[1] < m.num_embeddings:
            return None
        takes = f"indices from 0 to {m.num_embeddings - 1}"
        return takes, f"indices from {found[0]} to {found[1]}", "give it a table for all of them"
    if not is_known(m):  # a forward of its own may take anything
        return None
    if isinstance(m, nn.Linear):
        return _along_the_last([m.in_features], got, first)
    if isinstance(m, nn.LayerNorm):
        return _along_the_last(list(m.normalized_shape), got, first)
    axes = known(m).axes
    if not isinstance(axes, tuple) or not max(axes):
        return None
    if 0 in axes and len(got) == 1:
        channels = _channels(m)
        return None if channels is None else _along_the_last([channels], got, first)
    positions = len(got) - 1 if len(got) - 1 in axes else max(axes)
    told_of = _at_positions(m, positions, got, first)
    return None if told_of is None else (told_of[0], str(got), told_of[1])


# ---- which layer it is ------------------------------------------------------------------------


def _refusing(model: nn.Module, error: BaseException) -> tuple[str, nn.Module, Any] | None:
    """The innermost of a model's modules in whose forward an error arose, and its input."""
    names = {id(m): name for name, m in model.named_modules()}
    found: tuple[str, nn.Module, Any] | None = None
    at = error.__traceback__
    while at is not None:
        code, values = at.tb_frame.f_code, at.tb_frame.f_locals
        module: Any = values.get("self")
        if code.co_name == "forward" and id(module) in names:
            given = values.get(code.co_varnames[1]) if code.co_argcount > 1 else None
            found = names[id(module)], module, given
        at = at.tb_next
    return found


def told(model: nn.Module, error: BaseException, steps: Sequence[Step] = ()) -> str:
    """Which layer of a model an error of its forward came from, what that takes and what it got.

    `steps` are the model's layers in the order of their use, where that is known.
    """
    found = _refusing(model, error)
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if found is None:
        return said
    name, module, given = found
    label = label_of(name, module)
    before = list(itertools.takewhile(lambda step: step.module is not module, steps))
    is_step = len(before) < len(steps)
    givers = [
        s for s in before if s.module is not None and any(True for _ in s.module.parameters())
    ]
    conflict = _conflict(module, given, is_step and not givers)
    if conflict is None:
        return f"{label}: {said}"
    takes, got, cure = conflict
    giver = "it" if not is_step else "a row"
    if givers and givers[-1].module is not None:
        giver = label_of(givers[-1].name, givers[-1].module)
    verb = "gets" if giver == "it" else "gives"
    return f"{label} takes {takes}, but {giver} {verb} {got}; {cure}"


# ---- the rows of a call -----------------------------------------------------------------------


def _first_with_axes(steps: Sequence[Step]) -> tuple[Step, int] | None:
    """The first layer that says how many axes of positions its rows have at least, and these.

    Pooling and padding act on each row by itself, whichever axis torch takes for channels.
    """
    for step in steps:
        kind = step.layer[0]
        if kind in _RESHAPES:
            return None
        axes = axes_of(step.layer, step.module)
        if axes and min(axes) and "pool" not in kind and "pad" not in kind:
            return step, min(axes)
    return None


def asks_for_axes(steps: Sequence[Step]) -> bool:
    """Whether the beginning of a model says how many axes its rows have at least."""
    return _first_with_axes(steps) is not None


def _lacking_axes(steps: Sequence[Step], row_shape: Sequence[int]) -> str | None:
    """What there is to say of rows whose first axis torch would take for channels."""
    found = _first_with_axes(steps)
    if found is None or len(row_shape) > found[1]:
        return None
    step, axes = found
    row = torch.empty(1, *row_shape, device="meta")
    conflict = None if step.module is None else _conflict(step.module, row, True)
    if conflict is None:
        need = counted(axes + 1, "axis")
        return f"{step.label} takes rows of {need}, but a row gives {list(row_shape)}"
    return f"{step.label} takes {conflict[0]}, but a row gives {list(row_shape)}; {conflict[2]}"


def _refused_by_torch(
    model: nn.Module, steps: Sequence[Step], row_shape: Sequence[int]
) -> str | None:
    """What there is to say where torch refuses rows of this shape; None where it takes them.

    They are so many as nothing else in the model, so that torch cannot take rows for channels.
    """
    first = next(model.parameters(), torch.empty(0))
    others = {size for p in model.parameters() for size in p.shape}
    rows = next(n for n in itertools.count(2) if n not in others)
    with torch.no_grad(), untouched(model):
        x = torch.zeros(rows, *row_shape, dtype=first.dtype, device=first.device)
        if type(x) is not Tensor:  # there is nothing to run while torch.compile looks
            return None
        try:
            model(x)
        except Exception as error:  # a stranger's forward may raise anything
            refused = type(error) is RuntimeError or is_refusal(error)
            return told(model, error, steps) if refused else None
    return None


def _counts_rows(step: Step, row_shape: Sequence[int]) -> bool:
    """Whether what a layer does may depend on how many rows there are.

    A view may make other rows of more or fewer; a permutation may put the rows on another axis.
    """
    if step.layer[0] == PERMUTE:
        return len(row_shape) - 1 not in axes_of_permuted(step.layer)
    return bool(step.layer[0] == VIEW)


def misfit(
    model: nn.Module, steps: Sequence[Step], row_shape: tuple[int, ...], whole: bool
) -> str | None:
    """Why no path runs the model on rows of this shape; None where torch may.

    `steps` are its layers in the order of their use; `whole`: all of them, and not only those
    before the first that is unknown.
    """
    text = _lacking_axes(steps, row_shape)
    if text is None and whole and not any(_counts_rows(step, row_shape) for step in steps):
        text = _refused_by_torch(model, steps, row_shape)
    return text and f"the model does not take rows of shape {list(row_shape)}: {text}"
