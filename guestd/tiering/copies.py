"""`CopyView`: a page view that can copy pages while they stay mapped and keep their old frames as shadows.

What Nomad's stages work on (OSDI'24, 3); the guest's view does it (`guestd.guest_copy`), the host's does not.
"""

from abc import abstractmethod

from guestd.tiering.view import PageView
from proto.arrays import Mask, Words


class CopyView(PageView):
    """See the module."""

    @abstractmethod
    def keep_shadows(self) -> None:
        """From now on promotions by copy may leave shadows."""

    @abstractmethod
    def start_copies(self, pages: Words, keep: int, *, shadow: bool) -> tuple[Mask, int]:
        """Begin to copy 4 KiB pages to the fast node, leaving ``keep`` frames free; which are (bool[n]), until when.

        One page after the other, each mapped until its copy is done. The time is charged. ``shadow``: the old frame
        keeps the content, and the page is read-only.
        """

    @abstractmethod
    def finish_copies(self) -> tuple[Words, Mask]:
        """The time of `start_copies` has come: its pages (int64[n]), and which are in fast memory now (bool[n])."""

    @abstractmethod
    def reclaim_shadows(self, limit: int) -> int:
        """Free up to ``limit`` shadows; returns how many. Their pages stay read-only until the next write."""
