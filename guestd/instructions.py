"""The instructions that invalidate translations, and exactly what each drops.

Intel SDM vol. 3, 4.10.4 (INVLPG, INVPCID, MOV CR3) and 29.4.3 (INVVPID, INVEPT). Three kinds of mappings are cached:
*combined* ones (gVA to hPA: the TLBs and the guest's paging-structure caches), tagged with EPTP, VPID and PCID; and
*guest-physical* ones (gPA to hPA: nested TLB and EPT paging-structure caches), tagged with the EPTP. What a guest
executes acts on combined mappings of its own VPID only; INVVPID leaves guest-physical mappings alone; INVEPT drops both
kinds. Tags hold a *context*, an index into the vCPU's table of (EPTP, VPID, PCID) triples: EPTPs are small numbers
(0 to 7), PCID `GLOBAL` stands for the global pages of a VPID. A processor may drop more than it must; this one drops no
more, with one exception that real ones make: while parts of a *fractured* page (2 MiB in the guest, 4 KiB in the EPT)
are cached, INVLPG empties the TLB of the VPID, as the parts cannot be found by address (Amit, 2018).
"""

from guestd.jit import assume, inline, int32, int64, kernel
from guestd.tlb import CONTEXT_MASK, LANES, MISS, TlbGeometry, find, find_in_l1, tag_2m, tag_4k
from guestd.vcpu import CONTEXT, CONTEXTS, FRACTURED, Vcpus
from guestd.walk import EPTP_MASK, PageTables, WalkGeometry, upper_key
from proto.arrays import Ints, Words
from proto.units import TABLE_SHIFT

GLOBAL = -1
"""PCID of a context that holds a VPID's global pages."""
ANY = -2


@inline
def select(context: Words, eptp: int, vpid: int, pcid: int) -> int:
    """Bits of the contexts (int64[CONTEXTS, 3]) of that EPTP, VPID and PCID, each exact or ANY; `GLOBAL` is a PCID."""
    chosen = 0
    for i in range(CONTEXTS):
        if context[i, 1] == 0:
            break
        fits = (eptp == ANY or context[i, 0] == eptp) and (vpid == ANY or context[i, 1] == vpid)
        if fits and (pcid == ANY or context[i, 2] == pcid):
            chosen |= 1 << i
    return chosen


@inline
def _drop_contexts(tags: Ints, end: int, chosen: int, used: int) -> None:
    """Drop the entries of the ``chosen`` contexts from slots [0, end); ``used``: all contexts there are."""
    if chosen & used == used:
        tags[:end] = 0
    else:
        for i in range(end):
            if (chosen >> (int64(tags[i]) & CONTEXT_MASK)) & 1 == 1:
                tags[i] = 0


@kernel
def drop_combined(vcpus: Vcpus, vcpu: int, geometry: WalkGeometry, chosen: int) -> None:
    """Drop every combined mapping of the ``chosen`` contexts."""
    used = select(vcpus.context[vcpu], ANY, ANY, ANY)
    _drop_contexts(vcpus.l1_tag[vcpu], vcpus.l1_tag.shape[1], chosen, used)
    _drop_contexts(vcpus.l1_2m_tag[vcpu], vcpus.l1_2m_tag.shape[1], chosen, used)
    _drop_contexts(vcpus.stlb_tag[vcpu], vcpus.stlb_tag.shape[1], chosen, used)
    _drop_contexts(vcpus.walk_tag[vcpu], geometry.guest_slots, chosen, used)
    if chosen & used == used:
        vcpus.field[vcpu, FRACTURED] = 0


@inline
def _drop_tag(tags: Ints, number: int, mask: int, stride: int, key: int) -> None:
    base = (number & mask) * stride
    slot = find_in_l1(tags, base, stride, int32(key)) if stride % LANES else find(tags, base, stride, int32(key))
    if slot != MISS:
        assume(slot >= 0)
        tags[slot] = 0


@kernel
def drop_address(vcpus: Vcpus, vcpu: int, tlb: TlbGeometry, page: int, chosen: int) -> None:
    """Drop the TLB entries, of either size, that translate ``page`` in the ``chosen`` contexts."""
    table = page >> TABLE_SHIFT
    for context in range(CONTEXTS):
        if (chosen >> context) & 1 == 1:
            small, large = tag_4k(page, context), tag_2m(table, context)
            _drop_tag(vcpus.l1_tag[vcpu], page, tlb.l1_mask, tlb.l1_stride, small)
            _drop_tag(vcpus.stlb_tag[vcpu], page, tlb.stlb_mask, tlb.stlb_stride, small)
            _drop_tag(vcpus.l1_2m_tag[vcpu], table, tlb.l1_2m_mask, tlb.l1_2m_stride, large)
            _drop_tag(vcpus.stlb_tag[vcpu], table, tlb.stlb_mask, tlb.stlb_stride, large)


@kernel
def _drop_way_up(vcpus: Vcpus, vcpu: int, geometry: WalkGeometry, tables: PageTables, page: int, chosen: int) -> None:
    """Drop the paging-structure-cache entries on the way to ``page`` in the ``chosen`` contexts."""
    number = page >> TABLE_SHIFT
    tags = vcpus.walk_tag[vcpu]
    for level in range(3):
        for context in range(CONTEXTS):
            if (chosen >> context) & 1 == 1:
                key = int32(upper_key(number, context))
                for slot in range(geometry.guest_slots):
                    if tags[slot] == key:
                        tags[slot] = 0
        if level < 2:
            number = tables.parent[number]


@kernel
def _drop_page(vcpus: Vcpus, vcpu: int, tlb: TlbGeometry, geometry: WalkGeometry, tables: PageTables, page: int,
               chosen: int) -> None:  # fmt: skip
    """Drop what translates ``page``; any part of a fractured page may be one of its parts, and then all must go."""
    if vcpus.field[vcpu, FRACTURED] == 1:
        drop_combined(vcpus, vcpu, geometry, chosen)
    else:
        drop_address(vcpus, vcpu, tlb, page, chosen)
        _drop_way_up(vcpus, vcpu, geometry, tables, page, chosen)


@inline
def _current(vcpus: Vcpus, vcpu: int, pcid: int) -> int:
    """Contexts of the current VPID with that PCID (or ANY)."""
    now = vcpus.context[vcpu, vcpus.field[vcpu, CONTEXT]]
    return select(vcpus.context[vcpu], ANY, now[1], pcid)


@kernel
def invlpg(vcpus: Vcpus, vcpu: int, tlb: TlbGeometry, geometry: WalkGeometry, page: int) -> None:
    """INVLPG: the page in the current PCID and global; all paging-structure caches of the current PCID."""
    pcid = vcpus.context[vcpu, vcpus.field[vcpu, CONTEXT], 2]
    own = _current(vcpus, vcpu, pcid)
    if vcpus.field[vcpu, FRACTURED] == 1:
        drop_combined(vcpus, vcpu, geometry, _current(vcpus, vcpu, ANY))
    else:
        drop_address(vcpus, vcpu, tlb, page, own | _current(vcpus, vcpu, GLOBAL))
        _drop_contexts(vcpus.walk_tag[vcpu], geometry.guest_slots, own, select(vcpus.context[vcpu], ANY, ANY, ANY))


@kernel
def mov_cr3(vcpus: Vcpus, vcpu: int, geometry: WalkGeometry) -> None:
    """MOV to CR3 with bit 63 clear: all of the current PCID but global pages."""
    pcid = vcpus.context[vcpu, vcpus.field[vcpu, CONTEXT], 2]
    drop_combined(vcpus, vcpu, geometry, _current(vcpus, vcpu, pcid))


@kernel
def invpcid(vcpus: Vcpus, vcpu: int, tlb: TlbGeometry, geometry: WalkGeometry, tables: PageTables, kind: int,
            pcid: int, page: int) -> None:  # fmt: skip
    """INVPCID of type ``kind``: 0 a page of a PCID, 1 all of a PCID, 2 everything with global pages, 3 without."""
    if kind == 0:
        _drop_page(vcpus, vcpu, tlb, geometry, tables, page, _current(vcpus, vcpu, pcid))
    elif kind == 1:
        drop_combined(vcpus, vcpu, geometry, _current(vcpus, vcpu, pcid))
    elif kind == 2:
        drop_combined(vcpus, vcpu, geometry, _current(vcpus, vcpu, ANY))
    else:
        drop_combined(vcpus, vcpu, geometry, _current(vcpus, vcpu, ANY) & ~_current(vcpus, vcpu, GLOBAL))


@kernel
def invvpid(vcpus: Vcpus, vcpu: int, tlb: TlbGeometry, geometry: WalkGeometry, tables: PageTables, kind: int,
            vpid: int, page: int) -> None:  # fmt: skip
    """INVVPID of type ``kind``: 0 an address of a VPID, 1 all of a VPID, 2 everything, 3 a VPID but global pages."""
    context = vcpus.context[vcpu]
    if kind == 0:
        _drop_page(vcpus, vcpu, tlb, geometry, tables, page, select(context, ANY, vpid, ANY))
    elif kind == 1:
        drop_combined(vcpus, vcpu, geometry, select(context, ANY, vpid, ANY))
    elif kind == 2:
        drop_combined(vcpus, vcpu, geometry, select(context, ANY, ANY, ANY))
    else:
        drop_combined(vcpus, vcpu, geometry, select(context, ANY, vpid, ANY) & ~select(context, ANY, vpid, GLOBAL))


@kernel
def invept(vcpus: Vcpus, vcpu: int, geometry: WalkGeometry, eptp: int) -> None:
    """INVEPT: guest-physical and combined mappings of one EPTP (single-context), or with ANY of all (global)."""
    drop_combined(vcpus, vcpu, geometry, select(vcpus.context[vcpu], eptp, ANY, ANY))
    tags = vcpus.walk_tag[vcpu]
    for slot in range(geometry.guest_slots, geometry.slots):
        if eptp == ANY or (int64(tags[slot]) & EPTP_MASK) == eptp:
            tags[slot] = 0


@kernel
def mov_cr3_everywhere(vcpus: Vcpus, geometry: WalkGeometry) -> None:
    """MOV CR3 on every vCPU."""
    for vcpu in range(vcpus.field.shape[0]):
        mov_cr3(vcpus, vcpu, geometry)


@kernel
def invlpg_everywhere(vcpus: Vcpus, tlb: TlbGeometry, geometry: WalkGeometry, pages: Words) -> None:
    """INVLPG of each page (int64[m]) on every vCPU."""
    for vcpu in range(vcpus.field.shape[0]):
        for page in pages:
            invlpg(vcpus, vcpu, tlb, geometry, page)
