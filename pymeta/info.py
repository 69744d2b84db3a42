"""`pymeta info`, or `python -m pymeta.info`: what runs here and why, and a self-test.

The first line of a bug report.

Exits with 0 when the native core is there and agrees with the torch reference, on the CPU and on
every CUDA device that it can use (and on the emulated one, where the build has it), else with 1.
Where torch is not installed, an adapter is compared with its closed form in numpy.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

_VARIABLES = (
    "PYMETA_BACKEND",
    "PYMETA_ISA",
    "PYMETA_EXECUTOR",
    "PYMETA_NUM_THREADS",
    "PYMETA_KEPT_BYTES",
    "PYMETA_BLOCK_THREADS",
    "PYMETA_CHECK_VALUES",
)


def _has_torch() -> bool:
    try:
        return find_spec("torch") is not None
    except ValueError:  # sys.modules says that there is none
        return False


def facts() -> dict[str, Any]:
    """The facts as plain data, fit for JSON; what is not there is None or left out."""
    import pymeta
    from pymeta import native

    found: dict[str, Any] = {
        "pymeta": pymeta.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": None,
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "native": None,
    }
    if _has_torch():
        import torch

        found |= {"torch": torch.__version__, "dtype": str(torch.get_default_dtype())}
    if native.missing() is not None:
        return {**found, "missing": native.missing()}
    return {
        **found,
        "native": native.extension().__version__,
        "isa": native.isa(),
        "isas": native.isas(),
        "executor": native.executor(),
        "threads": native.num_threads(),
        "cores": native.extension().available_cores(),
        "cores_of_machine": os.cpu_count(),
        "cuda": native.devices(),
        "cuda_reason": native.cuda_reason(),
        "torch_has_cuda": _has_torch() and _torch_has_cuda(),
        "emulates": native.emulates(),
    }


def report(found: dict[str, Any] | None = None) -> list[str]:
    """The facts, a line each."""
    from pymeta.spec.show import counted

    f = facts() if found is None else found
    torch = "not installed: adapters run, all else needs it"
    if f["torch"] is not None:
        torch = f"{f['torch']}, default dtype {f['dtype']}"
    lines = [
        f"pymeta      {f['pymeta']}",
        f"python      {f['python']} on {f['system']}",
        f"torch       {torch}",
    ]
    if f["native"] is None:
        lines.append(f"native      missing: {f['missing']}")
    else:
        lines += [
            f"native      {f['native']}",
            f"isa         {f['isa']} (of {', '.join(f['isas'])})",
            f"executor    {f['executor']}",
            f"threads     {f['threads']} of {counted(f['cores'], 'core')} that this process may "
            f"use, of {f['cores_of_machine']}",
            *_cuda_lines(f),
        ]
    return lines + [f"{name}={value}" for name, value in f["environment"].items()]


def _cuda_lines(f: dict[str, Any]) -> list[str]:
    """What there is of CUDA, for the native core and for torch."""
    lines = [
        f"cuda        {d['ordinal']}: {d['name']}, compute capability {d['capability']}, "
        f"{d['multiprocessors']} multiprocessors"
        for d in f["cuda"]
    ]
    if f["cuda_reason"] is not None:
        lines.append(f"cuda        none: {f['cuda_reason']}")
    elif f["torch"] is not None and not f["torch_has_cuda"]:
        lines.append("cuda        torch has none: torch.cuda.is_available() is False")
    if f["emulates"]:
        lines.append("emulated    yes: a build for development")
    return lines


def _torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def places() -> list[str]:
    """Where the self-test runs: the CPU, CUDA devices, the emulated one; numpy without torch."""
    from pymeta import native

    if not _has_torch():
        return ["numpy"]
    found = ["cpu"]
    if native.missing() is None:
        if _torch_has_cuda():
            found += [f"cuda:{d['ordinal']}" for d in native.devices()]
        found += ["emulated"] * native.emulates()
    return found


def self_test(place: str = "cpu") -> tuple[str, float]:
    """Meta-train one step natively and in torch; (explain(), largest relative difference).

    Args:
        place: a torch device, "emulated", or "numpy" for an adapter without torch.

    Returns:
        What ran, and the largest difference of the loss and the meta-gradients (float64) over
        the largest entry.

    Raises:
        ValueError: the native core is not there.
        RuntimeError: it is not there, or the device does not work.
    """
    from pymeta import native

    if place == "numpy":
        return _adapter_test()
    if place != "emulated":
        return _compare(place)
    before = native.executor()
    native.set_executor("emulated")
    try:
        return _compare("cpu")
    finally:
        native.set_executor(before)


def _compare(device: str) -> tuple[str, float]:
    import torch

    from pymeta import MAML

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    net = net.to(device, torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(normal(*parameter.shape) / 2)
    xs, ys, xq, yq = normal(6, 5, 3), normal(6, 5, 2), normal(6, 4, 3), normal(6, 4, 2)
    results, said = [], ""
    for backend in ("torch", "native"):
        maml = MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)
        loss = maml(xs, ys, xq, yq).loss
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        results.append(torch.cat([loss.detach().view(1), *(g.flatten() for g in gradients)]))
        said = maml.explain()
    wanted, got = results
    return said, float((wanted - got).abs().max() / wanted.abs().max())


def _adapter_test() -> tuple[str, float]:
    """Two steps of a linear model by an adapter, against the same in numpy."""
    import numpy as np

    from pymeta import SGD, Adapter, Schedule, native
    from pymeta.spec.architecture import Architecture
    from pymeta.spec.losses import Loss

    random, names = np.random.default_rng(0), ("0.weight", "0.bias")
    w, b = random.normal(size=(2, 3)), random.normal(size=2)
    xs, ys, xq = (random.normal(size=shape) for shape in ((5, 3), (5, 2), (4, 3)))
    adapter = Adapter(
        Architecture((("linear", 3, 2, True),), names, names, False),
        {"0.weight": w, "0.bias": b},
        adapted=names,
        loss=Loss("mse"),
        optimizer=SGD(0.1),
        schedule=Schedule(steps=2),
    )
    got = adapter.adapt_predict(xs, ys, xq)
    for _ in range(2):
        delta = 2 * (xs @ w.T + b - ys) / ys.size
        w, b = w - 0.1 * delta.T @ xs, b - 0.1 * delta.sum(0)
    wanted = xq @ w.T + b
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    return f"native-cpu {native.isa()}: an adapter, in numpy", error


def self_tests() -> list[dict[str, Any]]:
    """The self-test in all places: {"place", "passed", "runs", "error"}, or "refused": why."""
    found: list[dict[str, Any]] = []
    for place in places():
        try:
            said, error = self_test(place)
        except (ValueError, RuntimeError) as refusal:
            found.append({"place": place, "passed": False, "refused": str(refusal)})
            continue
        passed = error < 1e-12
        found.append({"place": place, "passed": passed, "runs": said, "error": error})
    return found


def _lines_of(test: dict[str, Any]) -> list[str]:
    if "refused" in test:
        return [f"self-test   failed: {test['refused']}"]
    word = "passed" if test["passed"] else "FAILED"
    return [
        f"runs        {test['runs']}",
        f"self-test   {word}: relative difference {test['error']:.1e}",
    ]


def main(as_json: bool = False) -> int:
    """Print everything; the exit code."""
    found = facts()
    if not as_json:
        print("\n".join(report(found)), flush=True)
    tests = self_tests()
    if as_json:
        print(json.dumps({**found, "self_tests": tests}, indent=1))
    else:
        print("\n".join(line for test in tests for line in _lines_of(test)))
    return 0 if all(test["passed"] for test in tests) else 1


def command(words: Sequence[str]) -> int:
    """`pymeta info [--json]`."""
    parser = ArgumentParser(prog="pymeta info", description=(__doc__ or "").split("\n\n")[2])
    parser.add_argument("--json", action="store_true", help="as JSON, for a program")
    return main(parser.parse_args(list(words)).json)


if __name__ == "__main__":
    from pymeta.cli import main as cli

    sys.exit(cli(["info", *sys.argv[1:]]))
