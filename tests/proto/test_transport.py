"""ZeroMQ as hypercalls use it: private sockets, the transport's own routing ids, oversized peers cut off."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from proto import transport
from proto.errors import EndpointError
from proto.messages import MAX_MESSAGE

TIMEOUT_MS = 60_000


class Wire:
    """A host's ROUTER and a guest's DEALER of contexts of their own."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.host_context, self.guest_context = zmq.Context(1), zmq.Context(1)
        self.router, self.endpoint, self.key = transport.bind_host(self.host_context, kind, directory)
        self.monitor = transport.Monitor(self.router)
        self.dealer = transport.connect_guest(self.guest_context, self.endpoint, self.key)

    def incoming(self) -> transport.Incoming:
        assert self.router.poll(TIMEOUT_MS)
        incoming = transport.receive(self.router)
        assert incoming is not None
        return incoming

    def hear(self) -> bytes:
        assert self.dealer.poll(TIMEOUT_MS)
        return self.dealer.recv()

    def disconnected(self) -> list[int]:
        assert self.monitor.socket.poll(TIMEOUT_MS)
        return list(self.monitor.disconnected())

    def close(self) -> None:
        self.monitor.close()
        self.router.close(0)
        self.dealer.close(0)
        self.guest_context.term()
        self.host_context.term()


@pytest.fixture(params=["ipc", "tcp"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    directory = transport.choose_directory()
    wire = Wire(request.param, directory)
    yield wire
    wire.close()
    transport.remove_directory(directory)
    assert not directory.exists()


def test_the_directory_is_private_and_short() -> None:
    directory = transport.choose_directory()
    assert not directory.exists()
    assert len(os.fsencode(directory)) < transport.MAX_SOCKET_PATH - 16
    context = zmq.Context(1)
    try:
        router, _, _ = transport.bind_host(context, "ipc", directory)
        router.close(0)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        # Whoever made it before us may read in it.
        with pytest.raises(EndpointError, match="File exists"):
            transport.bind_host(context, "ipc", directory)
    finally:
        context.destroy(0)
        transport.remove_directory(directory)
        transport.remove_directory(directory)
    assert not directory.exists()


def test_a_path_too_long_for_a_socket_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    assert transport.choose_directory().parent == Path("/tmp")


def test_an_unknown_endpoint_is_refused(tmp_path: Path) -> None:
    context = zmq.Context(1)
    with pytest.raises(EndpointError, match="choose ipc or tcp"):
        transport.bind_host(context, "udp", tmp_path)
    context.destroy(0)


def test_a_message_and_its_answer(wire: Wire) -> None:
    wire.dealer.send(b"fault")
    incoming = wire.incoming()
    assert incoming.payload == b"fault"
    assert len(incoming.routing_id) == transport.ROUTING_ID_BYTES
    assert incoming.routing_id[0] == 0
    assert transport.send(wire.router, incoming.routing_id, b"mapped")
    assert wire.hear() == b"mapped"


def test_several_frames_are_no_message(wire: Wire) -> None:
    wire.dealer.send_multipart([b"", b"fault"])
    assert wire.incoming().payload is None


def test_the_longest_message_passes_and_a_longer_one_cuts_its_sender_off(wire: Wire) -> None:
    wire.dealer.send(bytes(MAX_MESSAGE))
    incoming = wire.incoming()
    assert incoming.payload == bytes(MAX_MESSAGE)
    wire.dealer.send(bytes(MAX_MESSAGE + 256))
    assert wire.disconnected() == [incoming.connection]
    # The same socket comes back as another peer; what it sent before it noticed that it was cut off is lost.
    wire.dealer.send(b"again")
    while not wire.router.poll(500):
        wire.dealer.send(b"again")
    again = wire.incoming()
    assert again.payload == b"again"
    assert again.routing_id != incoming.routing_id


def test_the_connection_of_a_peer_that_leaves_is_named(wire: Wire) -> None:
    wire.dealer.send(b"one")
    first = wire.incoming()
    other = transport.connect_guest(wire.guest_context, wire.endpoint, wire.key)
    other.send(b"two")
    second = wire.incoming()
    assert first.connection != second.connection
    other.close(0)
    assert wire.disconnected() == [second.connection]


def test_a_peer_that_is_gone_is_no_error(wire: Wire) -> None:
    assert not transport.send(wire.router, b"\0abcd", b"hello?")


def test_a_peer_that_does_not_read_is_never_waited_for(wire: Wire) -> None:
    wire.dealer.send(b"hello")
    routing_id = wire.incoming().routing_id
    sent = 0
    while transport.send(wire.router, routing_id, bytes(1 << 16)):
        sent += 1
        assert sent < 100_000
    assert sent > 0


def test_a_claimed_routing_id_shows(wire: Wire) -> None:
    claimer = wire.guest_context.socket(zmq.DEALER)
    claimer.setsockopt(zmq.ROUTING_ID, b"vm0")
    if wire.key:
        public, secret = zmq.curve_keypair()
        claimer.curve_serverkey, claimer.curve_publickey, claimer.curve_secretkey = wire.key, public, secret
    claimer.connect(wire.endpoint)
    claimer.send(b"it is me")
    assert wire.incoming().routing_id == b"vm0"
    claimer.close(0)


def test_without_the_key_tcp_lets_nobody_in() -> None:
    wire = Wire("tcp", Path("/nonexistent"))
    stranger = wire.guest_context.socket(zmq.DEALER)
    stranger.connect(wire.endpoint)
    stranger.send(b"let me in")
    wire.dealer.send(b"hello")
    assert wire.incoming().payload == b"hello"
    assert transport.receive(wire.router) is None
    stranger.close(0)
    wire.close()
