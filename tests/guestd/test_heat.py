"""Page heat: kernels against numpy, ranges against their definition, a run's bins against its accesses."""

from pathlib import Path

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd.heat import captured, count_bins, count_mapped
from proto.costs import Costs
from proto.counters import C
from proto.entry import FRAME_SHIFT, PRESENT, WRITABLE
from proto.layout import HEAT, HEAT_SPACES
from tests.small_fleet import FAST_PAGES, PAGES, new_fleet, run_fleet, small_guest, until_populated, without_measured

TABLES, FRAMES = 3, 2048


@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(0, 200))
def test_bins_count_as_numpy_does(seed: int, one: int, other: int) -> None:
    start, end = sorted((one, other))
    random = np.random.default_rng(seed)
    gpt = random.permutation(FRAMES)[: TABLES * 512] << FRAME_SHIFT | PRESENT
    gpt[random.random(gpt.size) < 0.2] = 0
    ept = random.permutation(FRAMES) << FRAME_SHIFT | np.where(random.random(FRAMES) < 0.8, WRITABLE, 0)
    address = random.integers(0, TABLES * 512 << 12, 200)
    chosen = random.integers(0, 2, gpt.size).astype(np.uint8)
    none = np.zeros(0, np.uint8)
    for mapped in (None, none, chosen):
        if mapped is None:
            pages = address[start:end] >> 12
        else:
            pages = np.flatnonzero((gpt != 0) & (chosen != 0) if mapped.size else gpt)
        gva, gpa, hpa = np.zeros(TABLES, np.int64), np.zeros(FRAMES // 512, np.int64), np.zeros(FRAMES // 512, np.int64)
        if mapped is None:
            count_bins(address, start, end, gpt, ept, gva, gpa, hpa)
        else:
            count_mapped(gpt, ept, mapped, gva, gpa, hpa)
        gpfns = gpt[pages][gpt[pages] != 0] >> FRAME_SHIFT
        slots = ept[gpfns][ept[gpfns] & WRITABLE != 0] >> FRAME_SHIFT
        assert gva.tolist() == np.bincount(pages >> 9, minlength=TABLES).tolist()
        assert gpa.tolist() == np.bincount(gpfns >> 9, minlength=gpa.size).tolist()
        assert hpa.tolist() == np.bincount(slots >> 9, minlength=hpa.size).tolist()


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9)), min_size=1, max_size=20), st.integers(0, 60))
def test_the_best_ranges_are_the_longest_prefix_that_fits(ranges: list[tuple[int, int]], capacity: int) -> None:
    heat, mapped = (np.array(values, np.int64) for values in zip(*ranges, strict=True))
    taken = held = used = 0
    for accesses, pages in ranges:
        if used + pages > capacity:
            break
        taken, held, used = taken + 1, held + accesses, used + pages
    assert captured(heat, mapped, np.arange(len(ranges)), capacity) == (taken, held)


def test_each_access_is_in_one_bin_of_each_space(costs: Costs, tmp_path: Path) -> None:
    path = tmp_path / "heat.bin"
    config = msgspec.structs.replace(small_guest(costs, "hyperplace", workload={"layout": "end"}), heat_path=str(path))
    fleet = new_fleet(config)
    guest = until_populated(fleet)
    before = int(guest.machine.counters[C.access__total])
    machine = guest.machine
    report = fleet.run().reports[0]
    records = np.fromfile(path, HEAT)
    for number, name in enumerate(HEAT_SPACES):
        mine = records[records["space"] == number]
        assert mine["accesses"].sum() == report["access"]["total"] >= machine.counters[C.access__total] - before
        assert (mine["address"] % (2 << 20) == 0).all()
        assert np.unique(mine[["time_ps", "address"]]).size == mine.size
        found = report["locality"][name]
        assert 0 < found["ranges_fast_ratio"] <= 1 and 0 < found["bins_fast_ratio"] <= 1
        assert 1 <= found["hot_ranges"] <= found["ranges"]
    hot = [np.bincount(np.unique(mine["time_ps"], return_inverse=True)[1], mine["hot_pages"])
           for mine in (records[records["space"] == number] for number in range(3))]  # fmt: skip
    assert hot[0].max() > 0 and records["hot_pages"].max() <= 512
    # A page is in one bin of each space; in none of hPA while the host has swapped it out, which it has not here.
    assert hot[0].tolist() == hot[1].tolist() == hot[2].tolist()
    gva, hpa = (records["address"][records["space"] == number] for number in (0, 2))
    assert set(gva) <= set(machine.table_gva)
    assert 0 <= hpa.min() < FAST_PAGES << 12 < PAGES << 12 < hpa.max() < 2 * PAGES << 12


def test_nothing_else_changes_with_it(costs: Costs, tmp_path: Path) -> None:
    plain = run_fleet(small_guest(costs, "hyperplace"))[0]
    config = msgspec.structs.replace(small_guest(costs, "hyperplace"), heat_path=str(tmp_path / "heat.bin"))
    watched = without_measured(run_fleet(config)[0])
    del watched["locality"]
    assert watched == without_measured(plain)


def test_a_policy_that_does_not_sample_has_no_trees(costs: Costs, tmp_path: Path) -> None:
    config = msgspec.structs.replace(small_guest(costs, "none", run_ms=20), heat_path=str(tmp_path / "heat.bin"))
    assert [list(space) for space in run_fleet(config)[0]["locality"].values()] == [["bins_fast_ratio"]] * 3
