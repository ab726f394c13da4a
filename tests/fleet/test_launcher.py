"""Whole fleets of real processes: they run, they die in every way, and leave nothing behind."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from fleet.errors import LaunchError
from fleet.experiment import Experiment
from fleet.launcher import run_fleet
from fleet.outcome import FleetResult, Outcome, Sample, Silent, VmProgress
from proto.config import GuestConfig, HostConfig
from proto.counters import COUNTERS
from proto.process import GO
from proto.units import PS_PER_MS, PS_PER_S

FOREVER_PS = 10_000 * PS_PER_S


def _family() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if _alive(process)]


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _titled(title: str) -> psutil.Process:
    (process,) = [p for p in _family() if "".join(p.cmdline()).startswith(f"fleet: {title}")]
    return process


class Watch(Silent):
    """Keeps what it is told; does something once the fleet is ready, and once it moves."""

    def __init__(self, ready: Callable[[], object] | None = None, moving: Callable[[], object] | None = None) -> None:
        self._ready = ready
        self._moving = moving
        self.compiled: list[tuple[int, int]] = []
        self.progress: dict[int, VmProgress] = {}
        self.samples = 0

    def on_compile(self, done: int, total: int, label: str) -> None:
        self.compiled.append((done, total))

    def on_ready(self, vms: int, seconds: float) -> None:
        if self._ready:
            self._ready()

    def on_progress(self, vms: list[VmProgress]) -> None:
        self.progress |= {vm.vm: vm for vm in vms}
        if self._moving:
            moving, self._moving = self._moving, None
            moving()

    def on_samples(self, samples: list[Sample]) -> None:
        self.samples += len(samples)


Start = Callable[..., FleetResult]


@pytest.fixture
def configs(experiment: Experiment, tmp_path: Path) -> Callable[..., tuple[list[GuestConfig], HostConfig]]:
    """Configurations of ``vms`` small guests that run for ``run_ps``."""

    def make(
        vms: int = 2, run_ps: int = FOREVER_PS, hang_timeout_s: float = 60.0
    ) -> tuple[list[GuestConfig], HostConfig]:
        tenant = replace(experiment.tenants[0], vms=vms, policy="none", vcpus=1, run_ps=run_ps, memory_bytes=16 << 20)
        one = replace(experiment, tenants=(tenant,), hang_timeout_s=hang_timeout_s)
        guests = one.guests(log_path=lambda vm: tmp_path / f"log.{vm}.jsonl")
        return guests, one.host_config()

    return make


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, short enough for sockets; empty again at the end."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)
        assert os.listdir(directory) == []


@pytest.fixture
def start(
    configs: Callable[..., tuple[list[GuestConfig], HostConfig]], runtime: Path, tmp_path: Path
) -> Iterator[Start]:
    """Runs a fleet; whatever becomes of it, nothing of it may be left."""

    def run(watch: Watch | None = None, **options: float) -> FleetResult:
        guests, host = configs(**options)
        return run_fleet(guests, host, tmp_path, watch or Watch())

    yield run
    assert _family() == []
    assert os.listdir(runtime) == []


def test_a_fleet_runs_to_its_end(start: Start) -> None:
    watch = Watch()
    result = start(watch, run_ps=2 * PS_PER_S)
    assert result.outcome is Outcome.OK
    assert result.failures == []
    assert set(result.reports) == {0, 1}
    assert {vm: progress.phase for vm, progress in watch.progress.items()} == {0: "done", 1: "done"}
    assert watch.samples == len(result.samples)
    assert watch.compiled == sorted(watch.compiled)
    assert result.host["refused"] == {}
    for vm, report in result.reports.items():
        samples = [sample for sample in result.samples if sample.vm == vm]
        assert [s.time_ps for s in samples] == sorted({s.time_ps for s in samples})
        # One for each 100 ms of virtual time, populating included.
        assert len(samples) >= report["virtual_s"] * PS_PER_S // (100 * PS_PER_MS)
        assert {len(s.counters) for s in samples} == {8 * COUNTERS}
        assert samples[-1].phase == "done"
        assert report["hypercalls"]["count"]["hello"] == 1
        assert report["memory"]["rss_bytes"] >= report["memory"]["private_bytes"] > 0


def test_the_ledger_of_every_process_closes(start: Start) -> None:
    result = start(run_ps=3 * PS_PER_S)
    for vm, report in result.reports.items():
        cpu = report["process_cpu"]
        assert cpu["wait4_s"] == pytest.approx(result.cpu_s[vm])
        assert all(cpu[part] > 0 for part in ("vcpu_s", "agent_s", "control_s", "runtime_s"))
        assert cpu["residue_ratio"] <= 0.02


def test_every_process_has_its_title_and_a_guest_its_threads(start: Start) -> None:
    seen: dict[str, set[str]] = {}

    def look() -> None:
        for process in _family():
            names = {Path(f"/proc/{process.pid}/task/{t.id}/comm").read_text().strip() for t in process.threads()}
            seen["".join(process.cmdline())] = names
        os.kill(os.getpid(), signal.SIGINT)

    start(Watch(moving=look))
    assert set(seen) == {"fleet: zygote", "fleet: host", "fleet: vm0 none gups", "fleet: vm1 none gups"}
    for title, names in seen.items():
        assert ({"vcpu", "agent"} <= names) == title.startswith("fleet: vm")
    assert seen["fleet: zygote"] == {"fleet: zygote"}


def test_no_process_holds_what_is_not_its_own(start: Start) -> None:
    links: dict[str, list[str]] = {}
    maps: dict[str, set[str]] = {}

    def look() -> None:
        for process in _family():
            title = "".join(process.cmdline()).split()[1]
            folder = f"/proc/{process.pid}/fd"
            # Standard error, which all share, is number 1 and 2.
            links[title] = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder) if int(fd) > 2]
            text = Path(f"/proc/{process.pid}/maps").read_text()
            maps[title] = set(re.findall(r"memfd:(\S+)", text))
        os.kill(os.getpid(), signal.SIGINT)

    start(Watch(moving=look), vms=3)
    guests = [f"vm{vm}" for vm in range(3)]
    assert not any("memfd" in link for title in links for link in links[title])
    assert maps == {"zygote": set(), "host": set(guests)} | {guest: {guest} for guest in guests}
    for title in guests:
        # A socket's inode names one end: held by one process only.
        own = {link for link in links[title] if link.startswith(("socket:", "pipe:"))}
        others = {link for other in links if other != title for link in links[other]}
        assert own
        assert not own & others


def test_a_killed_guest_costs_no_other(start: Start) -> None:
    result = start(Watch(ready=lambda: _titled("vm1").kill()), vms=3, run_ps=PS_PER_S)
    assert result.outcome is Outcome.FAILED
    assert [(f.vm, f.kind, f.message) for f in result.failures] == [(1, "killed", "was killed by signal 9 (SIGKILL)")]
    assert set(result.reports) == {0, 2}
    assert result.usage[1].status == -signal.SIGKILL


def test_a_hung_guest_is_killed_and_costs_no_other(start: Start) -> None:
    result = start(Watch(ready=lambda: _titled("vm0").suspend()), run_ps=PS_PER_S, hang_timeout_s=4.0)
    assert [(f.vm, f.kind) for f in result.failures] == [(0, "hung")]
    assert set(result.reports) == {1}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_fleet_reports_what_it_has(start: Start, signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    result = start(Watch(moving=lambda: os.kill(os.getpid(), signum)))
    assert result.outcome is Outcome.INTERRUPTED
    assert result.failures == []
    assert set(result.reports) == {0, 1}
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_leaves_the_reports_to_the_launcher(start: Start, signum: signal.Signals) -> None:
    def interrupt_all() -> None:
        for process in _family():
            process.send_signal(signum)
        os.kill(os.getpid(), signum)

    result = start(Watch(moving=interrupt_all))
    assert (result.outcome, set(result.reports)) == (Outcome.INTERRUPTED, {0, 1})


def test_what_nohup_has_ignored_stays_ignored(start: Start) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = start(Watch(moving=lambda: os.kill(os.getpid(), signal.SIGHUP)), run_ps=PS_PER_S)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.outcome, set(result.reports)) == (Outcome.OK, {0, 1})


def test_interrupted_twice_it_waits_for_no_report(start: Start) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    result = start(Watch(moving=twice))
    assert (result.outcome, result.reports, result.failures) == (Outcome.INTERRUPTED, {}, [])


def test_interrupted_before_it_is_ready_it_just_ends(start: Start) -> None:
    class Hasty(Watch):
        def on_compile(self, done: int, total: int, label: str) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    result = start(Hasty())
    assert (result.outcome, result.reports) == (Outcome.INTERRUPTED, {})


def test_a_dead_host_ends_the_run_with_one_clear_failure(start: Start) -> None:
    result = start(Watch(moving=lambda: _titled("host").kill()))
    assert result.outcome is Outcome.FAILED
    assert [(f.vm, f.kind) for f in result.failures] == [(None, "host")]
    assert "SIGKILL" in result.failures[0].message
    assert result.host == {}


def test_a_dead_zygote_takes_everybody_along(start: Start) -> None:
    result = start(Watch(moving=lambda: _titled("zygote").kill()))
    assert result.outcome is Outcome.FAILED
    assert [(f.vm, f.kind) for f in result.failures] == [(None, "zygote")]
    assert "SIGKILL" in result.failures[0].message


def test_a_guest_that_cannot_start_says_why(
    configs: Callable[..., tuple[list[GuestConfig], HostConfig]], start: Start, tmp_path: Path
) -> None:
    guests, host = configs(vms=2, run_ps=PS_PER_S)
    guests[0] = msgspec.structs.replace(guests[0], workload="trace", workload_params={"file": "/nowhere.trace"})
    result = run_fleet(guests, host, tmp_path, Watch())
    assert [failure.vm for failure in result.failures] == [0]
    assert "nowhere" in result.failures[0].message
    assert set(result.reports) == {1}


def test_an_observer_that_fails_ends_the_fleet(start: Start) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start(Watch(ready=fail))


def test_without_an_interpreter_there_is_a_clear_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(LaunchError, match="zygote"):
        start()


SCRIPT = """
import sys
from pathlib import Path
import msgspec, psutil
from fleet.launcher import run_fleet
from fleet.outcome import Silent
from proto.config import GuestConfig, HostConfig

class Tell(Silent):
    told = False
    def on_progress(self, vms):
        if not self.told:
            self.told = True
            print(*[process.pid for process in psutil.Process().children(recursive=True)], flush=True)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    guests = msgspec.msgpack.decode((folder / "guests").read_bytes(), type=list[GuestConfig])
    host = msgspec.msgpack.decode((folder / "host").read_bytes(), type=HostConfig)
    run_fleet(guests, host, folder, Tell())
"""


@pytest.mark.parametrize("victims", ["launcher", "launcher and zygote", "launcher, and the host asked many times"])
def test_a_killed_launcher_leaves_nothing(
    configs: Callable[..., tuple[list[GuestConfig], HostConfig]], runtime: Path, tmp_path: Path, victims: str
) -> None:
    guests, host = configs()
    (tmp_path / "guests").write_bytes(msgspec.msgpack.encode(guests))
    (tmp_path / "host").write_bytes(msgspec.msgpack.encode(host))
    (tmp_path / "launch.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "launch.py"), str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as launcher:
        assert launcher.stdout is not None
        family = [psutil.Process(int(pid)) for pid in launcher.stdout.readline().split()]
        assert len(family) == len(guests) + 2
        (socket,) = runtime.glob("fleet-*/*")
        assert socket.is_socket()
        (emulator,) = [process for process in family if "".join(process.cmdline()).startswith("fleet: host")]
        if victims == "launcher and zygote":
            family[0].kill()
        launcher.kill()
        if victims == "launcher, and the host asked many times":
            with suppress(ProcessLookupError):
                while _alive(emulator):
                    for _ in range(1000):
                        os.kill(emulator.pid, GO)
    # Each gets its signal from the kernel; the test's own time limit bounds the wait.
    while any(_alive(process) for process in family) or os.listdir(runtime):
        pass
