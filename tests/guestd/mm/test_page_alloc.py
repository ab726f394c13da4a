"""Free blocks: frames are conserved, none is given twice, blocks are whole and aligned; against a plain reference."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd.jit import kernel
from guestd.mm import nodes as mm
from guestd.mm.nodes import FAST, NO_PAGE, SLOW, Nodes, new_nodes
from guestd.mm.page_alloc import PARTLY, WHOLE, is_free
from proto.units import TABLE_PAGES

SPAN = 4 * TABLE_PAGES


@kernel
def take_free(nodes: Nodes, node: int, keep: int) -> int:
    return mm.take_free(nodes, node, keep)


@kernel
def give_free(nodes: Nodes, frame: int) -> None:
    mm.give_free(nodes, frame)


@kernel
def take_free_block(nodes: Nodes, node: int, keep: int) -> int:
    return mm.take_free_block(nodes, node, keep)


@kernel
def give_free_block(nodes: Nodes, frame: int) -> None:
    mm.give_free_block(nodes, frame)


class Reference:
    """The same with sets of frames and lists of blocks, the first of a list at its front."""

    def __init__(self, span: int, managed: tuple[int, int]) -> None:
        self.span = span
        self.blocks: list[dict[int, set[int]]] = []
        self.lists: list[dict[int, list[int]]] = []
        for node, count in enumerate(managed):
            first = node * span
            blocks = {start: set(range(start, min(start + TABLE_PAGES, first + count)))
                      for start in range(first, first + span, TABLE_PAGES)}  # fmt: skip
            self.blocks.append(blocks)
            self.lists.append({WHOLE: [b for b in blocks if len(blocks[b]) == TABLE_PAGES],
                               PARTLY: [b for b in blocks if 0 < len(blocks[b]) < TABLE_PAGES]})  # fmt: skip

    def free(self, node: int) -> int:
        return sum(len(frames) for frames in self.blocks[node].values())

    def take_free(self, node: int, keep: int) -> int:
        if self.free(node) <= keep:
            return NO_PAGE
        whole, partly = self.lists[node][WHOLE], self.lists[node][PARTLY]
        if not partly:
            partly.append(whole.pop(0))
        frames = self.blocks[node][partly[0]]
        frame = min(frames)
        frames.remove(frame)
        if not frames:
            partly.pop(0)
        return frame

    def take_free_block(self, node: int, keep: int) -> int:
        if self.free(node) - TABLE_PAGES < keep or not self.lists[node][WHOLE]:
            return NO_PAGE
        block = self.lists[node][WHOLE].pop(0)
        self.blocks[node][block].clear()
        return block

    def give_free(self, frame: int) -> None:
        node, block = frame // self.span, frame // TABLE_PAGES * TABLE_PAGES
        frames, lists = self.blocks[node][block], self.lists[node]
        frames.add(frame)
        if len(frames) == 1:
            lists[PARTLY].insert(0, block)
        elif len(frames) == TABLE_PAGES:
            lists[PARTLY].remove(block)
            lists[WHOLE].insert(0, block)


def assert_same(nodes: Nodes, reference: Reference) -> None:
    """Bitmaps, counts and both lists of each node, followed in both directions."""
    free, blocks = nodes.free, nodes.free.available.size
    expected = np.zeros(nodes.page.size, np.bool_)
    for node in (FAST, SLOW):
        assert nodes.free_count[node] == reference.free(node)
        for block, frames in reference.blocks[node].items():
            expected[sorted(frames)] = True
            assert free.available[block // TABLE_PAGES] == len(frames)
        for kind in (WHOLE, PARTLY):
            head = blocks + 2 * node + kind
            for link, order in ((free.next, 1), (free.previous, -1)):
                found, at = [], int(link[head])
                while at != head:
                    found.append(at * TABLE_PAGES)
                    at = int(link[at])
                assert found[::order] == reference.lists[node][kind]
    assert np.array_equal(is_free(free, SPAN), expected)


steps = st.lists(
    st.tuples(st.sampled_from(("take", "give", "take block", "give block", "give pieces")), st.integers(0, 1),
              st.integers(0, 700), st.integers(0, 1 << 20)),
    max_size=60,
)  # fmt: skip
shares = st.tuples(st.integers(0, SPAN), st.integers(0, SPAN))


@given(managed=shares, program=steps)
def test_frames_and_blocks_are_conserved(managed: tuple[int, int], program: list[tuple[str, int, int, int]]) -> None:
    nodes, reference = new_nodes(SPAN, *managed), Reference(SPAN, managed)
    frames: list[int] = []
    blocks: list[int] = []
    for what, node, count, drawn in program:
        if what == "take":
            for _ in range(count):
                frame = take_free(nodes, node, drawn % 64)
                assert frame == reference.take_free(node, drawn % 64)
                if frame != NO_PAGE:
                    frames.append(frame)
        elif what == "give":
            for step in range(min(count, len(frames))):
                frame = frames.pop((drawn + 7 * step) % len(frames))
                give_free(nodes, frame)
                reference.give_free(frame)
        elif what == "take block":
            block = take_free_block(nodes, node, drawn % 64)
            assert block == reference.take_free_block(node, drawn % 64)
            if block != NO_PAGE:
                assert block % TABLE_PAGES == 0 and block // SPAN == node
                blocks.append(block)
        elif blocks:
            block = blocks.pop(drawn % len(blocks))
            if what == "give block":
                give_free_block(nodes, block)
            for frame in range(block, block + TABLE_PAGES):
                if what == "give pieces":
                    give_free(nodes, frame)
                reference.give_free(frame)
        used = frames + [frame for block in blocks for frame in range(block, block + TABLE_PAGES)]
        assert len(used) == len(set(used)), "no frame twice"
        assert len(used) + int(nodes.free_count.sum()) == sum(managed)
        assert_same(nodes, reference)


def test_single_frames_leave_blocks_whole_for_as_long_as_they_can() -> None:
    """While frames of one broken block are left, no other is broken."""
    nodes = new_nodes(SPAN, SPAN, 0)
    taken = [take_free(nodes, FAST, 0) for _ in range(TABLE_PAGES)]
    assert {frame // TABLE_PAGES for frame in taken} == {0}
    assert [take_free_block(nodes, FAST, 0) for _ in range(4)] == [512, 1024, 1536, NO_PAGE]
    give_free(nodes, taken[5])
    assert take_free_block(nodes, FAST, 0) == NO_PAGE
    for frame in set(taken) - {taken[5]}:
        give_free(nodes, frame)
    assert take_free_block(nodes, FAST, 0) == 0


def test_a_block_is_refused_that_would_leave_too_little() -> None:
    nodes = new_nodes(SPAN, SPAN, SPAN)
    assert take_free_block(nodes, SLOW, SPAN - TABLE_PAGES + 1) == NO_PAGE
    assert take_free_block(nodes, SLOW, SPAN - TABLE_PAGES) == SPAN
