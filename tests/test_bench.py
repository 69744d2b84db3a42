"""`python -m pymeta.bench`: options, results, checks, comparison and figure; no figure counts."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pymeta
from pymeta.bench import (
    __main__ as cli,
)
from pymeta.bench import (
    compare,
    contestants,
    devices,
    ours,
    plot,
    report,
    rounding,
    torch_rivals,
    verify,
)
from pymeta.bench import session as sessions
from pymeta.bench.cases import CASES, CUDA_CASES, LATENCY, Data, chosen, draw, pool, sweep
from pymeta.bench.worker import Server

TINY = "W1 T=1 K=1"
W5 = CASES["W5 fine-tuning T=1000 K=20"]


def bench(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as a stranger starts it, far from any source tree."""
    return subprocess.run(
        [sys.executable, "-m", "pymeta.bench", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


class LocalWorker:
    """A contestant's worker in this process: the same requests and answers."""

    def __init__(self, name: str, kind: str, log, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder, self.alive = name, folder, True
        self.asked: list[str] = []
        self._server, self._answers = Server(name, kind), []

    def send(self, **request) -> None:
        self.asked.append(request["do"])
        self._answers.append(json.loads(json.dumps(self._server.answer(request))))

    def receive(self, patience=None) -> dict:
        return self._answers.pop(0)

    def ask(self, patience=None, **request) -> dict:
        self.send(**request)
        return self.receive()

    def close(self, at_once: bool = False) -> None:
        self.alive = False


@pytest.fixture(autouse=True)
def _threads_as_before():
    """The contestants set torch's and pymeta's threads."""
    before = torch.get_num_threads(), pymeta.num_threads()
    yield
    torch.set_num_threads(before[0])
    pymeta.set_num_threads(before[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of the program on the smallest case: pymeta alone."""
    folder = tmp_path_factory.mktemp("elsewhere")
    without = ["--without", "torch", "jax", "higher", "scikit-learn"]
    short = ["--rounds", "3", "--seconds", "0.01"]
    done = bench("--cases", TINY, *without, *short, "--out", "found.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


@pytest.fixture
def local(monkeypatch) -> None:
    """Sessions whose workers live in this process, on as few threads as tests may use."""
    monkeypatch.setattr(sessions, "Worker", LocalWorker)
    monkeypatch.setattr(contestants, "cores", lambda: 1)
    monkeypatch.setattr(devices, "measured_peaks", lambda device: {
        "matmul_flops": 5e10, "copy_bytes": 1e10, "matmul_size": 8.0})  # fmt: skip


# ---- the program ---------------------------------------------------------------------------------


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
    assert row[8].endswith("%") and row[9] in ("rows", "lanes")


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


# ---- checks before timing ------------------------------------------------------------------------


def run_in_process(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    """`main` with workers in this process; the exit status and the JSON."""
    out = tmp_path / "found.json"
    status = cli.main([*arguments, "--rounds", "1", "--seconds", "0.002", "--out", str(out)])
    return status, json.loads(out.read_text())


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


# ---- references and data -------------------------------------------------------------------------


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


# ---- the CUDA benchmark, rehearsed ---------------------------------------------------------------


def test_the_cuda_benchmark_rehearsed(local, monkeypatch, tmp_path, capsys):
    """All of it but `devices.Cuda`: graphs, bursts, repeated tasks, both passes, the tables."""
    w1, w5 = CUDA_CASES["W1 T=4096 K=1"], CUDA_CASES["W5 fine-tuning T=100000 K=20"]
    small = {
        "W1": replace(w1, name="W1", tasks=80, distinct=20),
        "W5": replace(w5, name="W5", tasks=40, distinct=8, steps=2),
    }
    monkeypatch.setattr(cli, "CUDA_CASES", small)
    monkeypatch.setattr(verify, "SAMPLE", 16)
    names = ["pymeta", "torch vmap"]
    with_jax = contestants.importlib.util.find_spec("jax") is not None
    status, found = run_in_process(
        tmp_path, "--device", "rehearsal", "--only", *names, *(["jax"] if with_jax else [])
    )
    out = capsys.readouterr().out
    assert status == 0, out
    assert len(found["cases"]) == 2 and found["device"] == "rehearsal"
    for row in found["cases"]:
        entries = row["contestants"]
        assert {"pymeta", "pymeta graph", "torch vmap", "torch vmap graph"} <= set(entries)
        assert ("jax vmap" in entries) == with_jax
        for name, entry in entries.items():
            assert "error" not in entry, (name, entry)
            assert entry["device_s"] > 0 and entry["error_in_tolerances"] < 4
    assert "roofline:" in out and "bind" in out
    assert out.count("W5   (") == (2 if with_jax else 1)  # the second pass replaces the row
    assert "no figure means anything" in (tmp_path / "found.md").read_text()


def test_when_the_budget_is_spent_nothing_is_compiled(local, monkeypatch, tmp_path):
    pytest.importorskip("jax")
    small = {"W1": replace(CUDA_CASES["W1 T=25 K=1"], name="W1", tasks=3)}
    monkeypatch.setattr(cli, "CUDA_CASES", small)
    status, found = run_in_process(
        tmp_path, "--device", "rehearsal", "--only", "pymeta", "jax", "--budget", "0.001"
    )
    entries = found["cases"][0]["contestants"]
    assert status == 0 and "the budget of 0 s was spent" in entries["jax"]["error"]
    assert "median_s" in entries["pymeta graph"]


def test_other_numbers_of_threads_a_block_are_contestants_of_their_own(monkeypatch):
    told = []
    monkeypatch.setattr(ours, "set_block_threads", told.append)
    case = replace(CASES[TINY], tasks=2)
    make = contestants.of("rehearsal")["pymeta"].make
    options = contestants.Options(block_threads=[64, 128])
    variants = make(case, draw(case), devices.make("rehearsal"), options)
    assert list(variants) == ["pymeta", "pymeta, 64 threads", "pymeta, 128 threads"]
    told.clear()
    variants["pymeta, 64 threads"].run()
    variants["pymeta"].run()
    assert told == [64, 0]
    assert not report._is_trip("pymeta, 64 threads")


def test_cuda_events_and_graphs_are_used_as_torch_wants_them(monkeypatch):
    """With torch.cuda's names standing in: three calls on the side stream, capture, one replay."""
    log: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self):
            log.append(f"in {self.name}")

        def __exit__(self, *_):
            log.append(f"out {self.name}")

        def wait_stream(self, other) -> None:
            log.append(f"{self.name} waits for {other.name}")

        def record(self) -> None:
            log.append(f"record {self.name}")

        def synchronize(self) -> None:
            log.append(f"synchronize {self.name}")

        def elapsed_time(self, end) -> float:
            return 12.0

        def replay(self) -> None:
            log.append("replay")

    cuda = torch.cuda
    for name, value in {
        "init": lambda: None,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: Named("main"),
        "Stream": lambda device=None: Named("side"),
        "stream": lambda stream: stream,
        "CUDAGraph": lambda: Named("graph"),
        "graph": lambda graph, stream: Named(f"capture on {stream.name}"),
        "Event": lambda enable_timing: Named("event"),
    }.items():
        monkeypatch.setattr(cuda, name, value)
    device = devices.Cuda()
    replay, result = device.capture(lambda: log.append("call") or "the result")
    calls = ["main waits for side", "in capture on side", "call", "out capture on side", "replay"]
    assert log == ["side waits for main", "in side", *["call"] * 3, "out side", *calls]
    assert result == "the result"
    log.clear()
    assert device.burst(replay, 4) == pytest.approx(3e-3)
    assert log == ["record event", *["replay"] * 4, "record event", "synchronize event"]


def test_peaks_and_bursts_by_hand():
    assert devices.data_sheet_flops((9, 0), 132, 1980.0) == pytest.approx(66.9e12, rel=1e-3)
    assert devices.data_sheet_flops((8, 0), 108, 1410.0) == pytest.approx(19.5e12, rel=1e-3)
    assert devices.data_sheet_flops((9, 0), 132, 0.0) is None
    assert devices.burst_length(1e-3, 0.05) == 50
    assert devices.burst_length(10.0, 0.05) == 2
    assert devices.burst_length(1e-9, 0.05) == devices.LARGEST_BURST


# ---- comparing -----------------------------------------------------------------------------------


def test_a_regression_shows_and_noise_does_not(results, tmp_path, capsys):
    folder, _ = results
    before = json.loads((folder / "found.json").read_text())
    for row in before["cases"]:
        for entry in row["contestants"].values():
            entry["median_s"] = 1e-4
            entry["rounds_s"] = [0.99e-4, 1e-4, 1.01e-4]
    after = copy.deepcopy(before)
    entries = after["cases"][0]["contestants"]
    entries["pymeta 1t"].update(median_s=1.5e-4, rounds_s=[1.48e-4, 1.5e-4, 1.51e-4])
    entries["pymeta kernel 1t"].update(median_s=1.1e-4, rounds_s=[0.9e-4, 1.1e-4, 1.2e-4])
    after["machine"]["versions"]["numpy"] = "0.1"
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, content in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(content))
    found = {d.contestant: d for d in compare.differences(before, after)}
    assert found["pymeta 1t"].ratio == pytest.approx(1.5)
    assert found["pymeta 1t"].noise == pytest.approx(0.02 + 0.02)
    assert found["pymeta 1t"].verdict == "slower"
    assert found["pymeta kernel 1t"].verdict == ""
    assert cli.main(["--compare", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert "numpy: " in out and "and 0.1" in out
    assert f"slower beyond the noise in 1 of {len(found)} comparisons" in out
    assert cli.main(["--compare", *map(str, reversed(paths))]) == 0
    assert " faster" in capsys.readouterr().out


def test_published_results_can_be_compared(results, tmp_path):
    """Files of an earlier form too: without rounds, the fastest call stands for the noise."""
    folder, _ = results
    old = json.loads((folder / "found.json").read_text())
    for name in ("schema", "date", "device"):
        del old[name]
    for entry in old["cases"][0]["contestants"].values():
        del entry["rounds_s"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    text = compare.text(tmp_path / "old.json", folder / "found.json")
    assert "old.json, no date" in text and "pymeta kernel 1t" in text


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"cases": [1]}', '{"cases": []}'])
def test_what_is_no_result_is_refused(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json"):
        compare.text(path, path)


# ---- the figure ----------------------------------------------------------------------------------


def swept(ratios: list[float], names: list[int]) -> list[tuple[int, dict]]:
    """Rows in which the best rival takes so many times our time."""
    rows = []
    for x, ratio in zip(names, ratios, strict=True):
        entries = {
            "pymeta 1t": {"median_s": 1e-3, "worker": "pymeta"},
            "torch vmap": {"median_s": 9e-3, "worker": "torch vmap"},
            "jax vmap": {"median_s": ratio * 1e-3, "worker": "jax"},
            "jax scanned steps": {"median_s": 8e-3, "worker": "jax"},
            "higher": {"error": "not measured"},
        }
        rows.append((x, {"case": str(x), "tasks": 10, "contestants": entries}))
    return rows


def test_crossovers_lie_where_the_lines_meet():
    points = swept([4.0, 2.0, 0.5, 0.25], [1, 4, 16, 64])
    assert plot.crossings(points) == [pytest.approx(8.0)]  # halfway between 4 and 16
    assert plot.losing(points) == [(pytest.approx(8.0), 64.0)]
    x, y = zip(*plot.lines(points)["jax"], strict=True)
    assert x == (1, 4, 16, 64) and y == pytest.approx((400, 200, 50, 25))
    assert plot.losing(swept([0.5, 0.5], [1, 2])) == [(1.0, 2.0)]
    assert plot.losing(swept([2.0, 3.0], [1, 2])) == [] == plot.crossings(swept([2.0], [1]))


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    content = {"machine": {"cpu": "a processor", "cores": 2}, "date": "today"}
    axes = {axis: swept([2.0, 0.5], [1, 4]) for axis in sweep(False)}
    plot.draw(tmp_path / "times.png", content, axes)
    assert (tmp_path / "times.png").read_bytes()[:4] == b"\x89PNG"
    plot.draw(tmp_path / "times.svg", content, axes)
    assert (tmp_path / "times.svg").read_text().count("<!-- crossover at 2 -->") == len(axes)


def test_plot_measures_its_sweep_and_draws_it(local, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    two = {axis: [p for p in points if p[0] in (1, 4, 8, 16)] for axis, points in
           sweep(False).items()}  # fmt: skip
    monkeypatch.setattr(cli, "sweep", lambda cuda: two)
    figure = tmp_path / "times.svg"
    status, found = run_in_process(
        tmp_path, "--plot", str(figure), "--only", "pymeta", "torch vmap"
    )
    assert status == 0 and figure.read_text().startswith("<?xml")
    rows = {row["case"]: row for row in found["cases"]}
    measured = [[(x, rows[f"sweep {axis}={x}"]) for x, _ in two[axis]] for axis in two]
    # who wins is the machine's affair, and that it is drawn is ours
    crossed = sum(len(plot.crossings(points)) for points in measured)
    assert figure.read_text().count("<!-- crossover at") == crossed
    assert [row["case"] for row in found["cases"]] == [
        "sweep tasks=1", "sweep tasks=4", "sweep tasks=16", "sweep width=8", "sweep width=16"
    ]  # fmt: skip


def test_without_matplotlib_the_figure_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        cli.main(["--plot", "times.png"])
    assert "--plot: needs matplotlib" in capsys.readouterr().err


def test_options_have_help():
    parser = cli.parser()
    text = parser.format_help()
    assert isinstance(parser, argparse.ArgumentParser) and "--quick" in text
    assert "python -m pymeta.bench --compare a.json b.json" in text


def test_data_survives_its_file(tmp_path):
    data = draw(CASES["W2 BN T=32 K=1"])
    data.save(tmp_path / "data.npz")
    again = Data.load(tmp_path / "data.npz")
    assert again.yq.dtype == np.int64 and len(again.parameters) == len(data.parameters)
    assert all((a == b).all() for a, b in zip(again.parameters, data.parameters, strict=True))
