"""A VM's frames in flat memory mode as the host's kernel keeps them: what is dedicated, what contends, and exchanges.

Memstrata's kernel (OSDI'24): two dedicated pages of one VM trade places with both pages of a contended pair of another.
A VM's frames are a window of hPA of its own, so each side does its half: the donor's two pages come to lie in one pair,
for which a fast frame leaves its share and a slow one joins it; the borrower's two pages come to lie in a pair each,
the other way round. Frames of the same number are the same place for whoever has them, so the page that keeps its
number is copied and mapped anew all the same. Each page costs a migration, a copy, a zap and a flush request of its
own. Over all VMs shares only change hands; an invariant: the partner of a slow frame of a share is in it, too.
"""

from typing import Any

import numpy as np

from guestd.mm.nodes import F_BUSY, FAST, NO_PAGE, SLOW
from guestd.tiering import units
from guestd.tiering.host_help import FlatMemoryHelp
from hostd.host_tools import HostTools
from proto.arrays import Mask, Words
from proto.config import GuestConfig
from proto.costs import copy_ps
from proto.counters import C, new_counters
from proto.layout import OP_MOVE
from proto.units import PAGE_SHIFT


class FlatMemory(HostTools, FlatMemoryHelp):
    """See the module. ``share``: bool[frames], the frames that the VM has been given."""

    def __init__(self, config: GuestConfig, *args: Any) -> None:
        super().__init__(config, *args)
        self.guest_counters = new_counters()
        self.random = np.random.default_rng(config.seed)
        half = self._half
        self.share = np.zeros(2 * half, np.bool_)
        self.share[: int(self.nodes.managed[FAST])] = True
        self.share[half : half + int(self.nodes.managed[SLOW])] = True
        self._leaving: list[tuple[Words, Words, Words]] = []
        """Moves to come: (times, frames that they leave for good, the other frames of the pages exchanged)."""

    def _idle(self) -> Mask:
        return (self.nodes.flags & F_BUSY) == 0

    def _held(self) -> Mask:
        return (self.nodes.page != NO_PAGE) & self._idle()

    def dedicated(self) -> Words:
        half, held = self._half, self._held()
        return np.flatnonzero(held[:half] & ~self.share[half:] & self._idle()[half:])

    def contended(self) -> Words:
        half, held = self._half, self._held()
        pairs = np.flatnonzero(held[:half] & held[half:])
        return pairs[: self._unused().size]

    def _unused(self) -> Words:
        """Numbers of pairs of the window of which the VM has neither frame."""
        half, gone = self._half, ~self.share & self._idle()
        return np.flatnonzero(gone[:half] & gone[half:])

    def give_dedicated(self, frames: Words) -> None:
        kept, moved = frames[0::2], frames[1::2]
        self._give(kept, moved, kept + self._half, SLOW)
        self.counters[C.vmstat__pgdemote_kswapd] += moved.size

    def take_dedicated(self, pairs: Words) -> None:
        self._give(pairs, pairs + self._half, self._unused()[: pairs.size], FAST)
        self.counters[C.vmstat__pgpromote_success] += pairs.size

    def _give(self, kept: Words, moved: Words, targets: Words, node: int) -> None:
        """Pages of ``kept`` are copied within their numbers, those of ``moved`` go to ``targets``, on ``node``."""
        if kept.size == 0:
            return
        nodes, costs = self.nodes, self.costs
        leaves = np.stack([kept, moved], axis=1)
        places = np.stack([kept, targets], axis=1)
        pages = nodes.page[leaves].astype(np.int64)
        self.split(np.unique(self.heads(pages.reshape(-1))))
        slow = node == SLOW
        copies = np.array([copy_ps(costs, False, False), copy_ps(costs, not slow, slow)])
        if not slow:
            # Reading the frame that is left brings its lines into DRAM, from which the copy of its partner drives them.
            pages, places, copies = pages[:, ::-1], places[:, ::-1], copies[::-1]
        each = np.tile(costs.migrate_page_ps + copies + self._request_ps(), kept.size)
        times = self.now + np.cumsum(each) - each
        self._emit(OP_MOVE, times, pages.reshape(-1), places.reshape(-1), 0, each)
        units.relink(self.meter.book, nodes, moved.astype(np.int32), targets.astype(np.int32), node)
        nodes.flags[leaves] |= F_BUSY
        nodes.flags[targets] |= F_BUSY
        self._leaving.append((np.maximum(times[0::2], times[1::2]), moved, places))
        self.share[moved], self.share[targets] = False, True
        nodes.managed[[node, 1 - node]] += np.array([kept.size, -kept.size])
        self.meter.charge(int(each.sum()))
        self.counters[C.vmstat__pgmigrate_success] += 2 * kept.size
        self.counters[C.bytes__migrated] += 2 * kept.size << PAGE_SHIFT
        named = pages[:, int(slow)] << PAGE_SHIFT
        self._events.add(self.now, "demote" if slow else "promote", named, 1 - node, node)

    def settle(self, now_ps: int) -> None:
        super().settle(now_ps)
        left = []
        for times, moved, places in self._leaving:
            done = int(np.searchsorted(times, now_ps))
            self.nodes.flags[moved[:done]] = 0
            self.nodes.flags[places[:done]] &= np.uint8(0xFF ^ F_BUSY)
            if done < times.size:
                left.append((times[done:], moved[done:], places[done:]))
        self._leaving = left

    def report(self) -> dict[str, int]:
        """`flat_memory` of a VM in summary.json, pages."""
        half, held = self._half, self.nodes.page != NO_PAGE
        dedicated = int(np.count_nonzero(held[:half] & ~self.share[half:]))
        contended = 2 * int(np.count_nonzero(held[:half] & held[half:]))
        return {"dedicated_pages": dedicated, "contended_pages": contended}
