"""What the engine has to execute between accesses at virtual times: the host's operations, and the guest's own.

The host says at each barrier what its threads do in the quantum to come. The guest's kernel has one batch of copies
under way at most (`guestd.guest_copy`), which may last beyond the barrier.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from guestd.errors import GuestError
from guestd.machine import S
from proto.arrays import Words
from proto.layout import OP_TRANSACTION_BEGIN, OPERATION

EptFaultCall = Callable[[int, Words, bool], tuple[Words, bool]]
"""The hypercall: (time ps, gPA frames int64[n], `EptFault.last`) -> (cost ps int64[n], `Mapped.waits`)."""


class Operations:
    """``pending``: OPERATION[n] in order of time; `S.OPERATION` in ``state`` (int64, the machine's) says which is next.

    ``ept_fault``: the hypercall as the host takes it.
    """

    def __init__(self, state: Words, ept_fault: EptFaultCall) -> None:
        self.pending = np.zeros(0, OPERATION)
        self._state = state
        self._ept_fault = ept_fault

    def of_host(self, operations: npt.NDArray[np.void]) -> None:
        """The host's for the next quantum; it has none left of the one before."""
        self._merge(self._left(), operations)

    def of_guest(self, operations: npt.NDArray[np.void]) -> None:
        """The guest's own, instead of those that it had.

        What is left of a batch of copies when its time has come is void, as if it had been aborted: an operation of the
        host before it waits for mmu_lock.
        """
        left = self._left()
        self._merge(left[left["kind"] < OP_TRANSACTION_BEGIN], operations)

    def page_fault(self, time_ps: int, gpfns: Words, *, last: bool = False) -> tuple[Words, bool]:
        """The hypercall. The host takes what it had planned for before ``time_ps`` for done: that is not quite so.

        An operation may wait for mmu_lock, and a vCPU's clock may be past the end of its slice.
        """
        left = self._left()
        planned = left["time_ps"][left["kind"] < OP_TRANSACTION_BEGIN]
        return self._ept_fault(min(time_ps, int(planned[0])) if planned.size else time_ps, gpfns, last)

    def ept_fault(self, time_ps: int, gpfns: Words) -> Words:
        """`page_fault` of a kernel that cannot wait: cost of each, ps (int64[n]). Raises GuestError if it has to."""
        cost, waits = self.page_fault(time_ps, gpfns)
        if waits:
            raise GuestError("the host has no frame left for memory that the guest's kernel needs at once")
        return cost

    def _left(self) -> npt.NDArray[np.void]:
        return self.pending[self._state[S.OPERATION] :]

    def _merge(self, left: npt.NDArray[np.void], new: npt.NDArray[np.void]) -> None:
        both = np.concatenate([left, new])
        self.pending = both[np.argsort(both["time_ps"], kind="stable")]
        self._state[S.OPERATION] = 0
