"""A recording as bytes: a file or standard input, plain, zstd or gzip, in chunks of whole lines.

Decompression is Arrow's (pyarrow.CompressedInputStream): it reads concatenated frames, as `zstd` and `pzstd` write
them, and reports a truncated stream, which the Python bindings of zstd take for the end of the file.
"""

import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from proto.errors import TraceError

CHUNK_BYTES = 4 << 20
MAX_LINE_BYTES = 1 << 20
_MAGIC = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip"}


class Lines(NamedTuple):
    """Whole lines; only the recording's last one can lack its newline."""

    data: bytes
    first: int
    """Number of the first line, from 1."""


class Source:
    """An open recording, a context manager. Raises TraceError if it cannot be opened, read or decompressed."""

    def __init__(self, path: Path, chunk_bytes: int = CHUNK_BYTES) -> None:
        """`path` ``-`` is standard input; `chunk_bytes` is what is held in memory at a time, decompressed."""
        self._is_stdin = str(path) == "-"
        self.name = "standard input" if self._is_stdin else str(path)
        self._chunk_bytes = chunk_bytes
        self._file = self._open(path)
        try:
            start = self._file.peek(4)
            self.compression = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")
            self._stream = (
                pa.CompressedInputStream(pa.PythonFile(self._file, "rb"), self.compression)
                if self.compression
                else self._file
            )
            self.bytes_total = path.stat().st_size if self._file.seekable() and path.is_file() else 0
            """Length of the file as stored; 0 where unknown."""
            self.head = self._read()
            """The first bytes, decompressed; `lines` gives them again."""
        except BaseException:
            self.__exit__()
            raise

    def _open(self, path: Path) -> BufferedReader:
        if self._is_stdin:
            return sys.stdin.buffer  # type: ignore[return-value]
        if path.is_dir():
            raise TraceError(f"{path}: is a directory; name the recording in it")
        try:
            return open(path, "rb")
        except OSError as error:
            raise TraceError(f"{path}: cannot read: {error.strerror or error}") from error

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_stdin:
            self._file.close()

    @property
    def bytes_done(self) -> int:
        """Stored bytes read so far, of `bytes_total`."""
        return self._file.tell() if self.bytes_total else 0

    def lines(self) -> Iterator[Lines]:
        """The recording from its start. Raises TraceError: truncated or damaged compression, or no text."""
        rest, block, first = b"", self.head, 1
        while block:
            block = rest + block
            end = block.rfind(b"\n") + 1
            if end:
                yield Lines(block[:end], first)
                first += block.count(b"\n", 0, end)
            rest = block[end:]
            if len(rest) > MAX_LINE_BYTES:
                raise TraceError(f"{self.name}: line {first} is longer than {MAX_LINE_BYTES} bytes; this is no text")
            block = self._read()
        if rest:
            yield Lines(rest, first)

    def _read(self) -> bytes:
        try:
            return bytes(self._stream.read(self._chunk_bytes))
        except (OSError, pa.ArrowException) as error:
            what = str(error)
            if "Truncated" in what:
                raise TraceError(
                    f"{self.name}: the {self.compression} stream is cut off; nothing was written, get the whole file"
                ) from error
            raise TraceError(f"{self.name}: cannot read: {what.splitlines()[0] if what else error!r}") from error
