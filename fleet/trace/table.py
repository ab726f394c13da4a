"""Tables of accesses, CSV or Parquet: columns address and rw, and where there are any, time and size.

Columns are found by name (`NAMES`), in any order, others ignored; a CSV without header is read as
``[time,] address, rw [, size]``. Addresses and times are unsigned; an address is hexadecimal with ``0x`` in front,
decimal without, unless told otherwise. Values are read through text in both formats, so that one set of rules holds.
Left out: quoted line breaks.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fleet.trace.batch import MAX_SIZE, UNKNOWN_SIZE, Batch, Garbage, Mask, Tally, elapsed_ns
from fleet.trace.source import Lines
from proto.errors import TraceError
from proto.trace import LOAD, MODIFY, STORE

ROLES = ("time", "address", "rw", "size")
NAMES = {
    "time": ("time", "timestamp", "ts", "t", "time_s", "time_ms", "time_us", "time_ns"),
    "address": ("address", "addr", "vaddr", "va", "gva", "virtual_address", "data_address"),
    "rw": ("rw", "r/w", "kind", "op", "type", "access", "is_write", "write", "operation"),
    "size": ("size", "bytes", "len", "length"),
}
"""Names by which a column is known, in any case; `time_us` and its like carry their unit."""
_KINDS = {
    LOAD: "r rd read l ld load 0 false",
    STORE: "w wr write s st store 1 true",
    MODIFY: "m rw rmw modify update 2",
}
_WORDS = [(word, kind) for kind, words in _KINDS.items() for word in words.split()]
_WORD_SET = pa.array([word for word, _ in _WORDS])
_WORD_KINDS = np.array([kind for _, kind in _WORDS], np.uint8)
NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_NUMBER = re.compile(r"(0x)?[0-9a-f]*[0-9][0-9a-f]*(\.\d+)?")
_DELIMITERS = ",;\t|"
_PARQUET_ROWS = 1 << 19


class Layout(NamedTuple):
    """Which columns of a table mean what."""

    columns: dict[str, int]
    """Index by role; has at least address and rw."""
    width: int
    ns: int
    """Length of a unit of the time column in ns."""
    hexadecimal: bool
    """Addresses without ``0x`` are hexadecimal."""
    delimiter: str = ","
    header_line: int = 0
    """Line of the header from 1; 0 = there is none."""


def csv_layout(head: bytes, name: str, time_unit: str, hexadecimal: bool) -> Layout:
    """Layout of a CSV that starts with `head`. Raises TraceError if no column is the address or none says r or w."""
    for number, raw in enumerate(head.split(b"\n"), start=1):
        text = raw.decode(errors="replace").removeprefix("\ufeff").strip()
        is_comment = text.startswith("#")
        text = text.lstrip("# ")
        delimiter = next((mark for mark in _DELIMITERS if mark in text), ",")
        fields = [field.strip(" \"'").lower() for field in text.split(delimiter)]
        if columns := _by_name(fields):
            unit = _unit(fields, columns, time_unit)
            return Layout(columns, len(fields), unit, hexadecimal, delimiter, number)
        if text and not is_comment:
            break
    if columns := _by_place(fields):
        return Layout(columns, len(fields), NS[time_unit], hexadecimal, delimiter)
    raise TraceError(f"{name}: {_what_is_missing(fields)}")


def is_csv(head: bytes) -> bool:
    """Whether `head` starts like a table of accesses: for format detection."""
    try:
        csv_layout(head, "", "ns", False)
    except TraceError:
        return False
    return True


def _by_name(fields: list[str]) -> dict[str, int]:
    columns = {
        role: fields.index(found)
        for role, names in NAMES.items()
        if (found := next((name for name in names if name in fields), None)) is not None
    }
    return columns if {"address", "rw"} <= columns.keys() else {}


def _by_place(fields: list[str]) -> dict[str, int]:
    """Without a header, the one field that is a word for load or store tells where the others are."""
    words = [index for index, field in enumerate(fields) if any(field == word for word, _ in _WORDS)]
    if len(words) > 1:  # 0, 1 and 2 are also numbers
        words = [index for index in words if not fields[index].isdigit()]
    if len(words) != 1 or words[0] not in (1, 2) or len(fields) > words[0] + 2:
        return {}
    rw = words[0]
    if not all(_NUMBER.fullmatch(field) for index, field in enumerate(fields) if index != rw):
        return {}
    columns = {"address": rw - 1, "rw": rw}
    if rw > 1:
        columns["time"] = 0
    if len(fields) > rw + 1:
        columns["size"] = rw + 1
    return columns


def _unit(fields: list[str], columns: dict[str, int], time_unit: str) -> int:
    named = fields[columns["time"]].rpartition("_")[2] if "time" in columns else ""
    return NS.get(named, NS[time_unit])


def _what_is_missing(fields: list[str]) -> str:
    for role in ("address", "rw"):
        if not any(name in fields for name in NAMES[role]):
            near = [field for field in fields if difflib.get_close_matches(field, NAMES[role], 1)]
            hint = f"; rename {near[0]!r}?" if near else ""
            return f"no {role} column among {', '.join(fields)[:120]!r}; name it one of {', '.join(NAMES[role])}{hint}"
    raise AssertionError(fields)


def csv_batches(chunks: Iterable[Lines], layout: Layout, tally: Tally) -> Iterator[Batch]:
    """References of a CSV; every line is booked in `tally`."""
    names = [f"c{index}" for index in range(layout.width)]
    wanted = {role: names[index] for role, index in layout.columns.items()}
    rows = _Rows(layout, tally)
    for chunk in chunks:
        data = chunk.data
        header = layout.header_line if chunk.first == 1 else 0
        for _ in range(header):
            data = data[data.find(b"\n") + 1 or len(data) :]
        tally.lines += header + data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
        if not data:
            continue
        # What is no UTF-8 matches no rule below, and shows in messages; to Arrow, a lone CR would end a line.
        data = data.decode(errors="replace").encode().replace(b"\r\n", b"\n").replace(b"\r", b" ")
        count = data.count(b"\n") + (not data.endswith(b"\n"))
        table, odd = _read_csv(data, names, list(wanted.values()), layout.delimiter, '"')
        if len(table) + len(odd) != count:  # a quote that is never closed swallows the lines behind it
            table, odd = _read_csv(data, names, list(wanted.values()), layout.delimiter, False)
        first = chunk.first + header
        wrong = [Garbage(first + number - 1, text[:80]) for number, text in odd if not text.startswith("#")]
        tally.add_garbage(len(wrong), wrong)
        if len(wrong) < len(odd):
            tally.skipped["comments"] += len(odd) - len(wrong)
        lines = np.setdiff1d(np.arange(len(table) + len(odd)), [number - 1 for number, _ in odd]) + first
        columns = {role: table[column].combine_chunks() for role, column in wanted.items()}
        yield rows.batch(columns, lines)


def _read_csv(
    data: bytes, names: list[str], wanted: list[str], delimiter: str, quote: str | bool
) -> tuple[pa.Table, list[tuple[int, str]]]:
    """The wanted columns as text, and number (from 1) and text of the lines with another number of fields."""
    odd: list[tuple[int, str]] = []

    def skip(row: pacsv.InvalidRow) -> str:
        odd.append((row.number, row.text))
        return "skip"

    table = pacsv.read_csv(
        pa.BufferReader(data),
        pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
        pacsv.ParseOptions(delimiter=delimiter, quote_char=quote, invalid_row_handler=skip, ignore_empty_lines=False),
        pacsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), include_columns=wanted, strings_can_be_null=False
        ),
    )
    return table, odd


def parquet_batches(path: Path, time_unit: str, hexadecimal: bool, tally: Tally) -> Iterator[tuple[Batch, float]]:
    """References of a Parquet file, with the share of its rows read so far; rows count as lines, from 1."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            fields = [name.lower() for name in names]
            if not (columns := _by_name(fields)):
                raise TraceError(f"{path}: {_what_is_missing(fields)}")
            rows = _Rows(Layout(columns, len(names), _unit(fields, columns, time_unit), hexadecimal), tally)
            wanted = [names[index] for index in columns.values()]
            for part in file.iter_batches(_PARQUET_ROWS, columns=wanted):
                lines = np.arange(len(part)) + tally.lines + 1
                tally.lines += len(part)
                yield (
                    rows.batch({role: part.column(names[index]) for role, index in columns.items()}, lines),
                    tally.lines / file.metadata.num_rows,
                )
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"{path}: cannot read as Parquet: {str(error).splitlines()[0]}") from error


class _Rows:
    """Turns columns into batches; keeps the time of the last row."""

    def __init__(self, layout: Layout, tally: Tally) -> None:
        self._layout = layout
        self._tally = tally
        self._before: int | None = None
        self._address = r"^(0[xX])?[0-9a-fA-F]{1,16}$" if layout.hexadecimal else r"^(0[xX][0-9a-fA-F]{1,16}|\d{1,19})$"

    def batch(self, columns: dict[str, pa.Array], lines: npt.NDArray[np.int64]) -> Batch:
        """`lines`: int64[n], the line of each row."""
        time = columns.pop("time", None)
        texts = {role: pc.ascii_lower(_text(column)) for role, column in columns.items()}
        word = pc.index_in(texts["rw"], _WORD_SET)
        good = _mask(pc.and_(pc.match_substring_regex(texts["address"], self._address), pc.is_valid(word)))
        if "size" in texts:
            good &= _mask(pc.match_substring_regex(texts["size"], r"^0*[1-9]\d{0,4}$"))
        if time is not None:
            time_ns, timed = self._time_ns(time)
            good &= timed
        kept = pa.array(good)
        size = np.full(int(good.sum()), UNKNOWN_SIZE, np.int64)
        if "size" in texts:
            size = _integers(texts["size"].filter(kept), pa.int64()).astype(np.int64)
            fits = size <= MAX_SIZE
            good[good] = fits
            kept, size = pa.array(good), size[fits]
        if not good.all():
            self._book_rest(texts, ~good, lines)
        digits = texts["address"].filter(kept)
        if self._layout.hexadecimal:
            digits = pc.binary_join_element_wise("0x", pc.replace_substring_regex(digits, "^0x", ""), "")
        compute = np.zeros(len(digits), np.int64)
        if time is not None and len(compute):
            self._tally.compute_unit = "ns"
            compute = elapsed_ns(time_ns[good], self._before, self._tally)
            self._before = int(time_ns[good][-1])
        kind = _WORD_KINDS[_integers(word.filter(kept), pa.int64())]
        return Batch(_integers(digits, pa.uint64()).astype(np.uint64), kind, size.astype(np.uint16), compute)

    def _time_ns(self, time: pa.Array) -> tuple[npt.NDArray[np.int64], Mask]:
        """Times in ns, and which of the rows have one."""
        scale = self._layout.ns
        if pa.types.is_timestamp(time.type) or pa.types.is_duration(time.type):
            scale, time = NS[time.type.unit], time.cast(pa.int64())
        if pa.types.is_floating(time.type):
            good = pc.and_(pc.greater_equal(time, 0.0), pc.less(time, 1e18))
            time = pc.if_else(pc.fill_null(good, False), time, 0.0).cast(pa.decimal128(27, 9), safe=False)
        else:
            text = _text(time)
            good = pc.match_substring_regex(text, r"^\d{1,18}(\.\d{1,9})?$")
            time = pc.if_else(good, text, "0").cast(pa.decimal128(27, 9))
        good = pc.and_(pc.fill_null(good, False), pc.less(time, Decimal((1 << 62) // scale)))
        time = pc.if_else(good, time, pa.scalar(Decimal(0), time.type))
        time_ns = pc.multiply(time, pa.scalar(Decimal(scale), pa.decimal128(10, 0))).cast(pa.int64(), safe=False)
        return _integers(time_ns, pa.int64()).astype(np.int64), _mask(good)

    def _book_rest(self, texts: dict[str, pa.Array], rest: Mask, lines: npt.NDArray[np.int64]) -> None:
        garbage: list[Garbage] = []
        for index in np.flatnonzero(rest).tolist():
            values = [text[index].as_py() for text in texts.values()]
            if any(values):
                garbage.append(Garbage(int(lines[index]), self._layout.delimiter.join(values)[:80]))
            else:
                self._tally.skipped["blank lines"] += 1
        self._tally.add_garbage(len(garbage), garbage)


def _text(column: pa.Array) -> pa.Array:
    return pc.ascii_trim(pc.fill_null(pc.cast(column, pa.string()), ""), " \t\r\"'")


def _mask(values: pa.Array) -> Mask:
    return np.array(values.to_numpy(zero_copy_only=False), np.bool_)


def _integers(values: pa.Array, dtype: pa.DataType) -> npt.NDArray[np.integer]:
    return np.asarray(values.cast(dtype).to_numpy(zero_copy_only=False))
