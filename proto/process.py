"""What every process of a fleet does to itself: its title, how it dies with its parent, what it keeps open.

Linux only: prctl(2). A process that outlives the launcher is a leak of memory and sockets, so each asks the kernel for
a signal at its parent's death; the signal is lost if the parent died before the request, hence the second look.
"""

import ctypes
import os
import resource
import signal
from collections.abc import Container

import setproctitle

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int, signum: signal.Signals) -> None:
    """Get ``signum`` when process ``parent``, this one's parent, ends; end now if it already has."""
    _prctl(_PR_SET_PDEATHSIG, int(signum))
    if os.getppid() != parent:
        os._exit(1)


def hide_memory() -> None:
    """Non-dumpable: no core file and no ptrace by a process without the capability for it."""
    _prctl(_PR_SET_DUMPABLE, 0)


def set_title(title: str) -> None:
    """The title in `ps`: ``fleet: <title>``."""
    setproctitle.setproctitle(f"fleet: {title}")


GO = signal.SIGUSR1
"""Asks the host to clean up and leave."""


def ignore_group() -> None:
    """Ctrl-C, a closed terminal and timeout(1) reach all of a group; the launcher alone decides what they mean."""
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def close_inherited(keep: Container[int]) -> None:
    """Close every descriptor but standard input, output, error and those of ``keep``.

    After a fork the parent's objects still hold the numbers; whoever calls this must never let them be finalised
    (leave with os._exit).
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:
                continue  # the listing's own descriptor is in the listing


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
