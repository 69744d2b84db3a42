"""The benchmark's CUDA run, rehearsed; comparisons of two runs, and the figure."""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench_help import RESULTS, TINY, run_in_process

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
    torch_rivals,
    verify,
    worker,
)
from pymeta.bench.cases import CASES, CUDA_CASES, Data, draw, sweep

# ---- the CUDA benchmark, rehearsed --------------------------------------------------------------


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
        ours = {"pymeta", "pymeta graph", "pymeta tf32x3"}
        assert ours | {"torch vmap", "torch vmap graph"} <= set(entries)
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


def test_who_has_no_memory_is_named_and_the_others_go_on(local, monkeypatch, tmp_path, capsys):
    """100,000 tasks may be too many for a rival: as torch says it, and as JAX does."""
    w5 = CUDA_CASES["W5 fine-tuning T=100000 K=20"]
    small = {"W5": replace(w5, name="W5", tasks=12, distinct=4, steps=2)}
    monkeypatch.setattr(cli, "CUDA_CASES", small)

    def vmap(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.05 GiB.\nSee also")

    monkeypatch.setattr(torch_rivals, "vmap", vmap)
    names, failed = ["pymeta", "torch vmap"], {"torch vmap", "torch vmap graph"}
    if contestants.importlib.util.find_spec("jax") is not None:
        from pymeta.bench import jax_rivals

        made = jax_rivals.make

        def make(case, data, shard, scan, chunk):
            if not scan:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
            return made(case, data, shard, scan, chunk)

        monkeypatch.setattr(jax_rivals, "make", make)
        names, failed = [*names, "jax"], failed | {"jax vmap"}
    status, found = run_in_process(tmp_path, "--device", "rehearsal", "--only", *names)
    entries = found["cases"][0]["contestants"]
    out = capsys.readouterr().out
    assert status == 0, out
    assert {name for name, entry in entries.items() if "error" in entry} == failed
    for name in failed:
        assert re.search(rf"{name}: .*[Oo]ut of memory", out), out
    assert {"pymeta", "pymeta graph"} <= {name for name in entries if "median_s" in entries[name]}


def test_what_was_prepared_is_let_go():
    """Contestants share a device's memory: each has it for its turn."""
    server = worker.Server("pymeta", "rehearsal")
    assert server.answer({"do": "forget"}) == {"variants": {}}
    server.variants = {"pymeta": "not captured"}
    assert server.answer({"do": "forget"}) == {"variants": {}} == {"variants": server.variants}


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
    assert not report._is_trip("pymeta, 64 threads") and not report._is_trip("pymeta tf32x3")


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


# ---- comparing ----------------------------------------------------------------------------------


@pytest.mark.background(RESULTS)
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


@pytest.mark.background(RESULTS)
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


# ---- the figure ---------------------------------------------------------------------------------


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
    two = {
        axis: [(x, replace(case, tasks=min(case.tasks, 4))) for x, case in points[:2]]
        for axis, points in sweep(False).items()
    }
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
        "sweep tasks=1", "sweep tasks=4", "sweep width=8", "sweep width=16"
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
