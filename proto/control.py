"""What the processes of one run tell each other beside the hypercalls: launcher, zygote and host, all trusted.

The control channels are inherited stream sockets; a message is one length-prefixed msgpack struct
(`multiprocessing.connection`). Guests have no such channel: what they say goes through `proto.messages` alone. The
hand-over over a guest's own socketpair (architecture 3.6, threat model) is here too, as it is said once, before there
is a transport.
"""

from multiprocessing.connection import Connection
from typing import TypeVar

import msgspec
from msgspec import Struct

from proto.config import GuestConfig, HostConfig

HOST = -1
"""Stands for the host where a VM number is expected."""


class Control(Struct, tag=True):
    """Base of everything on a control channel."""


# --- zygote to launcher


class Compiling(Control):
    """The zygote warms up: `done` of `total` kernels are compiled or loaded."""

    done: int
    total: int
    label: str


class Warm(Control):
    """The zygote is warm and about to fork; ``seconds`` of wall time since it began."""

    seconds: float


class Started(Control):
    """A process runs: VM ``vm`` (or `HOST`)."""

    vm: int
    pid: int


class Exited(Control):
    """A process ended and was reaped with wait4. CPU figures in seconds; ``main_s`` is the main thread's own clock."""

    vm: int
    pid: int
    status: int
    """Exit code, or minus the number of the signal that killed it."""
    user_s: float
    system_s: float
    max_rss_bytes: int
    main_s: float
    """CPU of the main thread from fork to death; negative if the kernel does not tell (CONFIG_SCHED_INFO)."""


class Broken(Control):
    """Zygote or host can't go on; ``message`` is one line."""

    message: str


# --- launcher to zygote


class Launch(Control):
    """What to fork."""

    host: HostConfig
    guests: list[GuestConfig]
    directory: str
    """For the sockets; the host makes it."""
    log_path: str
    """The zygote's own log file; empty = none."""


class Kill(Control):
    """Kill VM ``vm`` (or `HOST`) with SIGKILL."""

    vm: int


class Quit(Control):
    """Kill whatever still runs, reap it, and leave."""


# --- host to launcher


class VmProgress(Control):
    """How far one VM is."""

    vm: int
    time_ps: int
    phase: str
    """``start``, ``populate``, ``run``, ``done`` or ``lost``."""
    progress: float
    """Share of the run phase that is done, 0 to 1."""
    counters: bytes
    """int64[COUNTERS], cumulative; empty before the first tick. `proto.counters.split` reads it."""
    agent_cpu_s: float


class Sample(Control):
    """One line of the time series: a VM's cumulative counters at the first barrier at or after an interval's end."""

    vm: int
    time_ps: int
    phase: str
    counters: bytes
    """int64[COUNTERS], cumulative."""
    agent_cpu_s: float


class Ready(Control):
    """Every guest said hello or is lost."""

    vms: int


class Progress(Control):
    """The latest of every VM that moved since the last one."""

    vms: list[VmProgress]


class Samples(Control):
    """A batch of the time series."""

    samples: list[Sample]


class Hung(Control):
    """VM ``vm`` left the barrier waiting for longer than the bound; it is to be killed."""

    vm: int
    kind: str
    message: str


class Failure(Control):
    """What went wrong with one VM, or with the run as a whole (``vm`` is None)."""

    vm: int | None
    kind: str
    message: str


class Result(Control):
    """The host's last word. Reports are JSON objects, as bytes: each VM's part of summary.json, and the host's."""

    reports: dict[int, bytes]
    failures: list[Failure]
    host: bytes


# --- launcher to host


class Ended(Control):
    """VM ``vm`` was reaped. ``clean``: it left with status 0. ``kind`` and ``message`` say what happened otherwise."""

    vm: int
    clean: bool
    kind: str
    message: str


class Interrupt(Control):
    """End the run now, with what there is."""

    reason: str


ToLauncher = Compiling | Warm | Started | Exited | Broken | Ready | Progress | Samples | Hung | Result
ToZygote = Launch | Kill | Quit
ToHostControl = Ended | Interrupt


# --- host to guest, over the guest's own socketpair


class Handover(Struct):
    """With the memory's descriptor: what a guest needs to say hello."""

    vm: int
    secret: bytes
    total_pages: int
    endpoint: str
    server_key: bytes
    """CURVE public key of the host; empty without CURVE."""
    pebs_bytes: int = 0
    """Size of the host's PEBS buffer, whose descriptor then comes along too (``host.pebs=shared``)."""


MAX_HANDOVER = 4096
"""Bytes; a hand-over and its acknowledgement are one datagram each."""

_T = TypeVar("_T")
_ENCODER = msgspec.msgpack.Encoder()


class Channel:
    """One end of a control channel that receives messages of one union."""

    def __init__(self, connection: Connection, decoder: "msgspec.msgpack.Decoder[_T]") -> None:
        self._connection = connection
        self._decoder = decoder

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._connection.fileno()

    def send(self, message: Control) -> None:
        """Send; waits while the other side is behind. Raises OSError if it is gone."""
        self._connection.send_bytes(_ENCODER.encode(message))

    def receive(self) -> object:
        """Wait for the next message. Raises EOFError or OSError if the other side is gone."""
        return self._decoder.decode(self._connection.recv_bytes())

    def poll(self) -> bool:
        """Is there something to receive (or an end to learn of) now?"""
        return self._connection.poll(0)

    def close(self) -> None:
        """Close this end."""
        self._connection.close()
