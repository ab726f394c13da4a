"""The leak of a PEBS buffer that all share is counted by VM, whoever samples and whoever only reads."""

from typing import Any

import msgspec
import numpy as np
import pytest

from fleet.in_process import private_memory
from guestd.pebs import RECORD
from hostd.core import HostCore
from hostd.pebs_buffer import PebsLeak
from proto.config import GuestConfig, HostKernel, Scalar, pebs_buffer_bytes
from proto.costs import Costs
from proto.messages import Bye, Hello
from tests.small_fleet import new_fleet, small_guest, small_host, without_measured

SAMPLES: dict[str, Scalar] = {"load_period": 7, "tau_split": 1_000_000}


def fleet(costs: Costs, pebs: str) -> list[GuestConfig]:
    """Two VMs that sample, with different buffers and records, and one that does not."""
    host = HostKernel(pebs=pebs)
    guests = [
        small_guest(costs, "hyperplace", vm=0, vcpus=2, params=SAMPLES, host=host),
        small_guest(costs, "none", vm=1, vcpus=1, host=host),
        small_guest(costs, "hyperplace", vm=2, vcpus=3, params=SAMPLES | {"record": "memory+gpr"}, host=host),
    ]
    first = 0
    for number, guest in enumerate(guests):
        pages = (16, 4, 8)[number]
        guests[number] = msgspec.structs.replace(
            guest, first_vcpu=first, fleet_vcpus=6, kernel=msgspec.structs.replace(guest.kernel, ds_pages=pages)
        )
        first += guest.vcpus
    return guests


def test_records_count_for_everybody_else(costs: Costs) -> None:
    guests = fleet(costs, "shared")
    assert pebs_buffer_bytes(guests) == 6 * 16 * 4096
    buffer = np.zeros(pebs_buffer_bytes(guests) // 8, np.int64)
    leak = PebsLeak(guests, buffer)
    assert leak.foreign_records([0, 1, 2]) == {0: 0, 1: 0, 2: 0}
    area = 16 * 512
    buffer[0 : 3 * 8 : 8] = 1
    buffer[3 * area : 3 * area + 5 * 26 : 26] = 1
    assert leak.foreign_records([0, 1, 2]) == {0: 5, 1: 8, 2: 3}
    assert leak.foreign_records([1]) == {1: 8}


def reports(costs: Costs, pebs: str) -> tuple[dict[int, dict[str, Any]], set[int]]:
    """Reports, and the gVAs of VM 0's records that are in memory which VM 1 has mapped."""
    running = new_fleet(*fleet(costs, pebs))
    mapped = running.guests[1].memory.pebs
    host = running.run()
    assert host.failures == []
    column = RECORD.names.index("address") if RECORD.names else 0
    return host.reports, set(mapped[column : 2 * 16 * 512 : 8].tolist()) - {0}


def test_a_shared_buffer_leaks_and_private_ones_do_not(costs: Costs) -> None:
    told, seen = reports(costs, "shared")
    assert [told[vm]["pebs"]["foreign_records_visible"] > 0 for vm in range(3)] == [True, True, True]
    assert told[1]["pebs"]["foreign_records_visible"] > max(
        told[vm]["pebs"]["foreign_records_visible"] for vm in (0, 2)
    )
    assert told[1]["pebs"]["records"] == 0, "it need not sample to read"
    assert seen
    assert [told[vm]["integrity"]["mismatches"] for vm in range(3)] == [0, 0, 0]
    private, nothing = reports(costs, "ept-friendly")
    assert not nothing
    assert "pebs" not in private[1]
    for vm in (0, 2):
        assert "foreign_records_visible" not in private[vm]["pebs"]
        # Where records lie changes nothing else.
        shared = without_measured(told[vm])["pebs"]
        del shared["foreign_records_visible"]
        assert without_measured(private[vm])["pebs"] == shared


def test_the_leak_is_a_function_of_the_seed(costs: Costs) -> None:
    first, second = (reports(costs, "shared")[0] for _ in range(2))
    assert [without_measured(first[vm])["pebs"] for vm in range(3)] == [
        without_measured(second[vm])["pebs"] for vm in range(3)
    ]


@pytest.mark.parametrize("vm", [0, 2])
def test_a_vm_s_records_lie_in_its_own_areas(vm: int, costs: Costs) -> None:
    guests = fleet(costs, "shared")
    running = new_fleet(*guests)
    records = running.guests[vm].machine.ds.records
    area = 16 * 512
    records[:] = 7
    used = np.flatnonzero(running.guests[1].memory.pebs == 7)
    first = guests[vm].first_vcpu * area
    assert (used[0], used.size) == (first, records.size)
    assert used[-1] < first + guests[vm].vcpus * area
    assert records.flags.c_contiguous


def test_a_vm_that_is_stopped_before_the_first_barrier_could_read_nothing(costs: Costs) -> None:
    guests = fleet(costs, "shared")
    core = HostCore(small_host(costs, guests[0].host), guests)
    core.attach(0, private_memory(guests[0])._replace(pebs=np.zeros(pebs_buffer_bytes(guests) // 8, np.int64)))
    core.receive(0, Hello(vm=0, secret=bytes(32), pid=1))
    core.stop("enough")
    assert core.receive(0, Bye(report=msgspec.json.encode({"pebs": {}}))) == []
    assert core.reports[0]["pebs"] == {"foreign_records_visible": 0}
