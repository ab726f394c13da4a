"""Recordings as chunks of whole lines."""

import gzip
import io
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.trace import source
from fleet.trace.source import Source
from proto.errors import TraceError

TEXT = b"".join(b"line %d\n" % number for number in range(5000))


def read(path: Path, chunk_bytes: int = 1 << 12) -> bytes:
    """All lines; checks that chunks are whole lines and numbered through."""
    whole, number = b"", 1
    with Source(path, chunk_bytes) as opened:
        for chunk in opened.lines():
            assert chunk.first == number
            whole += chunk.data
            number += chunk.data.count(b"\n")
        assert opened.bytes_done == opened.bytes_total
    return whole


@pytest.mark.parametrize(
    "stored",
    [
        TEXT,
        zstandard.compress(TEXT),
        gzip.compress(TEXT),
        zstandard.compress(TEXT[:1000]) + zstandard.compress(TEXT[1000:]),  # frames, as parallel compressors write
    ],
)
def test_plain_and_compressed(tmp_path: Path, stored: bytes) -> None:
    (tmp_path / "x").write_bytes(stored)
    assert read(tmp_path / "x") == TEXT


@settings(deadline=None)
@given(st.lists(st.binary(max_size=9)).map(b"\n".join), st.integers(1, 50))
def test_any_content_in_any_chunks(tmp_path_factory: pytest.TempPathFactory, content: bytes, chunk_bytes: int) -> None:
    path = tmp_path_factory.mktemp("source") / "x"
    path.write_bytes(b"-" + content)
    assert read(path, chunk_bytes) == b"-" + content


@pytest.mark.parametrize("compress", [zstandard.compress, gzip.compress])
def test_truncated_or_damaged_stream_is_an_error(tmp_path: Path, compress: object) -> None:
    stored = (
        zstandard.ZstdCompressor(write_checksum=True).compress(TEXT)
        if compress is zstandard.compress
        else gzip.compress(TEXT)
    )
    for cut in (20, len(stored) // 2, len(stored) - 1):
        (tmp_path / "x").write_bytes(stored[:cut])
        with pytest.raises(TraceError, match="cut off"):
            read(tmp_path / "x")
    middle = len(stored) // 2
    (tmp_path / "x").write_bytes(stored[:middle] + bytes([stored[middle] ^ 255]) + stored[middle + 1 :])
    with pytest.raises(TraceError):
        read(tmp_path / "x")


def test_binary_without_lines_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_LINE_BYTES", 1000)
    (tmp_path / "x").write_bytes(b"a\n" + bytes(10_000))
    with pytest.raises(TraceError, match="line 2 is longer"):
        read(tmp_path / "x")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(zstandard.compress(TEXT)))))
    with Source(Path("-")) as opened:
        assert opened.name == "standard input"
        assert b"".join(chunk.data for chunk in opened.lines()) == TEXT
        assert opened.bytes_total == 0


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="is a directory"):
        Source(tmp_path)
    with pytest.raises(TraceError, match="No such file"):
        Source(tmp_path / "x")
