"""PEBS: a record per period of each event, PMI at the threshold, drops past the maximum, drain empties the buffer."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd import engine, pebs
from guestd.engine import PMI, REACHED
from guestd.errors import PebsEptViolation
from guestd.machine import Machine, S
from guestd.pebs import Pebs, drain, new_ds_area
from guestd.tiering.policy import LOAD_LATENCY, RECORD_GROUPS, STORES, Sampling
from guestd.vcpu import DS_FAULT, DS_INDEX, PEBS_RECORD
from proto.config import HostKernel
from proto.costs import Costs
from proto.counters import C
from proto.entry import ACCESSED, DIRTY, FRAME_SHIFT, PRESENT, STAMP_PAGE_SHIFT, WRITABLE
from proto.layout import OPERATION
from proto.trace import LOAD, MODIFY, STORE
from proto.units import PS_PER_MS
from tests.guestd.machines import SLOTS, bare_machine, guest_config, run_guest, small_costs, touch_pages

NO_OPERATIONS = np.zeros(0, OPERATION)
KINDS = st.lists(st.sampled_from((LOAD, STORE, MODIFY)), min_size=1, max_size=60)


def sampled(costs: Costs, sampling: Sampling, pages: int = 8, **changes: object) -> Machine:
    """Even pages fast, odd ones slow; every load is tagged."""
    machine = bare_machine(small_costs(costs, **{"load_latency_tag_interval": 1} | changes), 1, sampling=sampling)
    for page in range(pages):
        slot = page + (SLOTS // 2 if page % 2 else 0)
        machine.gpt[page] = page << FRAME_SHIFT | PRESENT | WRITABLE
        machine.ept[page] = slot << FRAME_SHIFT | PRESENT | WRITABLE
        machine.stamps[slot] = machine.state[S.OWNER] | page << STAMP_PAGE_SHIFT
    warm_up(machine, pages)
    return machine


def warm_up(machine: Machine, pages: int) -> None:
    """Touch every page, unsampled, so that from here on a latency is that of the tier and a TLB hit."""
    on, machine.ds.params[pebs.P_ON] = machine.ds.params[pebs.P_ON], 0
    touch_pages(machine, 0, list(range(pages)), MODIFY)
    run(machine)
    machine.ds.params[pebs.P_ON] = on
    machine.counters[:] = 0


def run(machine: Machine) -> int:
    """Run what the vCPU has to do, at most a millisecond of it."""
    machine.state[S.END_PS] = machine.state[S.NOW] + PS_PER_MS
    return int(engine.run(machine, NO_OPERATIONS, int(machine.state[S.END_PS])))


def pmu(machine: Machine, sampling: Sampling) -> Pebs:
    return Pebs(
        machine.ds, machine.pml, machine.ept, machine.tables.ept_pde, machine.vcpus.field, machine.counters, sampling
    )


@given(
    period=st.integers(1, 9),
    pages=st.lists(st.integers(0, 7), min_size=1, max_size=60),
    kind=st.sampled_from((LOAD, STORE, MODIFY)),
)
def test_a_record_per_period_of_loads_above_the_threshold(
    period: int, pages: list[int], kind: int, costs: Costs
) -> None:
    machine = sampled(costs, Sampling(period, 150, 0))
    touch_pages(machine, 0, pages, kind)
    run(machine)
    events = [page for page in pages if page % 2] if kind != STORE else []
    recorded = events[period - 1 :: period]
    records = machine.ds.of(0, int(machine.vcpus.field[0, DS_INDEX]))
    assert machine.counters[C.pebs__records] == len(records) == len(recorded)
    assert records["address"].tolist() == [int(machine.table_gva[0]) + (page << 12) for page in recorded]
    assert (records["data_source"] == 1).all() and (records["latency"] >= 150).all()
    assert (records["applicable_counters"] == 1 << LOAD_LATENCY).all()
    assert (np.diff(records["tsc"]) > 0).all()


@given(
    periods=st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)),
    accesses=st.lists(st.tuples(st.integers(0, 7), st.sampled_from((LOAD, STORE, MODIFY))), min_size=1, max_size=40),
    groups=st.sampled_from(tuple(RECORD_GROUPS)),
)
def test_records_are_the_events_over_the_period_less_the_drops(
    periods: tuple[int, int, int, int], accesses: list[tuple[int, int]], groups: str, costs: Costs
) -> None:
    """Of each event on its own, whatever the others do, and nobody drains."""
    loads, fast, slow, stores = periods
    sampling = Sampling(loads, 150, stores, fast, slow, groups=groups)
    machine = sampled(costs, sampling)
    touch_pages(machine, 0, [page for page, _ in accesses])
    machine.vcpus.kind[0, : len(accesses)] = [kind for _, kind in accesses]
    while run(machine) == PMI:
        pass
    loaded = [page % 2 for page, kind in accesses if kind != STORE]
    events = (sum(loaded), len(loaded) - sum(loaded), sum(loaded), sum(kind != LOAD for _, kind in accesses))
    report = pmu(machine, sampling).report()
    assert report["vcpus"] == [report["events"]]
    assert set(report["events"]) == {name for name, period in zip(pebs.EVENT_NAMES, periods, strict=True) if period}
    for name, period, count in zip(pebs.EVENT_NAMES, periods, events, strict=True):
        if period:
            one = report["events"][name]
            assert (one["period"], one["events"]) == (period, count)
            assert one["records"] == count // period - one["dropped"]
    total = sum(one["records"] for one in report["events"].values())
    assert machine.counters[C.pebs__records] == machine.vcpus.field[0, DS_INDEX] == total
    assert machine.counters[C.pebs__dropped] == sum(one["dropped"] for one in report["events"].values())
    assert total <= 2 * 4096 // RECORD_GROUPS[groups]


@given(period=st.integers(1, 9), kinds=KINDS)
def test_a_record_per_period_of_stores(period: int, kinds: list[int], costs: Costs) -> None:
    machine = sampled(costs, Sampling(0, 0, period))
    touch_pages(machine, 0, [2] * len(kinds))
    machine.vcpus.kind[0, : len(kinds)] = kinds
    run(machine)
    stores = sum(kind != LOAD for kind in kinds)
    assert machine.counters[C.pebs__records] == stores // period
    assert machine.vcpus.ledger[0, PEBS_RECORD] == stores // period * costs.pebs_record_ps


def test_pmi_at_the_threshold_and_drops_past_the_maximum(costs: Costs) -> None:
    machine = sampled(costs, Sampling(1, 0, 0))
    maximum, threshold = 128, 128 - 12  # 8 general counters and 4 fixed ones
    assert (machine.ds.params[pebs.P_MAXIMUM], machine.ds.params[pebs.P_INTERRUPT]) == (maximum, threshold)
    touch_pages(machine, 0, [1] * 160)
    assert run(machine) == PMI
    assert machine.vcpus.field[0, DS_INDEX] == threshold
    # Nobody drains: each further record fills the rest of the area, then is lost, and asks again.
    left = 160 - threshold
    assert [run(machine) for _ in range(left)] == [PMI] * left
    assert machine.counters[C.pebs__records] == maximum
    assert machine.counters[C.pebs__dropped] == 160 - maximum
    assert machine.counters[C.access__total] == 160


def test_without_large_pebs_there_is_a_pmi_per_record(costs: Costs) -> None:
    machine = sampled(costs, Sampling(3, 0, 0, large=False))
    touch_pages(machine, 0, [1] * 10)
    for records in (3, 6, 9):
        assert run(machine) == PMI
        assert machine.counters[C.access__total] == records
        machine.vcpus.field[0, DS_INDEX] = 0
    assert run(machine) != PMI


def test_a_new_programming_loads_the_counters_anew(costs: Costs) -> None:
    sampling = Sampling(4, 0, 0)
    machine = sampled(costs, sampling)
    hardware = pmu(machine, sampling)
    touch_pages(machine, 0, [1] * 3)
    run(machine)
    hardware.program(Sampling(2, 0, 3, large=False))
    touch_pages(machine, 0, [1])
    assert run(machine) != PMI
    touch_pages(machine, 0, [1])
    assert run(machine) == PMI
    assert set(hardware.report()["events"]) == {"load_latency", "stores"}


@pytest.mark.parametrize("groups", RECORD_GROUPS)
def test_a_record_s_groups_decide_its_size_and_what_fits(groups: str, costs: Costs) -> None:
    size = {"memory": 64, "memory+gpr": 208, "memory+gpr+xmm": 464, "memory+gpr+xmm+lbr": 1232}[groups]
    area = new_ds_area(2, 16, Sampling(1, 64, 0, groups=groups), costs)
    assert area.records.shape == (2, 65536 // size, size // 8), "64 KiB, as stock Linux has"
    assert area.params[pebs.P_INTERRUPT] == 65536 // size - 12
    machine = sampled(costs, Sampling(1, 0, 0, groups=groups))
    touch_pages(machine, 0, [1] * 5)
    while run(machine) == PMI:
        pass
    records = machine.ds.of(0, 5)
    assert (records["format_size"] >> 48 == size).all()
    assert pebs.RECORD_BYTES == 64


def test_a_small_area_of_large_records_still_interrupts(costs: Costs) -> None:
    area = new_ds_area(1, 1, Sampling(1, 64, 0, groups="memory+gpr+xmm+lbr"), costs)
    assert (area.params[pebs.P_MAXIMUM], area.params[pebs.P_INTERRUPT]) == (3, 1)


def test_a_record_over_two_pages_waits_for_both(costs: Costs) -> None:
    """Record 8 of 464 bytes lies in both pages of the area."""
    sampling = Sampling(1, 0, 0, groups="memory+gpr+xmm")
    machine = sampled(costs, sampling)
    first, second = machine.ds.gpfn[0]
    hardware = pmu(machine, sampling)
    touch_pages(machine, 0, [1] * 20)
    machine.ds.params[pebs.P_INTERRUPT] = 99
    machine.ept[second] &= ~PRESENT
    assert run(machine) == PMI
    assert machine.vcpus.field[0, [DS_INDEX, DS_FAULT]].tolist() == [9, 9]
    assert hardware.violations(0).tolist() == [second]
    assert machine.ept[first] & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    machine.ept[[first, second]] = machine.ept[[first, second]] & ~PRESENT
    assert hardware.violations(0).tolist() == [first, second]
    machine.ept[[first, second]] |= PRESENT
    hardware.resolved(0)
    assert (machine.ept[[first, second]] & (ACCESSED | DIRTY) == ACCESSED | DIRTY).all()
    assert hardware.violations(0).size == 0
    assert run(machine) in (REACHED, engine.NEED_ACCESSES)
    assert (machine.ds.of(0, 17)["address"] == machine.table_gva[0] + 4096).all(), "nothing is lost"


def test_drain_empties_one_vcpu_s_area_in_order(costs: Costs) -> None:
    machine = sampled(costs, Sampling(1, 0, 0))
    touch_pages(machine, 0, [1, 2, 3, 4])
    run(machine)
    records = machine.ds.of(0, 4).copy()
    out = np.zeros((128, 5), np.int64)
    assert drain(machine.ds.records[0], machine.vcpus.field[0], out) == 4
    assert out[:4, 0].tolist() == records["address"].tolist()
    assert out[:4, 1].tolist() == [1, 0, 1, 0]
    assert out[:4, 2].tolist() == records["latency"].tolist()
    assert out[:4, 4].tolist() == records["tsc"].tolist()
    assert machine.vcpus.field[0, DS_INDEX] == 0
    assert drain(machine.ds.records[0], machine.vcpus.field[0], out) == 0


@pytest.mark.parametrize("interval", [1, 8, 100])
def test_one_load_in_the_tag_interval_is_tagged_on_average(interval: int, costs: Costs) -> None:
    """Distances are uniform in [1, 2 n - 1]: mean n, variance (n^2 - n) / 3, so the count is known to 5 sigma."""
    params: dict[str, Any] = {"load_period": 1, "load_latency_ns": 3, "tau_split": 1_000_000}
    config = guest_config(msgspec.structs.replace(costs, load_latency_tag_interval=interval), "hyperplace", params,
                          vcpus=2)  # fmt: skip
    _, report = run_guest(config)
    records, loads = report["pebs"]["records"], report["access"]["loads"]
    sigma = ((interval * interval - interval) / 3) ** 0.5 / interval * (loads / interval) ** 0.5
    assert report["pebs"]["dropped"] == 0
    assert abs(records - loads / interval) <= 5 * sigma + 2


@pytest.mark.parametrize("event", ["load-latency", "llc-miss"])
@pytest.mark.parametrize("large", [True, False])
def test_the_law_of_records_holds_for_a_whole_guest(event: str, large: bool, costs: Costs) -> None:
    params: dict[str, Any] = {"event": event, "load_period": 13, "store_period": 29, "large_pebs": large,
                              "record": "memory+gpr", "tau_split": 1_000_000}  # fmt: skip
    _, report = run_guest(guest_config(costs, "hyperplace", params, vcpus=3, run_ps=3 * PS_PER_MS))
    told = report["pebs"]
    names = {"load-latency": {"load_latency"}, "llc-miss": {"fast_miss", "slow_miss"}}[event]
    assert len(told["vcpus"]) == 3
    for vcpu in told["vcpus"]:
        assert set(vcpu) == names | {"stores"}
        for one in vcpu.values():
            assert one["events"] > 0
            assert one["records"] == one["events"] // one["period"] - one["dropped"]
    if large:
        assert 0 < told["pmi"] < told["records"] / 50
    else:
        # An update that overflows two counters leaves two records at once.
        assert 0.8 * told["records"] < told["pmi"] <= told["records"]
    assert told["record_bytes"] == 208


LAZY: dict[str, Any] = {"load_period": 7, "load_latency_ns": 3, "tau_split": 1_000_000}


def lazy(costs: Costs, **host: Any) -> Any:
    """A guest whose PEBS buffer is backed only when a record is written to it."""
    config = guest_config(costs, "hyperplace", LAZY)
    kernel = msgspec.structs.replace(config.kernel, ds_prefault=False)
    return msgspec.structs.replace(config, kernel=kernel, host=HostKernel(**host))


def test_ept_friendly_pebs_writes_the_record_after_the_fault(costs: Costs) -> None:
    guest, report = run_guest(lazy(costs))
    touched = int((guest.machine.ept[guest.perf.pmu.frames] & WRITABLE != 0).sum())
    faults = int(guest.machine.counters[C.pebs__ept_violations])
    assert 0 < faults == touched <= 16
    assert report["integrity"]["mismatches"] == 0
    events = report["pebs"]["events"]["load_latency"]
    assert events["records"] == events["events"] // 7 > 0


def test_legacy_pebs_kills_the_vm_at_the_first_record(costs: Costs) -> None:
    with pytest.raises(PebsEptViolation, match=r"vm0 vCPU 0: .* gPA 0x[0-9a-f]+ .*host.populate=true") as raised:
        run_guest(lazy(costs, pebs="legacy"))
    assert raised.value.kind == "pebs_ept_violation"
    config = msgspec.structs.replace(guest_config(costs, "hyperplace", LAZY), host=HostKernel(pebs="legacy"))
    assert run_guest(config)[1]["pebs"]["records"] > 0, "stock Linux clears the buffer"


def test_without_sampling_nothing_is_recorded(costs: Costs) -> None:
    guest, report = run_guest(guest_config(costs))
    assert "pebs" not in report
    assert guest.machine.counters[C.pebs__records] == 0
    off = new_ds_area(2, 16, None, costs)
    assert not off.params[pebs.P_ON] and off.records.size == 16
    assert STORES < pebs.EVENTS
