"""Recorded memory accesses: the `.trace` file and what it says about pages.

A `.trace` is a compressed NumPy `.npz` (numpy.lib.format): one array a column, and `meta`, a JSON string. It is
written by `fleet trace import` and replayed by the guest's `trace` workload, which is why only NumPy is needed here.
Addresses are those of the recorded program. Left out: instruction addresses, threads, and data.
"""

import difflib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from proto.errors import TraceError
from proto.units import PAGE_SHIFT

TRACE_VERSION = 1
LOAD, STORE, MODIFY = 0, 1, 2
LLC_HIT = 1 << 7
"""Added to the kind of an access that the last-level cache serves."""
"""Values of `kind`; a modify is a read and a write of the same bytes by one instruction (Lackey's ``M``)."""
LLC_HIT = 1 << 7
"""OR-ed to the kind of an access by a guest's workload: the last-level cache serves it. In no file."""
USER_END = 1 << 56
"""End of the user half of a 57-bit address space (SDM vol. 1, 3.3.7.1); a trace holds no address beyond."""

ComputeUnit = Literal["instruction", "reference", "ns"]
COMPUTE_UNITS: tuple[ComputeUnit, ...] = ("instruction", "reference", "ns")
_COLUMNS = {"address": np.uint64, "kind": np.uint8, "size": np.uint16, "compute": np.uint32}


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceMeta:
    """Where a trace comes from and how to read its `compute` column."""

    version: int = TRACE_VERSION
    source: str = ""
    """Name of the recording, without its directory."""
    source_format: str = ""
    compute_unit: ComputeUnit = "reference"
    """Unit of `compute`: instructions; references (nothing is known between two of them but what
    `dropped_per_reference` says, `compute` is 0); nanoseconds of the recording's own clock."""
    dropped_per_reference: float = 0.0
    """References that a cache filter dropped for each one kept, where `compute` does not count them already."""
    trailing_compute: int = 0
    """Compute after the last reference."""
    lines: int = 0
    """Lines (or rows) of the recording."""
    instructions: int = 0
    skipped: int = 0
    """Lines that are no access and should not be: the tool's own messages, blank lines, kernel addresses."""
    filtered: int = 0
    """References that the importer's own cache filter dropped."""
    garbage: int = 0
    """Lines that could not be read."""
    garbage_lines: tuple[int, ...] = ()
    """Line numbers of the first of them, from 1."""


class Trace(NamedTuple):
    """n references in the order in which they were made."""

    address: npt.NDArray[np.uint64]
    """uint64[n]: first byte."""
    kind: npt.NDArray[np.uint8]
    """uint8[n]: LOAD, STORE or MODIFY."""
    size: npt.NDArray[np.uint16]
    """uint16[n]: bytes, at least 1 (1 where the recording did not say)."""
    compute: npt.NDArray[np.uint32]
    """uint32[n]: compute between the reference before and this one, in `meta.compute_unit`."""
    meta: TraceMeta


class TraceWriter:
    """Columns of a trace on their way to disk; memory use does not grow with the length of the trace."""

    def __init__(self, spools: Mapping[str, IO[bytes]]) -> None:
        self._spools = spools
        self.references = 0
        self.meta = TraceMeta()
        """To be set before the `with` block of `open_writer` ends."""

    def append(
        self,
        address: npt.NDArray[np.uint64],
        kind: npt.NDArray[np.uint8],
        size: npt.NDArray[np.uint16],
        compute: npt.NDArray[np.uint32],
    ) -> None:
        """Add references; arrays of equal length, dtypes as in `Trace`."""
        for (name, dtype), column in zip(_COLUMNS.items(), (address, kind, size, compute), strict=True):
            self._spools[name].write(np.ascontiguousarray(column, dtype).tobytes())
        self.references += len(address)


@contextmanager
def open_writer(path: Path) -> Iterator[TraceWriter]:
    """A writer whose file appears at `path` when the block ends without an exception, whole or not at all.

    Columns are spooled to unnamed files beside `path`, then compressed into a temporary file that is renamed.
    Raises TraceError if the place cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with ExitStack() as stack:
            spools = {name: stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for name in _COLUMNS}
            writer = TraceWriter(spools)
            yield writer
            with open(part, "xb") as file:
                _pack(file, spools, writer)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
    except OSError as error:
        raise TraceError(f"{path}: cannot write the trace: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _pack(file: IO[bytes], spools: Mapping[str, IO[bytes]], writer: TraceWriter) -> None:
    # numpy.savez wants whole arrays; these are longer than memory may be. Level 1: the columns repeat so much that a
    # higher level gains a few per cent for several times the time.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, dtype in _COLUMNS.items():
            spools[name].seek(0)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (writer.references,)}
                np.lib.format.write_array_header_1_0(member, header)
                while block := spools[name].read(1 << 20):
                    member.write(block)
        with archive.open("meta.npy", "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(asdict(writer.meta))), allow_pickle=False)


def write_trace(path: Path, trace: Trace) -> None:
    """Write a whole trace at once, atomically. Raises TraceError."""
    with open_writer(path) as writer:
        writer.append(trace.address, trace.kind, trace.size, trace.compute)
        writer.meta = trace.meta


def read_trace(path: Path) -> Trace:
    """The trace at `path`, checked: columns of equal length and right type, every access within user space.

    Raises TraceError: no such file, no trace, another version, damaged, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise TraceError(f"{path}: {_missing(path)}")
    try:
        if not zipfile.is_zipfile(path):
            raise TraceError(f"{path}: not a .trace file; make one of it with: fleet trace import {path} --out X.trace")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if missing := {*_COLUMNS, "meta"} - set(archive.files):
                raise TraceError(f"{path}: not a .trace file: it has no {', '.join(sorted(missing))}")
            meta = _meta(path, str(archive["meta"]))
            trace = Trace(archive["address"], archive["kind"], archive["size"], archive["compute"], meta)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, MemoryError, NotImplementedError) as error:
        raise TraceError(f"{path}: the trace is damaged ({error}); import it again") from error
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror or error}") from error
    if fault := _fault(trace):
        raise TraceError(f"{path}: the trace is damaged ({fault}); import it again")
    return trace


def _missing(path: Path) -> str:
    if path.exists():
        return "is no file"
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
    except OSError:
        return f"no such file: there is no directory {path.parent}"
    return f"no such file; did you mean {path.with_name(near[0])}?" if near else "no such file"


def _meta(path: Path, text: str) -> TraceMeta:
    values = json.loads(text)
    if not isinstance(values, dict) or not isinstance(values.get("version"), int):
        raise TraceError(f"{path}: not a .trace file: its meta has no version")
    if values["version"] != TRACE_VERSION:
        raise TraceError(
            f"{path}: written in trace format {values['version']}, this is format {TRACE_VERSION}; import it again"
        )
    for field in fields(TraceMeta):
        want: type | tuple[type, ...] = type(field.default)
        value = values.get(field.name)
        if not isinstance(value, (int, float) if want is float else list if want is tuple else want):
            raise ValueError(f"meta: {field.name} is {value!r}")
    if values["compute_unit"] not in COMPUTE_UNITS:
        raise ValueError(f"meta: compute_unit is {values['compute_unit']!r}")
    known = {field.name: values[field.name] for field in fields(TraceMeta)}
    return TraceMeta(**{**known, "garbage_lines": tuple(known["garbage_lines"])})


def _fault(trace: Trace) -> str:
    columns: dict[str, npt.NDArray[np.generic]] = {
        "address": trace.address,
        "kind": trace.kind,
        "size": trace.size,
        "compute": trace.compute,
    }
    for name, column in columns.items():
        if column.dtype != _COLUMNS[name] or column.shape != (len(trace.address),):
            return f"column {name} is {column.dtype}{list(column.shape)}, not {np.dtype(_COLUMNS[name])}[n]"
    if not len(trace.address):
        return "it has no references"
    if trace.kind.max() > MODIFY:
        return f"kind {trace.kind.max()} is unknown"
    if not trace.size.min():
        return "an access has size 0"
    if trace.address.max() >= USER_END or (trace.address + trace.size).max() > USER_END:
        return "an address is outside user space"
    return ""


def page_span(trace: Trace) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """First and last page number that each reference touches: uint64[n], uint64[n]."""
    last_byte = trace.address + (trace.size - np.uint16(1))
    return trace.address >> np.uint64(PAGE_SHIFT), last_byte >> np.uint64(PAGE_SHIFT)


def touched_pages(trace: Trace) -> npt.NDArray[np.uint64]:
    """Distinct page numbers, rising: uint64[pages]. An access across a page boundary touches every page it covers."""
    first, last = page_span(trace)
    pages = np.unique(first)
    crossing = last > first
    first, last = first[crossing], last[crossing]
    while len(first):
        first = first + np.uint64(1)
        pages = np.union1d(pages, first)
        more = last > first
        first, last = first[more], last[more]
    return pages


def regions(pages: npt.NDArray[np.uint64], gap_pages: int) -> list[tuple[int, int]]:
    """Areas as a program's VMAs would be: (first page, page count), rising, holes inside included.

    `pages`: uint64[n], distinct and rising (`touched_pages`). Two pages belong to one area unless more than
    `gap_pages` untouched pages lie between them.
    """
    if not len(pages):
        return []
    breaks = np.flatnonzero(np.diff(pages) > np.uint64(gap_pages + 1))
    starts = pages[np.concatenate(([0], breaks + 1))]
    ends = pages[np.concatenate((breaks, [len(pages) - 1]))]
    return [(int(start), int(end - start) + 1) for start, end in zip(starts, ends, strict=True)]
