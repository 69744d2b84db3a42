"""The check that stands before every timing can fail: it refuses what it should."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from pymeta.bench import latency, many, rounding, sklearn_rival, torch_rivals, verify
from pymeta.bench.cases import CASES, LATENCY, Case, chosen, pool
from pymeta.bench.contestants import on_host
from pymeta.bench.torch_rivals import vmap

SMALL = ["W1 T=25 K=1", "W1 T=1 K=5", "W2 no BN T=32 K=1", "W2 BN T=32 K=1", "W3 T=64 K=5"]
REPTILE = CASES["W4 Reptile T=32 K=32"]
FINETUNE = replace(CASES["W5 fine-tuning T=1000 K=20"], tasks=60)


def answer(case: Case, data, kind=vmap) -> tuple[float | None, list[np.ndarray]]:
    loss, gradients = kind(case, data)()
    return None if loss is None else loss.item(), [on_host(g) for g in gradients]


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
        with pytest.raises(verify.WrongAnswer, match=re.escape(case.name)):
            verify.check(case, reference, f"torch, {what}", bad_loss, bad_gradients)


@pytest.mark.parametrize("case", [REPTILE, FINETUNE], ids=lambda case: case.name)
def test_right_adaptations_pass_and_near_ones_do_not(case):
    data = verify.make_data(case)
    reference = verify.make_reference(case, data)
    loss, arrays = answer(case, data)
    assert verify.check(case, reference, "pymeta", loss, arrays) < 1
    other = {"sgd": "adam", "adam": "sgd"}[case.optimizer]
    wrong = {
        "a step less": answer(replace(case, steps=case.steps - 1), data),
        "another lr": answer(replace(case, lr=case.lr * 1.01), data),
        "another optimizer": answer(replace(case, optimizer=other), data),
        "a NaN": (loss, [np.full_like(a, np.nan) for a in arrays]),
    }
    if case.job == "reptile":
        wrong["another loss"] = (loss * 1.001, arrays)
    else:
        mixed = [a.copy() for a in arrays]
        for a in mixed:
            a[-1] = a[0]
        wrong["the last task's answer is the first one's"] = (None, mixed)
        wrong["a task is missing"] = (None, [a[:-1] for a in arrays])
    for what, (bad_loss, bad_arrays) in wrong.items():
        with pytest.raises(verify.WrongAnswer):
            verify.check(case, reference, f"torch, {what}", bad_loss, bad_arrays)


@pytest.mark.parametrize("case", [REPTILE, FINETUNE], ids=lambda case: case.name)
def test_rounding_draws_no_errors_when_told_so(case):
    """Then it is an implementation of its own, and agrees with the reference to float64."""
    data = verify.make_data(case)
    reference = verify.make_reference(case, data)
    losses, ends = rounding.adapted(case, data, size=0.0)
    if case.job == "reptile":
        arrays = [p - e.mean(0) for p, e in zip(data.parameters, ends, strict=True)]
        assert verify.error(reference, float(losses.mean()), arrays) < 1e-9
    else:
        assert verify.error(reference, None, ends) < 1e-9


@pytest.mark.parametrize("case", [REPTILE, FINETUNE], ids=lambda case: case.name)
def test_drawn_errors_are_larger_than_float32s(case):
    """In the middle task; both are far from nothing and from the tolerance."""
    data = verify.make_data(case)
    _, exact = rounding.adapted(case, data, size=0.0)
    float32 = replace(case, job="finetune")
    _, ours = answer(float32, data)

    def distance(arrays) -> float:
        pairs = zip(arrays, exact, strict=True)
        squares = sum(verify._task_norms(np.asarray(a) - e) ** 2 for a, e in pairs)
        return float(np.median(np.sqrt(squares)))

    drawn = distance(rounding.adapted(case, data, size=1.0, seed=5)[1])
    assert 0 < distance(ours) < drawn / 2


def test_loops_over_some_tasks_are_right(monkeypatch):
    """Those of torch.optim agree with torch.func, scikit-learn's to what its formula allows."""
    monkeypatch.setattr(torch_rivals, "LOOP_TASKS", 7)
    monkeypatch.setattr(sklearn_rival, "LOOP_TASKS", 7)
    data = verify.make_data(FINETUNE)
    reference = verify.make_reference(FINETUNE, data)
    loss, arrays = answer(FINETUNE, data, torch_rivals.loop)
    assert len(arrays[0]) == 7
    verify.check(FINETUNE, reference, "torch loop", loss, arrays)
    run, read = sklearn_rival.loop(FINETUNE, data)
    verify.check(FINETUNE, reference, "scikit-learn", *read(run()))
    with pytest.raises(verify.WrongAnswer, match="shape"):
        verify.check(FINETUNE, reference, "torch vmap", loss, arrays)


@pytest.mark.parametrize("name", ["numpy by hand", "torch eager"])
def test_latency_contestants_are_checked(name, tmp_path):
    right, scales = latency.prepare(tmp_path)
    data = latency.Data.load(tmp_path / "data.npz")

    def off(case: Case) -> float:
        call = latency.CONTESTANTS[name](case, data, tmp_path / "adapter.safetensors")
        answers = [call(*task).copy() for task in zip(data.xs, data.ys, data.xq, strict=True)]
        return np.max(np.abs(np.stack(answers) - right) / scales) / LATENCY.margin

    assert off(LATENCY) < 1
    assert off(replace(LATENCY, lr=1.01 * LATENCY.lr)) > 4
    assert off(replace(LATENCY, steps=LATENCY.steps - 1)) > 4


def test_latency_summary():
    found = latency.summary(np.arange(1, 1001, dtype=np.int64) * 1000)
    assert found["calls"] == 1000 and found["max"] == 1000.0
    assert found["p50"] == pytest.approx(500.5) and found["p99"] == pytest.approx(990.01)


def test_many_refuses_results_that_differ():
    class Models:
        def __init__(self, w: torch.Tensor) -> None:
            self.parameters = {"w": w}

        def __len__(self) -> int:
            return len(self.parameters["w"])

    weights = (torch.arange(2 * many.CASE.tasks) % many.CASE.tasks).double()
    answers = many.Answers()
    answers.look(Models(weights))
    weights[-1] += 1e-3
    with pytest.raises(AssertionError, match="not as the first"):
        answers.look(Models(weights))


def test_flop_counts_of_first_order_jobs_by_hand():
    # per row and step, in units of 2: the first layer twice, the others three times
    assert REPTILE.flops() == 2 * 10 * 32 * (64 * 2 + 4096 * 3 + 64 * 3)
    assert FINETUNE.flops() == 2 * 50 * 20 * (1536 * 2 + 4096 * 3 + 64 * 3)
    prediction = 1536 + 4096 + 64
    assert LATENCY.flops() == 2 * (20 * 5 * (1536 * 2 + 4096 * 3 + 64 * 3) + prediction)


def test_flop_count_of_a_case_by_hand():
    case = CASES["W1 T=1 K=1"]
    # per row, in units of 2: first and last layer 40 products, the middle one 1600
    step = 40 * (1 + 1 + 2) + 1600 * (1 + 2 + 6) + 40 * (1 + 2 + 6)
    query = 40 * (1 + 1) + 1600 * (1 + 2) + 40 * (1 + 2)
    assert case.flops() == 2 * (10 * step + 10 * query)


def test_every_case_of_the_plan_is_there():
    assert len(CASES) == 8 + 2 + 4 + 1 + 1


def test_chosen_tasks_keep_their_distance_from_kinks():
    case = CASES["W2 BN T=32 K=1"]
    data = verify.make_data(case).astype(np.float64)
    distances = [verify.kink_distance(case, data.of([t])) for t in range(case.tasks)]
    assert len(data.xs) == case.tasks and min(distances) > case.margin > 0


@pytest.mark.parametrize("case", [c for c in (*CASES.values(), LATENCY) if c.margin], ids=str)
def test_the_kept_choice_is_what_selecting_gives(case):
    many = pool(case)
    assert chosen(case, many) == verify.select(case, many)


@pytest.mark.parametrize("case", [REPTILE, FINETUNE, LATENCY], ids=lambda case: case.name)
def test_chosen_tasks_are_not_at_the_mercy_of_rounding(case):
    data = verify.make_data(case)
    assert len(data.xs) == case.tasks
    assert verify.sensitivity(case, data).max() < case.margin
