"""The native cell of a learned optimiser against `reference/cell.py`, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from kernels import same_bits, using

from pymeta import native
from pymeta.backend import cell as ours
from pymeta.reference import cell as reference

F32, F64 = torch.float32, torch.float64


class Trajectory:
    """Given gradients and losses of some steps, whatever the coordinates, and a cell."""

    def __init__(self, tasks, each, hidden=3, steps=3, dtype=F64, p=7.0, seed=0):
        random = torch.Generator().manual_seed(seed)

        def drawn(*shape, scale=1.0):
            values = torch.randn(*shape, generator=random, dtype=F64)
            return (scale * values).to(dtype)

        self.steps, self.p = steps, p
        self.gradients = drawn(steps, tasks, each)
        self.gradients[:, :, ::3] *= 1e-5  # below exp(-p)
        self.losses = drawn(steps, tasks).abs()
        self.weights = drawn(4 * hidden, 5 + hidden, scale=0.5).requires_grad_()
        self.gates = drawn(2, 4 + hidden, scale=0.5).requires_grad_()
        self.theta = drawn(tasks, each).requires_grad_()
        self.flows = drawn(tasks, each)

    def _at(self):
        left = iter(zip(self.gradients, self.losses, strict=True))
        return lambda theta: next(left)

    def results(self, take_native: bool):
        """The coordinates after the steps, and what flows to theta, weights and gates."""
        if take_native:
            after = ours.take_steps(
                self.weights, self.gates, self.p, self._at(), self.theta, self.steps
            )
        else:
            cell = reference.Cell(self.weights, self.gates, self.p)
            after = reference.take_steps(cell, self._at(), self.theta, self.steps)
        inputs = [self.theta, self.weights, self.gates]
        return [after.detach(), *torch.autograd.grad((after * self.flows).sum(), inputs)]

    def in_double(self):
        """The same numbers."""
        for name in ("gradients", "losses", "flows"):
            setattr(self, name, getattr(self, name).double())
        for name in ("weights", "gates", "theta"):
            setattr(self, name, getattr(self, name).detach().double().requires_grad_())
        return self


# one coordinate; a task's end within a vector; several chunks of panels, the last one short
SHAPES = [(1, 1, 1, 1), (3, 22, 3, 4), (5, 213, 20, 5), (2, 1100, 7, 2)]


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize(("tasks", "each", "hidden", "steps"), SHAPES)
def test_it_is_the_reference(isa, tasks, each, hidden, steps):
    given = Trajectory(tasks, each, hidden, steps)
    wanted = given.results(take_native=False)
    with using(isa=isa):
        got = given.results(take_native=True)
    for g, w in zip(got, wanted, strict=True):
        assert w.abs().max() > 0
        assert torch.allclose(g, w, rtol=1e-10, atol=1e-10 * float(w.abs().max()))


@pytest.mark.parametrize("isa", native.isas())
def test_float_is_near_double(isa):
    given = Trajectory(5, 213, 20, 5, dtype=F32)
    with using(isa=isa):
        got = given.results(take_native=True)
    # a number goes through 5 steps of products of 25 and functions of a few ulp each; a weight's
    # gradient adds up 1,065 coordinates of five steps
    for g, w in zip(got, given.in_double().results(take_native=False), strict=True):
        assert g.dtype == F32
        assert (g.double() - w).abs().max() <= 500 * torch.finfo(F32).eps * w.abs().max()


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", [F32, F64])
def test_bits_depend_neither_on_threads_nor_on_neighbours(isa, dtype):
    given = Trajectory(7, 300, dtype=dtype)
    with using(isa=isa, threads=1):
        wanted = given.results(take_native=True)
    for threads in (2, 5):
        with using(isa=isa, threads=threads):
            assert same_bits(given.results(take_native=True), wanted), threads
    last = Trajectory(7, 300, dtype=dtype)
    for name in ("gradients", "losses"):
        setattr(last, name, getattr(last, name)[:, -1:])
    last.theta, last.flows = given.theta.detach()[-1:].requires_grad_(), given.flows[-1:]
    with using(isa=isa):
        alone = last.results(take_native=True)
    assert same_bits(alone[:2], [v[-1:] for v in wanted[:2]])


def test_slopes_by_finite_differences():
    given = Trajectory(2, 9, hidden=2, steps=4)
    _, *slopes = given.results(take_native=True)
    torch.manual_seed(2)
    for value, slope in zip((given.theta, given.weights, given.gates), slopes, strict=True):
        direction = torch.randn_like(value)
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                value += sign * 1e-5 * direction
            found.append((given.results(take_native=True)[0] * given.flows).sum().item())
            with torch.no_grad():
                value -= sign * 1e-5 * direction
        wanted = (slope * direction).sum().item()
        # the differences' own error: 1e-10 of third derivatives, and 1e-16 / 1e-5 of rounding
        assert abs(wanted - (found[0] - found[1]) / 2e-5) < 1e-7 + 1e-6 * abs(wanted)
        assert abs(wanted) > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_coordinate(bad):
    given = Trajectory(3, 50)
    wanted = given.results(take_native=True)
    given.gradients[1, 1, 7] = bad
    got = given.results(take_native=True)
    spared = torch.ones(3, 50, dtype=torch.bool)
    spared[1, 7] = False
    for g, w in zip(got[:2], wanted[:2], strict=True):
        assert same_bits([g[spared]], [w[spared]])
    by_torch = given.results(take_native=False)
    for g, w in zip(got, by_torch, strict=True):
        assert torch.equal(g.isnan(), w.isnan())
    assert not got[0][1, 7].isfinite()


def test_a_loss_that_is_not_finite_stays_with_its_task():
    given = Trajectory(3, 50)
    wanted = given.results(take_native=True)[0]
    given.losses[0, 1] = float("nan")
    got = given.results(take_native=True)[0]
    assert got[1].isnan().all() and same_bits([got[::2]], [wanted[::2]])


def test_without_tasks_or_steps_nothing_changes():
    given = Trajectory(2, 5)
    none = given.theta.detach()[:0]
    cell = (given.weights, given.gates, given.p)
    assert ours.take_steps(*cell, given._at(), none, 3).shape == (0, 5)
    assert torch.equal(ours.take_steps(*cell, given._at(), given.theta, 0), given.theta)


def test_there_is_one_way_back():
    given = Trajectory(2, 5)
    after = ours.take_steps(given.weights, given.gates, given.p, given._at(), given.theta, 3)
    flows = given.flows.requires_grad_()
    (slope,) = torch.autograd.grad((after * flows).sum(), given.theta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 2}, r"dtype: expected 4 \(float32\) or 8 \(float64\), got 2"),
        ({"hidden": 0}, r"hidden: expected 1\.\.4096, got 0"),
        ({"coordinates": 7}, "coordinates: expected as many for each of 2 tasks, got 7"),
        ({"tasks": 0}, "coordinates: expected as many for each of 0 tasks, got 6"),
        ({"p": float("nan")}, "p: expected a number between 0 and 80"),
    ],
)
def test_sizes_that_are_refused(change, message):
    sizes = {"dtype": 8, "hidden": 3, "tasks": 2, "coordinates": 6, "p": 10.0}
    make = native.extension().Cell
    assert make(**sizes, weights=0, gates=0).state_size > 0
    with pytest.raises(ValueError, match=message):
        make(**{**sizes, **change}, weights=0, gates=0)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        make(**sizes, weights=0, gates=0).back(0, 0, 0, 0, 0, 0, 0, 0)
