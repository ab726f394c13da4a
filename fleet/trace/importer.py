"""A recording becomes a `.trace`: detect its format, read it in chunks, filter, write; all or nothing.

What counts as garbage is each reader's to say; how much of it a trace may lose is decided here. References outside the
user half of the address space (perf samples the kernel too) are skipped: a guest's workload is a user program.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from fleet.trace import lackey, perf, table
from fleet.trace.batch import Batch, Tally
from fleet.trace.source import Source
from proto.errors import TraceError
from proto.trace import USER_END, TraceMeta, TraceWriter, open_writer

_MAX_COMPUTE = (1 << 32) - 1
_DETECT_BYTES = 1 << 16
_DETECT_SHARE = 0.2


class Format(StrEnum):
    """What a recording can be written in."""

    LACKEY = "lackey"
    PERF = "perf"
    CSV = "csv"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """How to read a recording."""

    format: Format | None = None
    """None: find out."""
    dropped_per_line: float | None = None
    """References that a filter had dropped before the recording was written, for each line it left."""
    references_before_filter: int | None = None
    """The same as a total. At most one of the two."""
    cache_bytes: int = 0
    """Drop what hits in a cache of this size; 0 = keep all."""
    max_garbage: float = 1.0
    """Lines that may be unreadable, per cent."""
    time_unit: str = "ns"
    """Unit of a table's time column unless its name or type says."""
    hexadecimal: bool = False
    """A table's addresses are hexadecimal even without ``0x``."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of an import."""

    meta: TraceMeta
    references: int
    warnings: tuple[str, ...]
    """One line each, for standard error."""


Progress = Callable[[float], None]
"""Called with the share that is done, 0 to 1."""


def import_trace(path: Path, out: Path, options: ImportOptions, progress: Progress = lambda _: None) -> Imported:
    """Read the recording at `path` (``-`` = standard input) into the trace `out`.

    Raises TraceError, and leaves `out` as it was: unreadable or truncated, of unknown format, more than
    `options.max_garbage` per cent unreadable lines, or no reference left.
    """
    _check(path, out, options)
    tally = Tally()
    with Source(path) as source, open_writer(out) as writer:
        kind = options.format or detect(source)
        pump = _Pump(writer, tally, options.cache_bytes)
        for batch in _batches(source, path, kind=kind, options=options, tally=tally, progress=progress):
            pump.push(batch)
        _judge(source.name, kind, tally, writer.references, options.max_garbage)
        writer.meta = TraceMeta(
            source=source.name if str(path) == "-" else path.name,
            source_format=kind.value,
            compute_unit=tally.compute_unit,
            dropped_per_reference=_dropped(writer.references + pump.filtered, pump.filtered, options, tally),
            trailing_compute=tally.trailing_compute + pump.carry,
            lines=tally.lines,
            instructions=tally.instructions,
            skipped=sum(tally.skipped.values()),
            filtered=pump.filtered,
            garbage=tally.garbage,
            garbage_lines=tuple(sorted(example.line for example in tally.examples)),
        )
    return Imported(writer.meta, writer.references, tuple(_warnings(source.name, kind, tally)))


def detect(source: Source) -> Format:
    """The format of a recording by its first bytes. Raises TraceError if it is none that can be read."""
    head = source.head[:_DETECT_BYTES]
    if not head:
        raise TraceError(f"{source.name}: is empty; there is nothing to import")
    if head.startswith(b"PAR1"):
        return Format.PARQUET
    if head.startswith(b"PERFILE2"):
        raise TraceError(f"{source.name}: is perf's binary file; print it: perf script -F time,event,addr -i FILE")
    if head.startswith(b"PK\x03\x04"):
        raise TraceError(f"{source.name}: is a zip archive, perhaps a .trace already (fleet trace info)")
    lines = head.split(b"\n")
    if len(source.head) > len(head) and len(lines) > 1:
        lines.pop()  # cut by us
    lines = [line for line in lines if line.strip()]
    shares = {
        kind: sum(map(matches, lines)) / max(len(lines), 1)
        for kind, matches in ((Format.LACKEY, lackey.matches), (Format.PERF, perf.matches))
    }
    best = max(shares, key=lambda kind: shares[kind])
    if shares[best] >= _DETECT_SHARE:
        return best
    if table.is_csv(head):
        return Format.CSV
    start = lines[0][:40].decode(errors="replace") if lines else ""
    raise TraceError(
        f"{source.name}: neither Lackey, perf, CSV nor Parquet; it starts with {start!r}. "
        f"Name the format with --format {{{','.join(Format)}}}. For perf, {perf.HINT}"
    )


def _check(path: Path, out: Path, options: ImportOptions) -> None:
    if options.dropped_per_line is not None and options.references_before_filter is not None:
        raise TraceError("--dropped-per-line and --references-before-filter say the same; give one of them")
    if not 0 <= (options.dropped_per_line or 0.0) < math.inf:
        raise TraceError(f"--dropped-per-line {options.dropped_per_line} must be 0 or more")
    if not 0 <= options.max_garbage <= 100:
        raise TraceError(f"--max-garbage {options.max_garbage:g} must be between 0 and 100 (per cent)")
    try:
        _check_files(path, out)
    except OSError as error:
        raise TraceError(f"{error.filename or path}: cannot look at it: {error.strerror}") from error


def _check_files(path: Path, out: Path) -> None:
    if out.is_dir() or not out.parent.is_dir():
        problem = "is a directory" if out.is_dir() else f"there is no directory {out.parent}"
        raise TraceError(f"{out}: {problem}; name a file to write with --out")
    if out.exists() and not out.is_file():
        raise TraceError(f"{out}: is no regular file; name a file to write with --out")
    if path.exists() and out.exists() and path.samefile(out):
        raise TraceError(f"{out}: is the recording itself; name another file with --out")


def _batches(
    source: Source, path: Path, *, kind: Format, options: ImportOptions, tally: Tally, progress: Progress
) -> Iterator[Batch]:
    if kind is Format.PARQUET:
        if str(path) == "-" or source.compression:
            raise TraceError(f"{source.name}: Parquet is read from an uncompressed file only, not from a pipe")
        for batch, share in table.parquet_batches(path, options.time_unit, options.hexadecimal, tally):
            progress(share)
            yield batch
        return
    if kind is Format.LACKEY:
        batches = lackey.batches(source.lines(), tally)
    elif kind is Format.PERF:
        batches = perf.batches(source.lines(), tally)
    else:
        layout = table.csv_layout(source.head, source.name, options.time_unit, options.hexadecimal)
        batches = table.csv_batches(source.lines(), layout, tally)
    for batch in batches:
        progress(source.bytes_done / source.bytes_total if source.bytes_total else 0.0)
        yield batch


class _Pump:
    """From batches to the writer, through the filters; compute of what is dropped passes on to what is kept."""

    def __init__(self, writer: TraceWriter, tally: Tally, cache_bytes: int) -> None:
        self._writer = writer
        self._tally = tally
        self._cache = None
        if cache_bytes:
            from fleet.trace.cache_filter import CacheFilter  # compiles; most imports do without

            self._cache = CacheFilter(cache_bytes)
        self.filtered = 0
        self.carry = 0
        """Compute since the last reference written."""

    def push(self, batch: Batch) -> None:
        in_user = batch.address <= np.uint64(USER_END) - batch.size
        if outside := int(np.count_nonzero(~in_user)):
            self._tally.skipped["references outside user space"] += outside
        batch, self.carry = batch.select(in_user, self.carry)
        if self._cache is not None:
            missed = self._cache.misses(batch.address, batch.size)
            self.filtered += len(missed) - int(np.count_nonzero(missed))
            batch, self.carry = batch.select(missed, self.carry)
        if long := int(np.count_nonzero(batch.compute > _MAX_COMPUTE)):
            self._tally.notes["compute longer than 32 bits hold; cut"] += long
        compute = np.minimum(batch.compute, _MAX_COMPUTE).astype(np.uint32)
        self._writer.append(batch.address, batch.kind, batch.size, compute)


def _dropped(references: int, filtered: int, options: ImportOptions, tally: Tally) -> float:
    """References dropped per reference kept, by the recording's filter and ours; 0 where compute counts them."""
    dropped = references * (options.dropped_per_line or 0.0)
    if (before := options.references_before_filter) is not None:
        if before < references:
            raise TraceError(f"--references-before-filter {before} is less than the {references} of the recording")
        dropped = float(before - references)
    # Instructions and time between two kept references include those that our filter dropped, not the recording's.
    if tally.compute_unit == "reference":
        dropped += filtered
    return dropped / (references - filtered)


def _judge(name: str, kind: Format, tally: Tally, references: int, max_garbage: float) -> None:
    if not tally.lines:
        raise TraceError(f"{name}: is empty; there is nothing to import")
    hint = f"; {perf.HINT}" if kind is Format.PERF else ""
    if tally.garbage * 100 > max_garbage * tally.lines:
        raise TraceError(
            f"{name}: {_unread(tally, kind)}, more than --max-garbage {max_garbage:g} %; nothing was written{hint}"
        )
    if not references:
        skipped = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.items()) or "no access in it"
        raise TraceError(f"{name}: no reference left of {tally.lines} lines ({skipped}); nothing was written{hint}")


def _unread(tally: Tally, kind: Format) -> str:
    examples = "; ".join(f"line {line}: {text!r}" for line, text in sorted(tally.examples)[:3])
    return (
        f"{tally.garbage} of {tally.lines} lines ({100 * tally.garbage / tally.lines:.3g} %) cannot be read as "
        f"{kind.value} ({examples}{'; ...' if tally.garbage > 3 else ''})"
    )


def _warnings(name: str, kind: Format, tally: Tally) -> Iterator[str]:
    if tally.garbage:
        yield f"{name}: {_unread(tally, kind)}; left out"
    if outside := tally.skipped["references outside user space"]:
        yield f"{name}: {outside} references outside user space; left out"
    for note, count in tally.notes.items():
        yield f"{name}: {note} ({count})"
