"""What pymeta computes, in plain torch.func: the fallback for any module, and the oracle.

For each task t, starting at the shared parameters theta (or at ones of its own), the inner loop is

    theta_0   = theta
    g_k       = grad L(theta_k; batch k of support_t)              k = 0 .. steps-1
    theta_k+1 = theta_k - lr_k * direction(g_0 .. g_k)

with the batches of `spec/schedule.py` (all rows, where there are none) and the direction of SGD,
Adam or RMSprop (`rules.py`). Where there is a pull towards the start, g_k has
anchor * (theta_k - theta_0) in it as well. Three algorithms use it:

    MAML       loss = mean over t of L(theta_steps; query_t)       Finn et al. 2017, 1703.03400
    Reptile    gradient = theta - mean over t of theta_steps       Nichol et al. 2018, 1803.02999
    FineTune   validation after every epoch

MAML's gradient by theta, lr and the inputs is what autograd makes of exactly these lines: inner
gradients are differentiated through (second order), or grad L is taken as constant where
`first_order` is set. Only the adapted parameters change in the inner loop.

Tasks of equal sizes run under `torch.func.vmap`; ragged ones, and modules that vmap cannot
express, run one by one, as do tasks that are validated or have shuffles of their own. Any
`nn.Module`, device and dtype will do.

Three rules make every task a function of its own data. Batch normalisation uses the set's own
statistics and leaves running ones alone. A set without rows has loss 0 and gradient 0, so a task
without support rows is not adapted. And a row of weight 0, or with the ignored label, is left out
of its set, whatever it holds (`that_count`); tasks that have such rows run one by one. A query
row that is left out still has a prediction, normalised by the statistics of those that count.
Where weights require grad, no result changes: a row of weight 0 stands beside the others
(`sifted`), so that its own loss, normalised by the rows that count, is the gradient by its weight.
"""

from pymeta.reference.batch import (
    Own,
    adapt,
    clipped,
    evaluate,
    mean_loss,
    not_finite,
    reptile,
)
from pymeta.reference.modules import output_shape
from pymeta.reference.predict import input_gradients, predict, set_statistics
from pymeta.spec.inner import Adaptation, InnerLoop

__all__ = [
    "Adaptation",
    "InnerLoop",
    "Own",
    "adapt",
    "clipped",
    "evaluate",
    "input_gradients",
    "mean_loss",
    "not_finite",
    "output_shape",
    "predict",
    "reptile",
    "set_statistics",
]
