"""The `.trace` file and its pages."""

import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.errors import TraceError
from proto.trace import (
    LOAD,
    MODIFY,
    STORE,
    USER_END,
    Trace,
    TraceMeta,
    open_writer,
    read_trace,
    regions,
    touched_pages,
    write_trace,
)

META = TraceMeta(source="x.lackey", source_format="lackey", compute_unit="instruction", lines=9, garbage_lines=(3, 7))


def make(references: list[tuple[int, int]]) -> Trace:
    """A trace of (address, size)."""
    n = len(references)
    return Trace(
        np.array([address for address, _ in references], np.uint64),
        np.arange(n, dtype=np.uint8) % 3,
        np.array([size for _, size in references], np.uint16),
        np.arange(n, dtype=np.uint32),
        META,
    )


references = st.lists(st.tuples(st.integers(0, USER_END - 1 - (1 << 16)), st.integers(1, (1 << 16) - 1)), min_size=1)
near_references = st.lists(st.tuples(st.integers(0, 1 << 18), st.integers(1, (1 << 16) - 1)), min_size=1)


@settings(deadline=None)
@given(references)
def test_reads_what_was_written(tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, int]]) -> None:
    trace = make(made)
    path = tmp_path_factory.mktemp("trace") / "x.trace"
    write_trace(path, trace)
    back = read_trace(path)
    for column in ("address", "kind", "size", "compute"):
        np.testing.assert_array_equal(getattr(back, column), getattr(trace, column), strict=True)
    assert back.meta == META


def test_same_trace_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_trace(tmp_path / name, make([(1, 2), (3, 4)]))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_numpy_alone_reads_it(tmp_path: Path) -> None:
    write_trace(tmp_path / "x.trace", make([(4096, 8), (8192, 8)]))
    with np.load(tmp_path / "x.trace", allow_pickle=False) as archive:
        assert archive["address"].tolist() == [4096, 8192]


def test_appended_in_parts(tmp_path: Path) -> None:
    whole = make([(page << 12, 8) for page in range(10)])
    with open_writer(tmp_path / "x.trace") as writer:
        for part in (slice(0, 3), slice(3, 3), slice(3, 10)):
            writer.append(whole.address[part], whole.kind[part], whole.size[part], whole.compute[part])
        writer.meta = META
    assert read_trace(tmp_path / "x.trace").compute.tolist() == list(range(10))


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), open_writer(path) as writer:
        writer.append(*make([(0, 1)])[:4])
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_trace(tmp_path / "sort.trace", make([(0, 1)]))
    with pytest.raises(TraceError, match=r"did you mean .*sort\.trace"):
        read_trace(tmp_path / "sotr.trace")


def test_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot write"):
        write_trace(tmp_path / "no" / "x.trace", make([(0, 1)]))


@pytest.mark.parametrize("content", [b"", b" L 1000,8\n", b"PK\x03\x04nothing"])
def test_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(TraceError, match="fleet trace import"):
        read_trace(tmp_path / "x")


def test_any_other_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", address=np.zeros(1, np.uint64))
    with pytest.raises(TraceError, match="no compute, kind, meta, size"):
        read_trace(tmp_path / "x.npz")


@settings(deadline=None)
@given(st.data())
def test_damage_is_an_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("trace") / "x.trace"
    trace = make([(page << 12, 8) for page in range(100)])
    write_trace(path, trace)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        back = read_trace(path)
    except TraceError:
        return
    for column, same in zip(trace[:4], back[:4], strict=True):  # a bit that matters to nobody, as in a time stamp
        np.testing.assert_array_equal(column, same)


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (make([]), "no references"),
        (make([(0, 0)]), "size 0"),
        (make([(USER_END - 1, 2)]), "outside user space"),
        (make([((1 << 64) - 1, 1)]), "outside user space"),
        (make([(0, 1)])._replace(kind=np.array([3], np.uint8)), "kind 3"),
        (make([(0, 1)])._replace(meta=replace(META, version=99)), "format 99"),
        (make([(0, 1)])._replace(meta=replace(META, compute_unit="hour")), "hour"),  # type: ignore[arg-type]
        (make([(0, 1)])._replace(meta=replace(META, lines="many")), "many"),  # type: ignore[arg-type]
    ],
)
def test_implausible_content_is_refused(tmp_path: Path, broken: Trace, what: str) -> None:
    write_trace(tmp_path / "x.trace", broken)
    with pytest.raises(TraceError, match=what):
        read_trace(tmp_path / "x.trace")


def test_columns_of_different_length_or_type_are_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "x.trace", make([(0, 1), (1, 1)]))
    with np.load(tmp_path / "x.trace") as archive:
        columns = dict(archive)
    for name, column in (("size", columns["size"][:1]), ("address", columns["address"].astype(np.int64))):
        with open(tmp_path / "y.trace", "wb") as file:
            np.savez(file, **{**columns, name: column})
        with pytest.raises(TraceError, match=f"column {name}"):
            read_trace(tmp_path / "y.trace")


def test_is_a_plain_zip(tmp_path: Path) -> None:
    write_trace(tmp_path / "x.trace", make([(0, 1)]))
    with zipfile.ZipFile(tmp_path / "x.trace") as archive:
        assert archive.testzip() is None


@settings(deadline=None)
@given(near_references)
def test_touched_pages_are_those_of_every_byte(made: list[tuple[int, int]]) -> None:
    pages = sorted({page for address, size in made for page in range(address >> 12, (address + size - 1 >> 12) + 1)})
    assert touched_pages(make(made)).tolist() == pages


def test_crossing_access_touches_both_pages() -> None:
    assert touched_pages(make([(4095, 1)])).tolist() == [0]
    assert touched_pages(make([(4095, 2)])).tolist() == [0, 1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 200), unique=True).map(sorted), st.integers(0, 20))
def test_regions_cover_pages_and_are_apart(pages: list[int], gap: int) -> None:
    found = regions(np.array(pages, np.uint64), gap)
    covered = {page for start, count in found for page in range(start, start + count)}
    assert set(pages) <= covered
    for (start, count), (after, _) in pairwise(found):
        assert after - (start + count) > gap
    for start, count in found:
        inside = [page for page in pages if start <= page < start + count]
        assert (inside[0], inside[-1]) == (start, start + count - 1)
        assert all(b - a - 1 <= gap for a, b in pairwise(inside))


def test_kinds_are_distinct() -> None:
    assert (LOAD, STORE, MODIFY) == (0, 1, 2)
