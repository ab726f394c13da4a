"""What a tiering algorithm can find out about memory: the reading half of `guestd.tiering.view.PageView`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from guestd.meter import Meter
from guestd.mm.nodes import Nodes
from guestd.tiering import pages as ptes
from guestd.tiering import radix, units
from guestd.tiering.pages import Pdes
from guestd.tiering.radix import Radix
from proto.arrays import Ints, Mask, Words
from proto.costs import Costs
from proto.counters import Counters
from proto.entry import Entries

if TYPE_CHECKING:
    from guestd.tiering.policy import Sampling


def _no_pmu(sampling: Sampling) -> None:
    raise ValueError("this view has no PMU; only a guest's has, and only for a policy that samples from the start")


class Observations(ABC):
    """See `guestd.tiering.view`. ``pages``: size of the page index; ``vcpus``: vCPUs of the VM."""

    def __init__(self, nodes: Nodes, table: Entries, shape: Radix, meter: Meter, costs: Costs, counters: Counters,
                 vcpus: int, pages: int, schedule: Callable[[str, int], None]) -> None:  # fmt: skip
        self.nodes = nodes
        self._table = table
        self._radix = shape
        self._pde: Pdes = shape.upper
        self.meter = meter
        self.costs = costs
        self.counters = counters
        self.vcpus = vcpus
        self.pages = pages
        self.schedule = schedule
        """``schedule(name, at_ps)``: ask for `Tiering.on_timer(name)` at a virtual time."""
        self.program_pmu: Callable[[Sampling], None] = _no_pmu
        """``program_pmu(sampling)``: sample otherwise from now on; see `guestd.perf_events.PerfEvents.program`."""
        self._half = nodes.page.size // 2
        self.hint_fault_ps = costs.hint_fault_ps
        """What a NUMA hint fault costs in this view, without migration."""

    @property
    def now(self) -> int:
        """Virtual time of the thread at work, ps."""
        return self.meter.now

    def test_and_clear_young(self, pages: Words) -> Mask:
        """Read and clear the accessed bits of ``pages`` (int64[n]) found through the reverse map; bool[n].

        The kernel's ageing in reclaim, ptep_clear_flush_young_notify; in KVM ``clear_flush_young``
        (virt/kvm/kvm_main.c). Costs a reverse-map walk and a PTE each; in the host also a flush request per young page
        that the EPT maps (`remote_tlb_flush_requests`), in a guest on x86 none.
        """
        young, mapped = self._take_young(pages)
        self._flush_young(mapped)
        return young

    def test_young(self, pages: Words, *, rmap: bool = True) -> Mask:
        """Read the accessed bits of ``pages`` (int64[n]) and leave them; bool[n].

        DAMON's look, idle checks; in KVM ``test_young``. Costs a reverse-map walk and a PTE each; flushes nothing.
        ``rmap``: false if the caller knows where the PTEs are.
        """
        young = np.zeros(pages.size, np.bool_)
        ptes.test_young(self.meter.book, self._table, self._pde, pages, young)
        self.meter.charge(((self.costs.rmap_walk_ps if rmap else 0) + self.costs.scan_pte_ps) * pages.size)
        return young

    def clear_young(self, pages: Words) -> Mask:
        """Read and clear the accessed bits of ``pages`` (int64[n]) without any flush; bool[n].

        DAMON's preparation, idle page tracking, MGLRU's walks; in KVM ``clear_young``. Costs a reverse-map walk and a
        PTE each. A page that a TLB still translates looks idle the next time, however often it is accessed. Of a unit
        that is named twice, the first says whether it is young.
        """
        return self._take_young(pages)[0]

    def _take_young(self, pages: Words) -> tuple[Mask, int]:
        """What `clear_young` returns, and how many of them an entry maps."""
        young = np.zeros(pages.size, np.bool_)
        mapped = int(ptes.clear_young(self.meter.book, self._table, self._pde, pages, young))
        self.meter.charge((self.costs.rmap_walk_ps + self.costs.scan_pte_ps) * pages.size)
        return young, mapped

    def test_and_clear_dirty(self, pages: Words) -> Mask:
        """Read and clear the dirty bits of ``pages`` (int64[n]) in order of address; bool[n].

        Dirty logging by D bits, RAMinate's scan; in KVM kvm_arch_mmu_enable_log_dirty_pt_masked. Costs a PTE each, and
        one flush for the batch if any was set: a translation that is dirty in a TLB sets no D bit. In the host that is
        one request for the whole VM, in a guest one shootdown.
        """
        dirty = np.zeros(pages.size, np.bool_)
        ptes.clear_dirty(self.meter.book, self._table, self._pde, pages, dirty)
        self.meter.charge(self.costs.scan_pte_ps * pages.size)
        if dirty.any():
            self._flush_dirty(pages[dirty])
        return dirty

    def scan_young(self, first: int, count: int, *, flush: bool = False) -> Words:
        """Accessed pages of [first, first + count), in order of address (int64[n]); their bits are cleared.

        It walks the table as a tree (`guestd.tiering.radix`): passes over what is absent, and over subtrees whose entry
        was not accessed since the last scan. Costs a PTE for each entry that is looked at. ``flush``: one for all of it
        if anything was young (a request in the host, a shootdown in a guest); without it, what a TLB or a
        paging-structure cache still holds looks idle next time.
        """
        count = self._clip(first, count)
        out = np.empty(count, np.int64)
        found, visited = radix.scan_young(self.meter.book, self._table, self._radix, first, count, out)
        self.meter.charge(self.costs.scan_pte_ps * visited)
        if flush and found:
            self._flush_scanned()
        return out[:found]

    def scan_dirty(self, first: int, count: int, *, flush: bool = True) -> Words:
        """Dirty pages of [first, first + count), in order of address (int64[n]); their bits are cleared.

        Passes over what is absent; costs a PTE for each entry that is looked at, and one flush if any was dirty, as
        `test_and_clear_dirty`. Without ``flush`` a page that is dirty in a TLB looks clean the next time.
        """
        count = self._clip(first, count)
        out = np.empty(count, np.int64)
        found, visited = radix.scan_dirty(self.meter.book, self._table, self._pde, first, count, out)
        self.meter.charge(self.costs.scan_pte_ps * visited)
        if flush and found:
            self._flush_dirty(out[:found])
        return out[:found]

    def collapsible(self, first_pages: Words) -> Mask:
        """Where `collapse` could make a huge page, of which one page at least was accessed; bool[n].

        mm/khugepaged.c, hpage_collapse_scan_pmd. Costs a PTE for each entry that is looked at.
        """
        able = np.zeros(first_pages.size, np.bool_)
        visited = units.collapsible(self.meter.book, self._table, self._pde, self.nodes, first_pages, able)
        self.meter.charge(self.costs.scan_pte_ps * visited)
        return able

    def on_node(self, first: int, count: int, node: int, limit: int) -> Words:
        """Units of [first, first + count) that lie on ``node``, in order of address (int64[n]).

        Up to ``limit`` pages, of which a huge page that comes last may have more. Costs an entry for each that is
        looked at: what lies in no table is passed over.
        """
        count = self._clip(first, count)
        out = np.empty(min(limit, count), np.int64)
        found, visited = ptes.on_node(self.meter.book, self._table, self._pde, self._half, first, count, node, limit,
                                      out)  # fmt: skip
        self.meter.charge(self.costs.scan_pte_ps * visited)
        return out[:found]

    def count_mapped(self, first: int, count: int) -> int:
        """Mapped pages in [first, first + count); costs as `on_node`."""
        count = self._clip(first, count)
        mapped, visited = ptes.count_mapped(self.meter.book, self._table, self._pde, first, count)
        self.meter.charge(self.costs.scan_pte_ps * visited)
        return int(mapped)

    def _clip(self, first: int, count: int) -> int:
        """``count`` cut to the pages that there are; raises ValueError for a range that begins outside them."""
        if not 0 <= first <= self.pages or count < 0:
            raise ValueError(f"pages [{first}, {first + count}) of a view of {self.pages}")
        return min(count, self.pages - first)

    def frames(self, pages: Words) -> Ints:
        """Frame that stands for each page's unit (int32[n]), NO_PAGE where unmapped."""
        out = np.empty(pages.size, np.int32)
        if pages.size:
            ptes.frames(self.meter.book, self._table, self._pde, pages, out)
        return out

    def heads(self, pages: Words) -> Words:
        """The page that stands for each page's unit (int64[n])."""
        out = np.empty(pages.size, np.int64)
        if pages.size:
            ptes.heads(self.meter.book, self._pde, pages, out)
        return out

    def sizes(self, pages: Words) -> Words:
        """Pages of each page's unit, 1 or 512 (int64[n])."""
        out = np.empty(pages.size, np.int64)
        if pages.size:
            ptes.sizes(self.meter.book, self._pde, pages, out)
        return out

    def frame_sizes(self, frames: Ints) -> Words:
        """Pages of the unit that each frame stands for (int64[n]), wherever its page is mapped by now."""
        return units.frame_sizes(self.nodes, frames)

    def free(self, node: int) -> int:
        """Free frames of a node."""
        return int(self.nodes.free_count[node])

    def watermark(self, node: int, mark: int) -> int:
        """A watermark of a node, frames."""
        return int(self.nodes.watermark[node, mark])

    @abstractmethod
    def pages_at(self, addresses: Words) -> Words:
        """The page at each address (int64[n]), -1 where no table maps any; costs a walk of the page table each."""

    @abstractmethod
    def addresses(self, pages: Words) -> Words:
        """Address of each page (int64[n])."""

    @abstractmethod
    def page_range(self, start: int, end: int) -> tuple[int, int]:
        """(first page, count) of the pages at addresses [start, end), which must be multiples of 2 MiB."""

    @abstractmethod
    def address_bounds(self) -> tuple[int, int]:
        """Lowest and highest address that is mapped."""

    @abstractmethod
    def _flush_young(self, young: int) -> None:
        """After clearing accessed bits, ``young`` of which were set."""

    @abstractmethod
    def _flush_scanned(self) -> None:
        """One flush after clearing accessed bits all over."""

    @abstractmethod
    def _flush_dirty(self, pages: Words) -> None:
        """After clearing the dirty bits of ``pages``, all of which were set (int64[n], n > 0)."""
