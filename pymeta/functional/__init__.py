"""The inner loop as a stateless operator: parameters go in as {name: array}.

    operator = functional.Operator(net, loss="mse", lr=0.1, steps=5)
    adapted = functional.adapt(operator, parameters, xs, ys)
    outputs = functional.predict(operator, {**parameters, **adapted}, xq)
    outputs = functional.adapt_predict(operator, parameters, xs, ys, xq)
    found = functional.meta_gradient(operator, parameters, xs, ys, xq, yq)
    found.gradients["0.weight"]

An `Operator` says once what a network, a loss, an inner rule and a number of steps are; it holds no
parameters. Those that go in are shared by all tasks, or each task's own: {name: [...]} or
{name: [T, ...]}, in any mixture. Tensors in, tensors out, with a graph where grad is enabled;
numpy arrays in, numpy arrays out, without torch where the native core runs the network.
"""

from pymeta.functional.calls import (
    Gradients,
    MetaGradient,
    adapt,
    adapt_predict,
    meta_gradient,
    predict,
    vjp,
)
from pymeta.functional.operator import Operator, chain

__all__ = [
    "Gradients",
    "MetaGradient",
    "Operator",
    "adapt",
    "adapt_predict",
    "chain",
    "meta_gradient",
    "predict",
    "vjp",
]
