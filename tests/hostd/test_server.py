"""The host process's loop, over real sockets: guests come and go, liars are refused, nothing is waited for forever."""

import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Pipe
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
import zmq

from fleet.experiment import Experiment
from guestd.hypercall import Hypercalls
from hostd.core import HostCore
from hostd.server import HostServer, Terminated
from proto import codec, transport
from proto.control import (
    Broken,
    Channel,
    Ended,
    Handover,
    Hung,
    Interrupt,
    Launch,
    Ready,
    Result,
    Samples,
    ToHostControl,
    ToLauncher,
)
from proto.counters import COUNTERS
from proto.handover import Arrivals, accept, announce
from proto.layout import VmMemory
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

TIMEOUT_MS = 20_000


class Client:
    """A peer of the host's ROUTER; says what a test wants."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", said: Handover, routing_id: bytes = b"") -> None:
        self.said = said
        self.dealer = context.socket(zmq.DEALER)
        if routing_id:
            self.dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        self.dealer.connect(said.endpoint)
        self.calls = Hypercalls(self.dealer.send, self._receive)

    def _receive(self) -> bytes:
        assert self.dealer.poll(TIMEOUT_MS), "the host said nothing"
        return self.dealer.recv()

    def answer(self) -> ToGuest:
        """The next message, whatever its number."""
        return codec.decode_to_guest(self._receive())

    def refusal(self, payload: bytes) -> str:
        """Why the host refuses these bytes."""
        self.dealer.send(payload)
        answer = self.answer()
        assert isinstance(answer, Refused)
        return answer.reason.split(":")[0]

    def close(self) -> None:
        self.dealer.close()


class Guest(Client):
    """An honest guest without an engine: it faults a page and ticks."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", said: Handover, memory: VmMemory) -> None:
        super().__init__(context, said)
        self.memory = memory
        self.welcome: Welcome = self.calls.hello(said.vm, said.secret, 1)

    def quantum(self, phase: str = "run") -> Advance:
        """Take an advance, fault one new page, tick."""
        advance = self.calls.hear()
        assert isinstance(advance, Advance)
        free = int(np.flatnonzero(self.memory.ept == 0)[0])
        cost, waits = self.calls.ept_fault(advance.until_ps, np.array([free], np.int64), False)
        assert cost[0] > 0
        assert not waits
        assert self.memory.ept[free] != 0
        self.calls.say(
            Tick(
                time_ps=advance.until_ps,
                phase=phase,
                progress=0.5,
                counters=np.full(COUNTERS, 1, "<i8").tobytes(),
                agent_cpu_s=0.0,
                bandwidth_demand=bytes(32),
            )
        )
        return advance

    def bye(self) -> None:
        """Last word, and off."""
        self.calls.say(Bye(report=msgspec.json.encode({"id": self.said.vm})))
        self.close()


class Fleet:
    """The host's server in a thread, with the launcher's and the zygote's ends in the test's hands."""

    def __init__(self, experiment: Experiment, hang_timeout_s: float, cut_grace_s: float) -> None:
        self.config = msgspec.structs.replace(experiment.host_config(), hang_timeout_s=hang_timeout_s)
        self.guests = experiment.guests()
        self.directory = transport.choose_directory()
        ours, theirs = Pipe()
        self.launcher = Channel(ours, msgspec.msgpack.Decoder(ToLauncher))
        self.zygote, arrivals = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        launch = Launch(host=self.config, guests=self.guests, directory=str(self.directory), log_path="")
        self._channel = Channel(theirs, msgspec.msgpack.Decoder(ToHostControl))
        self._arrivals = arrivals
        self.server = HostServer(
            HostCore(self.config, self.guests), launch, self._channel, Arrivals(arrivals), cut_grace_s=cut_grace_s
        )
        self.context = zmq.Context(1)
        self.clients: list[Client] = []
        self.heard: list[object] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.error = error
        finally:
            self.server.close()
            self._channel.close()

    def fork(self, vm: int) -> socket.socket:
        """What the zygote does for a guest; the guest's end."""
        host_end, guest_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        announce(self.zygote, vm, host_end)
        host_end.close()
        return guest_end

    def guest(self, vm: int) -> Guest:
        said, memory = accept(self.fork(vm))
        guest = Guest(self.context, said, memory)
        self.clients.append(guest)
        return guest

    def stranger(self, said: Handover, routing_id: bytes = b"") -> Client:
        client = Client(self.context, said, routing_id)
        self.clients.append(client)
        return client

    def ended(self, vm: int, clean: bool = True) -> None:
        """What the launcher says once a guest was reaped."""
        self.launcher.send(Ended(vm=vm, clean=clean, kind="exited" if clean else "killed", message="it ended"))

    def out_of_patience(self, vm: int) -> None:
        """Of all VMs only ``vm`` owes a word, and has for longer than is allowed."""
        watchdog = self.server._watchdog
        while set(watchdog._since) != {vm}:
            pass
        watchdog._since[vm] -= 2 * watchdog.timeout_s

    def hear(self, kind: type[Any]) -> Any:
        """The next message to the launcher of a kind."""
        while True:
            message = self.launcher.receive()
            self.heard.append(message)
            assert not isinstance(message, Broken), message.message
            if isinstance(message, kind):
                return message

    def result(self) -> tuple[Result, dict[str, Any]]:
        """The host's last word, and its report."""
        result: Result = self.hear(Result)
        return result, msgspec.json.decode(result.host)

    def finish(self, *guests: Guest) -> tuple[Result, dict[str, Any]]:
        """Let these guests end well."""
        for guest in guests:
            guest.quantum("done")
        for guest in guests:
            guest.bye()
            self.ended(guest.said.vm)
        return self.result()

    def join(self) -> None:
        """Wait for the end of the host."""
        self._thread.join()

    def close(self) -> None:
        self.launcher.close()
        self._thread.join()
        self._arrivals.close()
        self.zygote.close()
        for client in self.clients:
            client.dealer.close(0)
        self.context.term()
        transport.remove_directory(self.directory)


MakeFleet = Callable[..., Fleet]


@pytest.fixture
def make_fleet(experiment: Experiment) -> Iterator[MakeFleet]:
    fleets: list[Fleet] = []

    def make(hang_timeout_s: float = 60.0, cut_grace_s: float = 60.0) -> Fleet:
        fleets.append(Fleet(experiment, hang_timeout_s, cut_grace_s))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


@pytest.fixture
def running(make_fleet: MakeFleet) -> tuple[Fleet, Guest, Guest]:
    """Two guests that said hello."""
    fleet = make_fleet()
    return fleet, fleet.guest(0), fleet.guest(1)


def test_a_run_from_hello_to_bye(running: tuple[Fleet, Guest, Guest]) -> None:
    fleet, one, other = running
    fleet.hear(Ready)
    assert [guest.welcome.config for guest in (one, other)] == fleet.guests
    for _ in range(20):
        assert one.quantum().until_ps == other.quantum().until_ps
    result, host = fleet.finish(one, other)
    assert {vm: msgspec.json.decode(report)["id"] for vm, report in result.reports.items()} == {0: 0, 1: 1}
    assert result.failures == []
    assert host["refused"] == {}
    assert host["hypercalls_per_s"] > 0
    assert {vm["id"]: vm["measured_s"] > 0 for vm in host["cpu"]["by_vm"]} == {0: True, 1: True}
    assert sum(vm["measured_s"] for vm in host["cpu"]["by_vm"]) <= host["cpu"]["measured_s"]
    samples = [sample for message in fleet.heard if isinstance(message, Samples) for sample in message.samples]
    for vm in (0, 1):
        # 21 quanta of 10 ms, sampled each 100 ms, and the last.
        assert [s.time_ps // 10**10 for s in samples if s.vm == vm] == [10, 20, 21]


def test_a_liar_is_refused_counted_and_changes_nothing(running: tuple[Fleet, Guest, Guest]) -> None:
    fleet, one, other = running
    fault = EptFault(time_ps=1, gpfns=bytes(8))
    liar, claimer = fleet.stranger(one.said), fleet.stranger(one.said, b"vm0")
    hello = Hello(vm=0, secret=one.said.secret, pid=1)
    version = msgpack.packb(msgpack.unpackb(codec.encode(fault)) | {"v": VERSION + 1})
    before = one.memory.ept.copy(), one.memory.stamps.copy()
    reasons = [
        liar.refusal(codec.encode(fault)),
        liar.refusal(codec.encode(hello)),  # the right secret of a VM that is taken
        liar.refusal(codec.encode(Hello(vm=0, secret=bytes(32), pid=1))),
        liar.refusal(version),
        liar.refusal(b""),
        liar.refusal(bytes(MAX_MESSAGE)),
        liar.refusal(codec.encode(Stop(reason="x"))),
        claimer.refusal(codec.encode(hello)),
    ]
    assert reasons == [
        "unbound",
        "identity",
        "identity",
        "version",
        "malformed",
        "malformed",
        "malformed",
        "claimed_routing_id",
    ]
    assert (one.memory.ept == before[0]).all()
    assert (one.memory.stamps == before[1]).all()
    one.quantum()
    other.quantum()
    result, host = fleet.finish(one, other)
    assert result.failures == []
    assert host["refused"] == {
        "claimed_routing_id": 1,
        "identity": 2,
        "malformed": 3,
        "unbound": 1,
        "version": 1,
    }


def test_a_replayed_message_of_a_guest_is_refused(running: tuple[Fleet, Guest, Guest]) -> None:
    fleet, one, other = running
    advance = one.calls.hear()
    assert isinstance(advance, Advance)
    fault = EptFault(seq=1, time_ps=1, gpfns=np.array([3], "<i8").tobytes())
    one.dealer.send(codec.encode(fault))
    assert isinstance(one.answer(), Mapped)
    entry = int(one.memory.ept[3])
    assert one.refusal(codec.encode(fault)) == "sequence"
    assert int(one.memory.ept[3]) == entry
    one.close()
    fleet.ended(0, clean=False)
    result, host = fleet.finish(other)
    assert host["refused"] == {"sequence": 1}
    assert [(f.vm, f.kind) for f in result.failures] == [(0, "killed")]


def test_an_oversized_message_is_cut_off_and_counted(running: tuple[Fleet, Guest, Guest]) -> None:
    fleet, one, other = running
    liar = fleet.stranger(one.said)
    assert liar.refusal(bytes(MAX_MESSAGE)) == "malformed"
    liar.dealer.send(bytes(MAX_MESSAGE + 1))
    # It comes back as another peer, after the first connection's end.
    assert liar.refusal(b"again") == "malformed"
    one.quantum()
    other.quantum()
    _, host = fleet.finish(one, other)
    assert host["refused"] == {"disconnected": 1, "malformed": 2}


def test_the_end_of_a_guests_connection_is_no_refusal(running: tuple[Fleet, Guest, Guest]) -> None:
    fleet, one, other = running
    one.close()
    fleet.ended(0, clean=False)
    result, host = fleet.finish(other)
    assert host["refused"] == {}
    assert [(f.vm, f.kind, f.message) for f in result.failures] == [(0, "killed", "it ended")]


def test_last_words_count_though_the_news_of_the_death_is_faster(make_fleet: MakeFleet) -> None:
    for _ in range(10):
        fleet = make_fleet()
        one, other = fleet.guest(0), fleet.guest(1)
        one.quantum("done")
        other.quantum("done")
        for guest in (one, other):
            guest.calls.say(Bye(report=msgspec.json.encode({"id": guest.said.vm})))
            fleet.ended(guest.said.vm)
            guest.close()
        result, _ = fleet.result()
        assert result.failures == []
        assert set(result.reports) == {0, 1}


def test_a_guest_that_says_nothing_is_hung_and_frees_the_others(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    one, other = fleet.guest(0), fleet.guest(1)
    other.quantum()
    fleet.out_of_patience(0)
    hung: Hung = fleet.hear(Hung)
    assert (hung.vm, hung.kind) == (0, "hung")
    one.close()
    fleet.ended(0, clean=False)
    other.quantum()
    result, _ = fleet.finish(other)
    assert [(f.vm, f.kind) for f in result.failures] == [(0, "hung")]
    assert set(result.reports) == {1}


def test_a_guest_that_never_says_hello_is_hung(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    other = fleet.guest(1)
    silent = fleet.fork(0)
    fleet.out_of_patience(0)
    hung: Hung = fleet.hear(Hung)
    assert hung.vm == 0
    silent.close()
    fleet.ended(0, clean=False)
    fleet.hear(Ready)
    result, _ = fleet.finish(other)
    assert [(f.vm, f.kind) for f in result.failures] == [(0, "hung")]


def test_a_guest_that_dies_before_its_memory_costs_no_other(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    fleet.fork(0).close()
    fleet.ended(0, clean=False)
    other = fleet.guest(1)
    result, _ = fleet.finish(other)
    assert [(f.vm, f.kind) for f in result.failures] == [(0, "killed")]
    assert set(result.reports) == {1}


def test_a_guest_that_is_cut_off_is_killed_and_counted(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(cut_grace_s=0.3)
    one, other = fleet.guest(0), fleet.guest(1)
    one.dealer.send(bytes(MAX_MESSAGE + 1))
    hung: Hung = fleet.hear(Hung)
    assert (hung.vm, hung.kind) == (0, "disconnected")
    one.close()
    fleet.ended(0, clean=False)
    result, host = fleet.finish(other)
    assert [(f.vm, f.kind) for f in result.failures] == [(0, "disconnected")]
    # Its own, and that of the connection by which its socket came back.
    assert host["refused"]["disconnected"] in (1, 2)


def test_a_guest_that_fails_says_why(running: tuple[Fleet, Guest, Guest]) -> None:
    fleet, one, other = running
    one.calls.say(Failed(kind="oom", message="no frame left"))
    one.close()
    fleet.ended(0, clean=False)
    result, _ = fleet.finish(other)
    assert [(f.vm, f.kind, f.message) for f in result.failures] == [(0, "oom", "no frame left")]


def test_an_interrupted_fleet_reports_what_it_has(running: tuple[Fleet, Guest, Guest]) -> None:
    fleet, one, other = running
    one.quantum()
    fleet.launcher.send(Interrupt(reason="enough"))
    for guest in (one, other):
        message: Message = guest.calls.hear()
        while not isinstance(message, Stop):
            message = guest.calls.hear()
        assert message.reason == "enough"
        guest.bye()
        fleet.ended(guest.said.vm)
    result, _ = fleet.result()
    assert set(result.reports) == {0, 1}
    assert result.failures == []


@pytest.mark.parametrize("parent", ["launcher", "zygote"])
def test_without_its_parents_the_host_leaves(running: tuple[Fleet, Guest, Guest], parent: str) -> None:
    fleet, _, _ = running
    getattr(fleet, parent).close()
    fleet.join()
    assert isinstance(fleet.error, Terminated)
