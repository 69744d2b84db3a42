"""Branches of one value that are joined: gates, inception modules, attention over channels."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

Joining: TypeAlias = Literal["add", "multiply", "concatenate"]
_JOINS = get_args(Joining)


class Branches(nn.Module):
    """Several modules applied to the same value, and what they give joined.

    add          b1(x) + b2(x) + ...: parallel paths, skip connections
    multiply     b1(x) * b2(x) * ...: a gate is one of them that ends with a sigmoid (WaveNet, van
                 den Oord et al. 2016); one that gives a single position for all of another's weighs
                 its channels (squeeze and excitation, Hu et al. 2018)
    concatenate  the channels of all side by side, torch.cat(..., 1): inception modules, dense
                 connections, a wide part beside a deep one

    torch.nn.Identity() is x itself. Any module whose forward torch.fx shows to consist of such
    calls is native too; this one needs no forward of your own. The branches may be whatever else
    is native, such modules among them.
    """

    def __init__(self, branches: Iterable[nn.Module], join: Joining = "add") -> None:
        """Make the block.

        Args:
            branches: at least one.
            join: "add", "multiply" or "concatenate".

        Raises:
            TypeError: one of the branches is no module.
            ValueError: there are none, or `join` is another word.
        """
        super().__init__()
        given = list(branches)
        for i, branch in enumerate(given):
            if not isinstance(branch, nn.Module):
                raise TypeError(
                    f"branches: expected torch.nn.Modules, got {type(branch).__name__} at {i}"
                )
        if not given:
            raise ValueError("branches: expected at least one")
        if join not in _JOINS:
            raise ValueError(f"join: expected one of {', '.join(_JOINS)}, got {join!r}")
        self.branches = nn.ModuleList(given)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        """What the branches give, joined: rows [n, channels] or [n, channels, ...]."""
        values = [branch(x) for branch in self.branches]
        if self.join == "concatenate":
            return torch.cat(values, 1)
        joined: Tensor = reduce(torch.add if self.join == "add" else torch.mul, values)
        return joined

    def extra_repr(self) -> str:
        """How they are joined."""
        return f"join={self.join!r}"
