"""khugepaged: a kernel thread that makes huge pages of memory that was mapped in pieces (mm/khugepaged.c).

Each time it wakes it looks at the next few 2 MiB of the address space (pages_to_scan, 4096 pages in stock Linux) and
collapses those that lie wholly in one VMA, whose 512 pages are all mapped on one node and one of which at least was
accessed; then it sleeps (scan_sleep_millisecs, 10 s). Left out: filling holes with clear pages (max_ptes_none),
gathering pages from both nodes on the one that has most of them, and the long sleep after an allocation that failed.
"""

import numpy as np

from guestd.meter import MIGRATE, TRACK
from guestd.tiering.view import PageView
from proto.arrays import Bytes
from proto.units import TABLE_PAGES


class Khugepaged:
    """The thread's state. ``whole``: uint8[tables], 1 for a table whose 2 MiB lie in one VMA."""

    def __init__(self, view: PageView, whole: Bytes, pages_to_scan: int) -> None:
        self._view = view
        self._whole = whole
        self._tables = min(whole.size, -(-pages_to_scan // TABLE_PAGES))
        self._cursor = 0

    def run(self) -> None:
        """One pass."""
        view = self._view
        tables = (self._cursor + np.arange(self._tables)) % self._whole.size
        self._cursor = (self._cursor + self._tables) % self._whole.size
        heads = tables[self._whole[tables] == 1] * TABLE_PAGES
        with view.meter.stage(TRACK):
            able = view.collapsible(heads)
        with view.meter.stage(MIGRATE):
            view.collapse(heads[able])
