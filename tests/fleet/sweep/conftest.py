"""A tiny sweep, once undisturbed for all tests that compare with it."""

import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import pyarrow.parquet as pq
import pytest

from fleet import hosts
from fleet.summary import is_deterministic

ROOT = Path(hosts.__file__).parent.parent

TINY = """
name = "tiny"
where = "vms == 1 or policy == 'g-tpp'"
[base]
seconds = 0.3
memory = "16MiB"
workload = "scan"
set.policy.scan_delay_ms = 20
[axes]
vms = "1..2"
policy = "g-tpp,none"
"""
CELLS = 3


def fleet(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    command = [sys.executable, "-m", "fleet", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@contextmanager
def start(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """The command, under way, and its standard error; killed at the end of the block if it still runs."""
    command = [sys.executable, "-m", "fleet", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield process, process.stderr
        finally:
            process.kill()


def until(condition: Callable[[], bool], seconds: float = 100.0) -> None:
    """Wait for a condition; fails after a time that only a broken program takes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        select.select([], [], [], 0.02)  # leaves the core to what is waited for


def family(process: psutil.Process) -> list[psutil.Process]:
    """All that it started, directly or not."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def has_guest(processes: list[psutil.Process]) -> bool:
    """Whether a guest of a fleet is among them."""
    for process in processes:
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("fleet: vm"):
                return True
        except psutil.Error:
            continue
    return False


def deterministic(directory: Path) -> list[dict[str, Any]]:
    """The rows of results.parquet without what this machine measured."""
    rows = pq.read_table(directory / "results.parquet").to_pylist()
    free = {key for row in rows for key in row if is_deterministic(_path(key))}
    named = {"cell", "repetition", "seed", "vm", "vms", "policy"}
    assert len(free) > 100
    return [{key: value for key, value in row.items() if key in free | named} for row in rows]


def _path(key: str) -> str:
    return key if key.startswith(("elapsed.", "host.")) else f"vms.0.{key.removeprefix('vm.')}"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the tiny sweep."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def undisturbed(tiny: Path) -> Path:
    """The directory of the tiny sweep, run without trouble."""
    out = tiny.parent / "undisturbed"
    done = fleet("sweep", tiny, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out
