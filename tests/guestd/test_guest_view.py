"""The guest's view: what its invalidations drop, cost and count, and that a forgotten one is seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from guestd.guest import Guest
from guestd.guest_view import GuestView
from guestd.meter import KTHREAD, TASK
from guestd.mm.nodes import FAST, SLOW
from guestd.vcpu import AGENT, CLOCK, EPT_REFAULT, EXIT_END, EXIT_START
from proto.arrays import Words
from proto.config import GuestConfig, Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import ACCESSED, DIRTY, PRESENT, PROTNONE
from proto.units import PS_PER_MS
from tests.guestd.machines import guest_config, run_guest, running_guest

POLICIES: dict[str, dict[str, Scalar]] = {
    "g-tpp": {"scan_delay_ms": 0, "scan_period_min_ms": 20, "scan_period_max_ms": 20, "scan_size_mb": 16},
    "hyperplace": {"load_period": 29, "epoch_ms": 4, "tau_split": 1, "initial": "ram"},
}


def forgetful(calls: int) -> Callable[..., Guest]:
    """A maker of guests whose migrations leave out their first ``calls`` flushes."""

    class ForgetfulView(GuestView):
        left = calls

        def _flush_unmapped(self, pages: Words, sizes: Words, batched: bool) -> None:
            if self.left:
                self.left -= 1
            else:
                super()._flush_unmapped(pages, sizes, batched)

    def make(*args: Any) -> Guest:
        guest = Guest(*args)
        guest.view.__class__ = ForgetfulView
        return guest

    return make


@pytest.mark.parametrize("policy", POLICIES)
def test_a_missing_shootdown_is_seen(policy: str, costs: Costs) -> None:
    workload: dict[str, Scalar] = {"layout": "start"} if policy == "g-tpp" else {}
    config = guest_config(costs, policy, POLICIES[policy], "gups", workload, vcpus=2, run_ps=100 * PS_PER_MS)
    _, sound = run_guest(config)
    assert sound["migration"]["demoted_pages"] > 100
    assert sound["integrity"]["mismatches"] == 0
    assert sound["integrity"]["pages_checked"] == 4096 * 7 // 8
    _, broken = run_guest(config, forgetful(1 << 40))
    assert broken["integrity"]["mismatches"] > 0


def test_one_missing_shootdown_is_enough(costs: Costs) -> None:
    config = guest_config(costs, "hyperplace", POLICIES["hyperplace"], vcpus=2, run_ps=30 * PS_PER_MS)
    assert run_guest(config, forgetful(0))[1]["integrity"]["mismatches"] == 0
    assert run_guest(config, forgetful(1))[1]["integrity"]["mismatches"] > 0


class Stopped:
    """A guest in the middle of its run, for calling its view by hand."""

    def __init__(self, config: GuestConfig) -> None:
        self.guest = running_guest(config)
        self.view = self.guest.view
        self.machine = self.guest.machine
        self.view.meter.context = KTHREAD
        self.view.flush.vcpu = 0
        self.before = self.machine.counters.copy()
        self.clocks = self.machine.vcpus.field[:, CLOCK].copy()

    def counted(self, name: C) -> int:
        """What was counted since."""
        return int(self.machine.counters[name] - self.before[name])

    def lost(self) -> list[int]:
        """What each vCPU's clock lost since, ps."""
        clocks: list[int] = (self.machine.vcpus.field[:, CLOCK] - self.clocks).tolist()
        return clocks

    def pages(self, node: int, count: int) -> Words:
        """Pages on ``node``."""
        return self.view.on_node(0, self.view.pages, node, count)


@pytest.fixture
def stopped(costs: Costs) -> Stopped:
    return Stopped(guest_config(costs, vcpus=3))


@pytest.mark.parametrize(("count", "full"), [(33, False), (34, True)])
def test_a_range_above_the_ceiling_is_flushed_whole(count: int, full: bool, stopped: Stopped) -> None:
    pages = stopped.pages(SLOW, 4096)
    first = next(int(p) for p, q in zip(pages, pages[count - 1 :], strict=False) if q - p == count - 1)
    assert stopped.view.protect(first, count) == count
    assert stopped.counted(C.vmstat__nr_tlb_local_flush_all) == full
    assert stopped.counted(C.vmstat__nr_tlb_local_flush_one) == (0 if full else count)
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush) == 1
    entries = stopped.machine.gpt[first : first + count]
    assert ((entries & PRESENT) == 0).all() and ((entries & PROTNONE) != 0).all()
    assert stopped.view.protect(first, count) == 0, "already under PROT_NONE: nothing to flush"
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush) == 1


def test_protect_leaves_fast_pages_alone(stopped: Stopped) -> None:
    fast = stopped.pages(FAST, 4096)
    stopped.view.protect(0, stopped.view.pages)
    assert ((stopped.machine.gpt[fast] & PRESENT) != 0).all()


def test_ageing_flushes_nothing(stopped: Stopped) -> None:
    pages = stopped.pages(SLOW, 100)
    cached = stopped.machine.vcpus.stlb_tag.copy()
    young = stopped.view.test_and_clear_young(pages)
    assert young.any()
    assert not stopped.view.test_and_clear_young(pages).any()
    assert (stopped.machine.vcpus.stlb_tag == cached).all()
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush) == stopped.counted(C.vmstat__nr_tlb_local_flush_one) == 0


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("context", [KTHREAD, TASK])
def test_migration_flushes_per_page_or_per_batch(batched: bool, context: int, costs: Costs) -> None:
    import msgspec

    config = guest_config(costs, vcpus=2)
    stopped = Stopped(
        msgspec.structs.replace(config, kernel=msgspec.structs.replace(config.kernel, batched_unmap_flush=batched))
    )
    stopped.view.meter.context = context
    pages = stopped.pages(FAST, 100)
    stamps = stopped.machine.stamps.copy()
    free = stopped.guest.nodes.free_count.copy()
    assert stopped.view.move(pages, SLOW, 0).all()
    whole = batched and context != TASK
    assert stopped.counted(C.vmstat__nr_tlb_local_flush_all) == int(whole)
    assert stopped.counted(C.vmstat__nr_tlb_local_flush_one) == (0 if whole else 100)
    assert stopped.counted(C.vmstat__nr_tlb_remote_flush) == (1 if whole else 100)
    assert (stopped.guest.nodes.free_count - free).tolist() == [100, -100]
    assert ((stopped.machine.gpt[pages] & (ACCESSED | DIRTY)) == 0).all(), "a migrated entry is old and clean"
    assert not (stopped.machine.stamps == stamps).all()


def test_a_page_under_prot_none_is_in_no_tlb_and_needs_no_flush(stopped: Stopped) -> None:
    pages = stopped.pages(SLOW, 2048)[:10]
    make_room = stopped.pages(FAST, 64)
    stopped.view.move(make_room, SLOW, 0)
    stopped.view.protect(int(pages[0]), int(pages[-1] - pages[0]) + 1)
    stopped.before = stopped.machine.counters.copy()
    assert stopped.view.move(pages, FAST, 0).all()
    for name in (C.vmstat__nr_tlb_local_flush_one, C.vmstat__nr_tlb_local_flush_all, C.vmstat__nr_tlb_remote_flush):
        assert stopped.counted(name) == 0


def test_exchange_trades_places_and_leaves_free_lists_alone(stopped: Stopped) -> None:
    slow, fast = stopped.pages(SLOW, 50), stopped.pages(FAST, 50)
    free = stopped.guest.nodes.free_count.copy()
    frames = stopped.view.frames(slow), stopped.view.frames(fast)
    assert stopped.view.exchange(slow, fast, batched=True) == 50
    assert (stopped.view.frames(slow) == frames[1]).all() and (stopped.view.frames(fast) == frames[0]).all()
    assert (stopped.guest.nodes.free_count == free).all()
    assert stopped.counted(C.vmstat__pgexchange_success) == 50
    assert stopped.view.exchange(slow, fast, batched=True) == 0, "the slow pages are fast now"
    assert stopped.counted(C.vmstat__pgmigrate_fail) == 100


def test_an_ept_violation_of_the_kernel_s_copy_is_an_exit_of_the_vcpu_that_copies(stopped: Stopped) -> None:
    """It is no work of the agent's."""
    guest, machine, costs = stopped.guest, stopped.machine, stopped.guest.config.costs
    pages = stopped.pages(FAST, 3)
    machine.ept[stopped.view.frames(pages)] &= ~PRESENT
    ledger, charged = machine.vcpus.ledger.copy(), int(stopped.view.meter.modelled_ps.sum())
    guest._activate(KTHREAD, 1, stopped.view.move, pages, SLOW, 0)
    spent = machine.vcpus.ledger - ledger
    exits = stopped.counted(C.exit__ept_violation)
    assert exits >= 3, "the sources, and targets that nobody has touched"
    assert spent[1, EPT_REFAULT] >= exits * costs.ept_violation_ps
    assert not spent[[0, 2], EPT_REFAULT].any()
    assert spent[1, AGENT] == int(stopped.view.meter.modelled_ps.sum()) - charged > 3 * costs.migrate_page_ps
    start, end = machine.vcpus.field[1, [EXIT_START, EXIT_END]]
    assert end - start == spent[1, EPT_REFAULT], "outside guest mode"
    assert (machine.vcpus.ledger.sum(axis=1) == machine.vcpus.field[:, CLOCK] - guest.booted_ps).all()


def test_page_range_is_the_tables_in_it(stopped: Stopped) -> None:
    space = stopped.guest.workload.space
    low, high = stopped.view.address_bounds()
    assert stopped.view.page_range(low, high) == (0, space.pages)
    assert stopped.view.page_range(low + (1 << 21), high) == (512, space.pages - 512)
    assert stopped.view.page_range(0, low) == (0, 0)
    assert stopped.view.count_mapped(0, space.pages) == np.count_nonzero(stopped.machine.gpt)
