"""Where a run came from: command, versions, commit, machine. Written beside the results as ``provenance.json``."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from msgspec import Struct

from fleet import __version__

LIBRARIES = ("llvmlite", "msgspec", "numba", "numpy", "psutil", "pyarrow", "pyzmq", "setproctitle")


class Provenance(Struct, frozen=True):
    """What is known of a run's origin when it starts."""

    started: str
    """ISO 8601, UTC."""
    argv: list[str]
    version: str
    commit: str | None
    """None where the package does not run from a git checkout."""
    dirty: bool | None
    versions: dict[str, str]
    """Python and the libraries that take part in a result."""
    machine: dict[str, Any]


def collect(argv: list[str] | None = None) -> Provenance:
    """The provenance of this process; ``argv`` defaults to its own."""
    commit, dirty = git_state(Path(__file__).parent)
    return Provenance(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        argv=list(sys.argv if argv is None else argv),
        version=__version__,
        commit=commit,
        dirty=dirty,
        versions=library_versions(),
        machine=machine(),
    )


def git_state(directory: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the checkout that ``directory`` is in, else (None, None)."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie below some other project's checkout: only a tracked file of ours tells that it is ours.
    if not git("ls-files", "--", Path(__file__).name):
        return None, None
    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def library_versions() -> dict[str, str]:
    """Python, and the libraries that take part in a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def machine() -> dict[str, Any]:
    """The machine: measured CPU figures mean little without it."""
    import psutil

    return {
        "cpu": _cpu_model(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
