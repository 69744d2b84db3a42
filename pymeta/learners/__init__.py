"""The field's other learners: closed-form heads, comparisons, and what is built on MAML's operator.

They are called as MAML is: `out = learner(xs, ys, xq, yq)`, `learner.adapt(xs, ys)(xq)`.
"""

from pymeta.spec.optional import need

need("torch", "pymeta.learners", "torch")

from pymeta.learners.base import AdaptedTasks, EncodedLearner, Outcome
from pymeta.learners.bayesian import BayesianHead
from pymeta.learners.encoded import EncodedMAML, EncodedTasks
from pymeta.learners.matching import MatchingNet
from pymeta.learners.meta_lstm import MetaLSTM
from pymeta.learners.protonet import ProtoNet
from pymeta.learners.relation import RelationNet
from pymeta.learners.relational import RelationalMAML, RelationalOutcome
from pymeta.learners.ridge import RidgeHead

__all__ = [
    "AdaptedTasks",
    "BayesianHead",
    "EncodedLearner",
    "EncodedMAML",
    "EncodedTasks",
    "MatchingNet",
    "MetaLSTM",
    "Outcome",
    "ProtoNet",
    "RelationNet",
    "RelationalMAML",
    "RelationalOutcome",
    "RidgeHead",
]
