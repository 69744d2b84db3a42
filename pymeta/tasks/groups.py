"""Groups: the labels of rows, checked and collected."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pymeta.spec.show import counted

Array: TypeAlias = NDArray[Any]


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except TypeError:  # pandas' NA is neither equal to itself nor not
        return True


def _as_array(groups: Any, name: str) -> Array:
    """`groups` as an array, of objects where numpy would make strings of what is none."""
    if isinstance(groups, np.ma.MaskedArray) and np.any(groups.mask):
        raise ValueError(
            f"{name}: {counted(np.sum(groups.mask), 'row has', 'rows have')} no group (masked)"
        )
    if hasattr(groups, "__array__"):
        return np.asarray(groups)
    unordered = isinstance(groups, (set, frozenset, dict))
    if isinstance(groups, (str, bytes)) or unordered or not hasattr(groups, "__len__"):
        raise ValueError(
            f"{name}: expected a label for each row of X, got the {type(groups).__name__} "
            f"{str(groups)[:60]!r}"
        )
    labels = list(groups)
    if any(np.ndim(label) for label in labels):  # a table, for its shape to be looked at
        return np.asarray(labels, dtype=object)
    objects = np.empty(len(labels), dtype=object)
    objects[:] = labels
    return objects


def _only_strings(labels: Array) -> bool:
    return set(map(type, labels.tolist())) == {str}


def _of_one_kind(labels: Array, name: str) -> Array:
    """Labels that are objects as numbers or strings, if all of them are."""
    kinds = {"str" if isinstance(g, str) else type(g).__name__ for g in labels}
    if "str" in kinds and len(kinds) > 1:
        raise TypeError(f"{name}: expected labels of one kind, got {' and '.join(sorted(kinds))}")
    return np.asarray(labels.tolist()) if kinds else labels


def _refuse_tables(labels: Array, name: str) -> None:
    """ValueError where rows have several labels: columns, tuples, lists."""
    cure = (
        "to group by several columns, join them into one label, as in "
        '[f"{a}|{b}" for a, b in groups]'
    )
    if labels.ndim > 1:
        raise ValueError(
            f"{name}: expected one label for each row of X, got shape {list(labels.shape)}; {cure}"
        )
    # of a structured array, of pandas' MultiIndex
    may = labels.ndim and labels.dtype.kind in "OV"
    several = next((g for g in labels.tolist() if np.ndim(g)), None) if may else None
    if several is not None:
        raise ValueError(
            f"{name}: expected one label for each row of X, got the {type(several).__name__} "
            f"{str(several)[:60]}; {cure}"
        )


def labels_of(groups: Any, X: Any, name: str = "groups") -> Array:
    """`groups` as an array [rows] of comparable labels; missing ones are refused.

    `name` is what the caller calls them, for messages.
    """
    labels = _as_array(groups, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    strings = labels.dtype.kind == "O" and labels.ndim == 1 and _only_strings(labels)
    if not strings:  # which need no look at each
        _refuse_tables(labels, name)
    if labels.shape != (len(X),):
        raise ValueError(
            f"{name}: expected a label for each row of X, shape [{len(X)}], "
            f"got shape {list(labels.shape)}"
        )
    if strings:
        return np.asarray(labels.tolist())
    if labels.dtype.kind in "mM":
        missing = labels[np.isnat(labels)].tolist()
    else:
        missing = [g for g in labels.tolist() if labels.dtype.kind in "fcO" and _is_missing(g)]
    if missing:
        raise ValueError(
            f"{name}: {counted(len(missing), 'row has', 'rows have')} no group ({missing[0]!r})"
        )
    return _of_one_kind(labels, name) if labels.dtype.kind == "O" else labels


def members_of(labels: Array) -> tuple[Array, list[Array]]:
    """The distinct labels in order, and for each of them its rows in their order."""
    names, codes = np.unique(labels, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    return names, np.split(order, ends[:-1])
