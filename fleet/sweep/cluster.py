"""The Dask engine: cells as tasks of a Dask cluster, each of which returns its directory as a tar.

A worker that dies takes its cell's processes along, and the scheduler gives the task to another; a cell that comes
twice is stored once. A failure of the emulated fleet is a result like any other; a machine that could not run the cell
(no memory, no processes) is an error, which Dask retries elsewhere. What workers do: `fleet.sweep.worker`.
"""

import io
import tarfile
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from fleet.errors import LaunchError, SpecError
from fleet.sweep.progress import Progress
from fleet.sweep.spec import Point
from fleet.sweep.store import Store

if TYPE_CHECKING:
    from distributed import Client

_CONNECT_S = 30


class DaskEngine:
    """Runs cells on the cluster of a scheduler, ``tcp://HOST:PORT`` or a scheduler file (``*.json``)."""

    def __init__(self, scheduler: str, retries: int = 2) -> None:
        self._scheduler = scheduler
        self._retries = retries

    def run(self, points: Sequence[Point], store: Store, progress: Progress) -> None:
        """Run them all; each ends in the store. Raises LaunchError if the cluster can't be reached or is lost."""
        with _connect(self._scheduler) as client:
            from distributed import as_completed

            from fleet.sweep.worker import WarmUp, run_cell

            try:
                client.register_plugin(WarmUp(_names(points)))
            except Exception as error:
                raise LaunchError(f"a worker of {self._scheduler} cannot be used: {error}") from None
            # Keys of this sweep alone: what an earlier one left with the scheduler must not count.
            sweep = uuid.uuid4().hex[:8]
            tasks: dict[Any, Point] = {}
            for number, point in enumerate(points):
                key = f"cell-{point.hash}-{sweep}"
                future = client.submit(
                    run_cell, point.experiment.to_toml(), point.hash, key=key, retries=self._retries, priority=-number
                )
                tasks[future] = point
                progress.started(point)
            try:
                for future in as_completed(list(tasks)):  # type: ignore[no-untyped-call]
                    self._take_in(tasks[future], future, store, progress, "shared" if _sharing(client) else "alone")
                    del tasks[future]
                    future.release()  # its archive is here; the cluster need not keep it
            finally:
                client.cancel(list(tasks), force=True)

    def _take_in(self, point: Point, future: Any, store: Store, progress: Progress, cpu_measured: str) -> None:
        folder = store.work / point.hash
        try:
            error = future.exception()
        except CancelledError:
            raise LaunchError(f"the scheduler {self._scheduler} was lost; run it again to go on") from None
        if error is None:
            made = future.result()
            with tarfile.open(fileobj=io.BytesIO(made.archive)) as archive:
                archive.extractall(folder, filter="data")
            reason = made.reason
        else:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        store.accept(point, folder, reason, cpu_measured)
        progress.finished(point, reason)


def _names(points: Sequence[Point]) -> list[str]:
    """The policies and workloads of all cells."""
    tenants = [tenant for point in points for tenant in point.experiment.tenants]
    return sorted({tenant.policy for tenant in tenants} | {tenant.workload for tenant in tenants})


def _connect(scheduler: str) -> "Client":
    try:
        from distributed import Client
    except ImportError:
        raise SpecError("--engine dask: needs the extra: pip install 'tierfleet[dask]'") from None
    try:
        where = {"scheduler_file": scheduler} if scheduler.endswith(".json") else {"address": scheduler}
        return Client(**where, timeout=_CONNECT_S)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as error:
        raise LaunchError(f"no Dask scheduler at {scheduler}: {error}; see deploy/README.md") from None


def _sharing(client: "Client") -> bool:
    """Whether cells may run beside each other on some machine: several workers, or threads of one, on one host."""
    slots: Counter[str] = Counter()
    for worker in client.scheduler_info(n_workers=-1)["workers"].values():
        slots[worker["host"]] += worker["nthreads"]
    return any(count > 1 for count in slots.values())
