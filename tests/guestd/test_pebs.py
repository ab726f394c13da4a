"""PEBS: one record per period, PMI at the threshold, drops past the maximum, drain empties the buffer."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd import engine, pebs
from guestd.engine import PMI
from guestd.machine import Machine, S
from guestd.pebs import drain, new_ds_area
from guestd.tiering.policy import Sampling
from guestd.vcpu import DS_INDEX
from proto.costs import Costs
from proto.counters import C
from proto.entry import FRAME_SHIFT, PRESENT, STAMP_PAGE_SHIFT, WRITABLE
from proto.layout import OPERATION
from proto.trace import LOAD, MODIFY, STORE
from proto.units import PS_PER_MS
from tests.guestd.machines import SLOTS, bare_machine, guest_config, run_guest, small_costs, touch_pages

NO_OPERATIONS = np.zeros(0, OPERATION)


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
    periods = machine.ds.params[[pebs.P_LOAD_PERIOD, pebs.P_STORE_PERIOD]]
    machine.ds.params[[pebs.P_LOAD_PERIOD, pebs.P_STORE_PERIOD]] = 0
    touch_pages(machine, 0, list(range(pages)), MODIFY)
    run(machine)
    machine.ds.params[[pebs.P_LOAD_PERIOD, pebs.P_STORE_PERIOD]] = periods
    machine.counters[:] = 0


def run(machine: Machine) -> int:
    """Run what the vCPU has to do, at most a millisecond of it."""
    machine.state[S.END_PS] = machine.state[S.NOW] + PS_PER_MS
    return int(engine.run(machine, NO_OPERATIONS, int(machine.state[S.END_PS])))


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
    assert (records["applicable_counters"] == pebs.EVENT_LOAD).all()
    assert (np.diff(records["tsc"]) > 0).all()


@given(period=st.integers(1, 9), kinds=st.lists(st.sampled_from((LOAD, STORE, MODIFY)), min_size=1, max_size=60))
def test_a_record_per_period_of_stores(period: int, kinds: list[int], costs: Costs) -> None:
    machine = sampled(costs, Sampling(0, 0, period))
    touch_pages(machine, 0, [2] * len(kinds))
    machine.vcpus.kind[0, : len(kinds)] = kinds
    run(machine)
    stores = sum(kind != LOAD for kind in kinds)
    assert machine.counters[C.pebs__records] == stores // period
    assert machine.counters[C.time__stolen_ps] == stores // period * costs.pebs_record_ps


def test_pmi_at_the_threshold_and_drops_past_the_maximum(costs: Costs) -> None:
    machine = sampled(costs, Sampling(1, 0, 0))
    maximum, threshold = 64, 56
    assert (machine.ds.params[pebs.P_MAXIMUM], machine.ds.params[pebs.P_INTERRUPT]) == (maximum, threshold)
    touch_pages(machine, 0, [1] * 100)
    assert run(machine) == PMI
    assert machine.vcpus.field[0, DS_INDEX] == threshold
    # Nobody drains: each further record fills the rest of the area, then is lost, and asks again.
    reasons = [run(machine) for _ in range(44)]
    assert reasons == [PMI] * 44
    assert machine.counters[C.pebs__records] == maximum
    assert machine.counters[C.pebs__dropped] == 100 - maximum
    assert machine.counters[C.access__total] == 100


def test_drain_empties_one_vcpu_s_area_in_order(costs: Costs) -> None:
    machine = sampled(costs, Sampling(1, 0, 0))
    touch_pages(machine, 0, [1, 2, 3, 4])
    run(machine)
    records = machine.ds.of(0, 4).copy()
    out = np.zeros((64, 5), np.int64)
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


def test_records_are_64_bytes_and_areas_hold_what_fits(costs: Costs) -> None:
    assert pebs.RECORD_BYTES == 64
    area = new_ds_area(2, 16, Sampling(1, 64, 0), costs)
    assert area.records.shape == (2, 1024, 8), "64 KiB, as stock Linux has"
    assert area.params[pebs.P_INTERRUPT] == 1024 - 8
    off = new_ds_area(2, 16, None, costs)
    assert off.params[pebs.P_LOAD_PERIOD] == off.params[pebs.P_STORE_PERIOD] == 0


def test_without_sampling_nothing_is_recorded(costs: Costs) -> None:
    guest, report = run_guest(guest_config(costs))
    assert "pebs" not in report
    assert guest.machine.counters[C.pebs__records] == 0
