"""Runs ``fleet run`` as a person does, in processes of its own, and watches those from outside."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 0.25


@dataclass
class FleetRun:
    """``summary``: summary.json; ``private_bytes``: by pid, most that the kernel showed of a guest while it ran."""

    summary: dict[str, Any]
    wall_s: float
    private_bytes: dict[int, int] = field(default_factory=dict)
    left_behind: int = 0
    """Processes of the run that outlived the command."""


def run_fleet(arguments: tuple[str, ...], *, watch: bool = False) -> FleetRun:
    """Run ``fleet run ARGUMENTS --json``; ``watch``: look at the guests meanwhile. Raises SystemExit if it fails."""
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, tempfile.TemporaryFile() as stdout:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "fleet", "run", *arguments, "--json", "--out", str(out)]
        start = time.perf_counter()
        process = psutil.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL)
        seen: dict[int, psutil.Process] = {}
        private: dict[int, int] = {}
        while process.poll() is None:
            if watch:
                _look(process, seen, private)
            try:
                process.wait(SAMPLE_S)
            except psutil.TimeoutExpired:
                continue
        wall_s = time.perf_counter() - start
        stdout.seek(0)
        text = stdout.read()
        if process.returncode != 0:
            raise SystemExit(f"bench: {' '.join(command)} failed with exit code {process.returncode}")
        left = sum(1 for one in seen.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE)
        return FleetRun(json.loads(text), wall_s, private, left)


def _look(process: psutil.Popen, seen: dict[int, psutil.Process], private: dict[int, int]) -> None:
    try:
        children = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        seen.setdefault(child.pid, child)
        try:
            title = " ".join(child.cmdline())
            if title.startswith("fleet: vm"):
                private[child.pid] = max(private.get(child.pid, 0), _private_bytes(child.pid))
        except (psutil.Error, OSError):
            # Gone, or not ours to look into: guests are non-dumpable, so only root sees their maps.
            continue


def _private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def cpu_model() -> str:
    """Name of this machine's CPU and how many of them there are."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} CPUs"
    return f"{os.cpu_count()} CPUs"
