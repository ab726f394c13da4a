"""The zygote: a warm, single-threaded process of its own that forks the host and every guest, and reaps them.

Started fresh by the launcher (no BLAS, rich or logging thread in it; a fork copies only the thread that calls it, and
the locks of all), it loads and compiles what its children need, so that a guest is ready in milliseconds and shares
the code (architecture 5). It reads each child's CPU from wait4. When it dies, the kernel signals its children; when
the launcher dies, the kernel signals it. It decides nothing: the launcher says what to fork and what to kill.
"""

import argparse
import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from proto import clocks
from proto.control import HOST, Broken, Channel, Compiling, Exited, Kill, Launch, Quit, Started, ToZygote, Warm
from proto.handover import announce
from proto.log import LineLog
from proto.process import GO, die_with_parent, ignore_group, raise_open_files, set_title

_HOST_LAST_S = 3.0
"""How long the host may take to clean up once it is told to go."""


class Zygote:
    """Forks and reaps. ``channel``: to the launcher; ``host_control``: the host's end of its own such channel."""

    def __init__(self, channel: Channel, host_control: Connection) -> None:
        self._channel = channel
        self._host_control = host_control
        self._vm_of: dict[int, int] = {}
        self._pid_of: dict[int, int] = {}
        self._quit = False
        # One pair of descriptors for any number of children; a pidfd each would be a thousand.
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        self._wake_writer = wake
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)

    def launch(self, launch: Launch) -> None:
        """Fork the host, then the guests, reaping meanwhile. Raises RuntimeError."""
        from guestd.guest import Guest
        from guestd.process import guest_process
        from hostd.core import HostCore
        from hostd.server import host_process

        zygote = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._fork(HOST, partial(host_process, zygote, launch, self._host_control, theirs, HostCore))
        # The zygote's copies would keep the channels open after the host's death.
        self._host_control.close()
        theirs.close()
        self._arrivals = ours  # open as long as the zygote lives: its end tells the host
        for guest in launch.guests:
            if self._quit or HOST not in self._pid_of:
                return
            self._fork_guest(guest.vm, ours, partial(guest_process, zygote, guest, make_guest=Guest))
            self._serve(0)

    def _fork_guest(self, vm: int, arrivals: socket.socket, child: Callable[[socket.socket], int]) -> None:
        host_end, guest_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with host_end, guest_end:
            self._fork(vm, partial(child, guest_end))
            try:
                announce(arrivals, vm, host_end)
            except OSError:
                return  # the host died; the launcher learns of it when it is reaped

    def _fork(self, vm: int, child: Callable[[], int]) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            who = "the host" if vm == HOST else f"guest {vm}"
            raise RuntimeError(
                f"cannot fork {who}: {error.strerror}; raise `ulimit -u` (see `fleet doctor`)"
            ) from error
        if pid == 0:
            status = 1
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                status = child()
            except BaseException:
                traceback.print_exc()
            finally:
                # Never back into the zygote's stack, and no finaliser of what belongs to it.
                os._exit(status)
        self._vm_of[pid] = vm
        self._pid_of[vm] = pid
        self._channel.send(Started(vm=vm, pid=pid))

    def run(self) -> None:
        """Serve the launcher until it says quit or is gone."""
        while not self._quit:
            self._serve(None)

    def _serve(self, timeout_s: float | None) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(timeout_s)]
        if self._wake in ready:
            self._wake.recv(4096)
            self.reap()
        if self._channel in ready:
            try:
                self._obey(self._channel.receive())
            except (EOFError, OSError):
                self._quit = True

    def _obey(self, message: object) -> None:
        if isinstance(message, Quit):
            self._quit = True
        elif isinstance(message, Kill) and message.vm in self._pid_of:
            # Not reaped yet, so the number is still this child's.
            os.kill(self._pid_of[message.vm], signal.SIGKILL)

    def reap(self) -> None:
        """Take every dead child, tell the launcher what it used."""
        while self._vm_of:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None:
                return
            main_ns = clocks.zombie_main_thread_ns(dead.si_pid)
            pid, status, usage = os.wait4(dead.si_pid, 0)
            vm = self._vm_of.pop(pid)
            del self._pid_of[vm]
            exited = Exited(
                vm=vm,
                pid=pid,
                status=os.waitstatus_to_exitcode(status),
                user_s=usage.ru_utime,
                system_s=usage.ru_stime,
                max_rss_bytes=usage.ru_maxrss * 1024,
                main_s=main_ns / 1e9,
            )
            try:
                self._channel.send(exited)
            except OSError:
                self._quit = True

    def close(self) -> None:
        """Kill the guests, ask the host to go, reap them all."""
        self._signal_all()
        deadline_s = time.monotonic() + _HOST_LAST_S
        while self._vm_of and time.monotonic() < deadline_s:
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake, selectors.EVENT_READ)
                if selector.select(deadline_s - time.monotonic()):
                    self._wake.recv(4096)
            self.reap()
        for pid in self._vm_of:
            os.kill(pid, signal.SIGKILL)

    def _signal_all(self) -> None:
        for vm, pid in self._pid_of.items():
            os.kill(pid, GO if vm == HOST else signal.SIGKILL)


def warm_up(channel: Channel, launch: Launch) -> None:
    """Import and compile all that host and guests will run, so that no child does. Raises RuntimeError."""
    import guestd.process  # noqa: F401
    import hostd.server  # noqa: F401
    from fleet.warmup import warm_up as warm_up_kernels

    start_s = time.monotonic()
    policies = sorted({guest.policy for guest in launch.guests})
    workloads = sorted({guest.workload for guest in launch.guests})
    warm_up_kernels(
        policies,
        workloads,
        launch.host.costs,
        lambda done, total, label: channel.send(Compiling(done=done, total=total, label=label)),
        launch.host.kernel,
        heat=any(guest.heat_path for guest in launch.guests),
        # The launcher removes it whatever becomes of this process.
        scratch=Path(launch.directory),
        huge=launch.host.kernel.thp == "always" or any(guest.kernel.thp == "always" for guest in launch.guests),
    )
    threads = clocks.thread_ids()
    if len(threads) != 1:
        raise RuntimeError(
            f"the zygote has {len(threads)} threads and can't fork safely; a policy's import started one"
        )
    # What is here now is never collected, so that a child's collector does not write to pages that it shares.
    gc.collect()
    gc.freeze()
    channel.send(Warm(seconds=time.monotonic() - start_s))


def main() -> int:
    """Entry of ``python -m fleet.zygote``, for the launcher only."""
    parser = argparse.ArgumentParser(description="Started by `fleet run`; not for use by hand.")
    for name in ("--control", "--host-control", "--parent"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    ignore_group()
    die_with_parent(options.parent, signal.SIGKILL)
    set_title("zygote")
    raise_open_files()
    channel = Channel(Connection(options.control), msgspec.msgpack.Decoder(ToZygote))
    host_control = Connection(options.host_control)
    launch = channel.receive()
    assert isinstance(launch, Launch)
    log = LineLog(launch.log_path, None, "zygote")
    zygote = Zygote(channel, host_control)
    try:
        warm_up(channel, launch)
        log.info(f"warm; forking {len(launch.guests)} guests")
        log.close()
        zygote.launch(launch)
        zygote.run()
    except Exception as error:
        log.error(traceback.format_exc())
        try:
            channel.send(Broken(message=f"the zygote failed: {type(error).__name__}: {error}"))
        except OSError:
            return 1
        return 1
    finally:
        zygote.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
