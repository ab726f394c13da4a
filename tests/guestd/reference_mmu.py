"""Translation hardware in plain Python: set-associative arrays as lists, walks and invalidations as manuals say them.

Nothing of `guestd.tlb`, `guestd.walk` or `guestd.instructions` is used but names of constants: entries are tuples, a
context is its triple (EPTP, VPID, PCID), and an invalidation is a predicate over entries.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from guestd import walk as mmu
from guestd.instructions import GLOBAL
from guestd.machine import Machine
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, HUGE, PRESENT, TABLE_SLOW

Context = tuple[int, int, int]
"""EPTP, VPID, PCID."""
Key = tuple[str, int, Context]
"""Page size, number, context."""
Value = TypeVar("Value")


class Array(Generic[Value]):
    """A set-associative array with bit-PLRU: a way is used or not; when all are, only the newest stays."""

    def __init__(self, sets: int, ways: int) -> None:
        self.ways = ways
        self.sets: list[list[tuple[Key, Value] | None]] = [[None] * ways for _ in range(sets)]
        self.used: list[set[int]] = [set() for _ in range(sets)]

    def _find(self, key: Key) -> tuple[int, int | None]:
        index = key[1] % len(self.sets)
        found = [way for way, entry in enumerate(self.sets[index]) if entry is not None and entry[0] == key]
        assert len(found) <= 1
        return index, found[0] if found else None

    def get(self, key: Key) -> Value | None:
        """Its value; a hit counts as use."""
        index, way = self._find(key)
        if way is None:
            return None
        self._use(index, way)
        entry = self.sets[index][way]
        assert entry is not None
        return entry[1]

    def _use(self, index: int, way: int) -> None:
        used = self.used[index] | {way}
        self.used[index] = {way} if len(used) == self.ways else used

    def enter(self, key: Key, value: Value, allowed: int) -> None:
        """Over the first of the ``allowed`` ways that is not marked used; if all are, their marks go."""
        index, way = self._find(key)
        assert way is None
        choice = set(range(allowed))
        if choice <= self.used[index]:
            self.used[index] -= choice
        way = min(choice - self.used[index])
        self.sets[index][way] = (key, value)
        self._use(index, way)

    def renew(self, key: Key, value: Value) -> None:
        """Replace the value if the key is there; no use."""
        index, way = self._find(key)
        if way is not None:
            self.sets[index][way] = (key, value)

    def drop(self, unwanted: Callable[[Key], bool]) -> None:
        """Contents go, the used marks stay."""
        self.sets = [[None if entry and unwanted(entry[0]) else entry for entry in ways] for ways in self.sets]


class Fifo:
    """A small cache of four ways a set, first in, first out, newest first; with no entries it never hits."""

    def __init__(self, entries: int) -> None:
        self.sets: list[list[tuple[int, object] | None]] = [[None] * 4 for _ in range(entries // 4)]

    def __contains__(self, key: tuple[int, object]) -> bool:
        return bool(self.sets) and key in self.sets[key[0] % len(self.sets)]

    def enter(self, key: tuple[int, object]) -> None:
        if self.sets:
            ways = self.sets[key[0] % len(self.sets)]
            ways[:] = [key, *ways[:3]]

    def drop(self, unwanted: Callable[[int, Any], bool]) -> None:
        self.sets = [[None if entry and unwanted(*entry) else entry for entry in ways] for ways in self.sets]


@dataclass
class Tables:
    """Both page tables, as lists."""

    gpt: list[int]
    ept: list[int]
    upper: list[int]
    parent: list[int]
    ept_pde: list[int]
    ept_pdpte: list[int]
    guest_levels: int
    ept_levels: int
    slow_frames: int


def frame_of(entry: int) -> int:
    """The frame that an entry maps."""
    return (entry & FRAME_MASK) >> FRAME_SHIFT


@dataclass
class Mmu:
    """One vCPU's translation hardware."""

    l1: Array[tuple[int, bool]]
    l1_2m: Array[tuple[int, bool]]
    stlb: Array[tuple[int, bool]]
    ways_2m: int
    pde: Fifo
    pdpte: Fifo
    pml4e: Fifo
    nested: Fifo
    ept_pde: Fifo
    ept_pdpte: Fifo
    ept_pml4e: Fifo
    contexts: list[Context] = field(default_factory=list)
    current: int = 0
    fractured: bool = False
    huge_seen: bool = False
    dirtied: list[int] = field(default_factory=list)
    """gPA frames of tables whose EPT entry got its D bit, until somebody logs them."""

    # -- look-up and fill ---------------------------------------------------------------------------------------

    @property
    def context(self) -> Context:
        """The current one."""
        return self.contexts[self.current]

    def look_up(self, page: int) -> tuple[int, bool, bool] | None:
        """(frame, dirty, whether the STLB served it) of a page."""
        sizes = [("4k", page, self.l1)] + ([("2m", page // 512, self.l1_2m)] if self.huge_seen else [])
        for size, number, first in sizes:
            key = (size, number, self.context)
            offset = page % 512 if size == "2m" else 0
            if (hit := first.get(key)) is not None:
                return hit[0] + offset, hit[1], False
            if (hit := self.stlb.get(key)) is not None:
                first.enter(key, hit, first.ways)
                return hit[0] + offset, hit[1], True
        return None

    def fill(self, page: int, frame: int, dirty: bool, guest_huge: bool, ept_huge: bool) -> None:
        """What a walk enters."""
        if guest_huge and ept_huge:
            self.huge_seen = True
            key, entry = ("2m", page // 512, self.context), (frame - page % 512, dirty)
            self.l1_2m.enter(key, entry, self.l1_2m.ways)
            self.stlb.enter(key, entry, self.ways_2m)
        else:
            self.fractured |= guest_huge
            small = ("4k", page, self.context)
            self.l1.enter(small, (frame, dirty), self.l1.ways)
            self.stlb.enter(small, (frame, dirty), self.stlb.ways)

    def renew(self, page: int, frame: int) -> None:
        """A write walked because its entry was clean."""
        small, large = ("4k", page, self.context), ("2m", page // 512, self.context)
        for array in (self.l1, self.stlb):
            array.renew(small, (frame, True))
        for array in (self.l1_2m, self.stlb):
            array.renew(large, (frame - page % 512, True))

    # -- walk ---------------------------------------------------------------------------------------------------

    def _ept_walk(self, tables: Tables, frame: int, price: list[int]) -> list[int]:
        """Price of each reference."""
        eptp = self.context[0]
        refs = []
        if not tables.ept_pde[frame // 512] & HUGE:
            refs.append(price[mmu.PRICE_EPT + 1])
            if (frame // 512, eptp) in self.ept_pde:
                return refs
            self.ept_pde.enter((frame // 512, eptp))
        refs.append(price[mmu.PRICE_EPT + 2])
        tables.ept_pde[frame // 512] |= ACCESSED
        if (frame >> 18, eptp) in self.ept_pdpte:
            return refs
        self.ept_pdpte.enter((frame >> 18, eptp))
        refs.append(price[mmu.PRICE_EPT + 3])
        tables.ept_pdpte[frame >> 18] |= ACCESSED
        if (frame >> 27, eptp) in self.ept_pml4e:
            return refs
        self.ept_pml4e.enter((frame >> 27, eptp))
        return refs + price[mmu.PRICE_EPT + 4 : mmu.PRICE_EPT + 1 + tables.ept_levels]

    def walk(self, tables: Tables, page: int, price: list[int]) -> list[int] | None:
        """Price of each reference of a walk to ``page``; None if a table on the way is not mapped by the EPT."""
        way = [page // 512]
        while len(way) < tables.guest_levels:
            way.append(tables.parent[way[-1]])
        huge = bool(tables.upper[page // 512] & HUGE)
        caches = [self.pde, self.pdpte, self.pml4e]
        start = next((k for k in range(huge, 3) if (way[k], self.context) in caches[k]), None)
        refs: list[int] = []
        first = len(way) - 1 if start is None else start
        for k in range(first, huge - 1, -1):
            if k != start and not self._translate(tables, way[k], price, refs):
                return None
            slow = bool(tables.upper[way[k]] & TABLE_SLOW)
            refs.append(price[mmu.PRICE_GUEST + 2 * (k + 1) + slow])
            if k > huge:
                tables.upper[way[k - 1]] |= ACCESSED
        for k in range(huge, min(first, 3)):
            caches[k].enter((way[k], self.context))
        return refs + self._ept_walk(tables, frame_of(tables.gpt[page]), price)

    def _translate(self, tables: Tables, number: int, price: list[int], refs: list[int]) -> bool:
        """Find the table that entry ``number`` maps; whether the EPT maps it."""
        frame = frame_of(tables.upper[number])
        if (frame, self.context[0]) in self.nested:
            return True
        if not tables.ept[frame] & PRESENT:
            return False
        if not tables.ept[frame] & DIRTY:
            self.dirtied.append(frame)
        tables.ept[frame] |= ACCESSED | DIRTY
        refs += self._ept_walk(tables, frame, price)
        self.nested.enter((frame, self.context[0]))
        slow = frame_of(tables.ept[frame]) >= tables.slow_frames
        tables.upper[number] = tables.upper[number] & ~TABLE_SLOW | (TABLE_SLOW if slow else 0)
        return True

    # -- invalidation: SDM vol. 3, 4.10.4 and 29.4.3 ------------------------------------------------------------

    def _drop(self, tlb: Callable[[str, int, Context], bool], paging: Callable[[int, Context], bool]) -> None:
        for array in (self.l1, self.l1_2m, self.stlb):
            array.drop(lambda key: tlb(*key))
        for cache in (self.pde, self.pdpte, self.pml4e):
            cache.drop(paging)

    def drop_combined(self, unwanted: Callable[[Context], bool]) -> None:
        """Every combined mapping of some contexts."""
        self._drop(lambda size, number, context: unwanted(context), lambda number, context: unwanted(context))
        if all(unwanted(context) for context in self.contexts):
            self.fractured = False

    def _of_page(self, page: int, size: str, number: int) -> bool:
        return number == (page if size == "4k" else page // 512)

    def invlpg(self, page: int) -> None:
        _, vpid, pcid = self.context
        if self.fractured:
            self.drop_combined(lambda context: context[1] == vpid)
            return
        self._drop(
            lambda size, number, context: self._of_page(page, size, number) and context[1] == vpid
            and context[2] in (pcid, GLOBAL),
            lambda number, context: context[1] == vpid and context[2] == pcid,
        )  # fmt: skip

    def mov_cr3(self) -> None:
        _, vpid, pcid = self.context
        self.drop_combined(lambda context: context[1:] == (vpid, pcid))

    def invpcid(self, kind: int, pcid: int, page: int, parent: list[int]) -> None:
        vpid = self.context[1]
        if kind == 0 and self.fractured:
            self.drop_combined(lambda context: context[1:] == (vpid, pcid))
        elif kind == 0:
            way = (page // 512, parent[page // 512], parent[parent[page // 512]])
            self._drop(
                lambda size, number, context: self._of_page(page, size, number) and context[1:] == (vpid, pcid),
                lambda number, context: number in way and context[1:] == (vpid, pcid),
            )
        elif kind == 1:
            self.drop_combined(lambda context: context[1:] == (vpid, pcid))
        elif kind == 2:
            self.drop_combined(lambda context: context[1] == vpid)
        else:
            self.drop_combined(lambda context: context[1] == vpid and context[2] != GLOBAL)

    def invvpid(self, kind: int, vpid: int, page: int, parent: list[int]) -> None:
        if kind == 0 and self.fractured:
            self.drop_combined(lambda context: context[1] == vpid)
        elif kind == 0:
            way = (page // 512, parent[page // 512], parent[parent[page // 512]])
            self._drop(
                lambda size, number, context: self._of_page(page, size, number) and context[1] == vpid,
                lambda number, context: number in way and context[1] == vpid,
            )
        elif kind == 1:
            self.drop_combined(lambda context: context[1] == vpid)
        elif kind == 2:
            self.drop_combined(lambda context: True)
        else:
            self.drop_combined(lambda context: context[1] == vpid and context[2] != GLOBAL)

    def invept(self, eptp: int | None) -> None:
        """Of one EPTP, or of all (None)."""
        self.drop_combined(lambda context: eptp in (None, context[0]))
        for cache in (self.nested, self.ept_pde, self.ept_pdpte, self.ept_pml4e):
            cache.drop(lambda number, tag: eptp in (None, tag))

    # -- comparison ---------------------------------------------------------------------------------------------

    def assert_same(self, machine: Machine, vcpu: int) -> None:
        """Every array of the engine's vCPU holds what is here, way by way."""
        vcpus = machine.vcpus
        t = machine.tlb_geometry
        for name, array, stride in (("l1", self.l1, t.l1_stride), ("l1_2m", self.l1_2m, t.l1_2m_stride),
                                    ("stlb", self.stlb, t.stlb_stride)):  # fmt: skip
            tags, data = getattr(vcpus, f"{name}_tag")[vcpu].tolist(), getattr(vcpus, f"{name}_data")[vcpu].tolist()
            mine = [entry for ways in array.sets for entry in ways + [None] * (stride - array.ways)]
            assert [self._decode(tag, entry) for tag, entry in zip(tags, data, strict=True)] == mine, name
        g, tags = machine.walk_geometry, vcpus.walk_tag[vcpu].tolist()
        for base, combined, cache in ((g.pde, True, self.pde), (g.pdpte, True, self.pdpte), (g.pml4e, True, self.pml4e),
                                      (g.nested, False, self.nested), (g.ept_pde, False, self.ept_pde),
                                      (g.ept_pdpte, False, self.ept_pdpte),
                                      (g.ept_pml4e, False, self.ept_pml4e)):  # fmt: skip
            mine_flat = [entry for ways in cache.sets for entry in ways]
            theirs = tags[base : base + len(mine_flat)]
            assert [self._decode_walk(tag, combined) for tag in theirs] == mine_flat

    def _decode(self, tag: int, data: int) -> tuple[Key, tuple[int, bool]] | None:
        if tag == 0:
            return None
        tag &= 0xFFFFFFFF
        number = (tag >> 4) - 1
        size, number = ("2m", number - (1 << 27)) if number >= 1 << 27 else ("4k", number)
        return (size, number, self.contexts[tag & 15]), ((data & 0xFFFFFFFF) >> 4, bool(data & 1))

    def _decode_walk(self, tag: int, combined: bool) -> tuple[int, object] | None:
        if tag == 0:
            return None
        return ((tag >> 4) - 1, self.contexts[tag & 15]) if combined else ((tag >> 3) - 1, tag & 7)


def new_mmu(machine: Machine, vcpu: int) -> Mmu:
    """Empty hardware of the geometry that ``machine`` has, with its contexts."""
    t, g = machine.tlb_geometry, machine.walk_geometry
    assert not any(getattr(machine.vcpus, name).any() for name in ("l1_tag", "l1_2m_tag", "stlb_tag", "walk_tag"))
    masks = (g.pde_mask, g.pdpte_mask, g.pml4e_mask, g.nested_mask, g.ept_pde_mask, g.ept_pdpte_mask, g.ept_pml4e_mask)
    pde, pdpte, pml4e, nested, ept_pde, ept_pdpte, ept_pml4e = (Fifo(4 * (mask + 1)) for mask in masks)
    return Mmu(
        Array(t.l1_mask + 1, t.l1_ways.bit_length()),
        Array(t.l1_2m_mask + 1, t.l1_2m_ways.bit_length()),
        Array(t.stlb_mask + 1, t.stlb_ways.bit_length()),
        t.stlb_ways_2m.bit_length(),
        pde,
        pdpte,
        pml4e,
        nested,
        ept_pde,
        ept_pdpte,
        ept_pml4e,
        contexts=[(int(row[0]), int(row[1]), int(row[2])) for row in machine.vcpus.context[vcpu] if row[1]],
    )
