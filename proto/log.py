"""Log lines of one process: whole JSON objects, one write each, to a file opened for appending.

A raw-forked process must not depend on a queue that a killed sibling can jam (architecture 5), so each writes its own
file; the results of a run merge them by (time, vm, sequence).
"""

import os
import time

import msgspec


class LineLog:
    """Appends ``{time_ns, vm, seq, process, level, message}`` to ``path``; an empty path swallows everything.

    ``vm`` is the VM's number, None for a process that is no VM; ``process`` says which one it is.
    """

    def __init__(self, path: str, vm: int | None, process: str) -> None:
        self._path = path
        self._vm = vm
        self._process = process
        self._seq = 0
        self._fd = -1

    def _write(self, level: str, message: str) -> None:
        if not self._path:
            return
        line = {
            "time_ns": time.time_ns(),
            "vm": self._vm,
            "seq": self._seq,
            "process": self._process,
            "level": level,
            "message": message,
        }
        self._seq += 1
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.write(self._fd, msgspec.json.encode(line) + b"\n")
        except OSError:
            # A full disk must not take the guest down with it, and there is no one left to tell.
            self._path = ""

    def info(self, message: str) -> None:
        """What a reader of the run wants to know."""
        self._write("info", message)

    def warning(self, message: str) -> None:
        """Something is odd; the run goes on."""
        self._write("warning", message)

    def error(self, message: str) -> None:
        """Something failed."""
        self._write("error", message)

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
