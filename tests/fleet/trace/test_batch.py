"""Batches: what is dropped leaves its compute to what is kept."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.trace.batch import Batch, Tally, elapsed_ns


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), max_size=20), max_size=5))
def test_selection_conserves_compute(rows: list[list[tuple[int, bool]]]) -> None:
    carry, total, kept = 0, 0, []
    for part in rows:
        n = len(part)
        batch = Batch(
            np.arange(n, dtype=np.uint64),
            np.zeros(n, np.uint8),
            np.ones(n, np.uint16),
            np.array([compute for compute, _ in part], np.int64),
        )
        chosen, carry = batch.select(np.array([keep for _, keep in part], np.bool_), carry)
        kept += chosen.compute.tolist()
        total += sum(compute for compute, _ in part)
    assert sum(kept) + carry == total
    expected, pending = [], 0
    for compute, keep in (row for part in rows for row in part):
        pending += compute
        if keep:
            expected.append(pending)
            pending = 0
    assert kept == expected


def test_elapsed_starts_at_nothing_and_never_goes_back() -> None:
    tally = Tally()
    assert elapsed_ns(np.array([5, 7, 6, 10]), None, tally).tolist() == [0, 2, 0, 4]
    assert elapsed_ns(np.array([12]), 10, tally).tolist() == [2]
    assert list(tally.notes.values()) == [1]
