"""`python -m pymeta.info`: what runs here and why, and a self-test. First line of a bug report.

Exits with 0 when the native core is there and agrees with the torch reference, else with 1.
"""

from __future__ import annotations

import os
import platform
import sys

_VARIABLES = ("PYMETA_BACKEND", "PYMETA_ISA", "PYMETA_EXECUTOR", "PYMETA_NUM_THREADS")


def report() -> list[str]:
    """The facts, a line each."""
    import torch

    import pymeta
    from pymeta import native

    lines = [
        f"pymeta      {pymeta.__version__}",
        f"python      {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch       {torch.__version__}, default dtype {torch.get_default_dtype()}",
    ]
    if native.missing() is None:
        lines += [
            f"native      {native.extension().__version__}",
            f"isa         {native.isa()} (of {', '.join(native.isas())})",
            f"executor    {native.executor()}",
            f"threads     {native.num_threads()} of {os.cpu_count()} cores",
        ]
    else:
        lines.append(f"native      missing: {native.missing()}")
    lines += [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return lines


def self_test() -> tuple[str, float]:
    """Meta-train one step natively and in torch; (explain(), largest relative difference).

    Returns:
        What ran, and the largest difference of the loss and the meta-gradients (float64) over
        the largest entry.

    Raises:
        ValueError: the native core is not there.
    """
    import torch

    from pymeta import MAML

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    net = net.double()
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


def main() -> int:
    """Print everything; the exit code."""
    print("\n".join(report()))
    try:
        said, error = self_test()
    except ValueError as refusal:
        print(f"self-test   failed: {refusal}")
        return 1
    print(f"runs        {said}")
    passed = error < 1e-12
    print(f"self-test   {'passed' if passed else 'FAILED'}: relative difference {error:.1e}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
