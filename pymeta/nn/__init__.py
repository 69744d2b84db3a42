"""Modules that torch lacks: plain torch by themselves, and native in pymeta's learners.

Branches            several modules of one value, added up, multiplied or side by side
PerStepBatchNorm    batch normalisation with statistics, scale and shift of each inner step
Residual            x + f(x), with a projection of x where the shapes differ
TabularInput        embeddings of columns of categories beside columns of numbers
at_step             a block in which a model is at one inner step, for loops of your own
"""

import pymeta.nn.needed  # noqa: F401, before all that imports torch
from pymeta.nn.branches import Branches
from pymeta.nn.norm import PerStepBatchNorm, at_step
from pymeta.nn.residual import Residual
from pymeta.nn.tabular import TabularInput

__all__ = ["Branches", "PerStepBatchNorm", "Residual", "TabularInput", "at_step"]
