"""Text of Linux perf with data addresses: `perf script` and `perf mem report -D` (tools/perf/builtin-script.c, -mem.c).

`perf script` prints ``[comm pid/tid [cpu]] [time:] [period] [event:] address [symbol] [data_src |OP LOAD|...] [...]``
whichever order ``-F`` names the fields in; any subset with the address is read. `perf mem report -D` prints
``pid tid ip address [...] weight data_src symbol`` under a ``# PID, TID, IP, ADDR`` line, with spaces or what ``-x``
says between. Samples are a sample: what lies between two of them is unknown but for its time. A sample without data
address (0) is skipped. Left out: sampling periods, CPUs, threads, instruction addresses, access sizes.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fleet.trace.batch import UNKNOWN_SIZE, Batch, Garbage, Mask, Tally, elapsed_ns
from fleet.trace.source import Lines
from proto.trace import LOAD, MODIFY, STORE

_TIME = r"(?P<seconds>\d{1,9})\.(?P<fraction>\d{6,9}):"
# The address is the line's last field, or another number follows. With nothing but a symbol behind it, it is an
# instruction address: what perf script prints for a recording without data addresses.
_REST = r"(?:[^:]|:\S)"  # no second event name
_SCRIPT = (
    rf"^(?:(?:.*?\s)?(?:{_TIME}(?:\s+\d+)?(?:\s+(?P<timed_event>[^\s:]\S*):)?|(?P<event>[^\s:]\S*):))?"
    r"\s+(?P<address>[0-9a-f]{1,16})"
    rf"(?:\s{_REST}*?[0-9a-f]+ \|(?P<op>OP [^|]*)\|.*|\s+(?:{_REST}*\s)?(?:0x)?[0-9a-f]+(?:\s{_REST}*)?)?\s*$"
)
_SEP = r"[\s,;:|]+"
# Up to now (6.x) perf prints the address in the first line of a dump with spaces behind "0x016", not "0x" and padding.
_DUMP = (
    rf"^\s*\d+{_SEP}\d+{_SEP}0x[0-9a-f]+{_SEP}0x(?:016)?(?P<address>[0-9a-f]{{1,16}}){_SEP}"
    rf"(?:.*{_SEP})?\d+{_SEP}0x(?P<source>[0-9a-f]{{1,16}}){_SEP}.*$"
)
_DUMP_HEADER = re.compile(rb"#\s*PID, TID, IP, ADDR")
_OP_LOAD, _OP_STORE = 0x02, 0x04
"""PERF_MEM_OP_LOAD, PERF_MEM_OP_STORE in the lowest bits of data_src (include/uapi/linux/perf_event.h)."""

HINT = "record data addresses (perf mem record, perf record -d), print them (perf script -F time,event,addr)"

Kinds = npt.NDArray[np.uint8]


def matches(line: bytes) -> bool:
    """Whether `line` (without newline) is a sample with an address or the header of a dump: for format detection."""
    text = line.decode(errors="replace")
    return bool(_DUMP_HEADER.match(line) or re.match(_DUMP, text) or re.match(_SCRIPT, text))


def batches(chunks: Iterable[Lines], tally: Tally) -> Iterator[Batch]:
    """References of the recording; every line is booked in `tally`. Compute is ns where the lines have a time."""
    chunks = iter(chunks)
    start = next(chunks)
    is_dump = any(
        _DUMP_HEADER.match(line) or re.match(_DUMP, line.decode(errors="replace"))
        for line in start.data[: 1 << 16].splitlines()
    )
    before: int | None = None
    for chunk in itertools.chain((start,), chunks):
        lines = pa.array(chunk.data.removesuffix(b"\n").split(b"\n"), pa.binary())
        tally.lines += len(lines)
        samples = pc.extract_regex(lines, _DUMP if is_dump else _SCRIPT)
        good = _mask(pc.is_valid(samples))
        if not good.all():
            _book_rest(chunk, lines, ~good, tally)
        samples = samples.filter(pa.array(good))
        address = _hex(samples, "address")
        present = address != 0
        if missing := int(np.count_nonzero(~present)):
            tally.skipped["samples without data address"] += missing
        samples, address = samples.filter(pa.array(present)), address[present]
        kind = _dump_kinds(samples, tally) if is_dump else _script_kinds(samples, tally)
        compute = np.zeros(len(address), np.int64)
        if not is_dump and len(address) and _mask(pc.not_equal(_text(samples, "seconds"), "")).all():
            tally.compute_unit = "ns"
            time_ns = _time_ns(samples)
            compute, before = elapsed_ns(time_ns, before, tally), int(time_ns[-1])
        yield Batch(address, kind, np.full(len(address), UNKNOWN_SIZE, np.uint16), compute)


def _mask(values: pa.Array) -> Mask:
    return np.asarray(values.to_numpy(zero_copy_only=False), np.bool_)


def _text(samples: pa.StructArray, name: str) -> pa.Array:
    """A field as strings; empty where the line has none."""
    return pc.fill_null(pc.struct_field(samples, name), b"").cast(pa.string())


def _hex(samples: pa.StructArray, name: str) -> npt.NDArray[np.uint64]:
    digits = pc.binary_join_element_wise("0x", _text(samples, name), "")
    return np.asarray(digits.cast(pa.uint64()).to_numpy(zero_copy_only=False), np.uint64)


def _time_ns(samples: pa.StructArray) -> npt.NDArray[np.int64]:
    fraction = pc.utf8_rpad(_text(samples, "fraction"), 9, "0")
    digits = pc.binary_join_element_wise(_text(samples, "seconds"), fraction, "")
    return np.asarray(digits.cast(pa.int64()).to_numpy(zero_copy_only=False), np.int64)


def _kinds(reads: Mask, writes: Mask, tally: Tally) -> Kinds:
    if unknown := int(np.count_nonzero(~(reads | writes))):
        tally.notes["neither load nor store by event or data_src; taken as load"] += unknown
    return np.where(writes, np.where(reads, MODIFY, STORE), LOAD).astype(np.uint8)


def _script_kinds(samples: pa.StructArray, tally: Tally) -> Kinds:
    """By data_src where the line has it, otherwise by the name of the event."""
    operation = _text(samples, "op")
    event = pc.binary_join_element_wise(_text(samples, "timed_event"), _text(samples, "event"), "")
    said = pc.match_substring_regex(operation, "LOAD|STORE")
    words = pc.utf8_lower(pc.if_else(said, operation, event))
    # ldlat= is a parameter of load events.
    reads, writes = pc.match_substring_regex(words, "load|ldlat"), pc.match_substring(words, "store")
    return _kinds(_mask(reads), _mask(writes), tally)


def _dump_kinds(samples: pa.StructArray, tally: Tally) -> Kinds:
    source = _hex(samples, "source")
    return _kinds((source & np.uint64(_OP_LOAD)) != 0, (source & np.uint64(_OP_STORE)) != 0, tally)


def _book_rest(chunk: Lines, lines: pa.Array, rest: Mask, tally: Tally) -> None:
    garbage: list[Garbage] = []
    for index in np.flatnonzero(rest).tolist():
        line = lines[index].as_py().strip()
        if not line:
            tally.skipped["blank lines"] += 1
        elif line.startswith(b"#"):
            tally.skipped["comments"] += 1
        else:
            garbage.append(Garbage(chunk.first + index, line[:80].decode(errors="replace")))
    tally.add_garbage(len(garbage), garbage)
