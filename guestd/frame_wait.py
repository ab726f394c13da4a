"""A fault that finds the host's pool exhausted stops the VM: what it waits for, and what is to be cleared then."""

from typing import NamedTuple

import numpy as np

from guestd.errors import GuestError
from guestd.fault import Batch, clear_fresh
from guestd.kvm import wait_for_frames
from guestd.machine import Machine, S
from proto.arrays import Words
from proto.entry import PRESENT, WRITABLE


class _Waits(NamedTuple):
    vcpu: int
    gpfn: Words
    """int64[n]: gPA frames that the host has to map before the VM goes on."""
    fresh: Words
    """int64[m]: what is to be cleared once it is mapped, as in `guestd.fault.Batch`, each in its frame."""
    fresh_gpfn: Words


class FrameWait:
    """One VM's fault for which the host had no frame yet, if there is one."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._waits: _Waits | None = None

    @property
    def active(self) -> bool:
        """The VM is stopped: no timer, no thread of its kernel runs."""
        return self._waits is not None

    @property
    def uncleared(self) -> int:
        """Pages that never had a frame, and wait for one."""
        return 0 if self._waits is None else self._waits.fresh.size

    def answered(self, vcpu: int, batch: Batch, waits: bool) -> None:
        """The host answered the faults of ``batch``, taken by ``vcpu``: clear what has a frame, or ``waits`` for one.

        Raises GuestError if the host left frames unmapped that do not wait.
        """
        gpfns, fresh = batch.counts[1], batch.counts[2]
        if waits:
            parts = batch.gpfn[:gpfns], batch.fresh[:fresh], batch.fresh_gpfn[:fresh]
            self._waits = _Waits(vcpu, *(part.copy() for part in parts))
            self.go_on()
        elif clear_fresh(self._machine, vcpu, batch.fresh[:fresh], batch.fresh_gpfn[:fresh]):
            raise GuestError("the host left frames unmapped after it had answered the fault")

    def go_on(self) -> None:
        """Clear what is mapped by now; what is left stops the VM to the end of the quantum."""
        waits, machine = self._waits, self._machine
        if waits is None:
            return
        mapped = (machine.ept[waits.fresh_gpfn] & PRESENT) != 0
        clear_fresh(machine, waits.vcpu, waits.fresh[mapped], waits.fresh_gpfn[mapped])
        if mapped.all() and np.all(machine.ept[waits.gpfn] & WRITABLE):
            self._waits = None
        else:
            self._waits = waits._replace(fresh=waits.fresh[~mapped], fresh_gpfn=waits.fresh_gpfn[~mapped])
            wait_for_frames(machine, int(machine.state[S.END_PS]))
