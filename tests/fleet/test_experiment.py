"""fleet.experiment: seeds and scale."""

import dataclasses
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from fleet.experiment import Experiment, scaled_pages, scaled_transactions, vm_seed


def test_seeds_are_those_of_splitmix64() -> None:
    # The published first outputs of SplitMix64 from state 1234567, without the lowest bit.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [vm_seed(1234567, vm) for vm in range(4)] == [output >> 1 for output in published]


@given(st.integers(0, (1 << 63) - 1))
def test_seeds_are_distinct_and_fit_a_signed_word(seed: int) -> None:
    seeds = [vm_seed(seed, vm) for vm in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= one < 1 << 63 for one in seeds)


def test_scale_applies_to_caches_in_use_and_not_to_the_profile(experiment: Experiment) -> None:
    third = dataclasses.replace(experiment, scale=Fraction(1, 3))
    whole = experiment.costs
    assert experiment.host_config().costs == whole
    for costs in (third.host_config().costs, third.guests()[0].costs):
        assert (costs.l2_bytes, costs.llc_bytes) == (whole.l2_bytes // 3, whole.llc_bytes // 3)
        assert (costs.stlb_entries, costs.invept_ps) == (whole.stlb_entries, whole.invept_ps)
    assert f"llc_bytes = {whole.llc_bytes}" in third.to_toml()


def test_scale_applies_to_memory_and_transactions() -> None:
    assert scaled_pages(16 << 30, Fraction(1, 16)) == (1 << 30) // 4096
    assert scaled_transactions(100, Fraction(1, 16)) == 6
    assert scaled_transactions(1, Fraction(1, 16)) == 1
    assert scaled_transactions(0, Fraction(1, 16)) == 0
