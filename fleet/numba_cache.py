"""Where compiled kernels are kept between runs: a directory per CPU and versions, a folder in it per state of a module.

`fleet.kernel_locator` names the folders.
"""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

_VERSIONED = ("numba", "numpy", "llvmlite")
_KEEP_S = 30 * 24 * 3600
"""A directory or folder that no run used for this long goes."""


def cache_directory() -> Path:
    """The directory for this installation on this CPU; created, writable, ours alone."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    key = _key()
    for parent in (Path(base) / "tierfleet", Path(tempfile.gettempdir()) / f"tierfleet-{os.getuid()}"):
        directory = parent / key
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Machine code is loaded from here: it must be nobody else's to write.
            if directory.stat().st_uid == os.getuid() == parent.stat().st_uid and os.access(directory, os.W_OK):
                os.utime(directory)
                _forget_old(parent)
                _forget_old(directory)
                return directory
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="tierfleet-"))


def environment() -> dict[str, str]:
    """The variables by which numba keeps kernels there; to be set before it is imported."""
    return {
        "NUMBA_CACHE_DIR": str(cache_directory()),
        "NUMBA_CACHE_LOCATOR_CLASSES": "fleet.kernel_locator.ModuleLocator",
    }


def _key() -> str:
    versions = [sys.version, *(metadata.version(name) for name in _VERSIONED)]
    return hashlib.sha256("\0".join([*versions, platform.machine(), _cpu()]).encode()).hexdigest()[:20]


def _cpu() -> str:
    """Model and features of the first CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    lines = text.split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def _forget_old(parent: Path) -> None:
    limit = time.time() - _KEEP_S
    for path in parent.iterdir():
        with suppress(OSError):  # another process tidies up, too
            if path.stat().st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True)
