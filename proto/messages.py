"""The messages between guests and host (architecture 3.6): typed structs, msgpack on the wire.

Every message carries the protocol version and a sequence number that rises by one per sender and connection, so that a
replay is refused. A guest names guest-physical frames and never a host frame, its own VM only in `Hello`; arrays
travel as little-endian bytes with a bounded length.
"""

from typing import Annotated

from msgspec import Meta, Struct

from proto.config import GuestConfig

VERSION = 1
MAX_MESSAGE = 1 << 20
"""Longest message to the host, whom a guest may not exhaust; bytes."""
MAX_TO_GUEST = 1 << 28
"""Longest message to a guest: room for the largest batch that a policy may move in one pause; bytes."""

MOST_RANGES = 1 << 14
"""Most ranges of a list for the host to scan."""
MOST_LISTED = 1 << 20
"""Most gPA pages that such a list may name in all."""

Time = Annotated[int, Meta(ge=0)]
Array = Annotated[bytes, Meta(max_length=MAX_MESSAGE - 4096)]


class Message(Struct, tag_field="t", kw_only=True, frozen=True):
    """Base: version and sequence number."""

    v: int = VERSION
    seq: Annotated[int, Meta(ge=0)] = 0


class Hello(Message, tag="hello", frozen=True):
    """Guest to host, first: which VM, and the secret that the host handed to that VM after the fork."""

    vm: Annotated[int, Meta(ge=0)]
    secret: Annotated[bytes, Meta(min_length=32, max_length=32)]
    pid: Annotated[int, Meta(ge=0)]


class EptFault(Message, tag="ept_fault", frozen=True):
    """Guest to host: EPT violations of one vCPU at ``time_ps``. ``gpfns``: int64[n]."""

    time_ps: Time
    gpfns: Array
    last: bool = False
    """The VM has executed its last operation, and only wants to see all of its memory."""


class Tick(Message, tag="tick", frozen=True):
    """Guest to host at the barrier: it has run to ``time_ps``. ``counters``: int64[COUNTERS], cumulative."""

    time_ps: Time
    phase: str
    """``populate``, ``run`` or ``done``."""
    progress: float
    """Share of the run that is done, 0 to 1."""
    counters: Array
    agent_cpu_s: float
    """Measured CPU of the agent so far (never feeds back into virtual time)."""
    bandwidth_demand: Array
    """int64[4]: bytes asked for in this quantum: fast read, slow read, fast write, slow write."""
    scan_list: Annotated[bytes, Meta(max_length=16 * MOST_RANGES)] = b""
    """int64[n, 2]: ranges of gPA pages (first, count) whose A bits the host is to read and clear now; rising, disjoint,
    of `MOST_LISTED` pages in all. The next `Advance` answers."""


class Bye(Message, tag="bye", frozen=True):
    """Guest to host, last: ``report`` is the VM's part of summary.json, as JSON."""

    report: Array


class Failed(Message, tag="failed", frozen=True):
    """Guest to host, last: the guest cannot go on."""

    kind: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=4096)]


class Welcome(Message, tag="welcome", frozen=True):
    """Host to guest, answer to `Hello`."""

    config: GuestConfig


class Mapped(Message, tag="mapped", frozen=True):
    """Host to guest, answer to `EptFault`: ``cost_ps``: int64[n], what each violation cost its vCPU."""

    cost_ps: Array
    waits: bool = False
    """There is no frame left until moves under way leave theirs: the VM waits for a barrier that finds all mapped."""


class Advance(Message, tag="advance", frozen=True):
    """Host to guest: run to ``until_ps``."""

    until_ps: Time
    latency_ps: tuple[int, int, int, int]
    """Loaded latency: fast random, fast local, slow random, slow local."""
    bandwidth_budget: tuple[int, int, int, int]
    """Bytes that this VM may move in the quantum: fast read, slow read, fast write, slow write."""
    llc_bytes: Annotated[int, Meta(ge=0)]
    """This VM's share of the host's last-level cache in the quantum."""
    operations: Annotated[bytes, Meta(max_length=MAX_TO_GUEST - 4096)]
    """`proto.layout.OPERATION` records in order of time: what host threads do to this VM in the quantum."""
    scanned: Annotated[bytes, Meta(max_length=MOST_LISTED // 8)] = b""
    """A bit for each page of `Tick.scan_list`, in its order, the lowest of a byte first: it was accessed."""
    scanned_ps: Time = 0
    """When the host is through with the list."""


class Stop(Message, tag="stop", frozen=True):
    """Host to guest: end the run now and say `Bye`."""

    reason: str


class Refused(Message, tag="refused", frozen=True):
    """Host to any peer: the message was not acted on."""

    reason: str


ToHost = Hello | EptFault | Tick | Bye | Failed
ToGuest = Welcome | Mapped | Advance | Stop | Refused
