"""2 MiB pages on either level, on a guest's real memory after populating: one unit each, whose content survives all.

What a view does with them, in the guest and in the host; the laws under every policy; and the command line.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestd import engine
from guestd.engine import NEED_ACCESSES
from guestd.guest import Guest
from guestd.instructions import mov_cr3_everywhere
from guestd.machine import S
from guestd.mm.kswapd import Kswapd
from guestd.mm.nodes import ACTIVE, F_BUSY, FAST, INACTIVE, SLOW, WMARK_DEMOTE, WMARK_HIGH, WMARK_MIN
from guestd.tiering.registry import policies
from guestd.tiering.view import PageView
from guestd.vcpu import FRACTURED, IDLE
from proto.arrays import Words
from proto.config import GuestConfig, Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import (
    ACCESSED,
    DIRTY,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    STAMP_PAGE_BITS,
    STAMP_PAGE_SHIFT,
    STAMP_TABLE_BASE,
)
from proto.layout import OPERATION
from proto.units import PS_PER_MS, PS_PER_S
from tests.guestd.machines import touch_pages
from tests.small_fleet import check_memory, new_fleet, small_guest, until_populated, with_thp

QUIET: dict[str, Scalar] = {"scan_delay_ms": 600_000}
"""A policy of the host that does nothing by itself."""


class HugePopulated:
    """A guest of 32 MiB that has touched 0.7 of it once, with free blocks on both nodes."""

    def __init__(self, costs: Costs, host: str = "always", view: str = "guest", **kernel: object) -> None:
        policy, params = ("none", {}) if view == "guest" else ("h-tpp", QUIET)
        config = small_guest(
            costs, policy, params=params, pages=8192, fast=4096, run_ms=40, workload={"footprint": 0.7}
        )
        config = with_thp(config, "always", host, thp_defrag="always", khugepaged_pages_to_scan=0, **kernel)
        self.fleet = new_fleet(config)
        self.guest = until_populated(self.fleet)
        self.view: PageView = self.guest.view if view == "guest" else self.fleet.host.vms[0].view
        self.catch_up()

    def catch_up(self) -> None:
        """What the host's thread does from now on, it does in the quantum to come."""
        vm = self.fleet.host.vms[0]
        vm.meter.now = max(vm.meter.now, vm.until_ps)

    def step(self) -> None:
        assert self.fleet.step()
        self.catch_up()

    def pages(self, node: int, count: int) -> Words:
        return self.view.on_node(0, self.view.pages, node, count)

    def huge(self, node: int) -> Words:
        """Heads of the huge pages on a node."""
        pages = self.pages(node, self.view.pages)
        return pages[self.view.sizes(pages) > 1]

    def base(self, node: int, count: int) -> Words:
        """4 KiB pages of a node."""
        pages = self.pages(node, self.view.pages)
        return pages[self.view.sizes(pages) == 1][:count]

    def ends_well(self) -> None:
        """Memory is conserved, and the guest finds its content to the end."""
        check_memory(self.fleet)
        while self.fleet.step():
            if self.fleet.guests[0].phase == "run":
                check_memory(self.fleet)
        assert self.fleet.host.failures == []
        assert self.fleet.host.reports[0]["integrity"]["mismatches"] == 0
        assert self.fleet.host.reports[0]["transactions"] > 0


@pytest.fixture(params=["guest", "host"])
def huge(request: pytest.FixtureRequest, costs: Costs) -> HugePopulated:
    return HugePopulated(costs, view=request.param)


def test_a_huge_page_is_one_unit_whatever_page_of_it_is_named(huge: HugePopulated) -> None:
    view, table = huge.view, huge.view._table
    (head, *_) = huge.huge(FAST)
    inside = head + np.array([0, 5, 511])
    assert view.heads(inside).tolist() == [head] * 3
    assert view.sizes(inside).tolist() == [512] * 3
    frame = (int(table[head]) & FRAME_MASK) >> FRAME_SHIFT
    assert view.frames(inside).tolist() == [frame] * 3
    assert view.frame_sizes(view.frames(inside)).tolist() == [512] * 3
    assert view.count_mapped(int(head), 512) == 512
    on_node = view.on_node(int(head), 512, FAST, 3)
    assert on_node.tolist() == [head], "it may have more pages than the limit"
    assert view.on_node(int(head) + 1, 511, FAST, 600).size == 0, "it belongs to the range that its head is in"


def test_lists_count_512_for_it_and_isolate_it_as_one(huge: HugePopulated) -> None:
    view, nodes = huge.view, huge.view.nodes
    before = int(nodes.size[INACTIVE])
    frames = view.isolate(FAST, INACTIVE, 2000)
    pages = int(view.frame_sizes(frames).sum())
    assert frames.size < pages and 2000 <= pages < 2512
    assert nodes.size[INACTIVE] == before - pages
    nothing = np.zeros(frames.size, np.bool_)
    view.put_back(frames, nothing, nothing)
    assert nodes.size[INACTIVE] == before
    whole = frames[view.frame_sizes(frames) > 1][:1]
    view.mark_accessed(whole)
    view.mark_accessed(whole)
    assert view.counters[C.vmstat__pgactivate] == 512
    assert nodes.size[ACTIVE] == 512
    huge.ends_well()


def test_a_huge_page_moves_whole_where_there_is_a_block(huge: HugePopulated, costs: Costs) -> None:
    view = huge.view
    heads = huge.huge(FAST)
    named = np.array([heads[1] + 7, heads[0], heads[1], heads[0] + 511])
    before, free, counted = view.now, (view.free(FAST), view.free(SLOW)), view.counters.copy()
    assert view.move(named, SLOW, 0).all(), "each once, for all that name it"
    delta = view.counters - counted
    assert delta[C.vmstat__thp_migration_success] == 2
    assert delta[C.vmstat__pgmigrate_success] == 1024
    assert delta[C.bytes__migrated] == 1024 << 12
    assert (view.free(FAST), view.free(SLOW)) == (free[0] + 1024, free[1] - 1024)
    least = 2 * (costs.migrate_page_ps + 512 * costs.copy_fast_slow_ps)
    assert least <= view.now - before < least + 2 * 512 * costs.ept_violation_alloc_ps
    assert view.was_demoted(huge.view.frames(heads[:2])).all() or huge.fleet.host.vms[0].flat
    huge.ends_well()


def test_without_a_block_it_stays_and_that_is_counted(huge: HugePopulated) -> None:
    view = huge.view
    small = huge.base(FAST, 600)
    assert view.move(small, SLOW, 0).all(), "one block of the slow node is broken, and another one"
    keep = view.free(SLOW) - 511
    heads = huge.huge(FAST)
    assert not view.move(heads[:1], SLOW, keep).any()
    assert view.counters[C.vmstat__thp_migration_fail] == 1
    assert view.move(heads[:1], SLOW, keep - 1).all()
    huge.ends_well()


@pytest.mark.parametrize("stride", ["4KiB", "2MiB"])
@pytest.mark.parametrize("host", ["never", "always"])
def test_a_guest_flushes_a_huge_page_once(stride: str, host: str, costs: Costs) -> None:
    """x86 steps by 4 KiB, which makes a full flush; one INVLPG drops an entry of 2 MiB, or all if it is fractured."""
    huge = HugePopulated(costs, host, thp_flush_stride=stride)
    view, machine = huge.view, huge.guest.machine
    heads = huge.huge(FAST)
    while huge.guest.phase == "run" and not (fractured := machine.vcpus.field[:, FRACTURED].all()) and host == "never":
        assert huge.fleet.step()
    cached = machine.vcpus.stlb_tag.astype(bool).sum(axis=1)
    counted = view.counters.copy()
    view.move(heads[:1], SLOW, 0)
    delta = view.counters - counted
    one = stride == "2MiB"
    assert delta[C.vmstat__nr_tlb_local_flush_one] == (1 if one else 0)
    assert delta[C.vmstat__nr_tlb_local_flush_all] == (0 if one else 1)
    assert delta[C.vmstat__nr_tlb_remote_flush] == 1
    left = machine.vcpus.stlb_tag.astype(bool).sum(axis=1)
    if one and host == "always":
        assert ((cached - left) <= 1).all(), "other translations survive"
    elif host == "never":
        assert fractured and (cached > 100).all()
        assert not left.any(), "the pieces of fractured pages cannot be found by address"
    huge.ends_well()


def test_huge_pages_are_exchanged_with_huge_pages_only(huge: HugePopulated) -> None:
    view = huge.view
    slow, fast, small = huge.huge(SLOW), huge.huge(FAST), huge.base(FAST, 2)
    places = view.frames(slow[:1]), view.frames(fast[:1])
    assert view.exchange(slow[:1], small[:1], batched=True) == 0
    assert view.exchange(slow[:1] + 3, fast[:1], batched=True) == 0, "only a head stands for its unit"
    failed = int(view.counters[C.vmstat__pgmigrate_fail])
    assert failed > 0
    assert view.exchange(slow[:1], fast[:1], batched=True) == 512
    assert view.counters[C.vmstat__pgexchange_success] == 512
    while (view.nodes.flags[view.frames(slow[:1])] & F_BUSY).any():
        huge.step()
    assert np.array_equal(view.frames(slow[:1]), places[1])
    assert np.array_equal(view.frames(fast[:1]), places[0])
    huge.ends_well()


def test_pairs_are_of_one_size_and_split_no_more_than_it_takes(costs: Costs) -> None:
    huge = HugePopulated(costs)
    view = huge.view
    slow, fast = huge.huge(SLOW), huge.huge(FAST)
    view.split(slow[:1])
    pieces = slow[0] + np.arange(512)
    wanted = np.concatenate([pieces[:200], slow[1:2] + 9, pieces[100:300]])
    split = int(view.counters[C.vmstat__thp_split_page])
    hot, cold = view.match(wanted, fast[:3])
    assert hot.tolist() == [slow[1], *pieces[:300]], "each once"
    assert cold.tolist() == [fast[0], *(fast[1] + np.arange(300))]
    assert view.counters[C.vmstat__thp_split_page] == split + 1
    assert view.exchange(hot, cold, batched=True) == 512 + 300
    # The other way round: 4 KiB victims for a huge page that is hot.
    victims = pieces[pieces < pieces[0] + 300]
    victims = np.concatenate([victims, huge.base(FAST, 1000)])
    hot, cold = view.match(huge.huge(SLOW)[:1], victims)
    assert hot.size == cold.size == 512 and (view.sizes(hot) == 1).all()
    huge.ends_well()


def test_a_split_maps_the_pieces_where_they_were_with_their_bits(huge: HugePopulated, costs: Costs) -> None:
    view, table = huge.view, huge.view._table
    heads = huge.huge(FAST)
    view.clear_young(heads)
    number = heads[:2] // 512
    view._pde[number[0]] |= ACCESSED | DIRTY
    view._pde[number[1]] -= view._pde[number[1]] & DIRTY
    frames, before, counted = view.frames(heads[:2]), view.now, view.counters.copy()
    none = np.flatnonzero(view.sizes(np.arange(view.pages)) == 1)[0]
    done = view.split(np.array([heads[0] + 3, heads[0], heads[1], none]))
    assert done.tolist() == [True, False, True, False], "once, and no page that is none"
    delta = view.counters - counted
    assert delta[C.vmstat__thp_split_page] == 2
    assert view.now - before >= 2 * costs.split_huge_ps
    for head, frame, bits in zip(heads, frames, (ACCESSED | DIRTY, 0), strict=False):
        pages = head + np.arange(512)
        assert view.frames(pages).tolist() == list(range(frame, frame + 512))
        assert ((table[pages] & (ACCESSED | DIRTY)) == bits).all()
        assert (view.sizes(pages) == 1).all()
        assert view.test_young(pages).tolist() == [bool(bits)] * 512
    assert view.move(heads[0] + np.arange(100), SLOW, 0).all(), "pieces go their own ways"
    huge.ends_well()


def test_a_guest_s_split_takes_a_page_for_the_leaf_table(costs: Costs) -> None:
    huge = HugePopulated(costs)
    machine, view = huge.guest.machine, huge.view
    (head, *_) = huge.huge(FAST)
    free = view.free(FAST) + view.free(SLOW)
    view.split(np.array([head]))
    assert view.free(FAST) + view.free(SLOW) == free - 1
    entry = int(machine.tables.upper[head // 512])
    assert entry & (PRESENT | HUGE) == PRESENT
    table = (entry & FRAME_MASK) >> FRAME_SHIFT
    stamp = machine.stamps[(int(machine.ept[table]) & FRAME_MASK) >> FRAME_SHIFT]
    assert (stamp >> STAMP_PAGE_SHIFT) & (1 << STAMP_PAGE_BITS) - 1 == STAMP_TABLE_BASE + head // 512
    # Without a frame for it the page stays huge.
    huge.guest.nodes.free_count[:] = 0
    rest = huge.huge(SLOW)
    assert not view.split(rest[:1]).any()
    assert view.sizes(rest[:1]).tolist() == [512]


def test_a_collapse_gathers_512_pages_of_one_node(huge: HugePopulated, costs: Costs) -> None:
    view = huge.view
    heads = huge.huge(SLOW)
    assert view.split(heads[:2]).all()
    while huge.fleet.host.vms[0].view.operations:
        huge.step()
    assert view.move(heads[1] + np.arange(5), FAST, 0).all()
    base = int(huge.base(SLOW, 1)[0])
    before, free, counted = view.now, view.free(FAST) + view.free(SLOW), view.counters.copy()
    done = view.collapse(np.array([heads[0], heads[1], heads[0] + 512 * 99, base | 1]))
    assert done.tolist() == [True, False, False, False], "on one node, and there"
    delta = view.counters - counted
    assert delta[C.vmstat__thp_collapse_alloc] == 1
    assert view.now - before >= costs.collapse_huge_ps + 512 * costs.copy_slow_slow_ps
    while view.sizes(heads[:1])[0] == 1:
        huge.step()
    assert view.sizes(heads[:1]).tolist() == [512]
    assert view.frames(heads[:1])[0] % 512 == 0
    if not huge.fleet.host.vms[0].flat:
        assert view.free(FAST) + view.free(SLOW) == free + 1, "the leaf table is given back"
        assert view.counters[C.vmstat__nr_tlb_local_flush_all] > counted[C.vmstat__nr_tlb_local_flush_all]
    huge.ends_well()


def test_a_collapse_without_a_free_block_changes_nothing(costs: Costs) -> None:
    huge = HugePopulated(costs)
    view = huge.view
    (head, *_) = huge.huge(FAST)
    view.split(np.array([head]))
    view.nodes.watermark[FAST, WMARK_MIN] = view.free(FAST) - 511
    assert not view.collapse(np.array([head])).any()
    assert view.sizes(np.array([head])).tolist() == [1]
    huge.ends_well()


def test_protection_takes_huge_pages_whole_and_counts_them(huge: HugePopulated) -> None:
    view = huge.view
    slow = huge.pages(SLOW, view.pages)
    whole = huge.huge(SLOW)
    first = int(whole[0])
    assert view.protect(first, 512) == 512
    assert view.counters[C.vmstat__numa_huge_pte_updates] == 1
    pages = int(view.sizes(slow).sum())
    assert view.protect(0, view.pages) in {pages, pages - 512}, "the guest's is protected by now, the host's will be"
    huge.ends_well()


def test_accessed_and_dirty_pages_are_found_by_walking_the_tree(huge: HugePopulated, costs: Costs) -> None:
    view = huge.view
    view.scan_young(0, view.pages)
    view.scan_dirty(0, view.pages)
    before = view.now
    assert view.scan_young(0, view.pages).size == 0
    assert view.now - before < 64 * costs.scan_pte_ps, "an idle tree costs its upper entries"
    huge.guest.machine.counters[:] = 0
    for _ in range(2):
        huge.fleet.step()
    heads = np.concatenate([huge.huge(FAST), huge.huge(SLOW)])
    young, dirty = view.scan_young(0, view.pages), view.scan_dirty(0, view.pages)
    assert (np.diff(young) > 0).all() and (np.diff(dirty) > 0).all()
    assert np.isin(heads, young).any() and np.isin(heads, dirty).any()
    assert view.scan_dirty(0, view.pages).size == 0
    huge.ends_well()


def test_a_page_under_a_cached_table_looks_idle_until_a_flush(costs: Costs) -> None:
    """A walk that begins at a paging-structure cache's entry does not read the entry, and so leaves its A bit clear."""
    guest = until_populated(new_fleet(small_guest(costs, pages=2048, run_ms=10)))
    view, machine = guest.view, guest.machine
    page = int(view.on_node(0, view.pages, SLOW, 1)[0]) // 512 * 512 + 512

    def access(*pages: int) -> None:
        machine.vcpus.field[:, IDLE] = [0, 1]
        machine.state[S.LEFT] = -1
        touch_pages(machine, 0, list(pages))
        machine.state[S.TURN] = 0
        end = int(machine.state[S.NOW]) + PS_PER_MS
        assert engine.run(machine, np.zeros(0, OPERATION), end) == NEED_ACCESSES

    mov_cr3_everywhere(machine.vcpus, machine.walk_geometry)
    access(page)
    assert page in view.scan_young(0, view.pages)
    access(page + 1)
    assert machine.gpt[page + 1] & ACCESSED, "the walk of the leaf table sets the page's own bit"
    assert page + 1 not in view.scan_young(0, view.pages, flush=True), "but the tree above it looks idle"
    access(page + 2)
    assert page + 2 not in view.scan_young(0, view.pages, flush=True), "nothing was young, so nothing was flushed"
    view.flush.all()
    access(page + 3)
    found = view.scan_young(0, view.pages)
    assert {page + 1, page + 2, page + 3} <= set(found.tolist()), "after a flush a walk begins at the root"


huge_operations = st.lists(
    st.tuples(st.sampled_from(["promote", "demote", "exchange", "match", "protect", "unprotect", "age", "scan", "split",
                               "collapse", "run"]),
              st.integers(0, 8191), st.integers(1, 1600)),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=40)
@given(program=huge_operations)
@pytest.mark.parametrize(("view_name", "host"), [("guest", "never"), ("guest", "always"), ("host", "always")])
def test_whatever_is_done_with_huge_pages_content_survives(
    view_name: str, host: str, program: list[tuple[str, int, int]], costs: Costs
) -> None:
    huge = HugePopulated(costs, host, view_name)
    view = huge.view
    tables = np.arange(view.pages // 512) * 512

    def pair(at: int, n: int) -> tuple[Words, Words]:
        return view.on_node(at, n, SLOW, n), view.on_node(0, view.pages, FAST, n)

    actions: dict[str, Callable[[int, int], object]] = {
        "promote": lambda at, n: view.move(view.on_node(at, n, SLOW, n), FAST, view.watermark(FAST, WMARK_HIGH)),
        "demote": lambda at, n: view.move(np.arange(at, at + n), SLOW, 0),
        "exchange": lambda at, n: view.exchange(*pair(at, n), batched=True),
        "match": lambda at, n: view.exchange(*view.match(*pair(at, n)), batched=False),
        "protect": view.protect,
        "unprotect": lambda at, n: view.unprotect(view.on_node(at, n, SLOW, n)) if view_name == "guest" else None,
        "age": lambda at, n: view.test_and_clear_young(view.on_node(at, n, FAST, n)),
        "scan": lambda at, n: (view.scan_young(at, n, flush=True), view.scan_dirty(at, n)),
        "split": lambda at, n: view.split(view.on_node(at, n, at & 1, n)),
        "collapse": lambda at, n: view.collapse(np.roll(tables, at)[: 1 + n // 100]),
        "run": lambda at, n: huge.step(),
    }
    for action, drawn, count in program:
        at = drawn % view.pages
        actions[action](at, min(count, view.pages - at))
        check_memory(huge.fleet)
        if huge.guest.phase != "run":
            break
    huge.fleet.run()
    (report,) = huge.fleet.host.reports.values()
    assert huge.fleet.host.failures == []
    assert report["integrity"]["mismatches"] == 0


# -- under the policies -----------------------------------------------------------------------------------------------

BY_ACCESSED_BITS = {"heteroos", "heterovisor", "vtmm"}
"""Of so few huge pages each is accessed between any two scans, so that none is colder than another."""
COMBINATIONS = [(guest, host) for guest in ("never", "always") for host in ("never", "always")]


def brisk(costs: Costs, policy: str, guest: str, host: str, **kernel: object) -> GuestConfig:
    config = small_guest(costs, policy, run_ms=60)
    return with_thp(config, guest, host, khugepaged_scan_sleep_ps=5 * PS_PER_MS, **kernel)


@pytest.mark.parametrize(("guest", "host"), COMBINATIONS)
@pytest.mark.parametrize("policy", policies())
def test_the_laws_hold_under_every_policy(policy: str, guest: str, host: str, costs: Costs) -> None:
    """At every barrier frames are conserved, no frame is mapped twice, and lists hold what they should."""
    fleet = new_fleet(brisk(costs, policy, guest, host))
    ticks = 0
    while fleet.step():
        if not fleet.guests[0].finished:
            check_memory(fleet)
            ticks += 1
    assert ticks > 5
    assert fleet.host.failures == []
    report = fleet.host.reports[0]
    assert report["integrity"]["mismatches"] == 0
    before, after = report["populate"]["vmstat"], report["vmstat"]
    assert (before["thp_fault_alloc"] + after["thp_fault_alloc"] > 0) == (guest == "always")
    huge_host = host == "always" and not policies()[policy].logs_dirty
    assert report["host_thp"]["fault_alloc"] > 0 if huge_host else "host_thp" not in report
    moves = policies()[policy].view != "-" and policies()[policy].moves_alone
    if moves and not (policy in BY_ACCESSED_BITS and "always" in (guest, host)):
        assert report["migration"]["promoted_pages"] > 0


def test_khugepaged_gathers_what_first_touch_could_not(costs: Costs) -> None:
    """The slow node's memory was mapped in pieces, as the fast node was full."""
    _, report = run_one(brisk(costs, "none", "always", "never"))
    assert report["populate"]["vmstat"]["thp_collapse_alloc"] + report["vmstat"]["thp_collapse_alloc"] > 5
    assert report["integrity"]["mismatches"] == 0
    _, without = run_one(brisk(costs, "none", "always", "never", khugepaged_pages_to_scan=0))
    assert without["populate"]["vmstat"]["thp_collapse_alloc"] + without["vmstat"]["thp_collapse_alloc"] == 0
    assert without["memory"]["huge_bytes"] < report["memory"]["huge_bytes"]


def test_reclaim_splits_what_it_cannot_demote_whole(costs: Costs) -> None:
    """The slow node has frames, but no block for a huge page: kswapd demotes it in pieces."""
    huge = HugePopulated(costs)
    view = huge.view
    while view.free(SLOW) >= 1024:
        assert view.move(huge.huge(FAST)[:1], SLOW, 0).all()
    view.split(huge.huge(FAST)[-2:])
    assert view.move(huge.base(FAST, 2000)[: view.free(SLOW) - 500], SLOW, 0).all()
    view.clear_young(np.arange(view.pages))
    view.nodes.watermark[FAST, WMARK_DEMOTE] = view.free(FAST) + 200
    whole, counted = huge.huge(FAST), view.counters.copy()
    free = view.free(SLOW)
    assert 200 < free - view.watermark(SLOW, WMARK_MIN) < 512
    Kswapd(view, WMARK_DEMOTE, protect=False).run(PS_PER_S)
    delta = view.counters - counted
    assert (
        delta[C.vmstat__thp_split_page] == delta[C.vmstat__thp_migration_fail] == whole.size - huge.huge(FAST).size > 0
    )
    assert delta[C.vmstat__pgdemote_kswapd] >= 200
    huge.ends_well()


def test_huge_pages_make_walks_shorter_and_misses_rarer(costs: Costs) -> None:
    """On both levels; on one of them the TLB holds 4 KiB pieces, and only the walk gets shorter."""
    small = msgspec.structs.replace(costs, pde_cache_entries=4, ept_pde_cache_entries=4, nested_tlb_entries=4)
    reports = {}
    for guest, host in COMBINATIONS:
        config = small_guest(small, "none", pages=16384, fast=12288, run_ms=20)
        _, reports[guest, host] = run_one(
            with_thp(config, guest, host, thp_defrag="always", khugepaged_pages_to_scan=0)
        )
    refs = {key: report["access"]["walk_refs"] / report["access"]["walks"] for key, report in reports.items()}
    misses = {key: report["access"]["tlb_miss_ratio"] for key, report in reports.items()}
    assert misses["always", "always"] < misses["never", "never"] / 4
    for one in (("always", "never"), ("never", "always")):
        assert refs[one] < refs["never", "never"] - 0.3, "an entry less to read"
        assert misses[one] == pytest.approx(misses["never", "never"], rel=0.1)
    assert reports["always", "always"]["throughput_mops"] > reports["never", "never"]["throughput_mops"]


def run_one(config: GuestConfig) -> tuple[Guest, dict[str, Any]]:
    """One guest to its end, with its report."""
    fleet = new_fleet(config)
    guest = fleet.guests[config.vm]
    fleet.run()
    assert fleet.host.failures == []
    return guest, fleet.host.reports[config.vm]


@pytest.mark.parametrize("quiet", [{"pml": True, "pml_harvest_ps": 5 * PS_PER_MS}, {"swap_pages_per_s": 400_000},
                                   {"populate": True}])  # fmt: skip
@pytest.mark.parametrize("policy", ["none", "h-tpp"])
def test_the_host_s_other_modes_go_with_huge_pages(policy: str, quiet: dict[str, Any], costs: Costs) -> None:
    """Swap splits what it takes; while KVM logs dirty pages it maps 4 KiB; populated memory is huge from the start."""
    config = brisk(costs, policy, "always", "always")
    fleet = new_fleet(msgspec.structs.replace(config, host=msgspec.structs.replace(config.host, **quiet)))
    while fleet.step():
        # What is swapped out has no frame.
        if "swap_pages_per_s" not in quiet and not fleet.guests[0].finished:
            check_memory(fleet)
    assert fleet.host.failures == []
    report = fleet.host.reports[0]
    assert report["integrity"]["mismatches"] == 0
    if "pml" in quiet:
        assert "host_thp" not in report and report["pml"]["entries"] > 0
    elif "populate" in quiet:
        assert report["host_thp"]["fault_alloc"] >= 12
        assert report["memory"]["pinned_bytes"] == config.total_pages << 12
    else:
        assert report["host_thp"]["split_page"] > 0 and report["swap"]["out_pages"] > 100


# -- the command line -------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
SPEC = """
memory = "32MiB"
seconds = 0.1
[[group]]
policy = "none"
[[group]]
policy = "g-tpp"
set.policy = { scan_delay_ms = 0, scan_period_min_ms = 20, scan_size_mb = 16 }
[[group]]
policy = "hyperplace"
set.policy = { load_period = 29, epoch_ms = 10, tau_split = 1, initial = "ram" }
[[group]]
policy = "h-tpp"
set.policy = { scan_delay_ms = 0, scan_period_min_ms = 20, scan_size_mb = 16 }
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("guest", "host"), COMBINATIONS)
def test_a_fleet_runs_so_from_the_command_line(guest: str, host: str, tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    settings = {"guest.thp": guest, "host.thp": host, "guest.khugepaged_scan_sleep": "10"}
    flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "fleet", "run", "spec.toml", *flags, "--out", "out", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["outcome"] == "ok"
    for vm in summary["vms"]:
        assert vm["integrity"]["mismatches"] == 0
        assert (vm["memory"]["huge_bytes"] > 0) == (guest == "always")
        assert ("host_thp" in vm) == (host == "always")
        if host == "always":
            assert vm["host_thp"]["huge_bytes"] > 0
