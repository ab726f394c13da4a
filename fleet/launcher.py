"""Starts a fleet, watches it, and leaves nothing behind: the side of a run that lives in the command's own process.

The launcher starts the zygote, which forks host and guests; it relays who died from the zygote to the host and whom to
kill from the host to the zygote, passes progress to an observer, and collects the result. Whatever happens (an error,
Ctrl-C, SIGTERM), every process of the run is gone and its socket removed when `run_fleet` returns; for a launcher that
is killed outright, the zygote's and the host's parent-death signals do the same (`proto.process`).
"""

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import FrameType
from typing import IO, Any

import msgspec

from fleet import numba_cache
from fleet.errors import LaunchError
from fleet.outcome import FleetResult, Observer, Outcome, Usage
from proto import transport
from proto.config import GuestConfig, HostConfig
from proto.control import (
    HOST,
    Broken,
    Channel,
    Compiling,
    Control,
    Ended,
    Exited,
    Failure,
    Hung,
    Interrupt,
    Kill,
    Launch,
    Progress,
    Quit,
    Ready,
    Result,
    Samples,
    Started,
    ToLauncher,
    Warm,
)
from proto.log import LineLog

__all__ = ["run_fleet"]

_STOP_S = 20.0
"""How long an interrupted fleet may take to report; then it is killed. The host's own bound on guests is shorter."""
_QUIT_S = 8.0
"""How long the zygote may take to kill and reap everybody."""
_STDERR_TAIL = 16384
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_fleet(guests: list[GuestConfig], host: HostConfig, run_dir: Path, observer: Observer) -> FleetResult:
    """Run the fleet to its end. Logs go to ``run_dir`` (`log.*.jsonl`); guests' own paths are in their configurations.

    What goes wrong with a guest, or with the host, is in the result; only a fleet that can't be started raises:
    LaunchError, EndpointError.
    """
    directory = transport.choose_directory()
    with tempfile.TemporaryFile() as stderr, _signals() as signals:
        run = _Run(guests, observer, signals)
        launch = Launch(
            host=msgspec.structs.replace(host, log_path=host.log_path or str(run_dir / "log.host.jsonl")),
            guests=guests,
            directory=str(directory),
            log_path=str(run_dir / "log.zygote.jsonl"),
        )
        try:
            run.start(launch, stderr)
            run.loop()
        finally:
            run.close()
            transport.remove_directory(directory)  # the host does that, unless it was killed
        return run.result(_log_stderr(stderr, run_dir / "log.stderr.jsonl"))


class _Signals:
    """Signals that ask for the end of the run, as a count and a socket to wait on."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1
        self.name = signal.Signals(signum).name


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Catch the signals until the end of the block; outside the main thread they stay the caller's business."""
    caught = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    wakeup = signal.set_wakeup_fd(caught.writer.fileno(), warn_on_full_buffer=False)
    # What nohup or a shell had this process ignore stays ignored.
    heard = [signum for signum in _STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, caught) for signum in heard}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup)
        caught.reader.close()
        caught.writer.close()


class _Peer:
    """A channel that is never waited for: zygote or host may themselves be waiting for the launcher to read."""

    def __init__(self, connection: Connection) -> None:
        self.channel = Channel(connection, msgspec.msgpack.Decoder(ToLauncher))
        self._out: deque[Control] = deque()

    def tell(self, message: Control) -> None:
        """Send it when the peer takes it."""
        self._out.append(message)

    @property
    def events(self) -> int:
        """What to wait for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)

    def flush(self) -> None:
        """Send one message; called when the channel takes one. (A writable stream socket takes a short one whole.)"""
        if self._out:
            with suppress(OSError):  # whoever is gone shows as the end of its channel
                self.channel.send(self._out.popleft())


class _Run:
    """One run's state in the launcher."""

    def __init__(self, guests: list[GuestConfig], observer: Observer, signals: _Signals) -> None:
        self._vms = [guest.vm for guest in guests]
        self._observer = observer
        self._signals = signals
        self._process: subprocess.Popen[bytes] | None = None
        self._samples: list[Any] = []
        self._failures: list[Failure] = []
        self._exits: dict[int, Exited] = {}
        self._result: Result | None = None
        self._asked_to_stop = False
        self._killed = False
        self._over = False
        self._deadline_s: float | None = None
        self._forked_s = self._ready_s = self._end_s = 0.0
        self._compile_s = 0.0

    def start(self, launch: Launch, stderr: IO[bytes]) -> None:
        """Start the zygote. Raises LaunchError."""
        zygote, zygote_end = Pipe()
        host, host_end = Pipe()
        self._zygote = _Peer(zygote)
        self._host = _Peer(host)
        options = {"--control": zygote_end, "--host-control": host_end}
        fds = [end.fileno() for end in options.values()]
        flags = [word for name, end in options.items() for word in (name, str(end.fileno()))]
        command = [sys.executable, "-P", "-m", "fleet.zygote", *flags, "--parent", str(os.getpid())]
        try:
            # Nothing of it may reach standard output, which belongs to the summary.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, pass_fds=fds, env=_environment()
            )
        except OSError as error:
            raise LaunchError(f"cannot start the zygote: {error.strerror}; see `fleet doctor`") from error
        finally:
            zygote_end.close()
            host_end.close()
        # The one long message; the zygote does nothing before it has read it.
        with suppress(OSError):
            self._zygote.channel.send(launch)

    def loop(self) -> None:
        """Until the result is there and the host has gone, or nothing more is to be expected."""
        with selectors.DefaultSelector() as selector:
            # The host's last words come before the zygote's news of its end.
            for peer, receive in ((self._host, self._from_host), (self._zygote, self._from_zygote)):
                selector.register(peer.channel, peer.events, (peer, receive))
            selector.register(self._signals.reader, selectors.EVENT_READ)
            while not self._over:
                timeout_s = None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
                events = selector.select(timeout_s)
                if not events and self._deadline_s is not None:
                    self._killed = True
                    return
                for key, mask in events:
                    if key.data is None:
                        self._interrupted()
                        continue
                    peer, receive = key.data
                    if mask & selectors.EVENT_WRITE:
                        peer.flush()
                    if mask & selectors.EVENT_READ and not receive():
                        selector.unregister(peer.channel)
                for key in list(selector.get_map().values()):
                    if key.data is not None:
                        selector.modify(key.fileobj, key.data[0].events, key.data)
                self._over = self._over or (self._result is not None and HOST in self._exits)

    def close(self) -> None:
        """Have everybody killed and reaped; the zygote itself too."""
        if self._process is None:
            return
        if not self._forked_s:
            self._process.kill()  # it compiles, has no child yet, and would hear of nothing before it is through
        with suppress(OSError, EOFError):
            self._zygote.channel.send(Quit())
        deadline_s = time.monotonic() + _QUIT_S
        with selectors.DefaultSelector() as selector, suppress(OSError, EOFError):
            selector.register(self._zygote.channel, selectors.EVENT_READ)
            while selector.select(max(0.0, deadline_s - time.monotonic())):
                message = self._zygote.channel.receive()
                if isinstance(message, Exited):
                    self._exits[message.vm] = message
        self._process.kill()  # a no-op once it has been waited for; its children follow by their parent-death signal
        self._process.wait()
        self._zygote.channel.close()
        self._host.channel.close()

    def result(self, stderr_tail: str) -> FleetResult:
        """What it all came to."""
        reports: dict[int, dict[str, Any]] = {}
        host: dict[str, Any] = {}
        if self._result is not None:
            reports = {vm: msgspec.json.decode(report) for vm, report in self._result.reports.items()}
            host = msgspec.json.decode(self._result.host)
            self._failures += self._result.failures
        elif not (self._asked_to_stop or self._killed or self._failures):
            how = _how(self._process.returncode) if self._process else "was never started"
            last = "".join(f": {line}" for line in stderr_tail.splitlines()[-1:])
            self._failures.append(Failure(vm=None, kind="zygote", message=f"the zygote {how}{last}"))
        exits = {vm: exited for vm, exited in self._exits.items() if vm in reports}
        for vm, exited in exits.items():
            _close_ledger(reports[vm].setdefault("process_cpu", {}), exited)
        interrupted = self._asked_to_stop or self._killed
        return FleetResult(
            outcome=Outcome.INTERRUPTED if interrupted else Outcome.FAILED if self._failures else Outcome.OK,
            reports=reports,
            failures=self._failures,
            host=host,
            samples=self._samples,
            usage={vm: _usage(exited) for vm, exited in self._exits.items()},
            cpu_s={vm: exited.user_s + exited.system_s for vm, exited in self._exits.items() if vm != HOST},
            compile_s=self._compile_s,
            ready_s=max(0.0, self._ready_s - self._forked_s) if self._ready_s else 0.0,
            wall_s=max(0.0, (self._end_s or time.monotonic()) - self._ready_s) if self._ready_s else 0.0,
        )

    # --- what arrives; each says whether its channel goes on

    def _from_zygote(self) -> bool:
        try:
            message = self._zygote.channel.receive()
        except (EOFError, OSError):
            self._over = True
            return False
        match message:
            case Compiling(done=done, total=total, label=label):
                self._observer.on_compile(done, total, label)
            case Warm(seconds=seconds):
                self._compile_s = seconds
                self._forked_s = time.monotonic()
            case Exited(vm=vm):
                self._exits[vm] = message
                if vm == HOST:
                    self._host_ended(message)
                else:
                    self._host.tell(_ended(message))
            case Broken(message=text):
                self._failures.append(Failure(vm=None, kind="zygote", message=text))
                self._over = True
            case Started():
                pass
        return True

    def _from_host(self) -> bool:
        try:
            message = self._host.channel.receive()
        except (EOFError, OSError):
            return False  # the zygote will say how it ended
        match message:
            case Ready(vms=vms):
                self._ready_s = time.monotonic()
                self._observer.on_ready(vms, self._ready_s - self._forked_s)
            case Progress(vms=vms):
                self._observer.on_progress(vms)
            case Samples(samples=samples):
                self._samples += samples
                self._observer.on_samples(samples)
            case Hung(vm=vm):
                self._zygote.tell(Kill(vm=vm))
            case Broken(message=text):
                self._failures.append(Failure(vm=None, kind="host", message=text))
            case Result():
                self._result = message
                self._end_s = time.monotonic()
        return True

    def _interrupted(self) -> None:
        with suppress(BlockingIOError):
            self._signals.reader.recv(64)
        if self._signals.count == 0:
            return  # a signal of someone else
        if self._signals.count > 1 or not self._ready_s:
            # Asked twice, or before there is anything to report.
            self._killed = self._over = True
        elif not self._asked_to_stop:
            self._asked_to_stop = True
            self._deadline_s = time.monotonic() + _STOP_S
            self._host.tell(Interrupt(reason=f"interrupted by {self._signals.name}"))

    def _host_ended(self, exited: Exited) -> None:
        # What it said before it died is still in its channel.
        while self._result is None and self._host.channel.poll() and self._from_host():
            pass
        if self._result is None:
            if not self._failures:
                self._failures.append(Failure(vm=None, kind="host", message=f"the host {_how(exited.status)}"))
            self._over = True


def _how(status: int) -> str:
    if status < 0:
        return f"was killed by signal {-status} ({signal.Signals(-status).name})"
    return f"exited with status {status}"


def _ended(exited: Exited) -> Ended:
    clean = exited.status == 0
    kind = "killed" if exited.status < 0 else "exited"
    message = "exited without a report" if clean else _how(exited.status)
    return Ended(vm=exited.vm, clean=clean, kind=kind, message=message)


def _usage(exited: Exited) -> Usage:
    return Usage(
        pid=exited.pid,
        status=exited.status,
        user_s=exited.user_s,
        system_s=exited.system_s,
        max_rss_bytes=exited.max_rss_bytes,
    )


def _close_ledger(ledger: dict[str, float], exited: Exited) -> None:
    """Complete `process_cpu` (summary.md) with wait4's total and the main thread's clock as it died."""
    wait4_s = exited.user_s + exited.system_s
    if exited.main_s >= 0:
        ledger["control_s"] = max(exited.main_s, ledger.get("control_s", 0.0))
    booked_s = sum(ledger.get(part, 0.0) for part in ("vcpu_s", "agent_s", "control_s", "runtime_s"))
    ledger["wait4_s"] = wait4_s
    ledger["residue_ratio"] = abs(wait4_s - booked_s) / wait4_s if wait4_s > 0 else 0.0


def _environment() -> dict[str, str]:
    """The zygote's environment: one thread, the launcher's own import path, the cache of kernels."""
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return os.environ | one | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"} | numba_cache.environment()


def _log_stderr(stderr: IO[bytes], path: Path) -> str:
    """What zygote, host or a guest wrote to standard error in their distress goes to the log too; its tail."""
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - _STDERR_TAIL))
    tail = stderr.read().decode(errors="replace").strip()
    if tail:
        log = LineLog(str(path), None, "stderr")
        log.error(tail)
        log.close()
    return tail
