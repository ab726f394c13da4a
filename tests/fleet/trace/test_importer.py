"""From a recording to a trace: detection, thresholds, all or nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fleet.trace.importer import Format, ImportOptions, detect, import_trace
from fleet.trace.source import Source
from proto.errors import TraceError
from proto.trace import read_trace

LACKEY = b"==1== Lackey\n" + b"".join(
    b"I  1000,4\nI  1004,4\n L %x,8\n" % (0x10000 + 64 * index) for index in range(500)
)
PERF = b"".join(b" 1.%06d: mem-loads:     7f00000%05x\n" % (index, index) for index in range(500))
CSV = b"address,rw\n" + b"".join(b"%d,w\n" % (index * 4096) for index in range(500))


@pytest.fixture
def recording(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "recording").write_bytes(content)
        return tmp_path / "recording"

    return write


def convert(path: Path, **options: object) -> Path:
    out = path.with_name("out.trace")
    import_trace(path, out, ImportOptions(**options))  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize(
    ("content", "kind"), [(LACKEY, "lackey"), (PERF, "perf"), (CSV, "csv"), (b"\n\n" + CSV, "csv")]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_formats_are_detected(recording: Callable[[bytes], Path], content: bytes, kind: str, compressed: bool) -> None:
    path = recording(zstandard.compress(content) if compressed else content)
    with Source(path) as source:
        assert detect(source) == kind
    trace = read_trace(convert(path))
    assert len(trace.address) == 500
    assert (trace.meta.source, trace.meta.source_format) == ("recording", kind)


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"address": [4096, 8192], "rw": ["r", "w"]}), tmp_path / "x.parquet")
    trace = read_trace(convert(tmp_path / "x.parquet"))
    assert trace.address.tolist() == [4096, 8192]
    assert trace.meta.source_format == "parquet"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"\n\n", "neither Lackey"),
        (b"PERFILE2" + bytes(100), "perf script"),
        (b"PK\x03\x04", "already"),
        (b"hello\nworld\n", "neither Lackey"),
        (b"\x7fELF" + bytes(range(256)) * 10, "neither Lackey"),
        (zstandard.compress(LACKEY)[:-10], "cut off"),
    ],
)
def test_what_cannot_be_imported(recording: Callable[[bytes], Path], content: bytes, what: str) -> None:
    path = recording(content)
    with pytest.raises(TraceError, match=what):
        convert(path)
    assert list(path.parent.iterdir()) == [path]


def test_garbage_up_to_the_threshold_is_reported(recording: Callable[[bytes], Path]) -> None:
    path = recording(LACKEY + b"oops\n L 10\n")
    imported = import_trace(path, path.with_name("out.trace"), ImportOptions())
    assert imported.references == 500
    assert imported.meta.garbage_lines == (1502, 1503)
    assert any("2 of 1503 lines" in warning and "line 1502: 'oops'" in warning for warning in imported.warnings)


def test_garbage_beyond_the_threshold_is_refused(recording: Callable[[bytes], Path]) -> None:
    path = recording(LACKEY + b"oops\n" * 100)
    with pytest.raises(TraceError, match=r"100 of 1601 lines \(6.25 %\).*line 1502: 'oops'"):
        convert(path)
    assert list(path.parent.iterdir()) == [path]
    assert len(read_trace(convert(path, max_garbage=10.0)).address) == 500


def test_old_trace_survives_a_refused_import(recording: Callable[[bytes], Path]) -> None:
    path = recording(LACKEY)
    before = convert(path).read_bytes()
    recording(b"oops\n" * 100)
    with pytest.raises(TraceError):
        convert(path, format=Format.LACKEY)
    assert path.with_name("out.trace").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "options", "what"),
    [
        (b"==1== Lackey\n==1== bye\n", {}, "no reference left of 2 lines"),
        (b"I  1000,4\n" * 10, {}, "no reference left"),
        (b"".join(b" mem-loads:  ffffffff81%06x\n" % index for index in range(10)), {}, "10 references outside user"),
        (b" a: 0\n", {"format": Format.PERF}, "record data addresses"),
        (LACKEY, {"format": Format.CSV}, "no address column"),
        (LACKEY, {"format": Format.PARQUET}, "Parquet"),
        (LACKEY, {"max_garbage": 101.0}, "between 0 and 100"),
        (LACKEY, {"dropped_per_line": -1.0}, "0 or more"),
        (LACKEY, {"dropped_per_line": 1.0, "references_before_filter": 1}, "one of them"),
        (LACKEY, {"references_before_filter": 499}, "less than the 500"),
        (LACKEY, {"cache_bytes": 1000}, "power of two"),
    ],
)
def test_nothing_is_written(
    recording: Callable[[bytes], Path], content: bytes, options: dict[str, object], what: str
) -> None:
    path = recording(content)
    with pytest.raises(TraceError, match=what):
        convert(path, **options)
    assert list(path.parent.iterdir()) == [path]


def test_places_that_cannot_be_written(recording: Callable[[bytes], Path]) -> None:
    path = recording(LACKEY)
    pipe = path.parent / "pipe"
    os.mkfifo(pipe)
    for out, what in (
        (path, "recording itself"),
        (path.parent, "is a directory"),
        (path.parent / "no/x", "no directory"),
        (pipe, "no regular file"),
    ):
        with pytest.raises(TraceError, match=what):
            import_trace(path, out, ImportOptions())
    assert path.read_bytes() == LACKEY


def test_kernel_addresses_are_left_out_and_their_time_is_kept(recording: Callable[[bytes], Path]) -> None:
    path = recording(
        b" 1.000001: mem-loads:  10000\n 1.000002: mem-loads:  ffffffff81000000\n 1.000004: mem-stores:  20000\n"
    )
    trace = read_trace(convert(path))
    assert trace.address.tolist() == [0x10000, 0x20000]
    assert trace.compute.tolist() == [0, 3000]
    assert trace.meta.skipped == 1


def test_compute_beyond_32_bits_is_cut_and_noted(recording: Callable[[bytes], Path]) -> None:
    path = recording(b"time_s,address,rw\n0,1,r\n5,2,r\n")
    imported = import_trace(path, path.with_name("out.trace"), ImportOptions())
    assert read_trace(path.with_name("out.trace")).compute.tolist() == [0, (1 << 32) - 1]
    assert any("cut" in warning for warning in imported.warnings)


def test_dropped_references(recording: Callable[[bytes], Path]) -> None:
    path = recording(LACKEY)
    assert read_trace(convert(path)).meta.dropped_per_reference == 0
    assert read_trace(convert(path, dropped_per_line=1300.4)).meta.dropped_per_reference == pytest.approx(1300.4)
    assert read_trace(convert(path, references_before_filter=1500)).meta.dropped_per_reference == 2


def test_cache_filter_keeps_the_instructions(recording: Callable[[bytes], Path]) -> None:
    text = b"I  1000,4\n L 10000,8\nI  1004,4\n L 10008,8\nI  1008,4\n L 20000,8\nI  100c,4\n"
    trace = read_trace(convert(recording(text), cache_bytes=1024))
    assert trace.address.tolist() == [0x10000, 0x20000]
    assert trace.compute.tolist() == [1, 2]
    assert (trace.meta.filtered, trace.meta.trailing_compute, trace.meta.dropped_per_reference) == (1, 1, 0)
    without = b"".join(line for line in text.splitlines(keepends=True) if line.startswith(b" "))
    assert read_trace(convert(recording(without), cache_bytes=1024)).meta.dropped_per_reference == 0.5


def test_progress_rises_to_the_end(recording: Callable[[bytes], Path]) -> None:
    path = recording(LACKEY)
    seen: list[float] = []
    import_trace(path, path.with_name("out.trace"), ImportOptions(), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_long_recordings_in_chunks_are_like_short_ones(
    recording: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recording(LACKEY)
    whole = read_trace(convert(path))
    monkeypatch.setattr(Source.__init__, "__defaults__", (97,))
    parts = read_trace(convert(path))
    np.testing.assert_array_equal(whole.address, parts.address)
    np.testing.assert_array_equal(whole.compute, parts.compute)
    assert whole.meta == parts.meta
