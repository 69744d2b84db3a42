"""The fuzz targets on what fuzzing found, on inputs that reach far, and on a few random ones.

`corpus/file` and `corpus/binding` hold the inputs (see target_file.py, target_binding.py for what
their bytes mean). An input that once broke something stays there for good.
"""

import random
from pathlib import Path

import pytest
import target_binding
import target_file
from source import Source

from pymeta import native

CORPUS = Path(__file__).parent / "corpus"
TARGETS = {"file": target_file, "binding": target_binding}
INPUTS = sorted(p for name in TARGETS for p in (CORPUS / name).iterdir())


@pytest.mark.parametrize("path", INPUTS, ids=lambda p: f"{p.parent.name}-{p.name[:40]}")
def test_corpus(path):
    TARGETS[path.parent.name].one_input(path.read_bytes())


def test_there_is_a_corpus():
    assert {p.parent.name for p in INPUTS} == set(TARGETS)


def test_random_programs():
    chance = random.Random(1)
    for _ in range(200):
        target_binding.one_input(chance.randbytes(chance.randrange(200)))


def test_random_files():
    chance = random.Random(2)
    seeds = [p.read_bytes() for p in INPUTS if p.parent.name == "file"]
    for _ in range(200):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        target_file.one_input(bytes(data))


def test_seeds_mean_the_files_that_they_were_made_of():
    seed = (CORPUS / "file" / "models").read_bytes()
    assert target_file.seed_of(target_file.content(seed)) == seed


def test_programs_reach_every_step(monkeypatch):
    """All four jobs, their repeats, engines and plans are run to the end by random programs."""
    reached = set()

    class Counting:
        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            found = getattr(self.real, name)
            if not callable(found):
                return found

            def called(*args, **kwargs):
                result = found(*args, **kwargs)
                reached.add(name)
                return Counting(result) if name in ("Problem", "Engine") else result

            return called

    lib = Counting(native.extension())
    lib.Engine = lambda p, *args: Counting(native.extension().Engine(p.real, *args))
    jobs = {}  # of the calls, which are kept so that none has another's id

    def a_call(problem, dtype, job):
        made = native.extension().Call(problem.real, dtype, job)
        jobs[id(made)] = job, made
        return made

    def run(source, device, function):
        run_one(source, device, function)
        reached.add(jobs[id(function.__self__)][0])

    lib.Call, run_one = a_call, target_binding.run
    monkeypatch.setattr(target_binding, "lib", lib)
    monkeypatch.setattr(target_binding, "run", run)
    chance = random.Random(3)
    for _ in range(300):
        target_binding.one_input(chance.randbytes(300))
    steps = {"meta", "adapt", "reptile", "predict", "plan", "adapt_predict", "RepeatedCall"}
    assert reached >= steps | {"set_isa", "set_executor", "set_num_threads"}


def test_the_targets_can_fail(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(target_binding, "a_problem", broken)
    with pytest.raises(RuntimeError, match="planted"):
        target_binding.one_input(b"\0" * 20)
    monkeypatch.setattr(target_file.Adapter, "load", broken)
    with pytest.raises(RuntimeError, match="planted"):
        target_file.one_input(b"\0")


def test_a_source_reads_zeros_behind_its_end():
    source = Source(b"")
    assert (source.byte(), source.integer(), source.rest(), source.chance(255)) == (0, 0, 0, False)
