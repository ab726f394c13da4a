"""The guest's end of the hypercall boundary: one DEALER, numbered messages, what they count and how long they take.

Whoever holds the baton may call (`guestd.threads`: one thread runs at a time). What the host says is checked for its
sequence, as what the guest says is checked there. Wall times are for the report only; virtual time never sees them.
"""

import math
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import numpy as np

from guestd.errors import RefusedByHost, UnexpectedMessage
from proto import codec
from proto.arrays import Words
from proto.messages import VERSION, EptFault, Hello, Mapped, Message, Refused, Stop, ToGuest, Welcome

_SUB_BITS = 4
"""Round-trip times are kept as a histogram with 16 steps per power of two: within 6 % at any number of calls."""


class Hypercalls:
    """``send`` and ``receive`` move one message's bytes; the process gives the socket's own."""

    def __init__(self, send: Callable[[bytes], object], receive: Callable[[], bytes]) -> None:
        self._send = send
        self._receive = receive
        self._sent = 0
        self._received = 0
        self._count: Counter[str] = Counter()
        self._rtt_ns: Counter[int] = Counter()
        self.stop: Stop | None = None
        """The host's word to end the run, once it came."""

    def say(self, message: Message) -> None:
        """Send a message, numbered. Raises SizeError."""
        payload = codec.encode(msgspec.structs.replace(message, seq=self._sent, v=VERSION))
        self._sent += 1
        self._count[_tag(message)] += 1
        self._send(payload)

    def hear(self) -> ToGuest:
        """Wait for the host's next message. Raises RefusedByHost, UnexpectedMessage, DecodeError, VersionError."""
        message = codec.decode_to_guest(self._receive())
        if message.seq != self._received:
            raise UnexpectedMessage(f"the host's message number {message.seq} came where {self._received} was due")
        self._received += 1
        if isinstance(message, Refused):
            raise RefusedByHost(f"the host refused: {message.reason}")
        return message

    def hello(self, vm: int, secret: bytes, pid: int) -> Welcome:
        """Say who this is. Raises as `hear`."""
        self.say(Hello(vm=vm, secret=secret, pid=pid))
        welcome = self.hear()
        if not isinstance(welcome, Welcome):
            raise UnexpectedMessage(f"the host answered hello with {_tag(welcome)}")
        return welcome

    def ept_fault(self, time_ps: int, gpfns: Words, last: bool) -> tuple[Words, bool]:
        """EPT violations of gpfns (int64[n]): what each cost its vCPU in ps (int64[n]), and `Mapped.waits`.

        ``last``: as in `EptFault`. A stop that crosses the fault on its way is kept for the barrier. Raises as `hear`.
        """
        start_ns = time.perf_counter_ns()
        self.say(EptFault(time_ps=time_ps, gpfns=gpfns.astype("<i8").tobytes(), last=last))
        answer = self.hear()
        if isinstance(answer, Stop):
            self.stop = answer
            answer = self.hear()
        if not isinstance(answer, Mapped) or len(answer.cost_ps) != 8 * len(gpfns):
            raise UnexpectedMessage(f"the host answered {len(gpfns)} EPT faults with {_tag(answer)}")
        self._rtt_ns[_bucket(time.perf_counter_ns() - start_ns)] += 1
        return np.frombuffer(answer.cost_ps, "<i8").astype(np.int64), answer.waits

    def report(self) -> dict[str, object]:
        """`hypercalls` of summary.json: counts by name, round trips of EPT faults in us."""
        report: dict[str, object] = {"count": dict(sorted(self._count.items()))}
        if self._rtt_ns:
            report["rtt_us"] = {"p50": self._percentile_us(0.50), "p99": self._percentile_us(0.99)}
        return report

    def _percentile_us(self, share: float) -> float:
        wanted = math.ceil(share * self._rtt_ns.total())
        seen = 0
        for bucket, count in sorted(self._rtt_ns.items()):
            seen += count
            if seen >= wanted:
                return bucket / 1e3
        raise AssertionError("the shares of a histogram add up to 1")


def _bucket(ns: int) -> int:
    """The lower end of the step that ``ns`` falls into."""
    drop = max(0, ns.bit_length() - 1 - _SUB_BITS)
    return ns >> drop << drop


def _tag(message: Message) -> str:
    return str(type(message).__struct_config__.tag)
