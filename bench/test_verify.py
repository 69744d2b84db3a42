"""The check that stands before every timing can fail: it refuses what it should."""

import re
from dataclasses import replace

import numpy as np
import pytest

from bench import verify
from bench.cases import CASES, Case
from bench.torch_rivals import vmap

SMALL = ["W1 T=25 K=1", "W1 T=1 K=5", "W2 no BN T=32 K=1", "W2 BN T=32 K=1", "W3 T=64 K=5"]


def answer(case: Case, data) -> tuple[float, list[np.ndarray]]:
    loss, gradients = vmap(case, data)()
    return loss.item(), [g.detach().numpy() for g in gradients]


@pytest.mark.parametrize("name", SMALL)
def test_right_answers_pass_and_near_ones_do_not(name):
    case = CASES[name]
    data = verify.make_data(case)
    reference = verify.make_reference(case, data)
    loss, gradients = answer(case, data)
    assert verify.check(case, reference, "pymeta", loss, gradients) < 1
    wrong = {
        "first order": answer(replace(case, first_order=True), data),
        "another lr": answer(replace(case, lr=case.lr * 1.01), data),
        "a NaN": (loss, [np.full_like(g, np.nan) for g in gradients]),
        "another loss": (loss * 1.01, gradients),
    }
    for what, (bad_loss, bad_gradients) in wrong.items():
        with pytest.raises(AssertionError, match=re.escape(case.name)):
            verify.check(case, reference, f"torch, {what}", bad_loss, bad_gradients)


def test_flop_count_of_a_case_by_hand():
    case = CASES["W1 T=1 K=1"]
    # per row, in units of 2: first and last layer 40 products, the middle one 1600
    step = 40 * (1 + 1 + 2) + 1600 * (1 + 2 + 6) + 40 * (1 + 2 + 6)
    query = 40 * (1 + 1) + 1600 * (1 + 2) + 40 * (1 + 2)
    assert case.flops() == 2 * (10 * step + 10 * query)


def test_every_case_of_the_plan_is_there():
    assert len(CASES) == 8 + 2 + 4


def test_chosen_tasks_keep_their_distance_from_kinks():
    case = CASES["W2 BN T=32 K=1"]
    data = verify.make_data(case).astype(np.float64)
    distances = [verify.kink_distance(case, data.of([t])) for t in range(case.tasks)]
    assert len(data.xs) == case.tasks and min(distances) > case.margin > 0
