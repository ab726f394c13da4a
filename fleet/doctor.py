"""Whether this machine can hold a fleet: limits and facilities, each with what is there, what is needed, and the fix.

`fleet doctor` shows them all; `fleet run` refuses on those that its own guests would break. The demand is an upper
bound: every page of every VM touched. What a page costs is the sum of the emulator's arrays (guest page table, EPT,
content stamps, LRU, heat), not a figure of any emulated machine.
"""

import fcntl
import os
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from proto.config import GuestConfig
from proto.errors import EndpointError
from proto.units import format_bytes

BYTES_PER_PAGE = 208
"""Process and shared memory for each page that a guest touched, under the design that takes most of it: vtmm, which
sorts copies of all its counts (no policy takes 97, most designs 100 to 140). Measured as the growth of the peak of a
run's proportional set sizes from 1 to 8 GiB of guest."""
BYTES_PER_GUEST = 8 << 20
BYTES_FOR_ALL = 384 << 20
"""Launcher, host and zygote with their libraries and compiled kernels."""
THREADS_PER_GUEST = 5
"""main, vcpu, agent, and ZeroMQ's two."""
FILES_PER_GUEST = 4
"""In the host, the process with most: socket, descriptor hand-over, memfd while it is mapped, log."""
FILES_FOR_ALL = 64
THREADS_FOR_ALL = 32
CLOCK_NEEDED_NS = 10_000
"""Agents are metered in stages of tens of microseconds; a clock of ticks would see none of them."""
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_UNLIMITED = 1 << 62


class Check(Struct, frozen=True):
    """One finding."""

    name: str
    ok: bool
    found: str
    needed: str
    fix: str
    """What to do about it; empty if `ok`."""

    def line(self) -> str:
        """As one line of an error."""
        return f"{self.name}: {self.found}, needed: {self.needed}; {self.fix}"


class Demand(NamedTuple):
    """What a fleet asks of the machine."""

    vms: int
    pages: int
    """4 KiB pages of all VMs."""

    @property
    def memory_bytes(self) -> int:
        """Upper bound of the memory of all processes."""
        return BYTES_FOR_ALL + self.vms * BYTES_PER_GUEST + self.pages * BYTES_PER_PAGE


def check_run(guests: Sequence[GuestConfig]) -> list[Check]:
    """The limits that these guests would break; [] if the run can start."""
    return [check for check in limits(demand_of(guests)) if not check.ok]


def demand_of(guests: Sequence[GuestConfig]) -> Demand:
    """What these guests ask of the machine."""
    return Demand(len(guests), sum(guest.total_pages for guest in guests))


def raise_file_limit(vms: int) -> None:
    """Raise this process's (and its children's) soft limit of open files as far as the run needs and root allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _files_needed(vms)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard < 0 else min(needed, hard), hard))


def examine(demand: Demand) -> list[Check]:
    """Every check."""
    return [*limits(demand), thread_clock(), kernel_cache()]


def limits(demand: Demand) -> list[Check]:
    """The checks that depend on the size of the fleet, and the facilities without which nothing starts."""
    return [
        open_files(demand.vms),
        processes(demand.vms),
        memory(demand),
        overcommit(demand),
        sealed_memfd(),
        socket_directory(),
    ]


def open_files(vms: int) -> Check:
    """RLIMIT_NOFILE; the soft limit is raised by `fleet run` itself, so the hard one decides."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    found = _UNLIMITED if hard == resource.RLIM_INFINITY else hard
    return _at_least(
        "open files",
        found,
        _files_needed(vms),
        "raise the hard limit (nofile in /etc/security/limits.conf, LimitNOFILE= in a unit) or use fewer --vms",
    )


def processes(vms: int) -> Check:
    """Processes and threads: RLIMIT_NPROC of the user, pids.max of the cgroups, kernel.threads-max and pid_max."""
    room = {
        "kernel.threads-max": _number("/proc/sys/kernel/threads-max"),
        "kernel.pid_max": _number("/proc/sys/kernel/pid_max"),
    }
    used = _threads()
    room = {name: value - used for name, value in room.items()}
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:
        room["ulimit -u"] = soft - _threads(os.geteuid())
    for folder in _cgroups("pids"):
        room[f"{folder}/pids.max"] = _number(folder / "pids.max") - _number(folder / "pids.current", 0)
    name = min(room, key=lambda key: room[key])
    needed = vms * THREADS_PER_GUEST + THREADS_FOR_ALL
    return _at_least("processes and threads", room[name], needed, f"raise {name} or use fewer --vms")


def memory(demand: Demand) -> Check:
    """Free memory of the machine and of the cgroups, against the upper bound of the demand."""
    free, name = free_memory()
    needed = demand.memory_bytes
    fix = "" if free >= needed else f"use fewer --vms, less --memory or a smaller --scale ({name} sets the limit)"
    return Check("memory", not fix, f"{format_bytes(max(free, 0))} free", f"{format_bytes(needed)} at most", fix)


def free_memory() -> tuple[int, str]:
    """Bytes that new processes can have, and who sets that limit: the machine or one of the cgroups."""
    room = {"this machine": _meminfo().get("MemAvailable", 0)}
    for folder in _cgroups("memory"):
        limit = min(_number(folder / "memory.max"), _number(folder / "memory.limit_in_bytes"))
        current = _number(folder / "memory.current", 0) or _number(folder / "memory.usage_in_bytes", 0)
        room[str(folder)] = limit - current + _stat(folder / "memory.stat", "inactive_file")
    name = min(room, key=lambda key: room[key])
    return room[name], name


def overcommit(demand: Demand) -> Check:
    """vm.overcommit_memory = 2 counts reserved memory, not touched; a guest reserves for all it might touch."""
    if _number("/proc/sys/vm/overcommit_memory", 0) != 2:
        return Check("overcommit", True, "allowed", "address space for untouched pages", "")
    info = _meminfo()
    return _at_least(
        "overcommit",
        info.get("CommitLimit", 0) - info.get("Committed_AS", 0),
        demand.memory_bytes,
        "set vm.overcommit_memory to 0 (sysctl) or use fewer --vms or less --memory",
        "bytes ",
    )


def sealed_memfd() -> Check:
    """memfd_create with seals (Linux 3.17), on which the shared segments rest."""
    try:
        descriptor = os.memfd_create("fleet-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, 4096)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        finally:
            os.close(descriptor)
    except OSError as error:
        sealed, found = False, error.strerror or str(error)
    else:
        found = "works" if sealed else "seals are not kept"
    fix = "" if sealed else "allow memfd_create and F_ADD_SEALS (container seccomp profile, vm.memfd_noexec)"
    return Check("memfd with seals", sealed, found, "memfd_create and F_ADD_SEALS", fix)


def socket_directory() -> Check:
    """A directory for Unix sockets, writable, with a path short enough for sockaddr_un."""
    from proto import transport

    needed = f"writable, paths of at most {transport.MAX_SOCKET_PATH} bytes"
    try:
        folder = transport.choose_directory().parent
        ok, found = os.access(folder, os.W_OK | os.X_OK), str(folder)
    except (EndpointError, OSError) as error:  # also: no directory for temporary files at all
        ok, found = False, str(error)
    fix = "" if ok else "set XDG_RUNTIME_DIR (or TMPDIR) to a short, writable directory such as /tmp"
    return Check("socket directory", ok, found, needed, fix)


def thread_clock() -> Check:
    """Step of the thread CPU clock, by which agents are metered."""
    stamps = sorted({time.clock_gettime_ns(time.CLOCK_THREAD_CPUTIME_ID) for _ in range(2000)})
    step = min((later - earlier for earlier, later in pairwise(stamps)), default=10**9)
    ok = step <= CLOCK_NEEDED_NS
    fix = "" if ok else "boot with high-resolution timers (highres=on); measured agent CPU would be too coarse"
    return Check("thread CPU clock", ok, f"steps of {step} ns", f"steps of at most {CLOCK_NEEDED_NS} ns", fix)


def kernel_cache() -> Check:
    """Where compiled kernels are kept: a lasting directory, or every run compiles anew."""
    from fleet.numba_cache import cache_directory

    folder = cache_directory()
    lasting = cache_directory() == folder
    if not lasting:
        folder.rmdir()
    warm = any(folder.rglob("*.nbc")) if lasting else False
    found = (
        f"{folder} ({'warm' if warm else 'empty: the first run compiles'})" if lasting else "none that is ours alone"
    )
    fix = "" if lasting else "set XDG_CACHE_HOME to a directory that only you can write; until then every run compiles"
    return Check("kernel cache", lasting, found, "a lasting, private directory", fix)


def _at_least(name: str, found: int, needed: int, fix: str, unit: str = "") -> Check:
    ok = found >= needed
    shown = "unlimited" if found >= _UNLIMITED - (1 << 32) else f"{max(found, 0)} {unit}available"
    return Check(name, ok, shown, f"{needed}", "" if ok else fix)


def _files_needed(vms: int) -> int:
    return FILES_FOR_ALL + FILES_PER_GUEST * vms


def _number(path: str | Path, default: int = _UNLIMITED) -> int:
    """The number in a one-line file; ``max`` or no such file is the default."""
    try:
        text = Path(path).read_text().split()[0]
    except (OSError, IndexError):
        return default
    return int(text) if text.isdigit() else default


def _stat(path: Path, key: str) -> int:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(value.split()[0]) << 10 for name, value in (line.split(":") for line in lines)}


def _cgroups(controller: str) -> Iterator[Path]:
    """The cgroup directories whose limits of that controller hold for this process (versions 1 and 2)."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root = Path("/sys/fs/cgroup")
            elif controller in controllers.split(","):
                root = Path("/sys/fs/cgroup", controller)
            else:
                continue
            own = root / path.strip("/")
            # In a container the path may name what only the outside sees; then the root is our own.
            yield from (folder for folder in _up(own if own.is_dir() else root, root))


def _up(folder: Path, root: Path) -> Iterable[Path]:
    return [parent for parent in (folder, *folder.parents) if parent == root or root in parent.parents]


def _threads(user: int | None = None) -> int:
    """Threads on this machine, or those of one user."""
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                if user is None or entry.stat().st_uid == user:
                    count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count
