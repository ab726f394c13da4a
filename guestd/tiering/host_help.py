"""What only a hypervisor can do for a tiering design, beside `PageView`: stop a VM, read its log of dirty pages, walk
its page table, copy ahead. Stages that use it have ``views=("host",)``.
"""

from abc import abstractmethod
from typing import cast

import numpy as np

from guestd.tiering.view import PageView
from proto.arrays import Ints, Mask, Words
from proto.counters import Counters


class HostHelp(PageView):
    """See the module. What is requested happens in the quantum to come; its result is there from ``barrier_ps`` on."""

    barrier_ps: int
    """End of the quantum to come."""

    @abstractmethod
    def exchange_stopped(self, slow_pages: Words, fast_pages: Words) -> int:
        """`exchange` with the whole VM paused for the batch, entries rewritten in place, and one flush at its end.

        RAMinate (SoCC'16): the pause (`vm_pause`), and three copies a pair through a buffer in fast memory. Nothing
        is zapped, so that no page faults in again.
        """

    @abstractmethod
    def harvest_dirty(self) -> Words:
        """gPA pages (int64[n], rising) that harvests before this barrier took, page tables too; costs a PTE each."""

    @abstractmethod
    def request_guest_walk(self, *, narrow: bool = False, leave: Words | None = None) -> None:
        """Walk the guest's page table now and clear its A bits, all but those of ``leave`` (gPA pages, int64[n]).

        One flush request if any was set: the host has no gVA to flush by. ``narrow``: harvest the log of dirty pages
        first, and look only at the tables that it names, and at those in which the last walk left an A bit, with one
        flush for both. What entries of 2 MiB map is looked at always.
        """

    @abstractmethod
    def accessed_in_guest(self) -> Words:
        """gPA pages (int64[n], rising) that walks before this barrier found accessed; costs a PTE an entry walked."""

    @abstractmethod
    def copy_ahead(self, pages: Words, node: int, keep: int) -> tuple[Words, Ints]:
        """Copy pages to free frames of ``node``, of which ``keep`` are left; they stay mapped where they are.

        Returns the pages and the frames that have their copies, which nobody else takes: to be given to `copy_again`,
        and in the end to `switch`. Only 4 KiB pages are copied.
        """

    @abstractmethod
    def copy_again(self, pages: Words, targets: Ints) -> None:
        """Make the copies anew, of pages that were written since."""

    @abstractmethod
    def switch(self, pages: Words, targets: Ints, stale: Mask) -> None:
        """Map pages, all to frames of one node, to their copies, in a pause for all of them with one flush.

        Those whose copies are ``stale`` (bool[n]), and what the log of dirty pages names since it was read last, are
        copied once more in the pause.
        """


class FlatMemoryHelp(HostHelp):
    """What the host does besides for a VM whose memory is in flat memory mode (`guestd.near_memory`)."""

    guest_counters: Counters
    """The VM's counters at the last barrier, as a host reads those of the cores that it is pinned to."""
    random: np.random.Generator
    """For a choice among equals; of the VM's own seed."""

    @abstractmethod
    def dedicated(self) -> Words:
        """Fast frames that hold a page and whose partner the VM has not been given (int64[n], rising); free to read."""

    @abstractmethod
    def contended(self) -> Words:
        """Fast frames that hold a page, as does their partner (int64[n], rising): as many as it could exchange."""

    @abstractmethod
    def give_dedicated(self, frames: Words) -> None:
        """Exchange the pages of dedicated frames (an even number) for both pages of another VM's contended pairs."""

    @abstractmethod
    def take_dedicated(self, pairs: Words) -> None:
        """The other side of it: the pages of contended pairs, named by their fast frames, for dedicated ones."""


def flat_memory(view: PageView) -> FlatMemoryHelp:
    """The same view with what the host does in flat memory mode."""
    return cast(FlatMemoryHelp, view)


def host_help(view: PageView) -> HostHelp:
    """The same view with what a hypervisor can do."""
    return cast(HostHelp, view)
