"""A guest's end of a scan by the host (HeteroOS, ISCA'17): it lists gPA ranges, and the host reads and clears A bits.

The list goes to the host at the next barrier, where a thread of the host scans the EPT and asks for one flush of the
whole VM; the bits come with the quantum after it, and are the guest's to read once that thread is through.
"""

from typing import NamedTuple, cast

import numpy as np

from guestd.tiering.view import PageView
from proto.arrays import Bytes, Words
from proto.messages import Advance


class Answer(NamedTuple):
    """What the host found."""

    ranges: Words
    """int64[n, 2]: the list, (first, count) each."""
    bits: Bytes
    """uint8: a bit a page of the list, the lowest of a byte first."""
    done_ps: int
    """When the host was through."""


class HostScan:
    """See the module. One list at a time: the next only once the answer to the last was taken."""

    def __init__(self) -> None:
        self.barrier_ps = 0
        """End of the quantum that the guest is in; the answer to a list comes after it."""
        self._asked: Words | None = None
        self._sent: Words | None = None
        self._answer: Answer | None = None

    def request(self, ranges: Words) -> None:
        """Have the host scan ``ranges`` (int64[n, 2]: first gPA page, count), rising and disjoint, n > 0.

        At most `proto.messages.MOST_RANGES` of them, with `MOST_LISTED` pages.
        """
        assert self._asked is None and self._sent is None and self._answer is None
        self._asked = ranges

    def take_list(self) -> bytes:
        """For the guest's tick: what was requested since the last."""
        self._sent, self._asked = self._asked, None
        return b"" if self._sent is None else self._sent.tobytes()

    def hear(self, message: Advance) -> None:
        """The next quantum, with the answer to the list that the tick carried."""
        self.barrier_ps = message.until_ps
        if self._sent is not None:
            self._answer = Answer(self._sent, np.frombuffer(message.scanned, np.uint8), message.scanned_ps)
            self._sent = None

    def due_ps(self) -> int:
        """When to read the answer: it is there, or else not before the next quantum."""
        return self.barrier_ps + 1 if self._answer is None else self._answer.done_ps

    def take_answer(self) -> Answer:
        """What the host found, at or after `due_ps`."""
        assert self._answer is not None
        answer, self._answer = self._answer, None
        return answer


class _GuestView(PageView):
    """What `guestd.guest_view.GuestView` has more than any view."""

    host_scan: HostScan


def host_scan(view: PageView) -> HostScan:
    """That of a guest's view."""
    return cast(_GuestView, view).host_scan
