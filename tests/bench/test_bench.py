"""`python -m pymeta.bench`: options, results, checks; no figure counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench_help import RESULTS, TINY, W5, bench, run_in_process

import pymeta
from pymeta.bench import (
    __main__ as cli,
)
from pymeta.bench import (
    contestants,
    devices,
    ours,
    report,
    rounding,
    torch_rivals,
    verify,
)
from pymeta.bench import session as sessions
from pymeta.bench.cases import CASES, CUDA_CASES, LATENCY, chosen, draw, pool

# ---- the program --------------------------------------------------------------------------------


@pytest.mark.background(RESULTS)
def test_it_prints_a_table_with_errors_times_and_the_peak(results):
    _, done = results
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{TINY}   (1-40-40-1 relu, mse, 10+10 rows")
    head = " ".join(lines[1].split())
    assert head == "error of tolerance ms a call us a task x pymeta of peak note"
    row = next(line for line in lines if line.strip().startswith("pymeta kernel 1t")).split()
    error, of_tolerance, ms, us = map(float, row[3:7])
    assert 0 < error < 1e-5 and 0 < of_tolerance < 1
    assert us == pytest.approx(1000 * ms, rel=0.02)  # one task
    assert row[8].endswith("%") and row[9] in ("rows", "lanes", "mixed", "stacked")


@pytest.mark.background(RESULTS)
def test_its_json_says_what_was_measured_where_and_how(results):
    folder, _ = results
    found = json.loads((folder / "found.json").read_text())
    assert found["schema"] == report.SCHEMA and found["device"] == "cpu"
    assert found["date"].endswith("UTC") and found["options"]["cases"] == [TINY]
    assert {"cpu", "cores", "python", "system", "versions"} <= set(found["machine"])
    (row,) = found["cases"]
    case = CASES[TINY]
    assert row["case"] == TINY and row["flops_per_task"] == case.flops()
    assert contestants.Case.read(row["definition"]) == case
    assert row["fma_peak"] > 1e8 and row["tolerance"] == verify.tolerance(case)
    entry = row["contestants"]["pymeta 1t"]
    assert len(entry["rounds_s"]) == 3 and entry["min_s"] <= entry["median_s"]
    assert entry["error_in_tolerances"] < 1
    assert found["summary"][0]["pymeta_s"] == report.own_time(row)
    assert (folder / "found.md").read_text().startswith("# Benchmark")
    assert {p.name for p in folder.iterdir()} == {"found.json", "found.md", "found.log"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "W9"], "--cases: none begins with 'W9'; there are W1 T=1 K=1"),
        (["--only", "jaxx"], "--only: none begins with 'jaxx'; there are pymeta"),
        (["--without", "numpy"], "--without: none begins with 'numpy'"),
        (["--only", "higher", "--without", "higher"], "no contestant is left"),
        (["--rounds", "0"], "--rounds: expected an integer above 0, got 0"),
        (["--seconds", "-1"], "--seconds: expected a number above 0"),
        (["--out", "found.txt"], "--out: expected a file that ends in .json, got found.txt"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--block-threads", "64"], "--block-threads: needs --device cuda"),
        (["--device", "cuda", "--block-threads", "512"], "1 to 256, got 512"),
        (["--plot", "a.png", "--cases", "W1"], "leave --cases out"),
        (["--plot", "a.nothing"], "--plot: no kind of figure ends in '.nothing'"),
        (["--compare", "a.json"], "--compare: expected 2 arguments"),
        (["--compare", "absent.json", "absent.json"], "absent.json"),
    ],
)
def test_wrong_options_are_named(arguments, said, capsys):
    if "a.nothing" in arguments:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_cases_come_in_the_order_asked_for():
    """A run may be cut off, so what is asked for first is measured first."""
    words = ["--device", "rehearsal", "--cases", "W3 T=16", "W1 T=25 K=5", "W3"]
    names = [case.name for case in cli.choose_cases(cli.parser().parse_args(words))]
    assert names == ["W3 T=16384 K=5", "W1 T=25 K=5", "W3 T=1024 K=5", "W3 T=64 K=5"]


def test_a_cuda_device_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "torch finds no CUDA device")
    assert cli.main(["--device", "cuda", "--only", "pymeta"]) == 1
    assert "--device cuda: torch finds no CUDA device" in capsys.readouterr().err


def test_the_list_names_cases_and_what_is_installed(monkeypatch, capsys):
    real = contestants.importlib.util.find_spec
    hidden = lambda name: None if name == "higher" else real(name)  # noqa: E731
    monkeypatch.setattr(contestants.importlib.util, "find_spec", hidden)
    assert cli.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, case in CASES.items():
        assert any(name in line and case.describe() in line for line in lines), name
    state = {" ".join(x.split("  ")[:2]).strip(): x for x in lines[lines.index("contestants:") :]}
    assert "not installed: higher" in state["higher"]
    assert state["torch vmap"].endswith(" installed")
    assert cli.main(["--list", "--device", "cuda"]) == 0
    assert "W1 T=65536 K=5" in capsys.readouterr().out


def test_without_torch_numpy_checks_what_it_can(tmp_path):
    """Reptile's and fine-tuning's cases run; torch, jax and sklearn count as not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('torch', 'jax', 'sklearn'):\n    sys.modules[name] = None\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = bench(
        *("--cases", TINY, "W4", "--rounds", "1", "--seconds", "0.01"),
        cwd=tmp_path,
        PYTHONPATH=path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "There is no torch here" in done.stderr
    assert "left are W4 Reptile T=32 K=32." in done.stderr
    assert "without jax shard_map: jax is not installed" in done.stderr
    found = json.loads((tmp_path / "pymeta-bench.json").read_text())
    (row,) = found["cases"]
    assert set(row["contestants"]) >= {"pymeta kernel 1t"}
    assert row["contestants"]["pymeta kernel 1t"]["error_in_tolerances"] < 1


@pytest.mark.parametrize("module", ["pymeta", "pymeta.bench", "pymeta.bench.__main__"])
def test_importing_brings_nothing_heavy_along(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "jax", "matplotlib", "sklearn"}
    assert ("pymeta.bench" in loaded) == (module != "pymeta")


# ---- checks before timing -----------------------------------------------------------------------


def test_wrong_numbers_are_reported_and_not_timed(local, monkeypatch, tmp_path, capsys):
    """A rival that returns its gradients a hundredth too large: no time, and the status is 1."""
    real, called = torch_rivals.vmap, []

    def wrong(case, data, device=None):
        run = real(case, data, device)

        def call():
            called.append(case.name)
            loss, gradients = run()
            return loss, [1.01 * g for g in gradients]

        return call

    monkeypatch.setattr(torch_rivals, "vmap", wrong)
    monkeypatch.setattr(contestants, "timed", lambda run, *_, **__: [(run(), 1.0)[1]])
    status, found = run_in_process(tmp_path, "--cases", TINY, "--only", "pymeta", "torch vmap")
    assert status == 1
    entries = found["cases"][0]["contestants"]
    assert entries["torch vmap"]["wrong"] and "median_s" not in entries["torch vmap"]
    assert "tolerances, 4 allowed" in entries["torch vmap"]["error"]
    assert "median_s" in entries["pymeta 1t"]
    assert len(called) == 3  # the first call, its trial, and the one that was checked
    said = capsys.readouterr()
    assert "WRONG: W1 T=1 K=1, torch vmap: the error is" in said.out + said.err
    assert "Not measured" in (tmp_path / "found.md").read_text()


def test_a_contestant_that_raises_leaves_the_others(local, monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(torch_rivals, "vmap", broken)
    status, found = run_in_process(tmp_path, "--cases", TINY, "--only", "pymeta", "torch vmap")
    entries = found["cases"][0]["contestants"]
    assert status == 0 and entries["torch vmap"] == {"error": "RuntimeError: no such luck"}


@pytest.mark.parametrize("what", ["a NaN", "a task less", "no loss"])
def test_what_counts_as_wrong(what):
    case = replace(W5, tasks=6)
    data = verify.make_data(W5).of(slice(0, 6))
    reference = verify.make_reference(case, data)
    run, read = ours.kernel(case, data)
    _, arrays = read(run())
    assert verify.check(case, reference, "pymeta", None, arrays) < 1
    bad = {
        "a NaN": (None, [np.where(a == a.max(), np.nan, a) for a in arrays]),
        "a task less": (None, [a[:-1] for a in arrays]),
        "no loss": (0.5, arrays),
    }
    with pytest.raises(verify.WrongAnswer):
        verify.check(case, reference, "pymeta", *bad[what])


def test_a_worker_that_takes_too_long_is_ended(tmp_path):
    with open(tmp_path / "log", "w") as log:
        worker = sessions.Worker("pymeta", "cpu", log, tmp_path / "worker")
        assert worker.ask(0.01, do="peak", seconds=0.01) == {"error": "not ready after 0 s"}
        assert not worker.alive
        assert worker.ask(5.0, do="peak", seconds=0.01) == {"error": "the process ended"}


# ---- references and data ------------------------------------------------------------------------


def test_the_numpy_loop_is_the_torch_reference():
    for case in (replace(W5, tasks=5), replace(CASES["W4 Reptile T=32 K=32"], tasks=5)):
        data = draw(case)
        by_torch = verify._adapted_reference(case, data.astype(np.float64))
        by_numpy = verify._numpy_reference(case, data)
        assert verify.error(by_torch, by_numpy.loss, by_numpy.gradients) < 1e-9


def test_predictions_and_their_scales_are_torchs():
    """The slopes are those of autograd, here by jacrev."""
    case = replace(LATENCY, tasks=3)
    data = draw(case)
    right, scales = verify.predictions(case, data)
    _, ends = rounding.adapted(case, data, size=0.0)
    distances = verify._distances(data.astype(np.float64), ends)
    model = torch_rivals.make_model(case, data.astype(np.float64))
    names = [name for name, _ in model.named_parameters()]
    for t in range(case.tasks):
        own = {n: torch.from_numpy(e[t]) for n, e in zip(names, ends, strict=True)}
        xq = torch.from_numpy(data.xq[t]).double()

        def outputs(parameters, xq=xq):
            return torch.func.functional_call(model, parameters, (xq,))

        np.testing.assert_allclose(right[t], outputs(own).numpy(), rtol=1e-10)
        slopes = torch.func.jacrev(outputs)(own).values()
        pairs = zip(slopes, distances, strict=True)
        scale = sum(s.flatten(2).norm(dim=2).numpy() * d[t] for s, d in pairs)
        np.testing.assert_allclose(scales[t], scale, rtol=1e-8)


def test_the_kept_choice_of_tasks_belongs_to_the_numbers_drawn():
    cases = [c for c in (*CASES.values(), *cli.QUICK_CASES.values(), LATENCY) if c.margin]
    assert len(cases) == 6
    for case in cases:
        many = pool(case)
        tasks = chosen(case, many)
        assert tasks is not None and len(set(tasks)) == case.tasks, case.name
        many.xs[0, 0, 0] += 1
        assert chosen(case, many) is None


def test_repeated_tasks_stand_in_a_drawn_order():
    case = CUDA_CASES["W1 T=4096 K=1"]
    order = case.order()
    assert case.distinct == 1024 and (np.bincount(order) == 4).all()
    assert (order[:1024] != np.arange(1024)).any()
    data = verify.make_data(case)
    assert len(data.xs) == 1024 and len(data.of(order).xs) == 4096
    assert (CUDA_CASES["W1 T=25 K=1"].order() == np.arange(25)).all()


def test_the_sample_of_many_networks_has_the_ends():
    case = CUDA_CASES["W5 fine-tuning T=100000 K=20"]
    tasks = verify.sample(case)
    assert len(set(tasks)) == verify.SAMPLE and tasks[0] == 0 and tasks[-1] == 99_999
    assert (verify.sample(W5) == np.arange(1000)).all()


def test_every_case_of_the_gpu_is_there():
    wanted = {f"W1 T={t} K={k}" for t in (25, 256, 4096, 65536) for k in (1, 5)}
    wanted |= {f"W3 T={t} K=5" for t in (64, 1024, 16384)}
    wanted |= {f"W5 fine-tuning T={t} K=20" for t in (1000, 100000)}
    wanted |= {f"W2 no BN T={t} K=1" for t in (32, 1024)}
    assert set(CUDA_CASES) == wanted
    assert {"W1 T=25 K=1", "W5 fine-tuning T=100 K=20"} <= set(cli.QUICK_CASES)


def test_bytes_by_hand():
    case = CASES["W1 T=25 K=1"]
    rows = 25 * 20 * (1 + 1)
    parameters = 40 + 40 + 1600 + 40 + 40 + 1
    assert case.bytes_moved() == 4 * (rows + parameters + parameters + 25 + 25 * 10)
    parameters = 24 * 64 + 64 + 64 * 64 + 64 + 64 + 1
    assert W5.bytes_moved() == 4 * (1000 * 50 * 25 + parameters + 1000 * parameters)
    w2 = CASES["W2 no BN T=32 K=1"]
    assert w2.bytes_moved() > 32 * 30 * (784 * 4 + 8)


def test_the_operators_ways_are_verified(monkeypatch):
    """Each way's gradient is compared first, and a wrong one is found."""
    from pymeta.bench import operator

    torch.manual_seed(0)
    ways = operator.Ways(operator.Shape((2, 6, 1), 3, 4, 5, 2))
    assert operator.check(ways) < 1e-4
    times = operator.measure(ways, 0.01)
    assert set(times) == set(ways.of(pymeta.MAML(ways.network, loss="mse", lr=0.01, steps=2)))
    monkeypatch.setattr(operator, "TOLERANCE", 1e-12)
    with pytest.raises(AssertionError, match="off by"):
        operator.check(ways)


def test_implicit_gradients_are_verified_and_their_memory_is_flat(monkeypatch):
    from pymeta.bench import implicit, operator

    torch.manual_seed(0)
    monkeypatch.setattr(implicit, "CASES", ("tiny",))
    monkeypatch.setitem(implicit.SHAPES, "tiny", operator.Shape((2, 6, 1), 3, 4, 5, 2))
    rows, lines = implicit.curve(0.01)
    assert len(rows) == len(lines) == len(implicit.UNROLLED) + len(implicit.IMPLICIT_STEPS)
    work = {name: row["workspace_bytes"] for name, row in rows.items()}
    assert len({v for n, v in work.items() if "implicit" in n}) == 1
    assert len({v for n, v in work.items() if "unrolled" in n}) == len(implicit.UNROLLED)
    monkeypatch.setattr(implicit, "TOLERANCE", 1e-12)
    with pytest.raises(AssertionError, match="off by"):
        implicit.curve(0.01)


def test_quick_begins_no_case_when_it_is_late(local, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "QUICK_START", 0.0)
    status, found = run_in_process(tmp_path, "--quick", "--only", "pymeta")
    assert status == 0 and len(found["cases"]) == 1  # the first always runs
    assert "after 0 s no case begins; left out: W1 T=256 K=1, W5" in capsys.readouterr().err


def test_a_quick_look_leaves_nothing_behind(tmp_path, monkeypatch, local, capsys):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    short = ["--rounds", "1", "--seconds", "0.002", "--cases", TINY, "--only", "pymeta"]
    assert cli.main(["--quick", *short]) == 0
    said = capsys.readouterr()
    assert "--out FILE.json keeps the results: " in said.err and "W1 T=1 K=1" in said.out
    assert list(folder.iterdir()) == []
    assert cli.main(["--quick", *short, "--out", "found.json"]) == 0
    assert {p.name for p in folder.iterdir()} == {"found.json", "found.md", "found.log"}
    assert "found.json, found.md: " in capsys.readouterr().err
