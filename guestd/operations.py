"""What the engine has to execute between accesses at virtual times: the host's operations, and the guest's own.

The host says at each barrier what its threads do in the quantum to come. The guest's kernel has one batch of copies
under way at most (`guestd.guest_copy`), which may last beyond the barrier.
"""

import numpy as np
import numpy.typing as npt

from guestd.guest_view import EptFaultCall
from guestd.machine import S
from proto.arrays import Bytes, Words
from proto.layout import OP_TRANSACTION_BEGIN, OPERATION


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

    def ept_fault(self, time_ps: int, gpfns: Words, write: Bytes) -> Words:
        """The hypercall. The host takes what it had planned for before ``time_ps`` for done: that is not quite so.

        An operation may wait for mmu_lock, and a vCPU's clock may be past the end of its slice.
        """
        left = self._left()
        planned = left["time_ps"][left["kind"] < OP_TRANSACTION_BEGIN]
        return self._ept_fault(min(time_ps, int(planned[0])) if planned.size else time_ps, gpfns, write)

    def _left(self) -> npt.NDArray[np.void]:
        return self.pending[self._state[S.OPERATION] :]

    def _merge(self, left: npt.NDArray[np.void], new: npt.NDArray[np.void]) -> None:
        both = np.concatenate([left, new])
        self.pending = both[np.argsort(both["time_ps"], kind="stable")]
        self._state[S.OPERATION] = 0
