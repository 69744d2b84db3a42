"""Learners that fit a closed form to each task, on features by a network that all tasks share.

They are called as MAML is: `out = learner(xs, ys, xq, yq)`, `learner.adapt(xs, ys)(xq)`.
"""

from pymeta.learners.base import AdaptedTasks, EncodedLearner, Outcome
from pymeta.learners.bayesian import BayesianHead
from pymeta.learners.ridge import RidgeHead

__all__ = ["AdaptedTasks", "BayesianHead", "EncodedLearner", "Outcome", "RidgeHead"]
