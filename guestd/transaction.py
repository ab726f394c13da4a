"""A page is copied while it stays mapped: what the guest's kernel does to its entry when it begins and when it is done.

Transactional page migration (Nomad, OSDI'24, 3.1). At the beginning the entry's dirty bit is cleared and the page
flushed, so that the next write sets it again; until the copy is done the page can be read and written. Then the entry
is taken out; if it is clean it comes back with the new frame, and the page is flushed; if it is dirty it comes back as
it was, and the copy is worth nothing. With a *shadow*, where the old frame keeps the content, the new entry is
read-only, so that the first write is told. Both steps are operations at virtual times (`proto.layout.OPERATION`), as
the vCPUs go on in between. What they cost, and what becomes of the frames, is the caller's (`guestd.guest_copy`).
"""

from typing import Any

from guestd.instructions import invlpg
from guestd.jit import inline
from guestd.machine import Machine
from guestd.pml import set_accessed, set_dirty
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, PRESENT, SHADOWED, WRITABLE
from proto.layout import OP_TRANSACTION_BEGIN

READ_ONLY = 1
"""Flag of OP_TRANSACTION_END: the old frame stays a shadow."""
VCPU_SHIFT = 1
"""Above it in the flags: the vCPU that copies, in whose log the write to the new frame is."""


@inline
def unshadowed(entry: int) -> int:
    """``entry`` without a shadow: writable, if it was read-only for its sake."""
    return (entry & ~SHADOWED) | WRITABLE if (entry & SHADOWED) != 0 else entry


@inline
def _flush(m: Machine, page: int) -> None:
    for vcpu in range(m.vcpus.field.shape[0]):
        invlpg(m.vcpus, vcpu, m.tlb_geometry, m.walk_geometry, page)


@inline
def copy_operation(m: Machine, operation: Any) -> None:
    """Execute an OP_TRANSACTION_BEGIN or OP_TRANSACTION_END; all vCPUs have run up to its time."""
    page = operation.a
    entry = m.gpt[page]
    if operation.kind == OP_TRANSACTION_BEGIN:
        m.gpt[page] = entry & ~DIRTY
        _flush(m, page)
    else:
        source, target = (entry & FRAME_MASK) >> FRAME_SHIFT, operation.b
        # A frame that the host took away meanwhile would have to be faulted in: the copy did not get done in its time.
        backed = (m.ept[source] & m.ept[target] & PRESENT) != 0
        if (entry & DIRTY) == 0 and backed:
            m.stamps[(m.ept[target] & FRAME_MASK) >> FRAME_SHIFT] = m.stamps[
                (m.ept[source] & FRAME_MASK) >> FRAME_SHIFT
            ]
            set_dirty(m.pml, operation.flags >> VCPU_SHIFT, m.ept, m.tables.ept_pde, target, 0, m.counters)
            set_accessed(m.ept, m.tables.ept_pde, source)
            entry = (entry & ~(FRAME_MASK | ACCESSED | DIRTY)) | (target << FRAME_SHIFT)
            m.gpt[page] = (entry & ~WRITABLE) | SHADOWED if (operation.flags & READ_ONLY) != 0 else entry
            _flush(m, page)
