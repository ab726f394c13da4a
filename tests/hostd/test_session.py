"""Identity, sequence, refusal: what is not acceptable is counted, answered, and changes nothing of the host."""

from collections.abc import Iterator

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet.experiment import Experiment
from hostd.core import HostCore
from hostd.session import Refusal, Session, Step
from proto import codec
from proto.counters import COUNTERS
from proto.layout import VmMemory, segment_bytes, view_segment
from proto.messages import (
    MAX_MESSAGE,
    VERSION,
    Advance,
    Bye,
    EptFault,
    Failed,
    Hello,
    Mapped,
    Message,
    Refused,
    Stop,
    Tick,
    ToGuest,
    Welcome,
)
from proto.transport import Incoming

QUANTUM_PS = 10**10


def _routing_id(number: int) -> bytes:
    return b"\0" + number.to_bytes(4, "big")


class Peer:
    """A client of the session, honest unless a test makes it lie."""

    def __init__(self, host: "Host", number: int) -> None:
        self.host = host
        self.routing_id = _routing_id(number)
        self.seq = 0

    def say(self, message: Message) -> Step:
        """Send with the next number."""
        numbered = msgspec.structs.replace(message, seq=self.seq)
        self.seq += 1
        return self.raw(codec.encode(numbered))

    def raw(self, payload: bytes | None) -> Step:
        """Send bytes."""
        return self.host.session.receive(Incoming(self.routing_id, payload, -1))

    def hello(self, vm: int) -> Step:
        return self.say(Hello(vm=vm, secret=self.host.secrets[vm], pid=1))


class Host:
    """Two VMs' host: the real core under the real session."""

    def __init__(self, experiment: Experiment) -> None:
        self.guests = experiment.guests()
        self.secrets = {guest.vm: bytes([guest.vm + 1]) * 32 for guest in self.guests}
        self.core = HostCore(experiment.host_config(), self.guests)
        self.memories: list[VmMemory] = []
        for guest in self.guests:
            size = segment_bytes(guest.total_pages)
            self.memories.append(view_segment(bytearray(size), guest.total_pages))
            self.core.attach(guest.vm, self.memories[-1])
        self.session = Session(self.core, self.secrets)

    def state(self) -> tuple[object, ...]:
        """All that a refused message must leave as it is, short of the refusals' own count."""
        memory = [array.tobytes() for memory in self.memories for array in memory]
        session = (self.session.accepted, set(self.session.ended), self.session.ready)
        core = (self.core.done, list(self.core.failures), dict(self.core.reports))
        return memory, session, core, self.core.host_report({"total_s": 0.0, "by_vm": {}})


@pytest.fixture
def host(experiment: Experiment) -> Host:
    return Host(experiment)


@pytest.fixture
def running(host: Host) -> Iterator[tuple[Host, Peer, Peer]]:
    """Both VMs said hello and are in their first quantum."""
    one, other = Peer(host, 1), Peer(host, 2)
    one.hello(0)
    other.hello(1)
    assert host.session.ready
    yield host, one, other


def _tick(time_ps: int = QUANTUM_PS, phase: str = "run") -> Tick:
    return Tick(
        time_ps=time_ps,
        phase=phase,
        progress=0.0,
        counters=bytes(8 * COUNTERS),
        agent_cpu_s=0.0,
        bandwidth_demand=bytes(32),
    )


def _fault(*gpfns: int) -> EptFault:
    return EptFault(time_ps=5, gpfns=np.array(gpfns, "<i8").tobytes())


def _messages(step: Step, routing_id: bytes) -> list[ToGuest]:
    return [codec.decode_to_guest(out.payload) for out in step.out if out.routing_id == routing_id]


def _refused(host: Host, step: Step, refusal: Refusal) -> str:
    """The reason given; asserts that this is one refusal and nothing else."""
    assert step.accepted is None
    (out,) = step.out
    answer = codec.decode_to_guest(out.payload)
    assert isinstance(answer, Refused)
    assert answer.reason.startswith(refusal)
    assert host.session.refused[refusal] >= 1
    return answer.reason


# --- what is accepted


def test_hello_binds_and_the_last_one_starts_the_fleet(host: Host) -> None:
    one, other = Peer(host, 1), Peer(host, 2)
    step = one.hello(0)
    assert step.vm == 0
    (welcome,) = _messages(step, one.routing_id)
    assert isinstance(welcome, Welcome)
    assert welcome.config == host.guests[0]
    assert not host.session.ready
    step = other.hello(1)
    assert host.session.ready
    assert [type(m) for m in _messages(step, other.routing_id)] == [Welcome, Advance]
    assert [type(m) for m in _messages(step, one.routing_id)] == [Advance]
    assert host.session.vm_of(other.routing_id) == 1


def test_what_goes_out_is_numbered_by_peer(running: tuple[Host, Peer, Peer]) -> None:
    _, one, other = running
    (mapped,) = _messages(one.say(_fault(1, 2)), one.routing_id)
    assert isinstance(mapped, Mapped)
    assert mapped.seq == 2  # after welcome and advance
    one.say(_tick())
    step = other.say(_tick())
    assert [m.seq for m in _messages(step, one.routing_id)] == [3]
    assert [m.seq for m in _messages(step, other.routing_id)] == [2]


def test_a_lost_guest_frees_the_barrier_and_is_heard_no_more(running: tuple[Host, Peer, Peer]) -> None:
    host, one, other = running
    one.say(_tick())
    out = host.session.lost(1, "killed", "by signal 9")
    assert [(o.vm, type(o.message)) for o in out] == [(0, Advance)]
    assert host.core.failures == [{"vm": 1, "kind": "killed", "message": "by signal 9"}]
    assert host.session.lost(1, "killed", "again") == []
    _refused(host, other.say(_tick()), Refusal.STATE)


def test_stop_reaches_every_guest(running: tuple[Host, Peer, Peer]) -> None:
    host, _, _ = running
    assert sorted((o.vm, type(o.message)) for o in host.session.stop("enough")) == [(0, Stop), (1, Stop)]


def test_after_the_last_word_nothing_is_heard(running: tuple[Host, Peer, Peer]) -> None:
    host, one, _ = running
    one.say(Failed(kind="oom", message="no frame"))
    assert host.core.failures == [{"vm": 0, "kind": "oom", "message": "no frame"}]
    state = host.state()
    _refused(host, one.say(_tick()), Refusal.STATE)
    assert host.state() == state


# --- what is refused


def test_a_wrong_secret_an_unknown_vm_and_a_taken_one_look_the_same(host: Host) -> None:
    Peer(host, 1).hello(0)
    state = host.state()
    lies = [
        Hello(vm=1, secret=bytes(32), pid=1),
        Hello(vm=1, secret=host.secrets[0], pid=1),
        Hello(vm=7, secret=host.secrets[0], pid=1),
        Hello(vm=7, secret=bytes(32), pid=1),
        Hello(vm=0, secret=host.secrets[0], pid=1),
    ]
    reasons = {_refused(host, Peer(host, 10 + i).say(lie), Refusal.IDENTITY) for i, lie in enumerate(lies)}
    assert len(reasons) == 1
    assert host.session.refused == {Refusal.IDENTITY: len(lies)}
    assert host.state() == state


def test_a_bound_peer_cannot_become_another_vm(host: Host) -> None:
    one = Peer(host, 1)
    one.hello(0)
    _refused(host, one.hello(1), Refusal.IDENTITY)
    assert host.session.vm_of(one.routing_id) == 0
    assert not host.session.ready


def test_a_lost_vm_cannot_be_impersonated(host: Host) -> None:
    host.session.lost(0, "killed", "by signal 9")
    _refused(host, Peer(host, 1).hello(0), Refusal.IDENTITY)


def test_a_stranger_gets_nothing_but_a_refusal(running: tuple[Host, Peer, Peer]) -> None:
    host, _, _ = running
    state = host.state()
    stranger = Peer(host, 9)
    for message in (_fault(1), _tick(), Bye(report=b"{}"), Failed(kind="x", message="y")):
        _refused(host, stranger.say(message), Refusal.UNBOUND)
    assert host.session.refused == {Refusal.UNBOUND: 4}
    assert host.state() == state


@pytest.mark.parametrize("routing_id", [b"vm0", b"\0" * 4, b"\0" * 6, b"\1abcd"])
def test_a_claimed_routing_id_is_refused_whatever_it_says(host: Host, routing_id: bytes) -> None:
    claimer = Peer(host, 1)
    claimer.routing_id = routing_id
    _refused(host, claimer.hello(0), Refusal.CLAIMED_ROUTING_ID)
    assert host.session.vm_of(routing_id) is None


@pytest.mark.parametrize("seq", [0, 1, 3, 2**64 - 1])
def test_a_number_other_than_the_next_is_refused(running: tuple[Host, Peer, Peer], seq: int) -> None:
    host, one, _ = running
    one.say(_fault(3))
    state = host.state()
    _refused(host, one.raw(codec.encode(msgspec.structs.replace(_fault(4), seq=seq))), Refusal.SEQUENCE)
    assert host.state() == state
    assert one.say(_fault(4)).accepted is not None


def test_a_replay_is_refused_also_of_a_message_that_was_refused(running: tuple[Host, Peer, Peer]) -> None:
    host, one, _ = running
    for message, first in ((_tick(5), Refusal.STATE), (_fault(3), None)):
        payload = codec.encode(msgspec.structs.replace(message, seq=one.seq))
        step = one.say(message)
        assert step.accepted is None if first else step.accepted is not None
        state = host.state()
        _refused(host, one.raw(payload), Refusal.SEQUENCE)
        assert host.state() == state


def test_another_peer_cannot_replay_a_hello(host: Host) -> None:
    one = Peer(host, 1)
    payload = codec.encode(Hello(vm=0, secret=host.secrets[0], pid=1))
    one.raw(payload)
    other = Peer(host, 2)
    _refused(host, other.raw(payload), Refusal.IDENTITY)
    assert host.session.vm_of(other.routing_id) is None


def test_another_version_is_told_what_to_do(running: tuple[Host, Peer, Peer]) -> None:
    host, one, _ = running
    payload = msgpack.packb(msgpack.unpackb(codec.encode(_fault(1))) | {"v": VERSION + 1, "seq": one.seq})
    assert "one installation" in _refused(host, one.raw(payload), Refusal.VERSION)
    assert one.say(_fault(1)).accepted is not None


@pytest.mark.parametrize("payload", [None, b"", b"\xc1", bytes(MAX_MESSAGE), b"\x81" * 1000])
def test_garbage_of_any_size_is_refused(running: tuple[Host, Peer, Peer], payload: bytes | None) -> None:
    host, one, _ = running
    state = host.state()
    _refused(host, one.raw(payload), Refusal.MALFORMED)
    assert host.state() == state


def test_the_hosts_own_messages_are_refused(running: tuple[Host, Peer, Peer]) -> None:
    host, one, _ = running
    state = host.state()
    for message in (Mapped(cost_ps=bytes(8)), Stop(reason="x"), Refused(reason="x"), Welcome(config=host.guests[0])):
        _refused(host, one.raw(codec.encode(message)), Refusal.MALFORMED)
    assert host.state() == state


@pytest.mark.parametrize(
    "message",
    [
        _tick(QUANTUM_PS - 1),
        _tick(2 * QUANTUM_PS),
        _fault(-1),
        _fault(1, 1 << 40),
        Bye(report=b"{}"),
    ],
    ids=["early", "late", "negative frame", "frame out of range", "early bye"],
)
def test_a_message_out_of_its_state_is_refused(running: tuple[Host, Peer, Peer], message: Message) -> None:
    host, one, _ = running
    state = host.state()
    _refused(host, one.say(message), Refusal.STATE)
    assert host.state() == state


def test_a_long_reason_is_cut(running: tuple[Host, Peer, Peer]) -> None:
    _, one, _ = running
    payload = msgpack.packb({"t": "x" * 100_000, "v": VERSION, "seq": 1})
    (out,) = one.raw(payload).out
    assert len(out.payload) < 1024


# --- anything at all


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"vm0", _routing_id(1), _routing_id(9)]),
            st.binary(max_size=64)
            | st.builds(
                msgpack.packb,
                st.fixed_dictionaries(
                    {"t": st.sampled_from(["hello", "ept_fault", "tick", "bye", "failed", "advance", "nonsense"])},
                    optional={
                        "v": st.sampled_from([VERSION, 0, 2]),
                        "seq": st.integers(-1, 3) | st.just(2**64 - 1),
                        "vm": st.integers(-1, 3),
                        "secret": st.binary(min_size=32, max_size=32),
                        "pid": st.integers(0, 9),
                        "time_ps": st.integers(-1, 2**64 - 1),
                        "gpfns": st.binary(max_size=24),
                        "write": st.binary(max_size=3),
                        "report": st.binary(max_size=8),
                        "phase": st.text(max_size=5),
                    },
                ),
            ),
        ),
        max_size=20,
    )
)
def test_no_garbage_changes_the_host(running: tuple[Host, Peer, Peer], traffic: list[tuple[bytes, bytes]]) -> None:
    host, one, _ = running
    state = host.state()
    for routing_id, payload in traffic:
        before = host.session.refused.total()
        step = host.session.receive(Incoming(routing_id, payload, -1))
        if step.accepted is not None:
            # By chance a well-formed fault of a VM's own with the right number: that may do what it does.
            assert routing_id == one.routing_id
            one.seq = step.accepted.seq + 1
            state = host.state()
            continue
        assert host.session.refused.total() == before + 1
        assert host.state() == state
