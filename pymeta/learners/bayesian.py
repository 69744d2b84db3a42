"""`BayesianHead`: Bayesian linear regression on a network's features, for each task.

Harrison, Sharma, Pavone 2018, "Meta-learning priors for efficient online Bayesian regression"
(ALPaCA, arXiv:1807.08912). The last layer K of a task has the prior

    K_j ~ N(K0_j, s_j L0^-1),    y_j = K_j' f + N(0, s_j)        for each output j

and the posterior after rows F (weights w):

    L = L0 + F' diag(w) F,    K = L^-1 (L0 K0 + F' diag(w) Y)
    y_j at f ~ N(K_j' f, s_j (1 + f' L^-1 f))

Everything, K0, L0 = C C' (C lower triangular), s and the network, is learned by the negative log
likelihood of query rows: empirical Bayes, end to end. With an identity for an encoder it is
Vasicek's estimate of betas, with the right variances.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pymeta.learners.base import EncodedLearner, State
from pymeta.learners.ridge import _count, cholesky, with_bias
from pymeta.learners.rows import Flat, columns, grouped, times_own
from pymeta.spec.losses import Loss


class BayesianHead(EncodedLearner):
    """A network's features, and for each task the posterior of the last layer on top.

    `out.loss` is the mean negative log likelihood of the query rows, `out.predictions` the
    predictive means, `out.variances` the predictive variances, noise included.

    Args:
        encoder: maps rows [N, ...] to features [N, features].
        features: how many there are.
        outputs: how many numbers are predicted.
        precision: the prior's at the beginning, in units of the noise's.
        noise: the noise's variance at the beginning.
        bias: whether there is a feature that is always 1.

    Attributes:
        prior_mean: [features (+ 1), outputs], K0.
        prior_root: [features (+ 1), features (+ 1)], its lower triangle is C, the logarithm of
            whose diagonal stands there.
        log_noise: [outputs], log s.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch
        >>> from pymeta.learners import BayesianHead
        >>> head = BayesianHead(torch.nn.Identity(), features=1, outputs=1, bias=False)
        >>> x = torch.tensor([[[1.0], [2.0]]])
        >>> models = head.adapt(x, 3 * x)
        >>> models(x).flatten().tolist(), models.variances(x).round(decimals=2).flatten().tolist()
        ([2.5, 5.0], [1.1699999570846558, 1.6699999570846558])
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        features: int,
        outputs: int,
        precision: float = 1.0,
        noise: float = 1.0,
        bias: bool = True,
    ) -> None:
        """Check the arguments and make the prior."""
        super().__init__(encoder, Loss("mse"))
        for name, value in (("precision", precision), ("noise", noise)):
            if not value > 0 or not math.isfinite(value):
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        self.features, self.outputs = _count("features", features), _count("outputs", outputs)
        self.bias = bool(bias)
        rows = self.features + self.bias
        self.prior_mean = nn.Parameter(torch.zeros(rows, self.outputs))
        self.prior_root = nn.Parameter(torch.eye(rows) * (math.log(precision) / 2))
        self.log_noise = nn.Parameter(torch.full((self.outputs,), math.log(noise)))

    def _out_features(self) -> int:
        return self.outputs

    def prior_precision(self) -> Tensor:
        """L0 [features (+ 1), features (+ 1)]."""
        root = self.prior_root.tril(-1) + torch.diag(self.prior_root.diagonal().exp())
        return root @ root.T

    def _fit(self, features: Tensor, support: Flat) -> State:
        f = with_bias(self, features)
        assert support.y is not None
        root = support.row_weights(f).sqrt().unsqueeze(-1)
        g = support.padded(root * f)
        known = (
            f @ self.prior_mean if support.offset is None else f @ self.prior_mean + support.offset
        )
        residual = support.padded(root * (columns(support.y) - known))
        factor = cholesky(self.prior_precision() + g.mT @ g)
        return {
            "weights": self.prior_mean + torch.cholesky_solve(g.mT @ residual, factor),
            "factor": factor,
        }

    def _predict(
        self, state: State, features: Tensor, task: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        f = with_bias(self, features)
        means = times_own(f, state["weights"], task)
        # f' L^-1 f = |C^-1 f|^2, the rows of a task at once
        spread = _squares(f, state["factor"], task)
        return means, self.log_noise.exp() * (1 + spread).unsqueeze(-1)

    def _row_losses(self, outputs: Tensor, variances: Tensor | None, targets: Tensor) -> Tensor:
        assert variances is not None
        error = (outputs - targets.reshape(outputs.shape)).square()
        return ((error / variances + variances.log() + math.log(2 * math.pi)) / 2).mean(-1)


def _squares(f: Tensor, factor: Tensor, task: Tensor) -> Tensor:
    """|C_t^-1 f_n|^2 for the task t of each row: f [N, d], factor [T, d, d] -> [N]."""
    tasks = len(factor)
    if tasks == 0 or len(f) == 0:
        return f.new_zeros(len(f))
    rows = grouped(task, tasks)
    solved = torch.linalg.solve_triangular(factor, rows.padded(f).mT, upper=False)
    spread: Tensor = rows.own(solved.square().sum(1))
    return spread
