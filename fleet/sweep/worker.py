"""What a Dask worker does for a sweep: makes its machine ready, and runs a cell as a process of its own.

A worker needs this package and Dask, no file system in common with anybody. When it dies, its cell's processes die
with it (`fleet.sweep.cell`).
"""

import asyncio
import io
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from distributed import WorkerPlugin

from fleet import __version__
from fleet.spec import load
from fleet.sweep.process import CellProcess, remove_tree


class Made(NamedTuple):
    """What a task returns."""

    reason: str
    """Why the cell failed; empty if it did not."""
    archive: bytes
    """Its directory, as a tar compressed with gzip."""


class MachineError(Exception):
    """This worker's machine could not run the cell; another may."""


class WarmUp(WorkerPlugin):
    """Before a worker's first cell: the same version there as here, and kernels compiled."""

    name = "tierfleet-warm-up"

    def __init__(self, names: list[str]) -> None:
        self._version = __version__
        self._names = names

    async def setup(self, worker: Any) -> None:
        """Raises MachineError."""
        if self._version != __version__:
            raise MachineError(f"{worker.address} has tierfleet {__version__}, the sweep {self._version}")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fleet.sweep.warm", *self._names, stderr=asyncio.subprocess.PIPE
        )
        _, said = await process.communicate()
        if process.returncode:
            words = said.decode(errors="replace").strip().splitlines() or ["no word why"]
            raise MachineError(f"{worker.address} cannot compile kernels: {words[-1]}")


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
