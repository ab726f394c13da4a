"""Gives each guest its memory: a sealed memfd and a secret, over that guest's own socketpair, after the fork.

The zygote passes the host's end of every socketpair over one socket (SCM_RIGHTS), so that no guest ever holds another
guest's descriptor. Nothing here waits: the host's poll loop says when a socket has something to tell.
"""

import os
import secrets
import socket
from collections.abc import Mapping

import msgspec
import numpy as np

from proto import memfd
from proto.config import GuestConfig
from proto.control import MAX_HANDOVER, Handover
from proto.layout import VmMemory, segment_bytes, view_segment

SECRET_BYTES = 32
_VM_BYTES = 4


class Arrivals:
    """The host's end of the socket over which the zygote passes the guests' sockets."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._socket.fileno()

    def take(self) -> tuple[int, socket.socket] | None:
        """The next guest and the host's end of its socketpair; None if the zygote is gone."""
        data, fds, _, _ = socket.recv_fds(self._socket, _VM_BYTES, 1)
        if not fds:
            return None
        return int.from_bytes(data, "little", signed=True), socket.socket(fileno=fds[0])


def announce(sock: socket.socket, vm: int, end: socket.socket) -> None:
    """The zygote's side of `Arrivals.take`. Raises OSError if the host is gone."""
    socket.send_fds(sock, [vm.to_bytes(_VM_BYTES, "little", signed=True)], [end.fileno()])


class PebsBuffer:
    """The host's PEBS buffer that all guests map too (``host.pebs=shared``), made by the host. Raises SegmentError.

    What the emulator never does by itself: it is here to show what a design would leak that had such a buffer.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = memfd.create("pebs", size)
        self.words = np.frombuffer(memfd.map_shared(self.fd, size), np.int64)

    def close(self) -> None:
        """Close the descriptor, once every guest has it; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Pending:
    """A guest that was given its memory and has not said yet that it mapped it."""

    def __init__(
        self, guest: GuestConfig, secret: bytes, sock: socket.socket, endpoint: str, server_key: bytes,
        pebs: PebsBuffer | None = None,
    ) -> None:  # fmt: skip
        """Make, map and pass the guest's memory. Raises SegmentError; OSError if the guest is gone."""
        self.vm = guest.vm
        self._socket = sock
        size = segment_bytes(guest.total_pages)
        self._fd = memfd.create(f"vm{guest.vm}", size)
        self.memory: VmMemory = view_segment(memfd.map_shared(self._fd, size), guest.total_pages)
        if pebs is not None:
            self.memory = self.memory._replace(pebs=pebs.words)
        handover = Handover(
            vm=guest.vm,
            secret=secret,
            total_pages=guest.total_pages,
            endpoint=endpoint,
            server_key=server_key,
            pebs_bytes=0 if pebs is None else pebs.size,
        )
        fds = [self._fd] if pebs is None else [self._fd, pebs.fd]
        try:
            socket.send_fds(sock, [msgspec.msgpack.encode(handover)], fds)
        except OSError:
            os.close(self._fd)
            raise

    def fileno(self) -> int:
        """Descriptor to poll: readable when the guest mapped its memory, or died."""
        return self._socket.fileno()

    def finish(self) -> bool:
        """Hear the guest's word, seal the memory for good, close the descriptor; False if the guest died instead.

        The last seals come this late because F_SEAL_FUTURE_WRITE refuses every later writable mapping, the guest's too.
        """
        try:
            mapped = bool(self._socket.recv(1))
        except OSError:
            mapped = False
        if mapped:
            memfd.seal(self._fd)
        self.close()
        return mapped

    def close(self) -> None:
        """Close descriptor and socket; the mapping stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._socket.close()


def accept(sock: socket.socket) -> tuple[Handover, VmMemory]:
    """The guest's side: receive, map, acknowledge, close both. Raises SegmentError, EOFError if the host is gone."""
    data, fds, _, _ = socket.recv_fds(sock, MAX_HANDOVER, 2)
    if not fds:
        raise EOFError("the host closed the socket before it handed over the memory")
    handover = msgspec.msgpack.decode(data, type=Handover)
    size = segment_bytes(handover.total_pages)
    memory = view_segment(memfd.map_shared(fds[0], size), handover.total_pages)
    if handover.pebs_bytes:
        words = np.frombuffer(memfd.map_shared(fds[1], handover.pebs_bytes), np.int64)
        memory = memory._replace(pebs=words)
    for fd in fds:
        os.close(fd)
    sock.send(b"m")
    sock.close()
    return handover, memory


def new_secrets(guests: Mapping[int, GuestConfig]) -> dict[int, bytes]:
    """A secret for each VM."""
    return {vm: secrets.token_bytes(SECRET_BYTES) for vm in guests}
