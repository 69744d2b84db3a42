"""pytest-benchmark's view of pymeta alone: `pytest bench --benchmark-only`.

Rivals need processes of their own and stand in `python -m pymeta.bench`; here two revisions of
pymeta are compared (`--benchmark-save`, `--benchmark-compare`). The cases are those of the package.
"""

import functools

import pytest

import pymeta
from pymeta.bench import ours, verify
from pymeta.bench.cases import CASES, Case
from pymeta.bench.contestants import on_host
from pymeta.bench.devices import Cpu

FORMS = {
    "kernel": ours.kernel,
    "round_trip": lambda case, data: ours.round_trip(case, data, Cpu())[:2],
}


@functools.lru_cache(maxsize=1)
def prepared(case: Case):
    data = verify.make_data(case)
    return data, verify.make_reference(case, data)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_one_thread(benchmark, name, form):
    case = CASES[name]
    data, reference = prepared(case)
    run, read = FORMS[form](case, data)
    before = pymeta.num_threads()
    pymeta.set_num_threads(1)
    try:
        loss, arrays = read(run())
        loss = None if loss is None else float(on_host(loss).reshape(()))
        verify.check(case, reference, "pymeta", loss, [on_host(a) for a in arrays])
        benchmark.group = name
        benchmark.extra_info.update(flops=case.flops() * case.tasks, executor=ours.executor(case))
        benchmark(run)
    finally:
        pymeta.set_num_threads(before)
