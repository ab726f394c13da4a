"""Nodes: frames are conserved, watermarks order allocations, LRU lists stay lists; against plain Python lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.jit import kernel
from guestd.mm import nodes as mm
from guestd.mm.nodes import (
    ACTIVE,
    F_ACTIVE,
    F_LRU,
    F_REFERENCED,
    FAST,
    INACTIVE,
    NO_PAGE,
    SLOW,
    WMARK_DEMOTE,
    WMARK_HIGH,
    WMARK_LOW,
    WMARK_MIN,
    Nodes,
    isolate_tail,
    mark_accessed,
    new_nodes,
    put_back,
)
from guestd.mm.page_alloc import is_free

SPAN = 64


@kernel
def allocate(nodes: Nodes, preferred: int) -> int:
    return mm.allocate(nodes, preferred)


@kernel
def take_free(nodes: Nodes, node: int, keep: int) -> int:
    return mm.take_free(nodes, node, keep)


@kernel
def give_free(nodes: Nodes, frame: int) -> None:
    mm.give_free(nodes, frame)


@kernel
def lru_add(nodes: Nodes, frame: int, active: int) -> None:
    mm.lru_add(nodes, frame, active)


@kernel
def lru_remove(nodes: Nodes, frame: int) -> None:
    mm.lru_remove(nodes, frame)


def walk_list(nodes: Nodes, node: int, active: int) -> list[int]:
    """Frames of a list from head to tail, followed both ways."""
    head = nodes.page.size + 2 * node + active
    forward: list[int] = []
    backward: list[int] = []
    for link, found in ((nodes.next, forward), (nodes.previous, backward)):
        at = int(link[head])
        while at != head:
            found.append(at)
            assert len(found) <= nodes.page.size, "a loop"
            at = int(link[at])
    assert forward == backward[::-1]
    return forward


class Model:
    """The same in Python lists: head of a list first."""

    def __init__(self) -> None:
        self.lists: dict[tuple[int, int], list[int]] = {(n, a): [] for n in (FAST, SLOW) for a in (INACTIVE, ACTIVE)}
        self.referenced: set[int] = set()
        self.isolated: list[int] = []

    def where(self, frame: int) -> tuple[int, int]:
        return next(key for key, frames in self.lists.items() if frame in frames)

    def on_a_list(self) -> list[int]:
        return sorted(frame for frames in self.lists.values() for frame in frames)


def assert_same(nodes: Nodes, model: Model) -> None:
    for (node, active), frames in model.lists.items():
        assert walk_list(nodes, node, active) == frames
        assert nodes.size[2 * node + active] == len(frames)
        for frame in frames:
            assert bool(nodes.flags[frame] & F_ACTIVE) == bool(active)
            assert nodes.flags[frame] & F_LRU
            assert bool(nodes.flags[frame] & F_REFERENCED) == (frame in model.referenced)
    for frame in model.isolated:
        assert not nodes.flags[frame] & F_LRU
    used = model.on_a_list() + model.isolated
    assert len(used) == len(set(used))
    for node in (FAST, SLOW):
        count = int(nodes.free_count[node])
        unused = np.flatnonzero(is_free(nodes.free, SPAN))
        free = unused[unused // SPAN == node].tolist()
        mine = [frame for frame in used if frame // SPAN == node]
        assert len(set(free)) == count and not set(free) & set(mine)
        assert count + len(mine) == nodes.managed[node], "frames are conserved"


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(("allocate", "free", "isolate", "put back", "mark")), st.integers(0, 1),
              st.integers(0, 1), st.integers(0, 31)),
    max_size=120,
)  # fmt: skip


@given(operations=OPERATIONS)
def test_lists_and_frames_survive_any_operations(operations: list[tuple[str, int, int, int]]) -> None:
    nodes, model = new_nodes(SPAN, 30, 50), Model()
    nodes.watermark[:] = 0
    for what, node, active, number in operations:
        used = model.on_a_list()
        if what == "allocate":
            frame = allocate(nodes, node)
            if sum(len(frames) for frames in model.lists.values()) + len(model.isolated) == 80:
                assert frame == NO_PAGE
            else:
                lru_add(nodes, frame, active)
                model.lists[frame // SPAN, active].insert(0, frame)
        elif what == "free" and used:
            frame = used[number % len(used)]
            lru_remove(nodes, frame)
            give_free(nodes, frame)
            model.lists[model.where(frame)].remove(frame)
            model.referenced.discard(frame)
        elif what == "isolate":
            out = np.zeros(number, np.int32)
            taken = out[: isolate_tail(nodes, node, active, out)].tolist()
            frames = model.lists[node, active]
            assert taken == frames[::-1][:number]
            del frames[len(frames) - len(taken) :]
            model.isolated += taken
        elif what == "put back":
            back, model.isolated = model.isolated[:number], model.isolated[number:]
            to_active = [(frame + number) % 2 == 0 for frame in back]
            referenced = [(frame + number) % 3 == 0 for frame in back]
            put_back(nodes, np.array(back, np.int32), np.array(to_active, np.uint8), np.array(referenced, np.uint8))
            for frame, goes_active, is_referenced in zip(back, to_active, referenced, strict=True):
                model.lists[frame // SPAN, int(goes_active)].insert(0, frame)
                (model.referenced.add if is_referenced else model.referenced.discard)(frame)
        elif what == "mark" and used:
            frame = used[number % len(used)]
            activated = mark_accessed(nodes, np.array([frame], np.int32))
            here, is_active = model.where(frame)
            if not is_active and frame in model.referenced:
                model.lists[here, INACTIVE].remove(frame)
                model.lists[here, ACTIVE].insert(0, frame)
                model.referenced.discard(frame)
                assert activated == 1
            else:
                model.referenced.add(frame)
                assert activated == 0
        assert_same(nodes, model)


@pytest.mark.parametrize("preferred", [FAST, SLOW])
def test_allocation_order_is_low_here_low_there_min_here_min_there(preferred: int) -> None:
    nodes = new_nodes(SPAN, SPAN, SPAN)
    nodes.watermark[:] = [[2, 5, 8, 16, 11], [3, 7, 9, 16, 11]]
    order = []
    while (frame := allocate(nodes, preferred)) != NO_PAGE:
        order.append(frame // SPAN)
    other = 1 - preferred
    low, minimum = nodes.watermark[:, WMARK_LOW], nodes.watermark[:, WMARK_MIN]
    expected = [(preferred, SPAN - low[preferred]), (other, SPAN - low[other]),
                (preferred, low[preferred] - minimum[preferred]), (other, low[other] - minimum[other])]  # fmt: skip
    assert order == [node for node, count in expected for _ in range(count)]
    assert nodes.free_count.tolist() == minimum.tolist()


def test_take_free_leaves_what_is_to_be_kept() -> None:
    nodes = new_nodes(SPAN, 10, 10)
    assert [take_free(nodes, FAST, 7) for _ in range(5)] == [0, 1, 2, NO_PAGE, NO_PAGE]
    assert take_free(nodes, SLOW, 0) == SPAN
    give_free(nodes, 1)
    assert take_free(nodes, FAST, 7) == 1, "the lowest of a broken block"


@pytest.mark.parametrize("gib", [1, 2, 8])
def test_watermarks_are_those_of_linux(gib: int) -> None:
    """min_free_kbytes = 4 sqrt(KiB), at most 256 MiB, by size; low, high, PROMO a gap above each other; DEMOTE 2 %."""
    pages = gib << 18
    fast, slow = pages // 5, pages - pages // 5
    nodes = new_nodes(pages, fast, slow)
    min_free = min(4 * (pages * 4) ** 0.5, 262144) / 4
    for node, managed in ((FAST, fast), (SLOW, slow)):
        minimum, low, high, demote, promo = nodes.watermark[node].tolist()
        assert minimum == pytest.approx(min_free * managed / pages, abs=2)
        gap = max(minimum // 4, managed // 1000)
        assert (low, high, promo) == (minimum + gap, minimum + 2 * gap, minimum + 3 * gap)
        assert demote == pytest.approx(managed * 0.02, abs=1)
        assert nodes.watermark[node, WMARK_HIGH] < nodes.watermark[node, WMARK_DEMOTE]


def test_frames_that_are_not_managed_are_never_given_out() -> None:
    nodes = new_nodes(SPAN, 5, 0)
    nodes.watermark[:] = 0
    assert sorted(allocate(nodes, SLOW) for _ in range(5)) == [0, 1, 2, 3, 4]
    assert allocate(nodes, FAST) == NO_PAGE
