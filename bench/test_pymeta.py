"""pytest-benchmark's view of pymeta alone: `pytest bench --benchmark-only`.

Rivals need processes of their own and stand in `python -m bench`; here two revisions of pymeta
are compared (`--benchmark-save`, `--benchmark-compare`).
"""

import functools

import pytest

import pymeta
from bench import native_calls, verify
from bench.cases import CASES, Case


@functools.lru_cache(maxsize=1)
def prepared(case: Case):
    data = verify.make_data(case)
    return data, verify.make_reference(case, data)


@pytest.mark.parametrize("form", ["kernel", "round_trip"])
@pytest.mark.parametrize("name", CASES)
def test_one_thread(benchmark, name, form):
    case = CASES[name]
    data, reference = prepared(case)
    run, read = getattr(native_calls, form)(case, data)
    before = pymeta.num_threads()
    pymeta.set_num_threads(1)
    try:
        verify.check(case, reference, "pymeta", *read(run()))
        benchmark.group = name
        benchmark.extra_info.update(
            flops=case.flops() * case.tasks, executor=native_calls.executor(case, data)
        )
        benchmark(run)
    finally:
        pymeta.set_num_threads(before)
