"""The host's state machine: what it refuses changes nothing, the barrier waits for nobody who has gone."""

import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from fleet.in_process import private_memory
from hostd.core import HostCore
from hostd.errors import RefusedMessage
from proto.config import GuestConfig, Scalar
from proto.costs import Costs
from proto.counters import COUNTERS, C, new_counters, split
from proto.entry import ACCESSED, FRAME_MASK, FRAME_SHIFT, PRESENT, PROTNONE, WRITABLE
from proto.layout import OP_FLUSH, OPERATION
from proto.messages import (
    MOST_LISTED,
    Advance,
    Bye,
    EptFault,
    Failed,
    Hello,
    Mapped,
    Stop,
    Tick,
    ToGuest,
    ToHost,
    Welcome,
)
from proto.units import PS_PER_MS, PS_PER_S
from tests.small_fleet import ENGINE, LLC_BYTES, small_guest, small_host

PAGES = 512
QUANTUM = ENGINE.quantum_ps
Sent = list[tuple[int, ToGuest]]
NO_CPU: dict[str, Any] = {"total_s": 0.0, "by_vm": {}}


def fault(gpfns: list[int], time_ps: int = 0) -> EptFault:
    return EptFault(time_ps=time_ps, gpfns=np.array(gpfns, np.int64).tobytes())


def tick(time_ps: int, phase: str = "run", demand: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Tick:
    return Tick(time_ps=time_ps, phase=phase, progress=0.5, counters=new_counters().tobytes(), agent_cpu_s=0.0,
                bandwidth_demand=struct.pack("<4q", *demand))  # fmt: skip


def listed(ranges: list[list[int]], cut: int = 0) -> Tick:
    """A tick with a list of gPA ranges to scan."""
    data = np.array(ranges, np.int64).tobytes()
    return msgspec.structs.replace(tick(QUANTUM), scan_list=data[: len(data) - cut])


def report(vm: int = 0) -> dict[str, Any]:
    """What a guest with a host-side design may say at the end."""
    groups = split(new_counters())
    cpu = {"track": 0.0, "classify": 0.0, "migrate": 0.0, "other": 0.5, "total": 0.5}
    return {
        "id": vm,
        "vmstat": groups["vmstat"],
        "kvm": groups["kvm"],
        "migration": {"bytes": 7},
        "agent_cpu": {"measured_s": cpu},
        "virtual_s": 1.0,
        "populate_virtual_s": 0.25,
        "populate": {"vmstat": split(new_counters())["vmstat"]},
    }


def bye(vm: int = 0) -> Bye:
    return Bye(report=msgspec.json.encode(report(vm)))


class Fleet:
    """A core with its VMs' memory."""

    def __init__(self, guests: list[GuestConfig]) -> None:
        self.core = HostCore(small_host(guests[0].costs), guests)
        self.memory = {guest.vm: private_memory(guest) for guest in guests}
        for vm, memory in self.memory.items():
            self.core.attach(vm, memory)

    def all_hello(self) -> Sent:
        sent: Sent = []
        for vm in self.memory:
            sent += self.core.receive(vm, Hello(vm=vm, secret=bytes(32), pid=1))
        return sent


@pytest.fixture
def fleet(costs: Costs) -> Callable[..., Fleet]:
    def make(vms: int = 2, policy: str = "none") -> Fleet:
        return Fleet([small_guest(costs, policy, vm=vm, pages=PAGES, fast=128) for vm in range(vms)])

    return make


def test_the_first_quantum_begins_when_the_last_vm_has_said_hello(fleet: Callable[..., Fleet]) -> None:
    core = fleet().core
    ((vm, welcome),) = core.receive(1, Hello(vm=1, secret=bytes(32), pid=1))
    assert (vm, type(welcome)) == (1, Welcome)
    sent = core.receive(0, Hello(vm=0, secret=bytes(32), pid=1))
    assert [(vm, type(message)) for vm, message in sent] == [(0, Welcome), (0, Advance), (1, Advance)]
    assert isinstance(sent[1][1], Advance)
    assert sent[1][1].until_ps == QUANTUM


def test_the_barrier_holds_until_all_have_ticked(fleet: Callable[..., Fleet]) -> None:
    made = fleet(3)
    made.all_hello()
    for quantum in range(1, 4):
        assert made.core.receive(2, tick(quantum * QUANTUM)) == []
        assert made.core.receive(0, tick(quantum * QUANTUM)) == []
        sent = made.core.receive(1, tick(quantum * QUANTUM))
        assert [vm for vm, _ in sent] == [0, 1, 2]
        assert {message.until_ps for _, message in sent if isinstance(message, Advance)} == {(quantum + 1) * QUANTUM}


def llc_shares(sent: Sent) -> dict[int, int]:
    return {vm: message.llc_bytes for vm, message in sent if isinstance(message, Advance)}


def test_the_llc_is_shared_by_vcpus_of_the_vms_that_run(costs: Costs) -> None:
    quantum_ms = QUANTUM // PS_PER_MS
    made = Fleet([small_guest(costs, vm=vm, vcpus=vcpus, start_ms=start, pages=PAGES, fast=128)
                  for vm, (vcpus, start) in enumerate([(3, 0), (1, 0), (4, quantum_ms)])])  # fmt: skip
    whole = LLC_BYTES
    # VM 2 has not booted in the first quantum; VM 0 leaves after the second.
    assert llc_shares(made.all_hello()) == {0: whole * 3 // 4, 1: whole // 4, 2: 0}
    sent = [made.core.receive(vm, tick(QUANTUM)) for vm in range(3)][-1]
    assert llc_shares(sent) == {0: whole * 3 // 8, 1: whole // 8, 2: whole // 2}
    sent = [made.core.receive(vm, tick(2 * QUANTUM, "done" if vm == 0 else "run")) for vm in range(3)][-1]
    assert llc_shares(sent) == {1: whole // 5, 2: whole * 4 // 5}


REFUSED: dict[str, Callable[[], ToHost]] = {
    "a frame beyond the VM's memory": lambda: fault([0, 2 * PAGES]),
    "a negative frame": lambda: fault([-1]),
    "a frame beyond int32": lambda: fault([1 << 40]),
    "a frame named twice": lambda: fault([300, 300]),
    "more than the VM's share": lambda: fault(list(range(PAGES))),
    "frames that are no whole number of words": lambda: EptFault(time_ps=0, gpfns=bytes(9)),
    "a tick of the past": lambda: tick(QUANTUM - 1),
    "a tick of the future": lambda: tick(2 * QUANTUM),
    "too few counters": lambda: msgspec.structs.replace(tick(QUANTUM), counters=bytes(8 * COUNTERS - 8)),
    "counters of odd length": lambda: msgspec.structs.replace(tick(QUANTUM), counters=bytes(13)),
    "too much demand": lambda: msgspec.structs.replace(tick(QUANTUM), bandwidth_demand=bytes(40)),
    "half a range to scan": lambda: listed([[0, 1]], cut=8),
    "a range of nothing": lambda: listed([[0, 0]]),
    "a negative range": lambda: listed([[-1, 2]]),
    "a range beyond memory": lambda: listed([[2 * PAGES - 1, 2]]),
    "a range beyond all numbers": lambda: listed([[5, (1 << 63) - 1]]),
    "ranges that overlap": lambda: listed([[3, 4], [6, 2]]),
    "ranges that fall": lambda: listed([[9, 1], [3, 1]]),
    "bye before the end": bye,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_changes_nothing(what: str, fleet: Callable[..., Fleet]) -> None:
    disturbed, twin = fleet(), fleet()
    for each in (disturbed, twin):
        each.all_hello()
        each.core.receive(0, fault([3, 4, PAGES + 1]))
    with pytest.raises(RefusedMessage) as refusal:
        disturbed.core.receive(0, REFUSED[what]())
    assert str(refusal.value)
    later: list[tuple[int, ToHost]] = [
        (0, fault([5, 120, PAGES + 7])), (1, fault([9])), (0, tick(QUANTUM, demand=(1, 2, 3, 4))),
        (1, tick(QUANTUM)), (0, tick(2 * QUANTUM, "done")), (0, bye()), (1, tick(2 * QUANTUM)),
    ]  # fmt: skip
    for vm, message in later:
        assert disturbed.core.receive(vm, message) == twin.core.receive(vm, message)
    for vm in (0, 1):
        assert np.array_equal(disturbed.memory[vm].ept, twin.memory[vm].ept)
        nodes = disturbed.core.vms[vm].nodes, twin.core.vms[vm].nodes
        mine, other = ({**each._asdict(), **each.free._asdict()} for each in nodes)
        for name in mine.keys() - {"free"}:
            assert np.array_equal(mine[name], other[name]), name
    assert disturbed.core.host_report(NO_CPU)["tiers"] == twin.core.host_report(NO_CPU)["tiers"]


def test_at_the_barrier_a_vm_may_neither_fault_nor_tick_again(fleet: Callable[..., Fleet]) -> None:
    core = fleet().core
    for vm in (0, 1):
        core.receive(vm, Hello(vm=vm, secret=bytes(32), pid=1))
    core.receive(0, tick(QUANTUM))
    for message in (fault([1]), tick(QUANTUM), tick(2 * QUANTUM)):
        with pytest.raises(RefusedMessage):
            core.receive(0, message)
    assert [vm for vm, _ in core.receive(1, tick(QUANTUM))] == [0, 1]


def test_a_fault_is_answered_at_once_and_costed_one_by_one(fleet: Callable[..., Fleet], costs: Costs) -> None:
    made = fleet()
    made.all_hello()
    made.core.receive(1, fault([2]))
    ((vm, answer),) = made.core.receive(1, fault([1, 2, 3]))
    assert vm == 1
    assert isinstance(answer, Mapped)
    new, old = costs.ept_violation_alloc_ps, costs.ept_violation_ps
    assert np.frombuffer(answer.cost_ps, np.int64).tolist() == [new, old, new]
    assert np.flatnonzero(made.memory[1].ept & WRITABLE).tolist() == [1, 2, 3]
    assert not made.memory[0].ept.any(), "another VM's memory is not touched"


@pytest.mark.parametrize("when", ["before hello", "in a quantum", "at the barrier", "done"])
def test_a_lost_vm_never_holds_up_the_barrier(when: str, fleet: Callable[..., Fleet]) -> None:
    core = fleet(3).core
    hellos = [0, 1] if when == "before hello" else [0, 1, 2]
    for vm in hellos:
        core.receive(vm, Hello(vm=vm, secret=bytes(32), pid=1))
    if when == "before hello":
        sent = core.lost(2, "killed", "was killed")
    else:
        core.receive(0, tick(QUANTUM))
        if when in ("at the barrier", "done"):
            core.receive(2, tick(QUANTUM, "done" if when == "done" else "run"))
        assert core.lost(2, "killed", "was killed") == []
        sent = core.receive(1, tick(QUANTUM))
    assert [(vm, type(message)) for vm, message in sent] == [(0, Advance), (1, Advance)]
    assert core.failures == [{"vm": 2, "kind": "killed", "message": "was killed"}]
    assert core.lost(2, "hung", "again") == []
    assert len(core.failures) == 1


def test_a_guest_that_fails_is_lost_with_its_own_words(fleet: Callable[..., Fleet]) -> None:
    core = fleet().core
    for vm in (0, 1):
        core.receive(vm, Hello(vm=vm, secret=bytes(32), pid=1))
    core.receive(0, tick(QUANTUM))
    sent = core.receive(1, Failed(kind="memory", message="out of memory"))
    assert [vm for vm, _ in sent] == [0]
    assert core.failures == [{"vm": 1, "kind": "memory", "message": "out of memory"}]


def test_the_run_is_over_when_all_have_left(fleet: Callable[..., Fleet]) -> None:
    core = fleet().core
    for vm in (0, 1):
        core.receive(vm, Hello(vm=vm, secret=bytes(32), pid=1))
    core.receive(0, tick(QUANTUM, "done"))
    assert core.receive(0, bye(0)) == []
    core.receive(1, tick(QUANTUM, "done"))
    assert not core.done
    core.receive(1, bye(1))
    assert core.done
    assert set(core.reports) == {0, 1}


def test_a_stop_asks_every_running_vm_for_its_report(fleet: Callable[..., Fleet]) -> None:
    core = fleet(3).core
    for vm in (0, 1, 2):
        core.receive(vm, Hello(vm=vm, secret=bytes(32), pid=1))
    core.receive(1, tick(QUANTUM, "done"))
    assert core.stop("enough") == [(vm, Stop(reason="enough")) for vm in (0, 2)]
    assert core.receive(0, tick(QUANTUM)) == []
    for vm in (0, 1, 2):
        assert core.receive(vm, bye(vm)) == []
    assert core.done


def test_a_vm_that_is_to_stop_may_still_read_its_memory(fleet: Callable[..., Fleet]) -> None:
    """It checks all of it, and the host may have swapped out some."""
    core = fleet(2).core
    for vm in (0, 1):
        core.receive(vm, Hello(vm=vm, secret=bytes(32), pid=1))
    core.receive(0, tick(QUANTUM))
    with pytest.raises(RefusedMessage, match="outside a quantum"):
        core.receive(0, fault([3]))
    core.stop("enough")
    ((vm, answer),) = core.receive(0, fault([3]))
    assert (vm, type(answer)) == (0, Mapped)


@pytest.mark.parametrize("order", [("done", "tick", "bye"), ("tick", "done", "bye")])
def test_when_the_one_that_leaves_is_heard_does_not_matter(order: tuple[str, ...], fleet: Callable[..., Fleet]) -> None:
    busy = (20_000_000,) * 4

    def following(order: tuple[str, ...]) -> tuple[list[ToGuest], Any]:
        core = fleet().core
        for vm in (0, 1):
            core.receive(vm, Hello(vm=vm, secret=bytes(32), pid=1))
        steps: dict[str, tuple[int, ToHost]] = {
            "done": (0, tick(QUANTUM, "done", busy)), "bye": (0, bye()), "tick": (1, tick(QUANTUM)),
        }  # fmt: skip
        sent = [message for step in order for vm, message in core.receive(*steps[step]) if vm == 1]
        for quantum in (2, 3):
            sent += [message for _, message in core.receive(1, tick(quantum * QUANTUM))]
        return sent, core.host_report(NO_CPU)["tiers"]

    sent, tiers = following(order)
    assert (sent, tiers) == following(("done", "bye", "tick"))
    first, *_, last = [message for message in sent if isinstance(message, Advance)]
    assert first.latency_ps > last.latency_ps, "the load of the one that left is over"


def test_the_peak_does_not_depend_on_whose_faults_come_first(costs: Costs) -> None:
    def tiers(order: tuple[int, ...]) -> Any:
        params: dict[str, Scalar] = {
            "scan_delay_ms": 0,
            "scan_period_min_ms": 1,
            "scan_size_mb": 4,
            "active_filter": False,
        }
        guests = [small_guest(costs, "h-tpp", params=params, vm=vm, pages=PAGES, fast=128) for vm in (0, 1)]
        made = Fleet(guests)
        made.all_hello()
        for vm in order:
            made.core.receive(vm, fault(list(range(300 + 50 * vm))))
        for quantum in (1, 2, 3):
            for vm in order:
                made.core.receive(vm, tick(quantum * QUANTUM))
        used = sum(made.core.vms[vm].used()[1] for vm in order)
        for vm in order:
            # As the zap of a scanned range leaves them: the next access is a hint fault, and promotes.
            ept = made.memory[vm].ept
            slow = np.flatnonzero((ept & WRITABLE) * ((ept & FRAME_MASK) >> FRAME_SHIFT >= PAGES))[: 3 + vm]
            ept[slow] = (ept[slow] & ~PRESENT) | PROTNONE
            made.core.receive(vm, fault(slow.tolist(), 3 * QUANTUM + 1))
        tiers = made.core.host_report(NO_CPU)["tiers"]
        assert tiers[1]["used"] == used - 7
        assert tiers[1]["peak"] >= used
        return tiers

    assert tiers((0, 1)) == tiers((1, 0))


@pytest.mark.parametrize(
    "text", [b"", b"[1, 2]", b"{", b"{}", b'{"vmstat": 3}', b'{"vmstat": {}, "kvm": {}}', b"\xff\xfe"]
)
def test_a_report_that_is_none_is_refused_and_the_host_goes_on(text: bytes, fleet: Callable[..., Fleet]) -> None:
    core = fleet(1, "h-tpp").core
    core.receive(0, Hello(vm=0, secret=bytes(32), pid=1))
    core.receive(0, tick(QUANTUM, "done"))
    with pytest.raises(RefusedMessage, match="report"):
        core.receive(0, Bye(report=text))
    assert core.reports == {}
    core.receive(0, bye())
    assert core.done


def test_the_hosts_own_work_for_a_vm_is_added_to_its_report(costs: Costs) -> None:
    made = Fleet([small_guest(costs, "h-tpp", pages=PAGES, fast=128)])
    made.all_hello()
    made.core.receive(0, fault(list(range(400))))
    for quantum in (1, 2, 3):
        made.core.receive(0, tick(quantum * QUANTUM, "done" if quantum == 3 else "run"))
    made.core.receive(0, bye())
    host = made.core.vms[0]
    said = made.core.reports[0]
    # The first tick of the run phase parts what was done while populating from the run.
    assert host.populated is not None
    run, populate = said["vmstat"]["numa_pte_updates"], said["populate"]["vmstat"]["numa_pte_updates"]
    assert populate == host.populated.counters[C.vmstat__numa_pte_updates]
    assert run + populate == host.counters[C.vmstat__numa_pte_updates] > 0
    moved = host.counters[C.bytes__migrated] - host.populated.counters[C.bytes__migrated]
    assert said["migration"]["bytes"] == 7 + moved
    cpu = said["agent_cpu"]
    assert cpu["where"] == "host"
    assert cpu["guest_thread_s"] == 0.5
    run_ps = int(host.meter.modelled_ps.sum() - host.populated.modelled_ps.sum())
    assert cpu["modelled_s"]["total"] == cpu["modelled_cores"] == pytest.approx(run_ps / PS_PER_S)
    before = said["populate"]["agent_cpu"]
    stages = sum(cpu["measured_s"][stage] for stage in ("track", "classify", "migrate"))
    assert 0 < stages <= cpu["measured_s"]["total"]
    by_vm = made.core.host_report({"total_s": 1.0, "by_vm": {0: 0.25}})["cpu"]["by_vm"]
    assert by_vm[0]["measured_s"] == 0.25
    assert by_vm[0]["modelled_s"] == pytest.approx(before["modelled_s"]["total"] + cpu["modelled_s"]["total"])


def test_a_list_is_scanned_at_the_barrier_and_answered_with_the_next_quantum(fleet: Callable[..., Fleet],
                                                                             costs: Costs) -> None:  # fmt: skip
    made = fleet()
    made.all_hello()
    made.core.receive(0, fault([3, 4, 5, PAGES + 1, PAGES + 2]))
    ept = made.memory[0].ept
    ept[[3, 5, PAGES + 2]] |= ACCESSED
    made.core.receive(0, listed([[4, 2], [PAGES + 1, 2]]))
    answers = dict(made.core.receive(1, tick(QUANTUM)))
    mine, other = answers[0], answers[1]
    assert isinstance(mine, Advance) and isinstance(other, Advance)
    assert mine.scanned == bytes([0b1010]), "5 and PAGES + 2, in the list's order"
    assert np.flatnonzero(ept & ACCESSED).tolist() == [3], "what is not on the list is left alone"
    (flush,) = np.frombuffer(mine.operations, OPERATION)
    request = costs.kick_base_ps + 2 * costs.kick_target_ps
    assert (flush["kind"], flush["time_ps"]) == (OP_FLUSH, QUANTUM + 4 * costs.scan_pte_ps)
    assert mine.scanned_ps == QUANTUM + 4 * costs.scan_pte_ps + request
    assert (other.scanned, other.scanned_ps, other.operations) == (b"", 0, b"")
    by_vm = made.core.host_report(NO_CPU)["cpu"]["by_vm"]
    assert [vm["modelled_s"] for vm in by_vm] == [(mine.scanned_ps - QUANTUM) / PS_PER_S, 0.0]
    made.core.receive(0, tick(2 * QUANTUM))
    ((_, later), _) = made.core.receive(1, tick(2 * QUANTUM))
    assert isinstance(later, Advance) and (later.scanned, later.operations) == (b"", b"")


def test_a_list_of_more_pages_than_one_may_have_is_refused(costs: Costs) -> None:
    made = Fleet([small_guest(costs, pages=MOST_LISTED, fast=1024)])
    made.all_hello()
    with pytest.raises(RefusedMessage, match=f"more than the {MOST_LISTED}"):
        made.core.receive(0, listed([[0, MOST_LISTED], [MOST_LISTED, 1]]))
    ((_, answer),) = made.core.receive(0, listed([[0, MOST_LISTED]]))
    assert isinstance(answer, Advance) and len(answer.scanned) == MOST_LISTED // 8
