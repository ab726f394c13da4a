"""A whole fleet in one process: the two sans-I/O cores wired to each other, without processes, sockets or threads.

For warming up compiled code, for tests and for benchmarks of the engine. The messages are the real ones; the order in
which VMs are served is fixed, which by the design of the barrier changes nothing.
"""

import os
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from guestd.guest import Guest
from guestd.operations import EptFaultCall
from guestd.threads import Inline
from hostd.core import HostCore
from proto import memfd
from proto.arrays import Words
from proto.config import GuestConfig, HostConfig, pebs_buffer_bytes
from proto.layout import VmMemory, segment_bytes, view_segment
from proto.messages import Advance, Bye, EptFault, Hello, Mapped, Stop, ToGuest, Welcome

_NO_SECRET = bytes(32)


def shared_memory(config: GuestConfig) -> VmMemory:
    """A VM's segment in a memfd of sealed size, as the host maps it for a process (no transparent huge pages)."""
    size = segment_bytes(config.total_pages)
    fd = memfd.create(config.name, size)
    try:
        return view_segment(memfd.map_shared(fd, size), config.total_pages)
    finally:
        os.close(fd)


def private_memory(config: GuestConfig) -> VmMemory:
    """A VM's segment in plain private memory."""
    words = np.zeros(-(-segment_bytes(config.total_pages) // 8), np.int64)
    return view_segment(words.data.cast("B"), config.total_pages)


class InProcessFleet:
    """Both cores and the messages under way between them. ``guests``: VM -> Guest while it runs."""

    def __init__(self, host: HostConfig, guests: list[GuestConfig],
                 make_guest: Callable[..., Guest] = Guest,
                 make_memory: Callable[[GuestConfig], VmMemory] = private_memory) -> None:  # fmt: skip
        self.host = HostCore(host, guests)
        self.guests: dict[int, Guest] = {}
        self._inbox: deque[tuple[int, ToGuest]] = deque()
        pebs = np.zeros(pebs_buffer_bytes(guests) // 8 if host.kernel.pebs == "shared" else 0, np.int64)
        for config in guests:
            memory = make_memory(config)._replace(pebs=pebs)
            self.host.attach(config.vm, memory)
            self.guests[config.vm] = make_guest(config, memory, self._hypercall(config.vm), Inline())
        for config in guests:
            self._inbox.extend(self.host.receive(config.vm, Hello(vm=config.vm, secret=_NO_SECRET, pid=0)))

    def _hypercall(self, vm: int) -> EptFaultCall:
        def ept_fault(time_ps: int, gpfns: Words, last: bool) -> tuple[Words, bool]:
            message = EptFault(time_ps=time_ps, gpfns=gpfns.tobytes(), last=last)
            ((_, answer),) = self.host.receive(vm, message)
            assert isinstance(answer, Mapped)
            return np.frombuffer(answer.cost_ps, np.int64).copy(), answer.waits

        return ept_fault

    def step(self) -> bool:
        """Deliver one message; whether there was one."""
        if not self._inbox:
            return False
        vm, message = self._inbox.popleft()
        guest = self.guests[vm]
        match message:
            case Welcome():
                guest.start()
            case Advance():
                self._inbox.extend(self.host.receive(vm, guest.advance(message)))
                if guest.finished:
                    self._bye(vm)
            case Stop():
                self._bye(vm)
        return True

    def _bye(self, vm: int) -> None:
        report = msgspec.json.encode(self.guests[vm].report())
        self._inbox.extend(self.host.receive(vm, Bye(report=report)))

    def kill(self, vm: int) -> None:
        """VM ``vm`` is gone without a word, as the host learns from its process's end."""
        self._inbox = deque((to, message) for to, message in self._inbox if to != vm)
        for to, message in self.host.lost(vm, "killed", "killed"):
            if to != vm:
                self._inbox.append((to, message))

    def run(self) -> HostCore:
        """Run to the end; the host's core has the reports."""
        while self.step():
            pass
        return self.host
