"""PML: an entry for each D bit that is set, downwards from 511, an exit when there is no room, and a bitmap of all."""

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd.fault import table_frames
from guestd.jit import kernel
from guestd.pml import ENTRIES, FULL, Pml, flush_log, has_dirty, log_dirty, new_pml, take_dirty
from guestd.vcpu import EPT_REFAULT
from proto.arrays import Bytes, Words
from proto.config import HostKernel, Scalar
from proto.costs import Costs
from proto.counters import C, Counters, new_counters
from proto.entry import DIRTY, HUGE, PRESENT
from tests.guestd.machines import guest_config, run_guest, start_fleet
from tests.guestd.reference import bitmap

PAGES = 300


@kernel
def log(pml: Pml, vcpu: int, gpfn: int, useless: int, counters: Counters) -> None:
    log_dirty(pml, vcpu, gpfn, useless, counters)


@kernel
def take(pml: Pml, ept: Words, ept_pde: Bytes) -> tuple[bool, int]:
    return has_dirty(pml), take_dirty(pml, ept, ept_pde)


@given(writes=st.lists(st.tuples(st.integers(0, 1), st.integers(0, PAGES - 1), st.integers(0, 1)), max_size=1500))
def test_the_log_is_a_list_of_512_and_the_bitmap_the_set_of_what_left_it(
    writes: list[tuple[int, int, int]], costs: Costs
) -> None:
    pml, counters = new_pml(2, np.zeros((2, 5), np.int64), True, costs), new_counters()
    logs: list[list[int]] = [[], []]
    gone: set[int] = set()
    exits = 0
    for vcpu, gpfn, useless in writes:
        if len(logs[vcpu]) == ENTRIES:
            gone |= set(logs[vcpu])
            logs[vcpu] = []
            exits += 1
        logs[vcpu].append(gpfn)
        log(pml, vcpu, gpfn, useless, counters)
    for vcpu, mine in enumerate(logs):
        assert pml.next[vcpu] == ENTRIES - 1 - len(mine) >= FULL
        assert (pml.log[vcpu, ENTRIES - len(mine) :][::-1] >> 12).tolist() == mine
        assert (pml.log[vcpu] % 4096 == 0).all(), "gPAs, 4 KiB aligned"
    assert counters[C.pml__entries] == len(writes)
    assert counters[C.pml__useless] == sum(useless for *_, useless in writes)
    assert counters[C.exit__pml_full] == exits
    spent = exits * (costs.vmexit_ps + ENTRIES * costs.pml_entry_ps)
    assert pml.due.sum() == spent
    assert flush_log(pml, 0) == len(logs[0]) * costs.pml_entry_ps
    assert flush_log(pml, 0) == 0
    gone |= set(logs[0])
    ept = np.full(320, DIRTY | PRESENT, np.int64)
    pdes = np.array([DIRTY | HUGE], np.uint8)
    assert take(pml, ept, pdes) == (bool(writes), len(gone))
    assert pdes[0] == (HUGE if gone else DIRTY | HUGE)
    assert (bits(pml, 0), bits(pml, 1)) == (set(), gone)
    assert set(np.flatnonzero(ept == PRESENT).tolist()) == gone


def bits(pml: Pml, row: int) -> set[int]:
    return {64 * word + bit for word in range(5) for bit in range(64) if int(pml.dirty[row, word]) >> bit & 1}


def test_a_guest_s_dirty_pages_are_exactly_those_that_were_logged(costs: Costs) -> None:
    """Whoever dirtied them: accesses, walks, the kernel that clears, migrates and swaps, records."""
    params: dict[str, Scalar] = {"epoch_ms": 2, "load_period": 7, "tau_split": 1, "initial": "ram", "fill_free": True}
    guest, report = run_guest(guest_config(costs, "hyperplace", params, vcpus=2, host=HostKernel(pml=True)))
    machine = guest.machine
    logged = bitmap(machine, 0)
    for vcpu in range(2):
        logged |= set((machine.pml.log[vcpu, int(machine.pml.next[vcpu]) + 1 :] >> 12).tolist())
    assert report["migration"]["swapped_pairs"] > 0
    assert logged == set(np.flatnonzero(machine.ept & DIRTY).tolist())
    kernel = {*table_frames(machine.tables).tolist(), *machine.ds.gpfn.reshape(-1).tolist()}
    assert machine.counters[C.pml__useless] == len(kernel & logged) == len(kernel), "no filter by address"
    assert machine.counters[C.pml__entries] == len(logged)
    assert machine.counters[C.exit__pml_full] > 0
    assert report["pml"]["full_exits"] + report["populate"]["kvm"]["exits"]["pml_full"] > 0


def test_clearing_the_pmu_s_buffers_meets_ept_violations_on_the_vcpu_whose_they_are(costs: Costs) -> None:
    def boot(prefault: bool) -> Words:
        config = guest_config(costs, "hyperplace", {"load_period": 1 << 20}, vcpus=2)
        kernel = msgspec.structs.replace(config.kernel, ds_prefault=prefault)
        fleet = start_fleet(msgspec.structs.replace(config, kernel=kernel))
        machine = fleet.guests[0].machine
        while not fleet.guests[0].now:
            fleet.step()
        exits[prefault] = int(machine.counters[C.exit__ept_violation])
        return machine.vcpus.ledger[:, EPT_REFAULT].copy()

    exits: dict[bool, int] = {}
    more = boot(True) - boot(False)
    assert more.tolist() == [16 * costs.ept_violation_alloc_ps] * 2
    assert exits[True] - exits[False] >= 32


def test_off_nothing_is_logged(costs: Costs) -> None:
    guest, report = run_guest(guest_config(costs))
    assert guest.machine.counters[[C.pml__entries, C.exit__pml_full]].tolist() == [0, 0]
    assert "pml" not in report
    assert not guest.machine.pml.dirty.any()
