"""How a guest's Linux flushes: what each flush drops, costs and counts, and who gets no IPI."""

import msgspec
import pytest

from guestd.guest import Guest
from guestd.machine import S
from guestd.meter import KTHREAD
from guestd.mm.nodes import SLOW
from guestd.vcpu import CLOCK, EXIT_END, EXIT_START, IDLE, KTHREAD_END, KTHREAD_START, OFF_PCPU
from proto.arrays import Words
from proto.config import GuestConfig
from proto.costs import Costs
from proto.counters import C
from proto.units import PS_PER_US
from tests.guestd.machines import guest_config, running_guest


class Stopped:
    """A guest in the middle of its run, whose kernel works on vCPU 0."""

    def __init__(self, config: GuestConfig) -> None:
        self.guest: Guest = running_guest(config)
        self.machine, self.view, self.flush = self.guest.machine, self.guest.view, self.guest.view.flush
        self.view.meter.context, self.view.meter.now = KTHREAD, self.guest.now
        self.flush.vcpu = 0
        self.machine.vcpus.field[:, [KTHREAD_START, KTHREAD_END]] = 0
        self.before = self.machine.counters.copy()
        self.clocks = self.machine.vcpus.field[:, CLOCK].copy()

    def counted(self, name: C) -> int:
        """What was counted since."""
        return int(self.machine.counters[name] - self.before[name])

    def lost(self) -> list[int]:
        """What each vCPU's clock lost since, ps."""
        clocks: list[int] = (self.machine.vcpus.field[:, CLOCK] - self.clocks).tolist()
        return clocks

    def pages(self, count: int) -> Words:
        """Some mapped pages."""
        return self.view.on_node(0, self.view.pages, SLOW, count)


@pytest.fixture
def stopped(costs: Costs) -> Stopped:
    return Stopped(guest_config(costs, vcpus=3))


@pytest.mark.parametrize("pti", [False, True])
def test_pages_are_one_invlpg_each_and_an_ipi_per_request_and_other_vcpu(pti: bool, costs: Costs) -> None:
    config = guest_config(costs, vcpus=3)
    stopped = Stopped(msgspec.structs.replace(config, kernel=msgspec.structs.replace(config.kernel, pti=pti)))
    pages, geometry = stopped.pages(8), stopped.machine.walk_geometry
    before = stopped.view.now
    stopped.flush.pages(pages, requests=8)
    assert stopped.counted(C.vmstat__nr_tlb_local_flush_one) == 8
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush) == 8
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush_received) == 16
    assert stopped.counted(C.instr__invlpg) == 8 + 16
    assert stopped.counted(C.instr__invpcid_0) == (8 + 16 if pti else 0)
    each = costs.invlpg_ps + (costs.invpcid_addr_ps if pti else 0)
    assert stopped.lost() == [0] + 2 * [8 * (costs.ipi_receive_ps + each)]
    wait = costs.shootdown_base_ps + 2 * costs.shootdown_target_ps
    assert stopped.view.now - before == 8 * (each + wait)
    walks = stopped.machine.vcpus.walk_tag
    assert not walks[:, : geometry.guest_slots].any(), "INVLPG drops the paging-structure caches of its PCID"
    assert walks[:, geometry.guest_slots :].any(), "and leaves guest-physical mappings"


def test_an_idle_vcpu_is_sent_no_ipi(stopped: Stopped) -> None:
    stopped.machine.vcpus.field[2, IDLE] = 1
    stopped.flush.all()
    assert stopped.counted(C.vmstat__nr_tlb_local_flush_all) == 1
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush) == 1
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush_received) == 1
    assert stopped.counted(C.instr__mov_cr3) == 2
    assert stopped.lost()[2] == 0 < stopped.lost()[1]


def test_a_vcpu_that_runs_a_kernel_thread_flushes_once_when_it_switches_back(stopped: Stopped, costs: Costs) -> None:
    pages = stopped.pages(3)
    field, now = stopped.machine.vcpus.field, stopped.view.now
    field[2, [KTHREAD_START, KTHREAD_END]] = now - 1, now + PS_PER_US
    stopped.flush.pages(pages, requests=1)
    stopped.view.meter.now = now
    stopped.flush.all()
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush) == 2
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush_received) == 2, "both by vCPU 1"
    assert stopped.lost()[2] == costs.cr3_flush_ps, "the two that it missed are one flush of everything"
    assert stopped.counted(C.instr__mov_cr3) == 2 + 1
    assert not stopped.machine.vcpus.stlb_tag[2].any()


def preempt(stopped: Stopped, vcpu: int) -> None:
    """The host gives the pCPU of ``vcpu`` to another one for two slices of 3 ms, as vCPUs 0 to 2 share one."""
    state, field, now = stopped.machine.state, stopped.machine.vcpus.field, stopped.view.now
    state[[S.PCPUS, S.FIRST_VCPU, S.FLEET_VCPUS, S.HOST_SLICE_PS]] = 1, 0, 3, 3000 * PS_PER_US
    field[vcpu, [OFF_PCPU, EXIT_START, EXIT_END]] = 1, now - 1, now + 6000 * PS_PER_US


def test_kvm_flushes_for_a_preempted_vcpu_at_its_entry(stopped: Stopped, costs: Costs) -> None:
    preempt(stopped, 2)
    stopped.flush.all()
    stopped.flush.pages(stopped.pages(3), requests=3)
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush_received) == 4, "by vCPU 1"
    assert stopped.counted(C.kvm__tlb_flush) == stopped.counted(C.instr__invvpid_ctx) == 1
    assert stopped.counted(C.kvm__remote_flush_executions) == 0
    assert stopped.lost()[2] == costs.pv_flush_entry_ps + costs.invvpid_context_ps


def test_without_that_help_the_initiator_waits_until_the_host_runs_the_target(costs: Costs) -> None:
    config = guest_config(costs, vcpus=3)
    stopped = Stopped(
        msgspec.structs.replace(config, kernel=msgspec.structs.replace(config.kernel, pv_tlb_flush=False))
    )
    preempt(stopped, 2)
    before = stopped.view.now
    stopped.flush.all()
    slice_ps = 3000 * PS_PER_US
    turn = before // slice_ps
    back_at = (turn + (2 - turn) % 3) * slice_ps
    wait = max(0, back_at - before - costs.cr3_flush_ps)
    assert wait > 0
    ipis = costs.shootdown_base_ps + 2 * costs.shootdown_target_ps
    assert stopped.view.now == back_at + ipis
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush_received) == 2


def test_one_vcpu_needs_no_shootdown(costs: Costs) -> None:
    alone = Stopped(guest_config(costs))
    alone.flush.all()
    alone.flush.pages(alone.pages(3), requests=3)
    assert alone.counted(C.vmstat__nr_tlb_remote_flush) == 0
    assert alone.lost() == [0]


@pytest.mark.parametrize(("first", "last", "full"), [(100, 132, False), (100, 133, True), (500, 524, None)])
def test_a_range_above_the_ceiling_is_flushed_whole(first: int, last: int, full: bool | None, costs: Costs) -> None:
    """What counts is its addresses: 25 pages are more than 33 if their two leaf tables are not neighbours."""
    for apart in (False, True):
        stopped = Stopped(guest_config(costs, vcpus=3))
        stopped.machine.table_gva[1:] += apart << 40
        stopped.flush.range(first, last)
        whole = apart if full is None else full
        assert stopped.counted(C.vmstat__nr_tlb_local_flush_all) == whole
        assert stopped.counted(C.vmstat__nr_tlb_local_flush_one) == (0 if whole else last - first + 1)
        assert stopped.counted(C.vmstat__nr_tlb_remote_flush) == 1
