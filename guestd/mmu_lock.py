"""KVM's mmu_lock of a VM as a calendar: who wants it at a virtual time waits until it is free.

vCPUs run in turns, so that requests do not come in order of time; a clock of "free from then on" would make a vCPU wait
for requests of its future. So time is divided into bins of 262 ns, each of which can be held for as long as it lasts,
whoever comes first; a request takes what is free from its own time on. Notifiers (invalidations by the host) hold the
lock alone. EPT violations share it under the TDP MMU, on by default since Linux 5.15 (arch/x86/kvm/mmu/tdp_mmu.c), and
then only wait for notifiers; without it each holds it alone. Left out: a notifier does not wait for EPT violations that
share the lock.
"""

import numpy as np

from guestd.jit import inline
from proto.arrays import Words

BIN_SHIFT = 18
BIN_PS = 1 << BIN_SHIFT
BINS = 1 << 14
"""A ring of 4.3 ms: more than a slice and the longest hold."""
_NUMBER, _HELD = 0, 1


def new_mmu_lock() -> Words:
    """int64[2, BINS]: number of the bin that a slot of the ring stands for, and for how long it is held, ps."""
    return np.zeros((2, BINS), np.int64)


@inline
def _held(lock: Words, number: int) -> int:
    """For how long bin ``number`` is held."""
    slot = number & (BINS - 1)
    return lock[_HELD, slot] if lock[_NUMBER, slot] == number else 0


@inline
def wait_for(lock: Words, time_ps: int) -> int:
    """How long who comes at ``time_ps`` waits until the lock is free, ps."""
    number = time_ps >> BIN_SHIFT
    last = number + BINS
    while number < last and _held(lock, number) >= BIN_PS:
        number += 1
    return max(0, (number << BIN_SHIFT) - time_ps)


@inline
def hold(lock: Words, time_ps: int, hold_ps: int) -> int:
    """Hold the lock alone for ``hold_ps`` from ``time_ps`` on, or as soon as it is free; returns the wait, ps."""
    wait = wait_for(lock, time_ps)
    number = (time_ps + wait) >> BIN_SHIFT
    last = number + BINS
    left = hold_ps
    while left > 0 and number < last:
        held = _held(lock, number)
        taken = min(left, BIN_PS - held)
        slot = number & (BINS - 1)
        lock[_NUMBER, slot] = number
        lock[_HELD, slot] = held + taken
        left -= taken
        number += 1
    return wait
