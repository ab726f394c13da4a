"""fleet.sweep.local: who may start beside whom. Running cells: test_run."""

from hypothesis import given
from hypothesis import strategies as st

from fleet import spec
from fleet.doctor import demand_of
from fleet.sweep.estimate import memory_bytes
from fleet.sweep.local import Load

AMOUNT = st.integers(0, 1000)


@given(st.lists(AMOUNT, max_size=8), AMOUNT, st.data())
def test_cells_together_never_exceed_what_was_free(needs: list[int], free: int, data: st.DataObject) -> None:
    promised = touched = 0
    for needed in needs:
        if Load(free, free - touched, promised).admits(needed):
            promised += needed
            touched += data.draw(st.integers(0, needed))
        assert promised <= free


def test_a_cell_is_also_held_back_by_others_that_took_memory_meanwhile() -> None:
    assert Load(100, 60, 0).admits(60)
    assert not Load(100, 59, 0).admits(60)
    assert not Load(100, 100, 41).admits(60)


def test_the_bound_of_a_cell_is_what_its_run_is_judged_by() -> None:
    experiment = spec.load(None, {"vms": 3, "memory": "32MiB"})
    assert memory_bytes(experiment) == demand_of(experiment.guests()).memory_bytes > 3 * (32 << 20) // 4096 * 64
