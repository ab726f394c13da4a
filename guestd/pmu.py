"""`Pmu`: the sampling hardware of a guest's vCPUs, as its kernel and its hypervisor deal with it.

What differs between vendors is which events there are, what a record holds, and what happens when a record meets an EPT
violation or the buffer fills up; what a guest's kernel does about it is the same. `guestd.pebs` is Intel's. AMD's IBS
(a record and an interrupt per sample), Arm's SPE (a buffer with a maintenance interrupt) and RISC-V's counters with
supervisor-mode delegation fit the same operations. Writing a record is no part of it: that is the hot path, a compiled
function of its own that the engine calls after each access (`guestd.pebs.sample`).
"""

from abc import ABC, abstractmethod
from typing import Any

from guestd.tiering.policy import Sampling
from proto.arrays import Words


class Pmu(ABC):
    """See the module. ``frames``: int64[vcpus, pages], gPA frames of the buffers, NO_FRAME until allocated."""

    frames: Words

    @abstractmethod
    def program(self, sampling: Sampling) -> None:
        """Set periods, threshold and interrupt mode; counters start anew. Records keep their size."""

    @abstractmethod
    def violations(self, vcpu: int) -> Words:
        """gPA frames (int64[n]) that records of ``vcpu`` were to be written to while the EPT did not map them."""

    @abstractmethod
    def resolved(self, vcpu: int) -> None:
        """Those frames are mapped, and the records are in them."""

    @abstractmethod
    def interrupt_due(self, vcpu: int) -> bool:
        """The buffer of ``vcpu`` asks to be drained."""

    @abstractmethod
    def waiting(self, vcpu: int) -> int:
        """Records in the buffer of ``vcpu``."""

    @abstractmethod
    def drain(self, book: Words, vcpu: int) -> Words:
        """Empty the buffer of ``vcpu``: int64[n, 5] rows (gVA, slow, latency ns, event, time ps).

        Valid until the next call. ``book``: the meter's, which the work is booked to.
        """

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Part of `pebs` of summary.json: how it was programmed, and what was counted, by event and vCPU."""
