"""Who said that, and may it be said: identity, sequence and refusal, between the transport and the host's core.

No I/O. A routing id is the transport's own and is bound to one VM by `Hello` with that VM's secret; a message means
that VM and can't name another (architecture 3.6). Whatever is not acceptable is counted by reason, answered with a
typed `Refused`, and changes nothing. The guest's kernel and messages are not trusted; the transport and the core are.
"""

import hmac
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec

from hostd.errors import RefusedMessage
from proto import codec
from proto.errors import DecodeError, VersionError
from proto.messages import VERSION, Bye, Failed, Hello, Refused, ToGuest, ToHost
from proto.transport import ROUTING_ID_BYTES, Incoming


class Refusal(StrEnum):
    """Why a message was refused: the keys of the summary's `host.refused`."""

    CLAIMED_ROUTING_ID = "claimed_routing_id"
    """The peer named itself; routing ids are the transport's own."""
    MALFORMED = "malformed"
    """No message of this protocol: garbage, an unknown type, the wrong direction, a field out of its bounds."""
    VERSION = "version"
    """Another protocol version."""
    UNBOUND = "unbound"
    """A peer that did not say a valid hello."""
    IDENTITY = "identity"
    """A hello with a wrong secret, for an unknown VM, or for one that is taken."""
    SEQUENCE = "sequence"
    """Not the number after the last one: replayed or lost."""
    STATE = "state"
    """Well-formed, but not acceptable now."""
    DISCONNECTED = "disconnected"
    """A connection ended that was not that of a guest that ended: closed, or cut off for an oversized message."""


class Core(Protocol):
    """The host's core as the session sees it: `hostd.core.HostCore`."""

    def receive(self, vm: int, message: ToHost) -> list[tuple[int, ToGuest]]:
        """Act on a VM's message; what to tell which VM. Raises RefusedMessage, having changed nothing."""
        ...

    def lost(self, vm: int, kind: str, message: str) -> list[tuple[int, ToGuest]]:
        """VM ``vm`` is no more."""
        ...

    def stop(self, reason: str) -> list[tuple[int, ToGuest]]:
        """End the run."""
        ...


class Outgoing(NamedTuple):
    """One message on its way out."""

    routing_id: bytes
    vm: int | None
    """None: a peer that is no guest."""
    message: ToGuest
    payload: bytes


class Step(NamedTuple):
    """What one message led to."""

    vm: int | None
    """The VM that is bound to the peer, after the message."""
    accepted: ToHost | None
    """The message, if it was acted on."""
    out: list[Outgoing]


class _Refuse(Exception):
    """Unwinds to `Session.receive`, which counts and answers."""

    def __init__(self, refusal: Refusal, detail: str) -> None:
        super().__init__(detail)
        self.refusal = refusal
        self.detail = detail


class _Bound:
    """A VM that said hello."""

    __slots__ = ("received", "routing_id", "sent", "vm")

    def __init__(self, vm: int, routing_id: bytes, received: int) -> None:
        self.vm = vm
        self.routing_id = routing_id
        self.received = received
        self.sent = 0


class Session:
    """Peers of one run. ``secrets``: 32 bytes per VM, handed over after the fork."""

    def __init__(self, core: Core, secrets: Mapping[int, bytes]) -> None:
        self._core = core
        self._secrets = secrets
        self._peers: dict[bytes, _Bound] = {}
        self._vms: dict[int, _Bound] = {}
        self.ended: set[int] = set()
        """VMs that said their last word or are lost."""
        self.accepted = 0
        """Messages that were acted on: hypercalls."""
        self.refused: Counter[str] = Counter()
        """Refusals by reason."""

    @property
    def ready(self) -> bool:
        """Every VM said hello or is lost."""
        return len(self.ended | self._vms.keys()) == len(self._secrets)

    def vm_of(self, routing_id: bytes) -> int | None:
        """The VM bound to a peer."""
        bound = self._peers.get(routing_id)
        return None if bound is None else bound.vm

    def receive(self, incoming: Incoming) -> Step:
        """Judge one message and act on it."""
        try:
            return self._accept(incoming)
        except _Refuse as error:
            self.refused[error.refusal] += 1
            answer = Refused(reason=f"{error.refusal}: {error.detail}"[:512])
            bound = self._peers.get(incoming.routing_id)
            if bound is not None:
                return Step(bound.vm, None, [self._outgoing(bound, answer)])
            return Step(None, None, [Outgoing(incoming.routing_id, None, answer, codec.encode(answer))])

    def lost(self, vm: int, kind: str, message: str) -> list[Outgoing]:
        """VM ``vm`` died, hung or was never born."""
        if vm in self.ended:
            return []
        self.ended.add(vm)
        return self._deliver(self._core.lost(vm, kind, message))

    def stop(self, reason: str) -> list[Outgoing]:
        """End the run with what there is."""
        return self._deliver(self._core.stop(reason))

    def _accept(self, incoming: Incoming) -> Step:
        routing_id = incoming.routing_id
        if len(routing_id) != ROUTING_ID_BYTES or routing_id[0] != 0:
            raise _Refuse(Refusal.CLAIMED_ROUTING_ID, "leave the routing id to the transport")
        if incoming.payload is None:
            raise _Refuse(Refusal.MALFORMED, "a message is one frame")
        try:
            message = codec.decode_to_host(incoming.payload)
        except VersionError as error:
            raise _Refuse(Refusal.VERSION, str(error)) from None
        except DecodeError as error:
            raise _Refuse(Refusal.MALFORMED, str(error)) from None
        bound = self._peers.get(routing_id)
        if isinstance(message, Hello):
            return self._hello(routing_id, bound, message)
        if bound is None:
            raise _Refuse(Refusal.UNBOUND, "say hello first")
        if message.seq != bound.received + 1:
            raise _Refuse(Refusal.SEQUENCE, f"number {message.seq}, expected {bound.received + 1}")
        # It has been received, whatever the core makes of it: it can't be sent again.
        bound.received = message.seq
        if bound.vm in self.ended:
            raise _Refuse(Refusal.STATE, "this VM said its last word")
        return self._act(bound, message)

    def _hello(self, routing_id: bytes, bound: _Bound | None, hello: Hello) -> Step:
        secret = self._secrets.get(hello.vm)
        # Compared even for a VM that does not exist, and one text for every cause: nothing to learn by probing.
        genuine = hmac.compare_digest(hello.secret, secret or bytes(32)) and secret is not None
        if not genuine or bound is not None or hello.vm in self._vms or hello.vm in self.ended:
            raise _Refuse(Refusal.IDENTITY, "not a VM that waits to be heard of")
        bound = _Bound(hello.vm, routing_id, hello.seq)
        self._peers[routing_id] = self._vms[hello.vm] = bound
        return self._act(bound, hello)

    def _act(self, bound: _Bound, message: ToHost) -> Step:
        try:
            answers = self._core.receive(bound.vm, message)
        except RefusedMessage as error:
            raise _Refuse(Refusal.STATE, error.reason) from None
        self.accepted += 1
        if isinstance(message, Bye | Failed):
            self.ended.add(bound.vm)
        return Step(bound.vm, message, self._deliver(answers))

    def _deliver(self, answers: Iterable[tuple[int, ToGuest]]) -> list[Outgoing]:
        bound = ((self._vms.get(vm), message) for vm, message in answers)
        return [self._outgoing(peer, message) for peer, message in bound if peer is not None]

    def _outgoing(self, bound: _Bound, message: ToGuest) -> Outgoing:
        numbered = msgspec.structs.replace(message, seq=bound.sent, v=VERSION)
        bound.sent += 1
        return Outgoing(bound.routing_id, bound.vm, numbered, codec.encode(numbered))
