"""The hand-over of a guest's memory: shared with that guest alone, sealed, no descriptor left on either side."""

import os
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from fleet.experiment import Experiment
from proto import handover
from proto.config import GuestConfig
from proto.control import Handover
from proto.layout import VmMemory

SECRET = bytes(range(32))


@pytest.fixture
def guest(experiment: Experiment) -> GuestConfig:
    return msgspec.structs.replace(experiment.guests()[1], total_pages=4096)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    host, vm = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with host, vm:
        yield host, vm


def _memfds() -> int:
    links = (
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    )
    return sum("memfd" in link for link in links)


def test_host_and_guest_share_the_memory_and_keep_no_descriptor(
    guest: GuestConfig, ends: tuple[socket.socket, socket.socket]
) -> None:
    host, vm = ends
    before = _memfds()
    pending = handover.Pending(guest, SECRET, host, "ipc://x", b"key")
    taken: list[tuple[Handover, VmMemory]] = []
    thread = threading.Thread(target=lambda: taken.append(handover.accept(vm)))
    thread.start()
    assert pending.finish()
    thread.join()
    said, memory = taken[0]
    assert (said.vm, said.secret, said.endpoint, said.server_key) == (guest.vm, SECRET, "ipc://x", b"key")
    assert memory.ept.shape == pending.memory.ept.shape == (2 * guest.total_pages,)
    assert memory.ept_pde.shape == (2 * guest.total_pages // 512,)
    assert memory.pebs.size == pending.memory.pebs.size == 0
    assert memory.dirty.shape == (2, 2 * guest.total_pages // 64)
    memory.ept[5] = 77
    pending.memory.stamps[9] = 88
    assert (pending.memory.ept[5], memory.stamps[9]) == (77, 88)
    assert _memfds() == before
    assert (host.fileno(), vm.fileno()) == (-1, -1)


def test_guests_share_one_pebs_buffer_only_where_the_host_has_one(
    guest: GuestConfig, ends: tuple[socket.socket, socket.socket]
) -> None:
    host, vm = ends
    before = _memfds()
    buffer = handover.PebsBuffer(3 * 4096)
    pending = handover.Pending(guest, SECRET, host, "ipc://x", b"", buffer)
    taken: list[tuple[Handover, VmMemory]] = []
    thread = threading.Thread(target=lambda: taken.append(handover.accept(vm)))
    thread.start()
    assert pending.finish()
    thread.join()
    memory = taken[0][1]
    assert memory.pebs.size == pending.memory.pebs.size == 3 * 512
    memory.pebs[70] = 99
    assert buffer.words[70] == pending.memory.pebs[70] == 99
    assert not memory.ept.any() and not memory.stamps.any()
    buffer.close()
    buffer.close()
    assert _memfds() == before


def test_a_guest_that_dies_before_it_mapped_is_noticed(
    guest: GuestConfig, ends: tuple[socket.socket, socket.socket]
) -> None:
    host, vm = ends
    before = _memfds()
    pending = handover.Pending(guest, SECRET, host, "ipc://x", b"")
    vm.close()
    assert not pending.finish()
    assert _memfds() == before


def test_a_guest_whose_host_is_gone_is_told(ends: tuple[socket.socket, socket.socket]) -> None:
    host, vm = ends
    host.close()
    with pytest.raises(EOFError, match="host"):
        handover.accept(vm)


def test_a_socket_travels_to_the_host_by_its_vm(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    arrivals = handover.Arrivals(far)
    one, other = socket.socketpair()
    handover.announce(near, 513, one)
    one.close()
    arrived = arrivals.take()
    assert arrived is not None
    vm, received = arrived
    assert vm == 513
    received.send(b"hi")
    assert other.recv(2) == b"hi"
    received.close()
    other.close()
    near.close()
    assert arrivals.take() is None


def test_secrets_differ(experiment: Experiment) -> None:
    secrets = handover.new_secrets({guest.vm: guest for guest in experiment.guests()})
    assert {len(secret) for secret in secrets.values()} == {32}
    assert len(set(secrets.values())) == len(secrets)


def test_a_guest_that_is_gone_leaves_no_descriptor_of_its_memory(
    guest: GuestConfig, ends: tuple[socket.socket, socket.socket]
) -> None:
    host, vm = ends
    before = _memfds()
    vm.close()
    with pytest.raises(OSError, match="Broken pipe"):
        handover.Pending(guest, SECRET, host, "ipc://x", b"key")
    assert _memfds() == before
