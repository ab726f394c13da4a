"""Page tables drawn at random for tests of what reads them, in the form that a guest has and in that of the host."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from proto.arrays import Words
from proto.entry import ACCESSED, DIRTY, FRAME_SHIFT, HUGE, PRESENT, PROTNONE, WRITABLE, YOUNG
from proto.units import TABLE_PAGES

TABLES = 5
PAGES = TABLES * TABLE_PAGES
HALF = 4096
"""First slow frame."""
ABSENT, SMALL, WHOLE = 0, 1, 2


class Table(NamedTuple):
    """Leaves, the entries above them, and which tables are of which kind."""

    leaf: Words
    pde: np.ndarray
    kinds: list[int]

    def huge(self, page: int) -> bool:
        return self.kinds[page // TABLE_PAGES] == WHOLE

    def copy(self) -> "Table":
        return Table(self.leaf.copy(), self.pde.copy(), self.kinds)


def draw_table(kinds: list[int], seed: int, dtype: type) -> Table:
    """``dtype``: int64 as in a guest, uint8 as in the host."""
    random = np.random.default_rng(seed)
    leaf, pde = np.zeros(PAGES, np.int64), np.zeros(TABLES, np.int64)
    for table, kind in enumerate(kinds):
        pages = np.arange(table * TABLE_PAGES, (table + 1) * TABLE_PAGES)
        slow = int(random.integers(2)) * HALF
        flags = [PRESENT | WRITABLE, PROTNONE | WRITABLE]
        if kind == WHOLE:
            head = slow + table * TABLE_PAGES
            state = flags[random.integers(2)]
            leaf[pages] = (head + np.arange(TABLE_PAGES)) << FRAME_SHIFT | state
            leaf[pages[0]] |= YOUNG * int(random.integers(2))
            bits = ACCESSED * int(random.integers(2)) | DIRTY * int(random.integers(2))
            pde[table] = HUGE | PRESENT | bits | (head << FRAME_SHIFT | state if dtype is np.int64 else 0)
        elif kind == SMALL:
            frames = random.integers(2, size=TABLE_PAGES) * HALF + pages
            seen = random.choice([0, ACCESSED, DIRTY, ACCESSED | DIRTY, YOUNG], TABLE_PAGES)
            entries = frames << FRAME_SHIFT | np.array(flags)[random.integers(2, size=TABLE_PAGES)] | seen
            leaf[pages] = np.where(random.random(TABLE_PAGES) < 0.7, entries, 0)
            pde[table] = PRESENT | WRITABLE | ACCESSED * int(random.integers(2))
    return Table(leaf, pde.astype(dtype), kinds)


tables = st.builds(
    draw_table,
    st.lists(st.integers(0, 2), min_size=TABLES, max_size=TABLES),
    st.integers(0, 1 << 30),
    st.sampled_from([np.int64, np.uint8]),
)
ranges = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(lambda pair: (min(pair), abs(pair[0] - pair[1])))
