"""The event log of a VM: which page went where and when, as binary records appended to a file of the run."""

import os

import numpy as np
import numpy.typing as npt

from proto.arrays import Words
from proto.layout import EVENT, EVENT_KINDS

_KIND = {name: index for index, name in enumerate(EVENT_KINDS)}
_FLUSH_AT = 4096


class EventLog:
    """Buffers `EVENT` records and appends them to ``path`` in whole writes; with an empty path it drops them."""

    def __init__(self, path: str, vm: int) -> None:
        self._vm = vm
        self._parts: list[npt.NDArray[np.void]] = []
        self._count = 0
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if path else -1

    def add(self, time_ps: int | Words, kind: str, addresses: npt.ArrayLike, source: int, target: int) -> None:
        """One event per address (gVA in a guest, gPA in the host) at ``time_ps`` (one, or int64[n])."""
        if self._file < 0:
            return
        address = np.atleast_1d(np.asarray(addresses, np.int64))
        records = np.zeros(address.size, EVENT)
        records["time_ps"], records["vm"], records["kind"] = time_ps, self._vm, _KIND[kind]
        records["gva"], records["source"], records["target"] = address, source, target
        self._parts.append(records)
        self._count += address.size
        if self._count >= _FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Append what is buffered."""
        if self._parts:
            os.write(self._file, np.concatenate(self._parts).tobytes())
            self._parts.clear()
            self._count = 0

    def close(self) -> None:
        """Flush and close."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1
