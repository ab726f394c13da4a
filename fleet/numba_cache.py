"""Where compiled kernels are kept between runs: one directory per state of the sources, versions and CPU.

numba's own cache looks at the file of a function only, and would go on with machine code of a callee that was edited in
another file (architecture 5). So the directory's name is a hash of every source that kernels can come from.
"""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("proto", "hostd", "guestd")
_VERSIONED = ("numba", "numpy", "llvmlite")
_KEEP_S = 30 * 24 * 3600
"""A directory that no run used for this long goes."""


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
                return directory
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="tierfleet-"))


def _key() -> str:
    digest = hashlib.sha256()
    sources = [path for package in _PACKAGES for path in (ROOT / package).rglob("*.py")]
    for path in sorted([*sources, ROOT / "fleet" / "zygote.py"]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    versions = [sys.version, *(metadata.version(name) for name in _VERSIONED)]
    digest.update("\0".join([*versions, platform.machine(), _cpu()]).encode())
    return digest.hexdigest()[:20]


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
        if path.stat().st_mtime < limit:
            shutil.rmtree(path, ignore_errors=True)
