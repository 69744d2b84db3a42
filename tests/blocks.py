"""Layers that have others in them, or more than one set of parameters, for `cases.Case`.

A layer is a tuple as in `kernels.py` and `images.py`; those of residual blocks and other branches
have the chains of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from hypothesis import strategies as st
from kernels import ACTIVATIONS, SOMETIMES, WIDTHS
from torch import nn

from pymeta.nn import Branches, PerStepBatchNorm, Residual, TabularInput

KINDS = (
    "residual",
    "branches",
    "glu",
    "tabular",
    "fixed_norm",
    "step_norm",
    "instance_norm",
    "dropout",
)
# What such names begin with takes statistics of a set's rows.
MEASURING = ("batch_norm", "step_norm")
STEPS = 2  # that have rows of their own in a PerStepBatchNorm
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d)


def every_layer(chain: tuple[tuple, ...]) -> Iterator[tuple]:
    """The layers of a chain, those of its branches among them."""
    for layer in chain:
        yield layer
        if layer[0] == "residual":
            yield from every_layer(layer[3])
            yield from every_layer(layer[4] or ())
        if layer[0] == "branches":
            for branch in layer[4]:
                yield from every_layer(branch)


def least_steps(chain: tuple[tuple, ...]) -> int:
    """How many inner steps there have to be."""
    return STEPS if any(layer[0] == "step_norm" for layer in every_layer(chain)) else 0


def residual(inputs, outputs, branch, shortcut=None):
    """x + branch(x), or shortcut(x) + branch(x); of channels where x is an image."""
    return ("residual", inputs, outputs, tuple(branch), shortcut and tuple(shortcut))


JOINS = ("add", "multiply", "concatenate")


def branches(inputs, outputs, join, chains):
    """Several chains of one value, and what they give joined; an empty one is the value itself."""
    return ("branches", inputs, outputs, join, tuple(map(tuple, chains)))


def make_block(layer: tuple, make: Callable[[tuple], nn.Module]) -> nn.Module:
    """The module of a layer whose kind is in KINDS; `make` makes those in it."""
    kind, *values = layer
    if kind == "residual":
        _, _, branch, shortcut = values
        parts = [None if c is None else nn.Sequential(*map(make, c)) for c in (branch, shortcut)]
        return Residual(*parts)
    if kind == "branches":
        _, _, join, chains = values
        return Branches([nn.Sequential(*map(make, chain)) for chain in chains], join)
    if kind == "glu":
        return nn.GLU(1)
    if kind == "tabular":
        _, _, numeric, cardinalities, dims = values
        return TabularInput(numeric=numeric, cardinalities=cardinalities, dims=dims)
    if kind == "dropout":
        return nn.Dropout(0.5).eval()
    width, _, affine, *axes = values
    if kind == "step_norm":
        return PerStepBatchNorm(width, STEPS, affine=affine)
    if kind == "instance_norm":
        return INSTANCE_NORMS[axes[0] - 1](width, affine=affine)
    norm = BATCH_NORMS[axes[0]](width, affine=affine).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def fill_categories(x: torch.Tensor, layer: tuple) -> None:
    """Put categories into the columns of x [..., features] that a "tabular" layer looks up."""
    _, _, _, numeric, cardinalities, _ = layer
    for i, categories in enumerate(cardinalities):
        x[..., numeric + i] = torch.randint(categories, x.shape[:-1]).to(x.dtype)


def normalisation(draw, kinds, channels: int, axes: int) -> tuple:
    """One of some kinds of normalisation, over so many axes of positions."""
    return (draw(st.sampled_from(kinds)), channels, channels, draw(st.booleans()), axes)


@st.composite
def table_chains(draw):
    """Tables and rows of numbers: embeddings, residual blocks, normalisations of every kind."""
    width, chain = draw(WIDTHS), []
    if draw(st.booleans()):
        columns = draw(st.integers(1, 3))
        numeric = draw(st.integers(0, 4))
        cardinalities, dims = (
            tuple(draw(st.integers(1, most)) for _ in range(columns)) for most in (5, 18)
        )
        width = numeric + sum(dims)
        chain.append(("tabular", numeric + columns, width, numeric, cardinalities, dims))

    def activation():
        return (draw(st.sampled_from(sorted(ACTIVATIONS))),)

    def normalise(into):
        if draw(SOMETIMES):
            into.append(normalisation(draw, ("fixed_norm", "step_norm"), width, 0))

    def branch(inputs, outputs):
        inner = draw(WIDTHS)
        layers = [("linear", inputs, inner, draw(st.booleans())), activation()]
        if draw(SOMETIMES):
            layers.append(residual(inner, inner, [("linear", inner, inner, True), activation()]))
        layers.append(("linear", inner, outputs, draw(st.booleans())))
        return layers

    def joined(inputs):
        """Branches, one of which may be the value itself or joined in its turn."""
        join, own = draw(st.sampled_from(JOINS)), draw(SOMETIMES)
        outputs, chains, wide = draw(WIDTHS), [], 0
        if own and join != "concatenate":
            outputs = inputs
        for i in range(draw(st.integers(1, 3))):
            each = draw(WIDTHS) if join == "concatenate" else outputs
            if i == 0 and own:
                each, found = inputs, []
            elif draw(SOMETIMES):
                pair = [[("linear", inputs, each, True), (name,)] for name in ("tanh", "sigmoid")]
                found = [branches(inputs, each, "multiply", pair)]
            else:
                found = [("linear", inputs, each, draw(st.booleans())), activation()]
            chains.append(found)
            wide += each
        return branches(inputs, wide if join == "concatenate" else outputs, join, chains)

    for _ in range(draw(st.integers(1, 3))):
        normalise(chain)
        out = width
        kind = draw(st.sampled_from(["linear", "residual", "branches"]))
        if kind == "branches":
            chain.append(joined(width))
            out = chain[-1][2]
            if out % 2 == 0 and draw(SOMETIMES):
                chain.append(("glu", out, out // 2))
                out //= 2
        elif kind == "residual":
            projects = draw(st.booleans())
            out = draw(WIDTHS) if projects else width
            layers, shortcut = branch(width, out), None
            if projects:
                shortcut = [("linear", width, out, draw(st.booleans()))]
            chain.append(residual(width, out, layers, shortcut))
        else:
            out = draw(WIDTHS)
            chain.append(("linear", width, out, True))
        width = out
        normalise(chain)
        if draw(st.booleans()):
            chain.append(activation())
        if draw(SOMETIMES):
            chain.append(("dropout",))
    chain.append(("linear", width, draw(st.sampled_from([1, 3, 5])), True))
    return tuple(chain)
