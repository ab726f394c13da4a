"""fleet.sweep.cluster: a real scheduler and three worker processes, of which one is killed in the middle of a cell."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from fleet.sweep.store import load
from tests.fleet.sweep.conftest import CELLS, ROOT, deterministic, family, fleet, has_guest, start, until

pytestmark = pytest.mark.timeout(600)  # the first run of a machine compiles


def dask(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """A process of Dask's own command line."""
    command = [sys.executable, "-m", "distributed.cli." + str(arguments[0]), *map(str, arguments[1:])]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Path, list[psutil.Process]]]:
    """The scheduler's file, and three workers without nannies: what is killed stays dead."""
    file = tmp_path / "scheduler.json"
    with ExitStack() as stack:

        def process(*arguments: str | Path) -> subprocess.Popen[bytes]:
            child = stack.enter_context(dask(*arguments))
            stack.callback(child.kill)
            return child

        process("dask_scheduler", "--scheduler-file", file, "--port", "0", "--no-dashboard", "--host", "127.0.0.1")
        until(file.is_file)
        options = ("--scheduler-file", file, "--nthreads", "1", "--no-nanny", "--no-dashboard")
        folders = [tmp_path / f"worker{number}" for number in range(3)]
        workers = [process("dask_worker", *options, "--local-directory", folder) for folder in folders]
        wait = f"from distributed import Client; Client(scheduler_file={str(file)!r}).wait_for_workers(3, timeout=300)"
        subprocess.run([sys.executable, "-c", wait], check=True, capture_output=True)
        yield file, [psutil.Process(worker.pid) for worker in workers]


def test_a_worker_is_killed_in_the_middle_of_a_cell(
    cluster: tuple[Path, list[psutil.Process]], tiny: Path, undisturbed: Path, tmp_path: Path
) -> None:
    file, workers = cluster
    out = tmp_path / "out"
    with start("sweep", tiny, "--out", out, "--engine", "dask", "--scheduler", file) as (sweep, stderr):
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = [worker for worker in workers if has_guest(family(worker))]
            return bool(found) or sweep.poll() is not None

        until(look)
        victim = found[0]
        its_cell = family(victim)
        victim.kill()
        said = stderr.read()
        assert sweep.wait() == 0, said
    assert psutil.wait_procs(its_cell, timeout=60)[1] == []
    cells = load(out)
    assert [cell.status for cell in cells] == ["done"] * CELLS
    assert {path.name for path in (out / "cells").iterdir()} == {cell.hash for cell in cells}
    assert said.count(" ETA ") == CELLS, "each cell came in once"
    digests = [json.loads((where / "results.json").read_text())["digest"] for where in (out, undisturbed)]
    assert digests[0] == digests[1]
    assert deterministic(out) == deterministic(undisturbed)
    assert {cell.info["cpu_measured"] for cell in cells} == {"shared"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--engine", "dask"), "--scheduler: where is it?"),
        (("--engine", "dusk", "--scheduler", "tcp://x"), "did you mean 'dask'"),
        (("--scheduler", "tcp://x"), "belongs to --engine dask"),
    ],
)
def test_an_engine_that_makes_no_sense_is_refused(
    flags: tuple[str, ...], says: str, tiny: Path, tmp_path: Path
) -> None:
    done = fleet("sweep", tiny, "--out", tmp_path / "out", *flags)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert says in done.stderr
