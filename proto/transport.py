"""Hypercalls over ZeroMQ: the host's ROUTER, a guest's DEALER, and a monitor of who was cut off.

ipc by default, in a short directory that only this user can enter (a Unix socket's path has at most 107 bytes); tcp on
the loopback with CURVE, whose server key travels over the guest's own socketpair. Contexts are made after the fork.
The transport itself cuts off a peer whose frame is longer than `MAX_MESSAGE`, so the host never holds more of it. Left
out: ZeroMQ bounds a frame, not the number of frames of one message, so a local peer of the same user can still make
the host hold many small ones.
"""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from proto.errors import EndpointError
from proto.messages import MAX_MESSAGE, MAX_TO_GUEST

MAX_SOCKET_PATH = 107
"""sockaddr_un.sun_path, without the final zero (unix(7))."""
ROUTING_ID_BYTES = 5
"""The ids that a ROUTER gives by itself: a zero byte and a counter (zmq_setsockopt(3), ZMQ_ROUTING_ID)."""

_CURVE_OVERHEAD = 64
"""An encrypted frame is longer than what it holds: command name, nonce, authenticator, flags (RFC 26/CurveZMQ)."""
_HIGH_WATER = 1024
_LINGER_MS = 2000
_SOCKET_NAME = "hypercall"
_EVENTS = zmq.Event.DISCONNECTED


class Incoming(NamedTuple):
    """One message as it came off the ROUTER."""

    routing_id: bytes
    payload: bytes | None
    """None: the peer sent something other than one frame."""
    connection: int
    """The transport's descriptor of the connection; -1 if unknown. Names it in `Monitor.disconnected`."""


def choose_directory() -> Path:
    """A new name of a directory for sockets, which `bind_host` makes. Raises EndpointError if its path is too long."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = runtime if runtime and os.access(runtime, os.W_OK | os.X_OK) else tempfile.gettempdir()
    for parent in dict.fromkeys((base, "/tmp")):
        directory = Path(parent) / f"fleet-{secrets.token_hex(8)}"
        if len(os.fsencode(directory / _SOCKET_NAME)) <= MAX_SOCKET_PATH:
            return directory
    raise EndpointError(f"a socket below {base} has a path longer than {MAX_SOCKET_PATH} bytes; set TMPDIR=/tmp")


def remove_directory(directory: str | Path) -> None:
    """Remove the sockets and their directory; whoever comes second finds nothing to do."""
    shutil.rmtree(directory, ignore_errors=True)


def bind_host(
    context: "zmq.Context[zmq.Socket[bytes]]", kind: str, directory: Path
) -> "tuple[zmq.Socket[bytes], str, bytes]":
    """The host's ROUTER, listening; its endpoint and its CURVE public key (empty for ipc). Raises EndpointError.

    ``kind`` is ``ipc`` (in ``directory``, made here for this user alone) or ``tcp``.
    """
    if kind not in ("ipc", "tcp"):
        raise EndpointError(f"endpoint {kind!r} is not known; choose ipc or tcp")
    socket = context.socket(zmq.ROUTER)
    _bound(socket, MAX_MESSAGE)
    # A message to a peer that is gone is an error here and not a silent loss.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    server_key = b""
    address = f"ipc://{directory / _SOCKET_NAME}"
    if kind == "tcp":
        server_key, secret_key = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE + _CURVE_OVERHEAD)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret_key)
        address = "tcp://127.0.0.1:*"
    try:
        if kind == "ipc":
            directory.mkdir(mode=0o700)
        socket.bind(address)
    except (OSError, zmq.ZMQError) as error:
        socket.close(0)
        raise EndpointError(f"cannot listen at {address}: {error.strerror}") from error
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT), server_key


def connect_guest(context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, server_key: bytes) -> "zmq.Socket[bytes]":
    """A guest's DEALER, connected (in the background) to the host's endpoint."""
    socket = context.socket(zmq.DEALER)
    _bound(socket, MAX_TO_GUEST)
    if server_key:
        public_key, secret_key = zmq.curve_keypair()
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_TO_GUEST + _CURVE_OVERHEAD)
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public_key)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret_key)
    socket.connect(endpoint)
    return socket


def _bound(socket: "zmq.Socket[bytes]", longest: int) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, longest)
    socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)


def receive(socket: "zmq.Socket[bytes]") -> Incoming | None:
    """The next message off the ROUTER, None if there is none now."""
    try:
        frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    routing_id = frames[0].bytes
    if len(frames) != 2:
        return Incoming(routing_id, None, -1)
    try:
        connection = int(frames[1].get(zmq.SRCFD))
    except zmq.ZMQError:
        connection = -1
    return Incoming(routing_id, frames[1].bytes, connection)


def send(socket: "zmq.Socket[bytes]", routing_id: bytes, payload: bytes) -> bool:
    """Send to one peer without ever waiting; False if it is gone or doesn't read."""
    try:
        socket.send_multipart((routing_id, payload), zmq.NOBLOCK)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno == errno.EHOSTUNREACH:
            return False
        raise
    return True


class Monitor:
    """Learns of connections that end, from the ROUTER's own event stream."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._watched = socket
        self.socket: zmq.Socket[bytes] = socket.get_monitor_socket(_EVENTS)

    def disconnected(self) -> Iterator[int]:
        """Connections (as in `Incoming.connection`) that ended since the last call."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(frames)
            if event["event"] == zmq.Event.DISCONNECTED:
                yield int(event["value"])

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
        self.socket.close(0)
