"""`python -m pymeta.info`: what runs here and why, and a self-test. First line of a bug report.

Exits with 0 when the native core is there and agrees with the torch reference, on the CPU and on
every CUDA device that it can use (and on the emulated one, where the build has it), else with 1.
Where torch is not installed, an adapter is compared with its closed form in numpy.
"""

from __future__ import annotations

import os
import platform
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.util import find_spec

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


def _torch_line() -> str:
    if not _has_torch():
        return "torch       not installed: adapters run, all else needs it"
    import torch

    return f"torch       {torch.__version__}, default dtype {torch.get_default_dtype()}"


def report() -> list[str]:
    """The facts, a line each."""
    import pymeta
    from pymeta import native

    lines = [
        f"pymeta      {pymeta.__version__}",
        f"python      {platform.python_version()} on {platform.system()} {platform.machine()}",
        _torch_line(),
    ]
    if native.missing() is None:
        lines += [
            f"native      {native.extension().__version__}",
            f"isa         {native.isa()} (of {', '.join(native.isas())})",
            f"executor    {native.executor()}",
            f"threads     {native.num_threads()} of {native.extension().available_cores()} cores "
            f"that this process may use, of {os.cpu_count()}",
            *_cuda_lines(),
        ]
    else:
        lines.append(f"native      missing: {native.missing()}")
    lines += [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return lines


def _cuda_lines() -> list[str]:
    """What there is of CUDA, for the native core and for torch."""
    from pymeta import native

    reason = native.cuda_reason()
    lines = [
        f"cuda        {d['ordinal']}: {d['name']}, compute capability {d['capability']}, "
        f"{d['multiprocessors']} multiprocessors"
        for d in native.devices()
    ]
    if reason is not None:
        lines.append(f"cuda        none: {reason}")
    elif _has_torch() and not _torch_has_cuda():
        lines.append("cuda        torch has none: torch.cuda.is_available() is False")
    if native.emulates():
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


def main() -> int:
    """Print everything; the exit code."""
    print("\n".join(report()))
    all_passed = True
    for place in places():
        try:
            said, error = self_test(place)
        except (ValueError, RuntimeError) as refusal:
            print(f"self-test   failed: {refusal}")
            all_passed = False
            continue
        print(f"runs        {said}")
        passed = error < 1e-12
        all_passed = all_passed and passed
        print(f"self-test   {'passed' if passed else 'FAILED'}: relative difference {error:.1e}")
    return 0 if all_passed else 1


def command(words: Sequence[str]) -> int:
    """`pymeta info`."""
    parser = ArgumentParser(prog="pymeta info", description=(__doc__ or "").split("\n\n")[1])
    parser.parse_args(list(words))
    return main()


if __name__ == "__main__":
    sys.exit(main())
