"""The zygote on its own: single-threaded, obedient, and the one that reaps."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet import numba_cache
from fleet.experiment import Experiment
from proto import transport
from proto.control import HOST, Broken, Channel, Exited, Kill, Launch, Quit, Ready, Started, ToLauncher, Warm
from proto.units import PS_PER_S


class Launcher:
    """The launcher's ends of a real zygote's channels."""

    def __init__(self, launch: Launch) -> None:
        decoder = msgspec.msgpack.Decoder(ToLauncher)
        (zygote, zygote_end), (host, host_end) = Pipe(), Pipe()
        self.zygote, self.host = Channel(zygote, decoder), Channel(host, decoder)
        fds = [zygote_end.fileno(), host_end.fileno()]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        ends = ["--control", str(fds[0]), "--host-control", str(fds[1]), "--parent", str(os.getpid())]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fleet.zygote", *ends],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ
            | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            | numba_cache.environment(),
        )
        zygote_end.close()
        host_end.close()
        self.zygote.send(launch)

    def hear(self, kind: type[Any], channel: Channel | None = None) -> Any:
        """The next message of a kind."""
        while True:
            message = (channel or self.zygote).receive()
            if isinstance(message, kind):
                return message
            assert not isinstance(message, Broken), message.message

    def rest(self) -> list[Any]:
        """All that the zygote still says until it leaves."""
        messages = []
        while True:
            try:
                messages.append(self.zygote.receive())
            except (EOFError, OSError):
                return messages

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.zygote.close()
        self.host.close()


@pytest.fixture
def launch(experiment: Experiment) -> Iterator[Launch]:
    """Two guests that would run for hours."""
    tenant = replace(experiment.tenants[0], vms=2, policy="none", vcpus=1, run_ps=10_000 * PS_PER_S)
    one = replace(experiment, tenants=(tenant,))
    directory = transport.choose_directory()
    yield Launch(host=one.host_config(), guests=one.guests(), directory=str(directory), log_path="")
    transport.remove_directory(directory)


Make = Callable[[Launch], Launcher]


@pytest.fixture
def make() -> Iterator[Make]:
    launchers: list[Launcher] = []

    def start(launch: Launch) -> Launcher:
        launchers.append(Launcher(launch))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.close()


def test_it_is_single_threaded_when_it_forks(make: Make, launch: Launch) -> None:
    launcher = make(launch)
    launcher.hear(Warm)
    launcher.hear(Started)
    assert os.listdir(f"/proc/{launcher.process.pid}/task") == [str(launcher.process.pid)]


def test_the_host_is_forked_first_then_the_guests(make: Make, launch: Launch) -> None:
    launcher = make(launch)
    assert [launcher.hear(Started).vm for _ in range(3)] == [HOST, 0, 1]


def test_it_kills_whom_it_is_told_to_and_reaps_it(make: Make, launch: Launch) -> None:
    launcher = make(launch)
    pids = {started.vm: started.pid for started in (launcher.hear(Started) for _ in range(3))}
    launcher.hear(Ready, launcher.host)
    launcher.zygote.send(Kill(vm=1))
    exited: Exited = launcher.hear(Exited)
    assert (exited.vm, exited.pid, exited.status) == (1, pids[1], -signal.SIGKILL)
    assert exited.user_s + exited.system_s > 0
    assert not Path(f"/proc/{pids[1]}").exists()
    # To kill it again, or one that never was, is nothing.
    launcher.zygote.send(Kill(vm=1))
    launcher.zygote.send(Kill(vm=99))
    launcher.zygote.send(Kill(vm=0))
    assert launcher.hear(Exited).vm == 0


def test_quit_ends_and_reaps_everybody(make: Make, launch: Launch) -> None:
    launcher = make(launch)
    launcher.hear(Ready, launcher.host)
    launcher.zygote.send(Quit())
    exits = {message.vm: message.status for message in launcher.rest() if isinstance(message, Exited)}
    assert exits == {HOST: 1, 0: -signal.SIGKILL, 1: -signal.SIGKILL}
    assert launcher.process.wait() == 0
    assert not Path(launch.directory).exists()


def test_without_a_launcher_it_ends_and_takes_everybody_along(make: Make, launch: Launch) -> None:
    launcher = make(launch)
    pids = [launcher.hear(Started).pid for _ in range(3)]
    launcher.hear(Ready, launcher.host)
    launcher.zygote.close()
    assert launcher.process.wait() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_terminals_signals_do_not_reach_it(make: Make, launch: Launch) -> None:
    launcher = make(launch)
    pids = [launcher.process.pid, *(launcher.hear(Started).pid for _ in range(3))]
    launcher.hear(Ready, launcher.host)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGHUP)
    launcher.zygote.send(Kill(vm=0))
    # It goes on, and so do all but the one that it was told to kill.
    assert launcher.hear(Exited).vm == 0
    assert launcher.process.poll() is None


def test_what_it_cannot_load_it_says(make: Make, launch: Launch) -> None:
    launch.guests[0] = msgspec.structs.replace(launch.guests[0], policy="no-such-policy")
    launcher = make(launch)
    broken = [message for message in launcher.rest() if isinstance(message, Broken)]
    assert len(broken) == 1
    assert "no-such-policy" in broken[0].message
    assert "\n" not in broken[0].message
    assert launcher.process.wait() == 1


def test_it_does_not_outlive_a_parent_that_is_already_gone() -> None:
    command = [sys.executable, "-m", "fleet.zygote", "--control", "0", "--host-control", "0", "--parent", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    assert subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, check=False).returncode == 1
