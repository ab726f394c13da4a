"""Units on the nodes: whatever is moved, swapped, split or collapsed, frames and lists stay whole; against a model."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd.jit import kernel
from guestd.meter import Meter
from guestd.mm import nodes as mm
from guestd.mm.nodes import (
    ACTIVE,
    F_ACTIVE,
    F_BUSY,
    F_DEMOTED,
    F_HUGE,
    F_LRU,
    F_REFERENCED,
    FAST,
    INACTIVE,
    NO_PAGE,
    SLOW,
    Nodes,
    isolate_tail,
    new_nodes,
)
from guestd.mm.page_alloc import is_free
from guestd.tiering import units
from guestd.tiering.pages import MAPPED
from guestd.tiering.units import NO_ROOM
from proto.entry import ACCESSED, FRAME_SHIFT, HUGE, PRESENT, YOUNG
from proto.units import TABLE_PAGES

SPAN = 6 * TABLE_PAGES
BOOK = Meter().book


@kernel
def take(nodes: Nodes, node: int, huge: bool) -> int:
    return mm.take_free_block(nodes, node, 0) if huge else mm.take_free(nodes, node, 0)


@kernel
def lru_add(nodes: Nodes, frame: int, active: int) -> None:
    mm.lru_add(nodes, frame, active)


@kernel
def give(nodes: Nodes, frame: int, huge: bool) -> None:
    if huge:
        mm.give_free_block(nodes, frame)
    else:
        mm.give_free(nodes, frame)


def add(nodes: Nodes, page: int, node: int, huge: bool, active: int = INACTIVE) -> int:
    """A new unit; its frame, or NO_PAGE."""
    frame = take(nodes, node, huge)
    if frame != NO_PAGE:
        size = TABLE_PAGES if huge else 1
        nodes.page[frame : frame + size] = page + np.arange(size)
        nodes.flags[frame] = F_HUGE if huge else 0
        lru_add(nodes, frame, active)
    return frame


def walk_list(nodes: Nodes, which: int) -> list[int]:
    """Frames of a list from head to tail; the links agree in both directions."""
    head = nodes.page.size + which
    frames, at = [], int(nodes.next[head])
    while at != head:
        assert nodes.previous[nodes.next[at]] == at
        frames.append(at)
        assert len(frames) <= nodes.page.size, "a loop"
        at = int(nodes.next[at])
    return frames


class Model:
    """Where each page is: page -> (frame, in a huge page?), and each list's units, newest first, by their pages."""

    def __init__(self) -> None:
        self.frame: dict[int, int] = {}
        self.units: dict[int, int] = {}
        """First page -> size."""
        self.lists: list[list[int]] = [[], [], [], []]

    def add(self, page: int, frame: int, size: int, which: int) -> None:
        self.units[page] = size
        self.frame |= {page + i: frame + i for i in range(size)}
        self.lists[which].insert(0, page)

    def where(self, page: int) -> int:
        return next(which for which, pages in enumerate(self.lists) if page in pages)


def assert_same(nodes: Nodes, model: Model) -> None:
    used = np.zeros(nodes.page.size, np.bool_)
    for page, frame in model.frame.items():
        assert nodes.page[frame] == page
        used[frame] = True
    assert used.sum() == len(model.frame)
    free = ~used
    free[SPAN + int(nodes.managed[SLOW]) :] = False
    assert np.array_equal(is_free(nodes.free, SPAN), free)
    assert (nodes.page[~used] == NO_PAGE).all() and not nodes.flags[~used].any()
    for which, pages in enumerate(model.lists):
        frames = walk_list(nodes, which)
        assert nodes.page[frames].tolist() == pages if frames else pages == []
        assert nodes.size[which] == sum(model.units[page] for page in pages)
        for page, frame in zip(pages, frames, strict=True):
            size = model.units[page]
            assert units.frame_sizes(nodes, np.array([frame], np.int32)).tolist() == [size]
            assert not nodes.flags[frame + 1 : frame + size].any(), "only the head has flags"
            assert bool(nodes.flags[frame] & F_ACTIVE) == bool(which & 1)


steps = st.lists(
    st.tuples(st.sampled_from(("small", "huge", "move", "exchange", "split", "collapse")), st.integers(0, 1),
              st.integers(0, 1 << 20), st.integers(1, 600)),
    min_size=1, max_size=25,
)  # fmt: skip


@given(program=steps)
def test_whatever_is_done_frames_and_lists_stay_whole(program: list[tuple[str, int, int, int]]) -> None:
    nodes, model = new_nodes(SPAN, SPAN, SPAN - 300), Model()
    next_page = 0
    for what, node, drawn, count in program:
        known = list(model.units)
        if what in ("small", "huge"):
            huge = what == "huge"
            for _ in range(1 if huge else count):
                frame = add(nodes, next_page, node, huge, drawn & 1)
                if frame != NO_PAGE:
                    model.add(next_page, frame, TABLE_PAGES if huge else 1, 2 * node + (drawn & 1))
                next_page += TABLE_PAGES
        elif what == "move" and known:
            page = known[drawn % len(known)]
            frame, size = model.frame[page], model.units[page]
            out = np.empty(1, np.int32)
            free = int(nodes.free_count[node])
            units.pick_targets(BOOK, nodes, np.array([frame], np.int32), node, 0, out)
            if frame // SPAN == node:
                assert out[0] == NO_PAGE
            elif out[0] == NO_ROOM:
                assert free < size or size == TABLE_PAGES
            else:
                was = model.where(page)
                units.relink(BOOK, nodes, np.array([frame], np.int32), out, node)
                give(nodes, frame, size > 1)
                model.lists[was].remove(page)
                model.add(page, int(out[0]), size, 2 * node + (was & 1 if node == FAST else 0))
                assert bool(nodes.flags[out[0]] & F_DEMOTED) == (node == SLOW)
        elif what == "exchange":
            fast = [page for page in known if model.frame[page] < SPAN]
            pairs = [(a, b) for a in fast[:20] for b in known
                     if model.frame[b] >= SPAN and model.units[a] == model.units[b]]  # fmt: skip
            if pairs:
                a, b = pairs[drawn % len(pairs)]
                frames = model.frame[a], model.frame[b]
                lists = model.where(a), model.where(b)
                first, second = (np.array([frame], np.int32) for frame in frames)
                nodes.flags[list(frames)] |= F_REFERENCED | F_DEMOTED
                units.relink_pairs(BOOK, nodes, first, second)
                assert not (nodes.flags[list(frames)] & (F_REFERENCED | F_DEMOTED)).any(), "the other page's"
                for page, which in ((a, lists[0]), (b, lists[1])):
                    model.lists[which].remove(page)
                # The active bit goes with the page; frame a is linked first.
                model.add(b, frames[0], model.units[b], (lists[0] & 2) | (lists[1] & 1))
                model.add(a, frames[1], model.units[a], (lists[1] & 2) | (lists[0] & 1))
        elif what == "split":
            whole = [page for page in known if model.units[page] > 1]
            if whole:
                page = whole[drawn % len(whole)]
                units.split(BOOK, nodes, np.array([model.frame[page]], np.int32))
                place = model.lists[model.where(page)]
                at = place.index(page)
                place[at : at + 1] = range(page, page + TABLE_PAGES)
                model.units |= {page + i: 1 for i in range(TABLE_PAGES)}
        elif what == "collapse":
            starts = [page for page in known if page % TABLE_PAGES == 0
                      and all(model.units.get(page + i) == 1 for i in range(TABLE_PAGES))]  # fmt: skip
            if starts:
                page = starts[drawn % len(starts)]
                pieces = np.array([model.frame[page + i] for i in range(TABLE_PAGES)], np.int32)
                target = int(units.take_block_for(BOOK, nodes, pieces))
                if target != NO_PAGE:
                    units.collapse(BOOK, nodes, pieces, target)
                    for frame in pieces:
                        give(nodes, int(frame), False)
                    for pages in model.lists:
                        pages[:] = [one for one in pages if not page <= one < page + TABLE_PAGES]
                    for i in range(TABLE_PAGES):
                        del model.units[page + i]
                    model.add(page, target, TABLE_PAGES, 2 * (target // SPAN) + INACTIVE)
        assert_same(nodes, model)


def test_pieces_keep_the_flags_and_the_place_of_the_whole() -> None:
    nodes = new_nodes(SPAN, SPAN, SPAN)
    older = add(nodes, 0, FAST, False, ACTIVE)
    head = add(nodes, 512, FAST, True, ACTIVE)
    newer = add(nodes, 1, FAST, False, ACTIVE)
    nodes.flags[head] |= F_REFERENCED | F_DEMOTED
    units.split(BOOK, nodes, np.array([head], np.int32))
    pieces = list(range(head, head + TABLE_PAGES))
    assert walk_list(nodes, 2 * FAST + ACTIVE) == [newer, *pieces, older]
    assert (nodes.flags[pieces] == F_LRU | F_ACTIVE | F_REFERENCED | F_DEMOTED).all()
    assert nodes.size[ACTIVE] == TABLE_PAGES + 2


def test_an_isolated_page_is_split_off_the_lists() -> None:
    nodes = new_nodes(SPAN, SPAN, SPAN)
    add(nodes, 0, FAST, True)
    add(nodes, 512, FAST, False)
    out = np.empty(32, np.int32)
    assert isolate_tail(nodes, FAST, INACTIVE, out) == 1, "512 pages are more than 32"
    units.split(BOOK, nodes, out[:1])
    assert nodes.size.tolist() == [1, 0, 0, 0]
    assert not (nodes.flags[out[0] : out[0] + TABLE_PAGES] & F_LRU).any()


def test_who_is_busy_or_there_already_gets_no_target() -> None:
    nodes = new_nodes(SPAN, 2 * TABLE_PAGES, SPAN)
    frames = np.array([add(nodes, page, FAST, True) for page in (0, 512)] + [NO_PAGE], np.int32)
    nodes.flags[frames[0]] |= F_BUSY
    out = np.empty(3, np.int32)
    units.pick_targets(BOOK, nodes, frames, SLOW, SPAN - TABLE_PAGES, out)
    assert out[0] == NO_PAGE and out[1] % TABLE_PAGES == 0 and out[1] >= SPAN and out[2] == NO_PAGE
    units.pick_targets(BOOK, nodes, frames[1:2], SLOW, SPAN - TABLE_PAGES, out[:1])
    assert out[0] == NO_ROOM
    units.pick_targets(BOOK, nodes, frames[1:2], FAST, 0, out[:1])
    assert out[0] == NO_PAGE


def entries_on(frames: np.ndarray, bits: int) -> np.ndarray:
    return frames.astype(np.int64) << FRAME_SHIFT | PRESENT | bits


def test_what_can_collapse_is_mapped_on_one_node_and_was_accessed() -> None:
    nodes = new_nodes(SPAN, SPAN, SPAN)
    table, pde = np.zeros(6 * TABLE_PAGES, np.int64), np.full(6, PRESENT, np.int64)
    rows = table.reshape(6, TABLE_PAGES)
    frames = np.arange(TABLE_PAGES)
    rows[0] = entries_on(frames, 0)
    rows[0, 77] |= ACCESSED
    rows[1] = entries_on(frames + SPAN, 0)
    nodes.flags[SPAN + 9] = F_REFERENCED
    rows[2] = entries_on(frames, YOUNG)
    rows[2, 100] = entries_on(np.array([SPAN]), YOUNG)[0]
    rows[3] = entries_on(frames, ACCESSED)
    rows[3, 511] = 0
    rows[4] = entries_on(frames, 0)
    pde[5] = PRESENT | HUGE
    able = np.zeros(6, np.bool_)
    seen = units.collapsible(BOOK, table, pde, nodes, np.arange(6, dtype=np.int64) * TABLE_PAGES, able)
    assert able.tolist() == [True, True, False, False, False, False]
    assert seen == 6 + 512 + 512 + 101 + 512 + 512
    assert (table[3 * TABLE_PAGES : 4 * TABLE_PAGES - 1] & MAPPED).all()
