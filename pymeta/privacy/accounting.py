"""Epsilon of a number of noisy sums over Poisson samples, by Google's `dp-accounting`.

Two data sets are neighbours if one has a task more than the other. A step draws each task with the
same probability, bounds what each adds to a sum to norm C, and adds Gaussian noise of standard
deviation z C: the Gaussian mechanism on a Poisson sample (Abadi et al. 2016, arXiv:1607.00133;
Mironov, Talwar, Zhang 2019, arXiv:1908.10530), composed over the steps.
"""

from __future__ import annotations

import math
from importlib import import_module
from numbers import Integral, Real
from typing import Any

_ACCOUNTANTS = ("pld", "rdp")


def need_accounting(what: str) -> Any:
    """The package dp_accounting; ImportError that names the extra where it is missing."""
    try:
        return import_module("dp_accounting")
    except ModuleNotFoundError as error:
        if error.name != "dp_accounting":  # it is there, but broken
            raise
        raise ImportError(
            f"{what} needs dp-accounting, which is not installed: "
            f"pip install 'pymeta-kernels[privacy]'"
        ) from None


def check_number(name: str, value: Any, least: float, most: float, *, open_at: str = "") -> float:
    """A real number in a range.

    Args:
        name: of the argument.
        value: which should be one.
        least: the smallest.
        most: the largest.
        open_at: "least", "most" or both, where that itself is out of range.

    Raises:
        TypeError: it is no real number.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    found = float(value)
    within = (found > least if "least" in open_at else found >= least) and (
        found < most if "most" in open_at else found <= most
    )
    if not within or not math.isfinite(found):
        left, right = "(["["least" not in open_at], ")]"["most" not in open_at]
        top = "infinity" if math.isinf(most) else f"{most:g}"
        raise ValueError(f"{name}: expected a number in {left}{least:g}, {top}{right}, got {value}")
    return found


def check_integer(name: str, value: Any, least: int) -> int:
    """An integer; TypeError where it is none, ValueError where it is smaller than `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer >= {least}, got {type(value).__name__}")
    found = int(value)
    if found < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {found}")
    return found


def _event(accounting: Any, noise_multiplier: float, sampling_rate: float, steps: int) -> Any:
    gaussian = accounting.GaussianDpEvent(noise_multiplier)
    sampled = accounting.PoissonSampledDpEvent(sampling_rate, gaussian)
    return accounting.SelfComposedDpEvent(sampled if sampling_rate < 1 else gaussian, steps)


def _maker(accounting: Any, accountant: str) -> Any:
    if accountant not in _ACCOUNTANTS:
        raise ValueError(
            f"accountant: expected one of {', '.join(_ACCOUNTANTS)}, got {accountant!r}"
        )
    relation = accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if accountant == "pld":
        module = import_module("dp_accounting.pld")
        return lambda: module.PLDAccountant(relation)
    module = import_module("dp_accounting.rdp")
    return lambda: module.RdpAccountant(neighboring_relation=relation)


def epsilon(
    *,
    delta: float,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    accountant: str = "pld",
) -> float:
    """The epsilon of so many steps.

    Args:
        delta: the probability with which the bound may fail; well below 1 / tasks.
        noise_multiplier: the noise's standard deviation over the largest norm of a task's share.
        sampling_rate: the probability with which a step draws a task.
        steps: how many there are.
        accountant: "pld" (privacy loss distributions, tighter) or "rdp" (Renyi, quicker).

    Returns:
        Epsilon; infinity without noise.

    Raises:
        ImportError: dp-accounting is not installed.
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> from pymeta.privacy import epsilon
        >>> private = epsilon(delta=1e-5, noise_multiplier=1.1, sampling_rate=0.05, steps=500)
        >>> 3 < private < 6
        True
    """
    delta = check_number("delta", delta, 0, 1, open_at="least most")
    noise = check_number("noise_multiplier", noise_multiplier, 0, math.inf)
    rate = check_number("sampling_rate", sampling_rate, 0, 1, open_at="least")
    steps = check_integer("steps", steps, 0)
    accounting = need_accounting("epsilon")
    make = _maker(accounting, accountant)
    if steps == 0:
        return 0.0
    if noise == 0:
        return math.inf
    found = make().compose(_event(accounting, noise, rate, steps)).get_epsilon(delta)
    return float(found)


def noise_multiplier_for(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    accountant: str = "pld",
) -> float:
    """The smallest noise multiplier with which so many steps stay within an epsilon.

    Args:
        epsilon: the largest that is allowed.
        delta: as for `epsilon`.
        sampling_rate: likewise.
        steps: likewise, at least 1.
        accountant: likewise.

    Raises:
        ImportError: dp-accounting is not installed.
        TypeError, ValueError: an argument is not as described.
    """
    most = check_number("epsilon", epsilon, 0, math.inf, open_at="least")
    delta = check_number("delta", delta, 0, 1, open_at="least most")
    rate = check_number("sampling_rate", sampling_rate, 0, 1, open_at="least")
    steps = check_integer("steps", steps, 1)
    accounting = need_accounting("noise_multiplier_for")
    found = accounting.calibrate_dp_mechanism(
        _maker(accounting, accountant),
        lambda noise: _event(accounting, noise, rate, steps),
        most,
        delta,
        accounting.LowerEndpointAndGuess(0.0, 1.0),
        tol=1e-3,
    )
    return float(found)
