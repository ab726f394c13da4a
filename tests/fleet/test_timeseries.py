"""Differences per interval add up to the totals; events survive the way into parquet, whole or torn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.timeseries import column_name, interval_table, merge_events, write_intervals
from proto.control import Sample
from proto.counters import COUNTERS, C
from proto.layout import EVENT, EVENT_KINDS
from proto.units import PS_PER_MS, PS_PER_S


def test_columns_are_named_as_in_the_summary() -> None:
    assert column_name(C.vmstat__pgpromote_success) == "vmstat.pgpromote_success"
    assert column_name(C.exit__ept_violation) == "kvm.exits.ept_violation"
    assert column_name(C.instr__invlpg) == "instructions.invlpg"
    assert len({column_name(counter) for counter in C}) == COUNTERS


def test_one_vm(make_sample: Callable[..., Sample], tmp_path: Path) -> None:
    samples = [
        make_sample(4, 1100 * PS_PER_MS, "populate", 0.5, access__total=10, access__fast=10),
        make_sample(4, 1200 * PS_PER_MS, "run", 0.5, access__total=10, access__fast=10),
        make_sample(4, 1400 * PS_PER_MS, "run", 0.75, access__total=2_000_010, access__fast=500_010),
        make_sample(4, 1500 * PS_PER_MS, "done", 0.75, access__total=2_000_014, access__fast=500_014),
    ]
    write_intervals(interval_table(samples, {4: PS_PER_S}), tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["vm"].to_pylist() == [4] * 4
    assert table["time_s"].to_pylist() == [1.1, 1.2, 1.4, 1.5]
    assert table["interval_s"].to_pylist() == pytest.approx([0.1, 0.1, 0.2, 0.1])
    assert table["phase"].to_pylist() == ["populate", "populate", "run", "run"]
    assert table["fast_ratio"].to_pylist() == [1.0, None, 0.25, 1.0]
    assert table["throughput_mops"].to_pylist() == pytest.approx([1e-4, 0.0, 10.0, 4e-5])
    assert table["agent_cpu_s"].to_pylist() == [0.5, 0.0, 0.25, 0.0]
    assert table["access.total"].to_pylist() == [10, 0, 2_000_000, 4]


def test_truth_is_told_for_each_interval(make_sample: Callable[..., Sample]) -> None:
    first = {"believed": 10, "right": 5, "asked": 20, "found": 5, "accesses": 100, "fast": 30, "oracle_fast": 60}
    second = {"believed": 10, "right": 5, "asked": 40, "found": 5, "accesses": 200, "fast": 80, "oracle_fast": 160}
    samples = [
        make_sample(0, time * PS_PER_MS, "run", 0.0, **{f"truth__{name}": count for name, count in counts.items()})
        for time, counts in ((1, {}), (2, first), (3, second), (4, second))
    ]
    table = interval_table(samples, {})
    rows = {name: table[f"hotness.{name}"].to_pylist() for name in ("precision", "recall", "f1", "oracle_fast_ratio")}
    assert rows["precision"] == [None, 0.5, 0.0, None]
    assert rows["recall"] == [None, 0.25, 0.0, None]
    assert rows["f1"] == pytest.approx([None, 1 / 3, 0.0, None])
    assert rows["oracle_fast_ratio"] == [None, 0.6, 1.0, None]
    assert table["hotness.share_of_oracle"].to_pylist() == [None, 0.5, 0.5, None]


def test_a_run_without_samples_is_an_empty_table() -> None:
    assert interval_table([], {}).num_rows == 0


@given(
    st.dictionaries(st.tuples(st.integers(0, 3), st.integers(1, 9)), st.integers(0, 1000), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
)
def test_intervals_add_up(increments: dict[tuple[int, int], int], random: object) -> None:
    totals: dict[int, int] = {}
    samples = []
    for vm, step in sorted(increments):
        totals[vm] = totals.get(vm, 0) + increments[vm, step]
        counters = np.zeros(COUNTERS, np.int64)
        counters[C.kvm__tlb_flush] = totals[vm]
        samples.append(Sample(vm=vm, time_ps=step, phase="run", counters=counters.tobytes(), agent_cpu_s=0.0))
    random.shuffle(samples)  # type: ignore[attr-defined]
    table = interval_table(samples, {})
    vms = np.array(table["vm"])
    for vm, total in totals.items():
        assert np.array(table["kvm.tlb_flush"])[vms == vm].sum() == total
        assert np.array(table["interval_s"])[vms == vm].sum() * PS_PER_S == pytest.approx(
            max(step for v, step in increments if v == vm)
        )


def test_events_of_all_guests(tmp_path: Path) -> None:
    first = np.zeros(3, EVENT)
    first["time_ps"] = [PS_PER_S, 2 * PS_PER_S, 2 * PS_PER_S]
    first["kind"] = [0, 1, len(EVENT_KINDS) + 5]
    first["gva"] = [0x7F00_0000_1000, 2, 3]
    second = np.zeros(2, EVENT)
    second["vm"], second["target"] = 1, 1
    parts = [tmp_path / f"events.vm{vm}.bin" for vm in range(3)]
    parts[0].write_bytes(first.tobytes())
    parts[1].write_bytes(second.tobytes()[:-5])  # killed within a record
    assert merge_events(parts, tmp_path / "events.parquet") == 4
    table = pq.read_table(tmp_path / "events.parquet")
    assert table["vm"].to_pylist() == [0, 0, 0, 1]
    assert table["kind"].to_pylist() == [EVENT_KINDS[0], EVENT_KINDS[1], "unknown", EVENT_KINDS[0]]
    assert table["time_s"].to_pylist() == [1.0, 2.0, 2.0, 0.0]
    assert table["gva"].to_pylist()[0] == 0x7F00_0000_1000
    assert table["target"].to_pylist() == [0, 0, 0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["events.parquet"]


def test_no_events_is_an_empty_table(tmp_path: Path) -> None:
    assert merge_events([], tmp_path / "events.parquet") == 0
    assert pq.read_table(tmp_path / "events.parquet").num_rows == 0
