"""Which invalidation drops what, and no more: SDM vol. 3, 4.10.4 (INVLPG, INVPCID, MOV CR3), 29.4.3 (INVVPID, INVEPT).

A vCPU's hardware is filled under contexts that differ in EPTP, VPID or PCID; each test says which entries go.
"""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from guestd import instructions, walk
from guestd import tlb as hardware
from guestd.instructions import ANY, GLOBAL
from guestd.jit import kernel
from guestd.machine import Machine
from guestd.vcpu import CONTEXT, FRACTURED, tlb_of
from proto.costs import Costs
from tests.guestd.machines import bare_machine

CONTEXTS = {"own": (0, 1, 1), "pcid 2": (0, 1, 2), "global": (0, 1, GLOBAL), "vpid 9": (0, 9, 1), "eptp 1": (1, 1, 1),
            "vpid 9 global": (0, 9, GLOBAL)}  # fmt: skip
OWN_VPID = {"own", "pcid 2", "global", "eptp 1"}
PAGE, OTHER = 5, 600
"""In leaf tables 0 and 1."""


@kernel
def fill(m: Machine, context: int, eptp: int) -> None:
    """Enter PAGE, OTHER, the 2 MiB pages of their tables, the entries above them, and guest-physical mappings."""
    tlb, geometry = tlb_of(m.vcpus, 0), m.walk_geometry
    tags = m.vcpus.walk_tag[0]
    for page in (PAGE, OTHER):
        hardware.fill_4k(tlb, m.tlb_geometry, page, context, page, 0)
        hardware.fill_2m(tlb, m.tlb_geometry, page >> 9, context, page, 0)
    if m.vcpus.context[0, context, 2] == GLOBAL:
        return  # only leaves are global
    for number in (0, 1, 3):
        walk.use(tags, geometry.pde, geometry.pde_mask, number, walk.upper_key(number, context))
    walk.use(tags, geometry.pdpte, geometry.pdpte_mask, m.tables.parent[0],
               walk.upper_key(m.tables.parent[0], context))  # fmt: skip
    if context == 0 or eptp == 1:
        walk.use(tags, geometry.nested, geometry.nested_mask, 77, walk.physical_key(77, eptp))
        walk.use(tags, geometry.ept_pde, geometry.ept_pde_mask, 7, walk.physical_key(7, eptp))


@kernel
def execute(m: Machine, what: int, kind: int, number: int) -> None:
    if what == 0:
        instructions.invlpg(m.vcpus, 0, m.tlb_geometry, m.walk_geometry, PAGE)
    elif what == 1:
        instructions.mov_cr3(m.vcpus, 0, m.walk_geometry)
    elif what == 2:
        instructions.invpcid(m.vcpus, 0, m.tlb_geometry, m.walk_geometry, m.tables, kind, number, PAGE)
    elif what == 3:
        instructions.invvpid(m.vcpus, 0, m.tlb_geometry, m.walk_geometry, m.tables, kind, number, PAGE)
    else:
        instructions.invept(m.vcpus, 0, m.walk_geometry, number)


Held = set[tuple[str, str, int]]
"""(array, context or EPTP, number)"""


def held(machine: Machine) -> Held:
    """What the first vCPU's hardware holds."""
    vcpus, g, names = machine.vcpus, machine.walk_geometry, list(CONTEXTS)
    found: Held = set()
    for array in ("l1", "l1_2m", "stlb"):
        tags = getattr(vcpus, f"{array}_tag")[0].astype(np.int64) & 0xFFFFFFFF
        found |= {(array, names[tag & 15], (tag >> 4) - 1) for tag in tags[tags != 0].tolist()}
    walks = vcpus.walk_tag[0].tolist()
    found |= {("paging", names[tag & 15], (tag >> 4) - 1) for tag in walks[: g.guest_slots] if tag}
    return found | {("physical", f"eptp {tag & 7}", (tag >> 3) - 1) for tag in walks[g.guest_slots :] if tag}


@pytest.fixture
def machine(costs: Costs) -> Machine:
    """A vCPU of the default profile whose hardware is filled under each of CONTEXTS; the first is current."""
    roomy = {
        f"l1_dtlb_{size}_{what}": count for size in ("4k", "2m") for what, count in (("entries", 64), ("ways", 16))
    }
    machine = bare_machine(msgspec.structs.replace(costs, **roomy), 2)
    machine.vcpus.context[0, : len(CONTEXTS)] = list(CONTEXTS.values())
    for number, (eptp, _, _) in enumerate(CONTEXTS.values()):
        fill(machine, number, eptp)
    assert len(held(machine)) == len(CONTEXTS) * (2 + 2 + 4) + 4 * 4 + 4
    return machine


def of_page(entry: tuple[str, str, int]) -> bool:
    """A TLB entry, of either size, that translates PAGE."""
    array, _, number = entry
    return array in ("l1", "l1_2m", "stlb") and number in (PAGE, hardware.SIZE_2M)


def on_the_way(entry: tuple[str, str, int], machine: Machine) -> bool:
    """A paging-structure-cache entry that translates PAGE."""
    return entry[0] == "paging" and entry[2] in (0, int(machine.tables.parent[0]))


def combined(*contexts: str) -> Callable[[tuple[str, str, int]], bool]:
    """All combined mappings of some contexts."""
    return lambda entry: entry[0] != "physical" and entry[1] in contexts


def check(machine: Machine, what: int, kind: int, number: int, dropped: Callable[[tuple[str, str, int]], bool]) -> None:
    before = held(machine)
    execute(machine, what, kind, number)
    gone = {entry for entry in before if dropped(entry)}
    assert gone
    assert held(machine) == before - gone


def test_invlpg(machine: Machine) -> None:
    """The page in the current PCID and global; all paging-structure caches of the current PCID."""
    check(machine, 0, 0, 0, lambda e: (of_page(e) and e[1] in {"own", "global", "eptp 1"})
          or (e[0] == "paging" and e[1] in {"own", "eptp 1"}))  # fmt: skip


def test_invlpg_of_a_fractured_page_empties_the_tlb_of_the_vpid(machine: Machine) -> None:
    machine.vcpus.field[0, FRACTURED] = 1
    check(machine, 0, 0, 0, combined(*OWN_VPID))
    assert machine.vcpus.field[0, FRACTURED] == 1, "parts in other VPIDs are still there"


def test_mov_cr3(machine: Machine) -> None:
    """All of the current PCID but global pages; under a VPID, only that VPID's. The EPTP does not matter."""
    check(machine, 1, 0, 0, combined("own", "eptp 1"))


@pytest.mark.parametrize("current", list(OWN_VPID))
def test_invpcid_of_an_address(current: str, machine: Machine) -> None:
    """Of the PCID in the descriptor, whichever is current; not global ones."""
    machine.vcpus.field[0, CONTEXT] = list(CONTEXTS).index(current)
    check(machine, 2, 0, 2, lambda e: e[1] == "pcid 2" and (of_page(e) or on_the_way(e, machine)))


def test_invpcid_of_a_context(machine: Machine) -> None:
    check(machine, 2, 1, 2, combined("pcid 2"))


def test_invpcid_of_all_with_global_pages(machine: Machine) -> None:
    check(machine, 2, 2, 0, combined(*OWN_VPID))


def test_invpcid_of_all_but_global_pages(machine: Machine) -> None:
    check(machine, 2, 3, 0, combined(*OWN_VPID - {"global"}))


def test_invvpid_of_an_address(machine: Machine) -> None:
    """Every PCID of the VPID, global pages too."""
    check(machine, 3, 0, 9, lambda e: e[1] in {"vpid 9", "vpid 9 global"} and (of_page(e) or on_the_way(e, machine)))


def test_invvpid_of_a_context(machine: Machine) -> None:
    check(machine, 3, 1, 9, combined("vpid 9", "vpid 9 global"))


def test_invvpid_of_all_contexts_leaves_guest_physical_mappings(machine: Machine) -> None:
    check(machine, 3, 2, 0, lambda e: e[0] != "physical")


def test_invvpid_but_global_pages(machine: Machine) -> None:
    check(machine, 3, 3, 9, combined("vpid 9"))


def test_invept_of_one_eptp(machine: Machine) -> None:
    """Its guest-physical mappings, and combined ones of every VPID and PCID with it."""
    check(machine, 4, 0, 1, lambda e: e[1] == "eptp 1")


def test_invept_global(machine: Machine) -> None:
    check(machine, 4, 0, ANY, lambda e: True)


def test_another_vcpu_keeps_everything(machine: Machine) -> None:
    machine.vcpus.l1_tag[1], machine.vcpus.walk_tag[1] = 5, 6
    execute(machine, 4, 0, ANY)
    assert (machine.vcpus.l1_tag[1] == 5).all()
    assert (machine.vcpus.walk_tag[1] == 6).all()
