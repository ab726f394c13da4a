"""Starting a cell as a process of its own, and telling how it ended. Used by the local engine and by Dask's workers."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fleet.atomic import write_atomic
from fleet.experiment import Experiment

_STOP_S = 30.0
"""How long a fleet that is asked to end may take (`fleet.launcher` gives it 20 s to report)."""
_REFUSED = 2


class Ending(NamedTuple):
    """How a cell ended."""

    ok: bool
    reason: str
    """Of a failure, one line; else empty."""
    emulated: bool
    """It ran and left a summary: a failure is then one of the emulated fleet, not of this machine."""


class CellProcess:
    """A running cell. Its run directory is ``folder/name``, which appears in ``folder`` with its spec and its words."""

    def __init__(self, experiment: Experiment, name: str, folder: Path) -> None:
        self.directory = folder / name
        self._digest = experiment.digest
        spec, self._words = folder / f"{name}.toml", folder / f"{name}.stderr"
        write_atomic(spec, experiment.to_toml())
        command = [sys.executable, "-P", "-m", "fleet.sweep.cell", str(spec), str(self.directory)]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with self._words.open("wb") as words:
            # Ctrl-C in a terminal reaches the foreground group; what it means for a cell, the sweep decides.
            self._process = subprocess.Popen(
                [*command, "--parent", str(os.getpid())], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=words, env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
        self.pidfd = os.pidfd_open(self._process.pid)
        """Readable when the cell has ended."""

    def wait(self) -> Ending:
        """How it ended; waits for that."""
        code = self._process.wait()
        self._close()
        try:
            summary = json.loads((self.directory / "summary.json").read_text("utf-8"))
        except (OSError, ValueError):
            return Ending(False, self._last_words(code), False)
        if summary["run"]["spec_digest"] != self._digest:
            return Ending(False, "its resolved spec, read back, is another experiment", True)
        if code == 0 and summary["outcome"] == "ok":
            return Ending(True, "", True)
        errors = [_line(error) for error in summary["errors"]]
        return Ending(False, "; ".join(errors) or f"the run was {summary['outcome']}", summary["outcome"] == "failed")

    def stop(self) -> None:
        """End it in order, or else by force."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _last_words(self, code: int) -> str:
        lines = self._words.read_text("utf-8", errors="replace").strip().splitlines()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if lines and code == _REFUSED:
            return lines[-1]
        return f"no summary, {how}" + (f": {lines[-1]}" if lines else "")


def _line(error: dict[str, object]) -> str:
    vm = "" if error.get("vm") is None else f"vm{error['vm']}: "
    return f"{vm}{error['kind']}: {error['message']}"


def remove_tree(folder: Path) -> None:
    """Remove a directory in which a process that was just killed may still write."""
    import shutil

    for _ in range(3):
        with suppress(OSError):
            shutil.rmtree(folder)
        if not folder.exists():
            return
