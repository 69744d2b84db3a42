"""Task-level differential privacy for meta-training: nobody can tell whether a task was there.

    private = PrivateTraining(maml, optimizer, tasks=len(xs), sampling_rate=0.1, clip=0.5,
                              noise_multiplier=1.0)
    for _ in range(500):
        some = private.sample()
        private.step(xs[some], ys[some], xq[some], yq[some])
    private.epsilon(delta=1e-5)

Needs torch, and for epsilon `dp-accounting` (extra `privacy`).
"""

from pymeta.spec.optional import need

need("torch", "pymeta.privacy", "torch")

from pymeta.privacy.accounting import epsilon, noise_multiplier_for
from pymeta.privacy.training import PrivateTraining

__all__ = ["PrivateTraining", "epsilon", "noise_multiplier_for"]
