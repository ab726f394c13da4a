"""CSV and Parquet."""

import re
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fleet.trace import table
from fleet.trace.batch import Batch, Tally
from fleet.trace.source import Lines
from proto.errors import TraceError


def read(text: bytes, time_unit: str = "ns", hexadecimal: bool = False, chunks: int = 1) -> tuple[Batch, Tally]:
    tally = Tally()
    layout = table.csv_layout(text, "x.csv", time_unit, hexadecimal)
    lines = re.findall(rb"[^\n]*\n|[^\n]+$", text)
    cuts = np.linspace(0, len(lines), chunks + 1).astype(int)
    parts = [Lines(b"".join(lines[a:b]), int(a) + 1) for a, b in pairwise(cuts)]
    batches = list(table.csv_batches(parts, layout, tally))
    return Batch(*(np.concatenate(column) for column in zip(*batches, strict=True))), tally


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_columns_are_found_by_name(chunks: int) -> None:
    batch, tally = read(
        b'note,Size,RW,"Addr",time_us\na,8,R,0x1000,1.5\n"b,c",4,w,8192,2.5\nc,2,rmw,0xFF,2.5\n', chunks=chunks
    )
    assert batch.address.tolist() == [0x1000, 8192, 0xFF]
    assert batch.kind.tolist() == [0, 1, 2]
    assert batch.size.tolist() == [8, 4, 2]
    assert batch.compute.tolist() == [0, 1000, 0]
    assert (tally.compute_unit, tally.lines, tally.garbage) == ("ns", 4, 0)


def test_without_time_and_size() -> None:
    batch, tally = read(b"address;rw\n16;load\n32;store\n64;modify\n")
    assert batch.kind.tolist() == [0, 1, 2]
    assert batch.size.tolist() == [1, 1, 1]
    assert tally.compute_unit == "reference"


@pytest.mark.parametrize(
    ("row", "place"),
    [
        (b"0x1000,r", {"address": 0, "rw": 1}),
        (b"0x1000,1", {"address": 0, "rw": 1}),
        (b"0x1000,r,8", {"address": 0, "rw": 1, "size": 2}),
        (b"0x1000\tw\t1", {"address": 0, "rw": 1, "size": 2}),
        (b"17,0x1000,w", {"address": 1, "rw": 2, "time": 0}),
        (b"17.5,0x1000,w,64", {"address": 1, "rw": 2, "time": 0, "size": 3}),
    ],
)
def test_without_header_by_place(row: bytes, place: dict[str, int]) -> None:
    assert table.csv_layout(row + b"\n", "x", "ns", False).columns == place
    assert read(row + b"\n")[0].address.tolist() == [0x1000]


def test_hexadecimal_without_prefix() -> None:
    assert read(b"address,rw\nff,r\n0x10,r\n10,r\n", hexadecimal=True)[0].address.tolist() == [0xFF, 0x10, 0x10]
    batch, tally = read(b"address,rw\nff,r\n10,r\n")
    assert (batch.address.tolist(), tally.garbage) == ([10], 1)


@pytest.mark.parametrize(("unit", "ns"), [("ns", 2), ("us", 2_500), ("ms", 2_500_000), ("s", 2_500_000_000)])
def test_time_units(unit: str, ns: int) -> None:
    assert read(b"t,address,rw\n0,1,r\n2.5,1,r\n", unit)[0].compute.tolist() == [0, ns]


def test_seconds_since_the_epoch_keep_their_nanoseconds() -> None:
    assert read(b"time_s,address,rw\n1700000000.000000001,1,r\n1700000000.000000004,1,r\n")[0].compute.tolist() == [
        0,
        3,
    ]


@pytest.mark.parametrize("chunks", [1, 3])
def test_garbage_is_reported_by_line(chunks: int) -> None:
    text = (
        b"# recorded\ntime,address,rw,size\n1,16,r,8\n\n2,16,r\n3,x,r,8\n# note\n4,16,q,8\n5,16,w,0\n6,16,w,70000\n"
        b"x,16,r,1\r\n"
        b'7,-1,r,\r1\n8,16,r,1,9\n"9,16,r,1\n\xff,16,r,1\n10,16,\xff,1\n11,17,w,1\n'
    )
    batch, tally = read(text, chunks=chunks)
    assert batch.address.tolist() == [16, 16, 17]  # an unclosed quote does not swallow the lines behind it
    assert sorted(example.line for example in tally.examples) == [5, 6, 8, 9, 10, 11, 12, 13, 15, 16]
    assert tally.garbage == 10
    assert tally.lines == text.count(b"\n")
    assert tally.skipped["blank lines"] == 1


def test_missing_column_is_named_with_the_nearest() -> None:
    with pytest.raises(TraceError, match=r"no address column .*rename 'adress'"):
        table.csv_layout(b"adress,rw\n1,r\n", "x", "ns", False)
    with pytest.raises(TraceError, match="no rw column"):
        table.csv_layout(b"address,sz\n1,2\n", "x", "ns", False)
    assert not table.is_csv(b"a,b\n1,2\n")


def parquet(path: Path, columns: dict[str, pa.Array]) -> tuple[Batch, Tally]:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    tally = Tally()
    parts = [batch for batch, _ in table.parquet_batches(path, "ns", False, tally)]
    return Batch(*(np.concatenate(column) for column in zip(*parts, strict=True))), tally


def test_parquet_types(tmp_path: Path) -> None:
    batch, tally = parquet(
        tmp_path / "x.parquet",
        {
            "timestamp": pa.array([datetime(2020, 1, 1, 0, 0, second) for second in (0, 1, 3)], pa.timestamp("us")),
            "vaddr": pa.array([1 << 40, (1 << 40) + 64, 1 << 41], pa.uint64()),
            "is_write": pa.array([True, False, True]),
            "bytes": pa.array([8, 4, 64], pa.int16()),
        },
    )
    assert batch.address.tolist() == [1 << 40, (1 << 40) + 64, 1 << 41]
    assert batch.kind.tolist() == [1, 0, 1]
    assert batch.compute.tolist() == [0, 1_000_000_000, 2_000_000_000]
    assert (tally.lines, tally.garbage) == (3, 0)


def test_parquet_garbage_is_reported_by_row(tmp_path: Path) -> None:
    batch, tally = parquet(
        tmp_path / "x.parquet",
        {
            "time": pa.array([0.0, float("nan"), None, 4.0, 7.0]),
            "address": pa.array([16, 16, 16, -1, 32]),
            "rw": pa.array(["r", "r", "r", "r", "W"]).dictionary_encode(),
        },
    )
    assert batch.address.tolist() == [16, 32]
    assert batch.compute.tolist() == [0, 7]
    assert [example.line for example in tally.examples] == [2, 3, 4]


def test_parquet_that_is_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"address": [1] * 1000, "rw": ["r"] * 1000}), tmp_path / "x")
    (tmp_path / "y").write_bytes((tmp_path / "x").read_bytes()[:-20])
    with pytest.raises(TraceError, match="Parquet"):
        list(table.parquet_batches(tmp_path / "y", "ns", False, Tally()))
    pq.write_table(pa.table({"adress": [1], "rw": ["r"]}), tmp_path / "z")
    with pytest.raises(TraceError, match="no address column"):
        list(table.parquet_batches(tmp_path / "z", "ns", False, Tally()))
