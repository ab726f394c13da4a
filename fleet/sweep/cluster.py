"""The Dask engine: cells as tasks of a Dask cluster, whose workers need this package and nothing in common but that.

A task gets a resolved spec as text, runs it as a process of the worker's machine and returns its directory as a tar.
A worker that dies takes its cell's processes along (`fleet.sweep.cell`), and the scheduler gives the task to another;
a cell that comes twice is stored once. A failure of the emulated fleet is a result like any other; a machine that could
not run the cell (no memory, no processes) is an error, which Dask retries. Kernels are compiled once per worker, before
its first cell, by a `WorkerPlugin` that also refuses a worker of another version.
"""

import io
import tarfile
import tempfile
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fleet import __version__
from fleet.errors import LaunchError, SpecError
from fleet.spec import installed, load
from fleet.sweep.process import CellProcess, remove_tree
from fleet.sweep.progress import Progress
from fleet.sweep.spec import Point
from fleet.sweep.store import Store

if TYPE_CHECKING:
    from distributed import Client

_CONNECT_S = 30


class Made(NamedTuple):
    """What a worker returns."""

    reason: str
    """Why the cell failed; empty if it did not."""
    archive: bytes
    """Its directory, as a tar compressed with gzip."""


class MachineError(Exception):
    """This worker's machine could not run the cell; another may."""


class DaskEngine:
    """Runs cells on the cluster of a scheduler, ``tcp://HOST:PORT`` or a scheduler file."""

    def __init__(self, scheduler: str, retries: int = 2) -> None:
        self._scheduler = scheduler
        self._retries = retries

    def run(self, points: Sequence[Point], store: Store, progress: Progress) -> None:
        """Run them all; each ends in the store. Raises LaunchError if the cluster can't be reached or is lost."""
        with _connect(self._scheduler) as client:
            from distributed import as_completed

            try:
                client.register_plugin(_warm_up_plugin())
            except Exception as error:
                raise LaunchError(f"a worker of {self._scheduler} cannot be used: {error}") from None
            # Keys of this sweep alone: what an earlier one left in the scheduler must not count.
            sweep = uuid.uuid4().hex[:8]
            tasks = {}
            for number, point in enumerate(points):
                future = client.submit(
                    run_cell, point.experiment.to_toml(), point.hash, key=f"cell-{point.hash}-{sweep}",
                    retries=self._retries, priority=-number, pure=False,
                )  # fmt: skip
                tasks[future] = point
                progress.started(point)
            try:
                ended = as_completed(list(tasks))
                for future in ended:
                    point = tasks.pop(future)
                    self._take_in(point, future, store, progress, _sharing(client))
                    # Its archive is here; the cluster need not keep it.
                    future.release()
            finally:
                client.cancel(list(tasks), force=True)

    def _take_in(self, point: Point, future: Any, store: Store, progress: Progress, shared: bool) -> None:
        folder = store.work / point.hash
        error = future.exception()
        if error is None:
            made: Made = future.result()
            with tarfile.open(fileobj=io.BytesIO(made.archive)) as archive:
                archive.extractall(folder, filter="data")
            reason = made.reason
        else:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        store.accept(point, folder, reason, "shared" if shared else "alone")
        progress.finished(point, reason)


def run_cell(spec: str, name: str) -> Made:
    """A task: run the cell of a resolved spec on this machine. Raises MachineError if that is not possible here."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-cell-"))
    try:
        file = folder / "given.toml"
        file.write_text(spec, "utf-8")
        process = CellProcess(load(file), name, folder)
        ending = process.wait()
        if not (ending.ok or ending.emulated):
            raise MachineError(ending.reason)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
            for path in sorted(process.directory.iterdir()):
                archive.add(path, path.name)
        return Made(ending.reason, packed.getvalue())
    finally:
        remove_tree(folder)


def warm_up(version: str) -> None:
    """Compile the kernels of all policies and workloads into this machine's cache. Raises MachineError."""
    if version != __version__:
        raise MachineError(f"it has tierfleet {__version__}, the sweep {version}; install the same on all machines")
    import subprocess
    import sys

    script = "from fleet.sweep.cluster import warm_up_here; warm_up_here()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"warming up failed: {(done.stderr.strip().splitlines() or ['no words'])[-1]}")


def _connect(scheduler: str) -> "Client":
    try:
        from distributed import Client
    except ImportError:
        raise SpecError("--engine dask: needs the extra: pip install 'tierfleet[dask]'") from None
    try:
        if scheduler.endswith(".json"):
            return Client(scheduler_file=scheduler, timeout=_CONNECT_S, set_as_default=False)
        return Client(scheduler, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise LaunchError(f"no Dask scheduler at {scheduler}: {error}; see deploy/README.md") from None


def _sharing(client: "Client") -> bool:
    """Whether cells may run beside each other on some machine: several workers, or threads of one, at an address."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any(slots > 1 for slots in sum((Counter({w["host"]: w["nthreads"]}) for w in workers), Counter()).values())
