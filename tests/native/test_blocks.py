"""Networks of embeddings, branches and normalisations of every kind, drawn at random."""

import collections

import torch
from blocks import every_layer, table_chains
from cases import cases, compare
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DTYPES, ISAS, PROFILE
from native_help import POISONS, check_bits, check_isolation

CASES = cases(tasks=(1, 2, 3, 17), chain=table_chains())


def test_random_blocks_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=30)
    @given(CASES)
    def check(case):
        counts.update(compare(case))
        counts.update({layer[0] for layer in every_layer(case.chain)})

    check()
    assert counts[torch.float64] >= 30
    assert counts[torch.float32] >= 20  # the cases that a kink rules out are the exception
    for kind in ("residual", "branches", "glu", "tabular", "fixed_norm", "step_norm", "dropout"):
        assert counts[kind] >= 3, kind


@settings(PROFILE, max_examples=15)
@given(CASES, st.sampled_from(DTYPES), ISAS)
def test_the_bits_of_a_task_are_its_own(case, dtype, isa):
    check_bits(case, dtype, isa)


@settings(PROFILE, max_examples=15)
@given(CASES, st.sampled_from(sorted(POISONS)), st.sampled_from(["xs", "ys", "xq"]),
       st.sampled_from(DTYPES), ISAS)  # fmt: skip
def test_a_diverged_task_is_its_own_affair(case, poison, where, dtype, isa):
    check_isolation(case, poison, where, dtype, isa, threads=(1,))
