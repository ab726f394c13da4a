"""HeteroOS' rules (ISCA'17): what the guest lists, what the host finds for it, how it ranks, what it moves."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.in_process import InProcessFleet
from guestd.mm.nodes import FAST, NO_PAGE, SLOW, WMARK_HIGH, new_nodes
from guestd.tiering import heteroos
from guestd.tiering.heteroos import POLICY, Ageing, HostScanList
from guestd.tiering.registry import policy_of, stages
from guestd.tiering.stage import Evidence, Staged, StageError, with_stages
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import ACCESSED
from proto.units import PS_PER_MS, PS_PER_S
from tests.small_fleet import check_memory, new_fleet, small_guest, small_host, until_populated

BOOK = np.zeros(6, np.int64)
PAGES = 2048
ASLEEP: dict[str, Scalar] = {"list_ms": 600_000}


@given(used=st.sets(st.integers(0, 119)), start=st.integers(0, 120), limit=st.integers(1, 130), room=st.integers(1, 30))
def test_a_list_has_the_frames_in_use_as_far_as_it_goes(used: set[int], start: int, limit: int, room: int) -> None:
    nodes = new_nodes(60, 20, 45)
    managed = [*range(20), *range(60, 105)]
    nodes.page[sorted(used.intersection(managed))] = 7
    ranges = np.empty((room, 2), np.int64)
    listed = heteroos.list_frames(BOOK, nodes, start, limit, ranges)
    found = [frame for first, count in ranges[: listed.ranges] for frame in range(first, first + count)]
    wanted = [frame for frame in managed if frame >= start and nodes.page[frame] != NO_PAGE]
    assert found == wanted[: listed.pages]
    gaps = np.flatnonzero(np.diff(found) != 1).size if found else -1
    assert listed.ranges == gaps + 1, "what lies together is one range"
    if listed.pages < min(limit, len(wanted)):
        assert listed.ranges == room
    rest = wanted[listed.pages :]
    assert [frame for frame in wanted if frame >= listed.end] == rest
    assert listed.frames == len([frame for frame in managed if start <= frame < listed.end])


@given(seen=st.lists(st.sets(st.integers(0, 11)), max_size=12), scans=st.integers(1, 8), least=st.integers(1, 8))
def test_the_order_is_that_of_the_last_scans_the_latest_first(seen: list[set[int]], scans: int, least: int) -> None:
    history, now = np.zeros(12, np.uint8), np.zeros(12, np.uint8)
    for pages in seen:
        now[sorted(pages)] = 1
        heteroos.age(BOOK, history, now, scans)
        assert not now.any()
    last = [[page in pages for pages in seen[::-1][:scans]] for page in range(12)]
    last = [found + [False] * (scans - len(found)) for found in last]
    starts, out = np.empty(heteroos.HISTORIES, np.int64), np.empty(12, np.int64)
    for hot in (True, False):
        expected = [page for page in range(12) if (sum(last[page]) >= least) == hot]
        expected.sort(key=lambda page: last[page], reverse=hot)
        # `reverse` keeps the order of equals.
        assert out[: heteroos.in_order(BOOK, history, least, hot, starts, out)].tolist() == expected


@given(bits=st.lists(st.booleans(), min_size=1, max_size=40), cut=st.integers(1, 40))
def test_the_bits_of_an_answer_are_those_of_the_list(bits: list[bool], cut: int) -> None:
    cut = min(cut, len(bits))
    ranges = np.array([[100, cut], [500, len(bits) - cut]], np.int64)
    frames = [*range(100, 100 + cut), *range(500, 500 + len(bits) - cut)]
    out = np.empty(len(bits), np.int64)
    packed = np.packbits(np.array(bits, np.uint8), bitorder="little")
    count = heteroos.accessed(BOOK, ranges, packed, out)
    assert out[:count].tolist() == [frame for frame, bit in zip(frames, bits, strict=True) if bit]


class HandFed:
    """A populated guest whose lists are made when the test says so."""

    def __init__(self, costs: Costs, **params: Scalar) -> None:
        config = small_guest(costs, "heteroos", params=ASLEEP | params, pages=PAGES, fast=400, run_ms=1000)
        self.fleet = new_fleet(config)
        self.guest = until_populated(self.fleet)
        self.view, tiering = self.guest.view, self.guest.tiering
        assert isinstance(tiering, Staged)
        assert isinstance(tiering.tracker, HostScanList) and isinstance(tiering.classifier, Ageing)
        self.tiering, self.tracker, self.classifier = tiering, tiering.tracker, tiering.classifier

    def pages(self, node: int) -> Words:
        return self.view.on_node(0, self.view.pages, node, self.view.pages)

    def round(self, pages: Words) -> None:
        self.classifier.observe(Evidence(self.view, pages=pages))
        self.classifier.end_of_round()


def test_the_host_looks_at_the_listed_pages_and_at_no_others(costs: Costs) -> None:
    fed = HandFed(costs, list_pages=700)
    host, ept = fed.fleet.host.vms[0], fed.guest.machine.ept
    frames = np.sort(fed.view.frames(np.concatenate([fed.pages(FAST), fed.pages(SLOW)])))
    fed.view.meter.now = fed.guest.now
    fed.tiering.on_timer("tracker.list")
    ranges = np.frombuffer(fed.view.host_scan.take_list(), np.int64).reshape(-1, 2)
    listed = np.concatenate([np.arange(first, first + count) for first, count in ranges])
    assert np.array_equal(listed, frames[:700]), "in order of gPA, none but pages of the user"
    young = (ept & ACCESSED) != 0
    host.take_list(ranges)
    host.prepare(fed.guest.now, host.until_ps)
    bits, _ = host.scanned
    assert np.array_equal(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:700] != 0, young[listed])
    cleared = young & ((ept & ACCESSED) == 0)
    assert np.array_equal(np.flatnonzero(cleared), listed[young[listed]])
    request = costs.kick_base_ps + costs.kick_target_ps * fed.view.vcpus
    assert int(host.meter.modelled_ps.sum()) == 700 * costs.scan_pte_ps + request


def test_a_round_is_over_when_all_frames_were_listed(costs: Costs) -> None:
    pages = PAGES // 2 + 1
    fed = HandFed(costs, list_ms=1, list_pages=pages, hot_scans=8)
    rounds: list[int] = []
    while len(rounds) < 40:
        assert fed.fleet.step()
        rounds.append(int(fed.classifier.history.max()))
    lists = int(fed.guest.machine.counters[C.kvm__remote_tlb_flush_requests])
    assert rounds[0] <= 128 and rounds[-1] == 255
    assert 16 <= lists <= len(rounds) + 20, "one a quantum at most, and two a round"


def test_the_guest_makes_room_before_it_promotes(costs: Costs) -> None:
    fed = HandFed(costs, scans=2, hot_scans=2, most_promoted=60)
    view, fast, slow = fed.view, fed.pages(FAST), fed.pages(SLOW)
    fed.round(np.concatenate([fast[:300], slow[:100]]))
    before = view.counters.copy()
    fed.round(np.concatenate([fast[:290], slow[:100]]))
    delta = view.counters - before
    assert delta[C.vmstat__pgpromote_success] == 60
    assert (view.nodes_of(slow[:60]) == FAST).all()
    assert (view.nodes_of(fast[:290]) == FAST).all(), "the hot stay"
    gone = fast[view.nodes_of(fast) == SLOW]
    assert delta[C.vmstat__pgdemote_kswapd] == gone.size
    assert np.array_equal(gone, fast[300:][: gone.size]), "those of the last round, 290 to 299, were used later"
    assert view.free(FAST) == view.watermark(FAST, WMARK_HIGH)
    assert delta[C.vmstat__nr_tlb_local_flush_one] + delta[C.vmstat__nr_tlb_local_flush_all] > 0
    hot = fed.classifier.hot_set()
    assert hot is not None and np.array_equal(hot, np.sort(np.concatenate([fast[:290], slow[:100]])))
    check_memory(fed.fleet)


def test_without_hot_pages_in_slow_memory_nothing_moves(costs: Costs) -> None:
    fed = HandFed(costs, scans=1, hot_scans=1)
    fed.round(fed.pages(FAST))
    assert fed.view.counters[C.bytes__migrated] == 0


def test_only_a_guest_can_give_the_host_a_list() -> None:
    with pytest.raises(StageError, match=r"host-scan-list.*guest.*h-tpp.*host"):
        policy_of("h-tpp", {"tracker": "host-scan-list", "migrator": "remap"})
    mixed = with_stages(POLICY, {"classifier": stages()["last-use"], "migrator": stages()["remap"]})
    assert mixed.stages == {"tracker": "host-scan-list", "classifier": "last-use", "migrator": "remap"}


def run(costs: Costs, policy: str, params: dict[str, Scalar]) -> tuple[dict[str, Any], dict[str, Any]]:
    guest = small_guest(costs, policy, params=params, run_ms=80)
    guest = msgspec.structs.replace(guest, engine=msgspec.structs.replace(guest.engine, quantum_ps=PS_PER_MS))
    core = InProcessFleet(msgspec.structs.replace(small_host(costs), engine=guest.engine), [guest]).run()
    assert core.failures == []
    return core.reports[0], core.host_report({"total_s": 0.0, "by_vm": {}})["cpu"]["by_vm"][0]


def test_it_finds_the_hot_set_and_the_host_is_charged_for_its_part(costs: Costs) -> None:
    none, idle = run(costs, "none", {})
    found, host = run(costs, "heteroos", {"list_ms": 1, "scans": 4, "hot_scans": 3})
    assert found["integrity"]["mismatches"] == 0
    assert found["access"]["fast_ratio"] > 5 * none["access"]["fast_ratio"]
    assert found["transactions"] > none["transactions"]
    assert idle["modelled_s"] == 0 < host["modelled_s"]
    assert found["agent_cpu"]["where"] == "guest"
    assert found["kvm"]["mmu_zapped"] == 0, "the host moves nothing"
    scans = found["kvm"]["remote_tlb_flush_requests"]
    assert 20 < scans <= 80, "one full flush a list"
    assert found["vmstat"]["nr_tlb_local_flush_one"] > 0, "the guest flushes by gVA"
    assert host["modelled_s"] * PS_PER_S > scans * 6000 * costs.scan_pte_ps
