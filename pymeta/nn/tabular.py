"""The first layer of networks on tables: numbers beside embedded categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a list of integers, got {type(values).__name__}")
    for value in values:
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected integers of at least 1, got {value!r}")
    return tuple(values)


class TabularInput(nn.Module):
    """[rows, numeric + columns] to [rows, numeric + sum(dims)]: categories become embeddings.

    A row has its `numeric` numbers first, then one category for each of `cardinalities`: an
    integer from 0 to cardinality - 1, held in the dtype of the numbers, which is exact up to 2^24
    in float32. The numbers are passed on as they are, each category becomes its row of a table
    that is learned. There is no gradient to the categories.

    Attributes:
        tables: one nn.Embedding-like parameter [cardinality, dim] for each column of categories.
        numeric: how many columns are numbers.
        cardinalities: of the columns of categories.
        dims: the widths of their embeddings.
        in_features: numeric + the number of categories.
        out_features: numeric + the sum of dims.
    """

    def __init__(self, *, numeric: int, cardinalities: Sequence[int], dims: Sequence[int]) -> None:
        """Make the tables, drawn from a normal distribution as nn.Embedding draws them.

        Raises:
            TypeError, ValueError: these are not integers, or not as many of the one as of the
                other.
        """
        super().__init__()
        if type(numeric) is not int or numeric < 0:
            raise ValueError(f"numeric: expected an integer of at least 0, got {numeric!r}")
        self.numeric = numeric
        self.cardinalities = _sizes("cardinalities", cardinalities)
        self.dims = _sizes("dims", dims)
        if len(self.dims) != len(self.cardinalities):
            raise ValueError(
                f"dims: expected {len(self.cardinalities)}, one for each of cardinalities, "
                f"got {len(self.dims)}"
            )
        if not self.dims:
            raise ValueError("cardinalities: expected at least one column of categories")
        self.tables = nn.ParameterList(
            torch.randn(n, width) for n, width in zip(self.cardinalities, self.dims, strict=True)
        )

    @property
    def in_features(self) -> int:
        """Columns of the input."""
        return self.numeric + len(self.dims)

    @property
    def out_features(self) -> int:
        """Columns of the output."""
        return self.numeric + sum(self.dims)

    def forward(self, x: Tensor) -> Tensor:
        """The numbers of x [rows, in_features], and the embeddings of its categories behind them.

        Raises:
            ValueError: x has another number of columns.
            IndexError: a category is out of range (torch's own message).
        """
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(
                f"input: expected [rows, {self.in_features}] ({self.numeric} numbers and "
                f"{len(self.dims)} categories), got {list(x.shape)}"
            )
        codes = x.detach()[:, self.numeric :].long()
        # F.embedding cannot be differentiated twice where there are no rows
        looked_up = [
            torch.index_select(table, 0, codes[:, i]) for i, table in enumerate(self.tables)
        ]
        return torch.cat([x[:, : self.numeric], *looked_up], 1)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"numeric={self.numeric}, cardinalities={list(self.cardinalities)}, "
            f"dims={list(self.dims)}"
        )
