"""What `explain` says of a native call: which executor runs it, and how it is cut."""

from __future__ import annotations

from typing import NamedTuple

from pymeta import native
from pymeta.backend.gradients import NOTHING, Wanted
from pymeta.backend.plan import Plan
from pymeta.spec.network import Description
from pymeta.spec.schedule import Schedule
from pymeta.spec.settings import TF32X3
from pymeta.spec.show import counted


class NativeCall(NamedTuple):
    """What `explain` reports of a native call, from which the core derives its plan."""

    job: str  # "meta", "adapt" or "reptile"
    schedule: Schedule
    tasks: int
    support_rows: int
    query_rows: int = 0
    validation_rows: int = 0
    second_order: bool = False
    lr_rows: int = 1
    wanted: Wanted = (True, *NOTHING[1:])
    has_anchors: bool = False
    is_plain: bool = False


def _idle(blocks: int, multiprocessors: int) -> str:
    """Whether half of a device or more has nothing to do: more tasks would cost no more time."""
    idle = multiprocessors - blocks
    if idle < blocks:
        return ""
    return f" ({idle} of {counted(multiprocessors, 'multiprocessor')} idle: call with more tasks)"


def _planned(plan: Plan, call: NativeCall) -> tuple[str, str]:
    """The executor of a call, and how the call was cut, in words."""
    s = call.schedule
    turns = counted(s.steps, "step") if s.epochs is None else counted(s.epochs, "epoch")
    arguments = (plan.dtype_code, call.job, native.schedule(s), *call[2:])
    if plan.device is None:
        p = plan.problem.plan(*arguments)
        each, how = " each", counted(p["threads"], "thread")
    else:
        p = plan.problem.plan(*arguments, device=plan.device.ordinal)
        how = f"{counted(p['threads'], 'thread')} a task, {counted(p['blocks'], 'block')} at once"
        how += _idle(p["blocks"], p["multiprocessors"])
        each = ""
    how += f", {p['workspace_bytes']} bytes of workspace{each}"
    return p["executor"], f"{counted(call.tasks, 'task')}, {turns}, {how}"


def _products(plan: Plan, last: NativeCall | None) -> str:
    """What `precision="tf32x3"` comes to, in words."""
    if plan.device is None:
        return f'products in float32, because "{TF32X3}" is for CUDA'
    if last is None:
        return f'"{TF32X3}" where a call has it'
    at_least = "at least 16 inputs and outputs"
    if plan.problem.has_tf32x3:
        return f"products of linear layers with {at_least} in 3xTF32"
    return f'products in float32, because "{TF32X3}" is for plain calls and layers with {at_least}'


def explained(plan: Plan, last: NativeCall | None) -> str:
    """Where native calls of a plan run, on which chain, and how the last one was cut."""
    assert isinstance(plan.description, Description)
    chain = " ".join(str(layer[0]) for layer in plan.description.layers)
    if plan.device is None:
        on, executor = f"native-cpu {native.isa()}", native.executor()
    else:
        on, executor = f"native-cuda {plan.device.name}", "block"
    text = f"{on} {executor}: {chain}"
    if last is not None:
        executor, what = _planned(plan, last)
        text = f"{on} {executor}: {chain}; the last call had {what}"
    return text if plan.precision != TF32X3 else f"{text}; {_products(plan, last)}"
