"""The host process: one synchronous poll loop around the session and the core, and what it takes to be one.

The loop hands guests their memory, moves messages between the ROUTER and the session, keeps the watchdog, meters its
own CPU per VM, and tells the launcher how things are. It ends with a `Result` when the core is done and every guest
was reaped; or when its parents are gone. Left out: anything that decides; that is in `hostd.core`.
"""

import contextlib
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import msgspec
import zmq

from hostd.publisher import Publisher
from hostd.session import Core, Outgoing, Refusal, Session
from hostd.watchdog import Watchdog
from proto import transport
from proto.config import GuestConfig, HostConfig, pebs_buffer_bytes
from proto.control import (
    Broken,
    Channel,
    Control,
    Ended,
    Failure,
    Hung,
    Interrupt,
    Launch,
    Ready,
    Result,
    ToHostControl,
)
from proto.errors import EndpointError, SegmentError
from proto.handover import Arrivals, PebsBuffer, Pending, new_secrets
from proto.layout import VmMemory
from proto.log import LineLog
from proto.messages import MAX_MESSAGE, Advance, Bye, EptFault, Failed, Hello, Stop, Tick, ToHost
from proto.process import GO, close_inherited, die_with_parent, hide_memory, ignore_group, set_title

_POLL_MS = 200
"""Longest sleep of the loop: how fine watchdog and progress are."""
_BURST = 256
"""Messages handled before the loop looks at everything else again."""
_ALL = 1 << 14
"""More messages than the guests of a run can have on their way; a bound all the same, against a flood."""
_LAST_WORDS_S = 2.0
"""How long to wait for the end of a dead guest's connection."""
CUT_GRACE_S = 5.0
"""A guest whose connection ended and whose process did not is taken for cut off after this time."""
_STOP_S = 10.0
"""How long a guest may take to say bye once the run is to end."""


class HostCore(Core, Protocol):
    """The core as the server sees it: `hostd.core.HostCore`."""

    failures: list[dict[str, Any]]
    reports: dict[int, dict[str, Any]]

    @property
    def done(self) -> bool:
        """Every VM has said bye or is lost."""
        ...

    def attach(self, vm: int, memory: VmMemory) -> None:
        """VM ``vm`` has its memory."""
        ...

    def agent_cpu_s(self, vm: int, tick: Tick) -> float:
        """Measured CPU so far of what manages VM ``vm``."""
        ...

    def host_report(self, measured_cpu: dict[str, Any]) -> dict[str, Any]:
        """The `host` object of summary.json without `refused` and `hypercalls_per_s`."""
        ...


class Terminated(BaseException):
    """A signal, or the end of a parent: clean up and leave."""


class HostServer:
    """The loop. ``channel``: to the launcher; ``arrivals``: from the zygote. Raises EndpointError."""

    def __init__(
        self,
        core: HostCore,
        launch: Launch,
        channel: Channel,
        arrivals: Arrivals,
        *,
        cut_grace_s: float = CUT_GRACE_S,
    ) -> None:
        config, guests = launch.host, launch.guests
        self._core = core
        self._guests = {guest.vm: guest for guest in guests}
        self._secrets = new_secrets(self._guests)
        self._session = Session(core, self._secrets)
        self._channel = channel
        self._arrivals = arrivals
        self._log = LineLog(config.log_path, None, "host")
        self._watchdog = Watchdog(config.hang_timeout_s, time.monotonic())
        self._cut = Watchdog(cut_grace_s, time.monotonic())
        self._publisher = Publisher(len(guests), config.sample_ps, self._tell)
        self._pending: dict[int, Pending] = {}
        self._pebs = PebsBuffer(pebs_buffer_bytes(guests)) if config.kernel.pebs == "shared" else None
        self._awaited = set(self._guests)
        """Guests that have not been given their memory."""
        self._connections: dict[int, int] = {}
        self._condemned: dict[int, tuple[str, str]] = {}
        self._dead: dict[int, tuple[Ended, float]] = {}
        self._buried: set[int] = set()
        self._cpu_ns = dict.fromkeys(self._guests, 0)
        self._stopping = ""
        self._ready_s: float | None = None
        self._context = zmq.Context(1)
        try:
            self._router, self._endpoint, self._server_key = transport.bind_host(
                self._context, config.endpoint, Path(launch.directory)
            )
        except EndpointError:
            self._context.term()
            raise
        self._monitor = transport.Monitor(self._router)
        self._poller = zmq.Poller()
        for source in (self._router, self._monitor.socket, channel.fileno(), arrivals.fileno()):
            self._poller.register(source, zmq.POLLIN)

    def run(self) -> None:
        """Until the result is sent. Raises Terminated if launcher or zygote are gone."""
        self._log.info(f"listening for {len(self._guests)} guests")
        while not (self._core.done and len(self._buried) == len(self._guests)):
            events = dict(self._poller.poll(_POLL_MS))
            now_s = time.monotonic()
            self._watchdog.tick(now_s)
            self._cut.tick(now_s)
            if self._channel.fileno() in events:
                self._control()
            if self._arrivals.fileno() in events:
                self._arrival()
            for fd in events.keys() & self._pending.keys():
                self._mapped(self._pending.pop(fd))
            if self._router in events:
                self._hypercalls(_BURST)
            self._disconnected()
            self._bury()
            self._condemn_overdue()
            self._announce_ready()
            self._publisher.publish()
        self._publisher.publish(final=True)
        self._tell(self._result())
        self._log.info("done")

    def close(self) -> None:
        """Close sockets; answers on their way get a moment."""
        self._monitor.close()
        self._router.close(0)
        self._context.term()
        self._log.close()

    # --- guests come and go

    def _arrival(self) -> None:
        arrived = self._arrivals.take()
        if arrived is None:
            raise Terminated("the zygote is gone")
        vm, sock = arrived
        self._awaited.discard(vm)
        try:
            pending = Pending(self._guests[vm], self._secrets[vm], sock, self._endpoint, self._server_key, self._pebs)
        except SegmentError as error:
            sock.close()
            self._condemn(vm, "memory", str(error))
            return
        except OSError:
            sock.close()  # it died this early; who reaps it will say so
            return
        if self._pebs is not None and not self._awaited:
            self._pebs.close()
        # Now, not when the guest has mapped it: its hello may overtake that word, on the other channel.
        self._core.attach(pending.vm, pending.memory)
        self._pending[pending.fileno()] = pending
        self._poller.register(pending.fileno(), zmq.POLLIN)
        self._watchdog.expect(vm)

    def _mapped(self, pending: Pending) -> None:
        self._poller.unregister(pending.fileno())
        if pending.finish():
            self._watchdog.refresh(pending.vm)

    def _ended(self, ended: Ended) -> None:
        self._dead[ended.vm] = (ended, time.monotonic() + _LAST_WORDS_S)
        self._watchdog.settle(ended.vm)
        self._cut.settle(ended.vm)

    def _bury(self) -> None:
        """Count a reaped guest out, once its last words are in: they precede the end of its connection."""
        for vm, (ended, deadline_s) in list(self._dead.items()):
            if vm in self._connections.values() and time.monotonic() < deadline_s:
                continue
            self._hypercalls(_ALL)
            del self._dead[vm]
            self._buried.add(vm)
            if vm not in self._session.ended:
                kind, message = self._condemned.get(vm, (ended.kind, ended.message))
                self._log.error(f"vm{vm} {kind}: {message}")
                self._send(self._session.lost(vm, kind, message))
                self._publisher.lost(vm)

    def _condemn(self, vm: int, kind: str, message: str) -> None:
        """Have a guest killed; it is lost once it is reaped, as until then it may still write to its memory."""
        self._condemned[vm] = (kind, message)
        self._tell(Hung(vm=vm, kind=kind, message=message))

    def _condemn_overdue(self) -> None:
        for vm in self._watchdog.overdue():
            self._condemn(vm, "hung", f"said nothing for {self._watchdog.timeout_s:g} s while the fleet waited for it")
        for vm in self._cut.overdue():
            self._session.refused[Refusal.DISCONNECTED] += 1
            self._condemn(
                vm, "disconnected", f"its connection was cut off: closed, or over {MAX_MESSAGE} bytes at once"
            )

    def _announce_ready(self) -> None:
        if self._ready_s is None and self._session.ready:
            self._ready_s = time.monotonic()
            self._tell(Ready(vms=len(self._guests)))

    # --- messages

    def _control(self) -> None:
        while self._channel.poll():
            try:
                message = self._channel.receive()
            except (EOFError, OSError):
                raise Terminated("the launcher is gone") from None
            if isinstance(message, Ended):
                self._ended(message)
            elif isinstance(message, Interrupt) and not self._stopping:
                self._stopping = message.reason
                self._watchdog.timeout_s = min(self._watchdog.timeout_s, _STOP_S)
                self._send(self._session.stop(message.reason))

    def _hypercalls(self, limit: int) -> None:
        for _ in range(limit):
            incoming = transport.receive(self._router)
            if incoming is None:
                return
            start_ns = time.thread_time_ns()
            step = self._session.receive(incoming)
            if step.vm is None or step.accepted is None:
                self._log.warning(f"refused a message of {_name(step.vm)}: {_reasons(step.out)}")
            else:
                self._accepted(step.vm, step.accepted, incoming.connection)
            self._send(step.out)
            if step.vm is not None:
                self._cpu_ns[step.vm] += time.thread_time_ns() - start_ns

    def _accepted(self, vm: int, message: ToHost, connection: int) -> None:
        match message:
            case Hello():
                # A descriptor is used again only after its last event: hear of the connections that ended first.
                self._disconnected()
                self._connections[connection] = vm
                self._watchdog.settle(vm)
            case Tick():
                self._publisher.tick(vm, message, self._core.agent_cpu_s(vm, message))
                self._watchdog.settle(vm)
                if message.phase == "done":
                    self._watchdog.expect(vm)
            case Failed():
                self._log.error(f"vm{vm} {message.kind}: {message.message}")
                self._publisher.lost(vm)
                self._watchdog.expect(vm)
            case EptFault() | Bye():
                self._watchdog.expect(vm)

    def _tell(self, message: Control) -> None:
        try:
            self._channel.send(message)
        except OSError:
            raise Terminated("the launcher is gone") from None

    def _send(self, out: list[Outgoing]) -> None:
        for outgoing in out:
            sent = transport.send(self._router, outgoing.routing_id, outgoing.payload)
            if outgoing.vm is not None and isinstance(outgoing.message, Advance | Stop):
                self._watchdog.expect(outgoing.vm)
                if not sent:
                    self._log.warning(f"vm{outgoing.vm} took no {type(outgoing.message).__name__}")

    def _disconnected(self) -> None:
        for connection in self._monitor.disconnected():
            vm = self._connections.pop(connection, None)
            if vm is None:
                self._session.refused[Refusal.DISCONNECTED] += 1
            elif vm not in self._session.ended and vm not in self._dead:
                self._cut.expect(vm)

    def _result(self) -> Result:
        by_vm = {vm: ns / 1e9 for vm, ns in self._cpu_ns.items()}
        host = self._core.host_report({"total_s": time.process_time(), "by_vm": by_vm})
        wall_s = time.monotonic() - (self._ready_s if self._ready_s is not None else time.monotonic())
        host["hypercalls_per_s"] = self._session.accepted / wall_s if wall_s > 0 else 0.0
        host["refused"] = dict(sorted(self._session.refused.items()))
        return Result(
            reports={vm: msgspec.json.encode(report) for vm, report in self._core.reports.items()},
            failures=[Failure(vm=f["vm"], kind=f["kind"], message=f["message"]) for f in self._core.failures],
            host=msgspec.json.encode(host),
        )


def _name(vm: int | None) -> str:
    return "a stranger" if vm is None else f"vm{vm}"


def _reasons(out: list[Outgoing]) -> str:
    return "; ".join(str(getattr(outgoing.message, "reason", "")) for outgoing in out)


def _terminate(signum: int, frame: FrameType | None) -> None:
    _terminate_no_more()
    raise Terminated(signal.Signals(signum).name)


def _terminate_no_more() -> None:
    """Ignore what asks for the end, which has begun: another signal in its middle would leave the sockets behind."""
    signal.signal(GO, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)


def host_process(
    parent: int,
    launch: Launch,
    control: Connection,
    arrivals: socket.socket,
    make_core: Callable[[HostConfig, list[GuestConfig]], HostCore],
) -> int:
    """What the zygote's child that is the host does; its exit status. ``parent``: the zygote's pid."""
    channel = Channel(control, msgspec.msgpack.Decoder(ToHostControl))
    server: HostServer | None = None
    status = 1
    try:
        try:
            signal.signal(GO, _terminate)
            signal.signal(signal.SIGQUIT, _terminate)
            ignore_group()
            die_with_parent(parent, GO)
            set_title("host")
            hide_memory()
            close_inherited({control.fileno(), arrivals.fileno()})
            core = make_core(launch.host, launch.guests)
            server = HostServer(core, launch, channel, Arrivals(arrivals))
            server.run()
            status = 0
        except Exception as error:
            LineLog(launch.host.log_path, None, "host").error(traceback.format_exc())
            with contextlib.suppress(OSError):
                channel.send(Broken(message=f"the host failed: {type(error).__name__}: {error}"))
        finally:
            _terminate_no_more()
    except Terminated:
        status = 1
    finally:
        # Also when the parents died without a word: the socket goes, whatever happened.
        transport.remove_directory(launch.directory)
        if server is not None:
            server.close()
    return status
