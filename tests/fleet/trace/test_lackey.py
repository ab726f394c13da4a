"""Lackey text, against a line-by-line reader and as Valgrind 3.19 writes it."""

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.trace import lackey
from fleet.trace.batch import Batch, Tally
from fleet.trace.source import Lines

REAL = b"""\
==18962== Lackey, an example Valgrind tool
==18962== Command: sqlite3 :memory: select
==18962==\x20
I  040099c5,4
 L 1fff000728,8
I  040099c9,3
I  040099cc,2
 M 04033e06,1
 S 1ffeffcff8,16
I  04009a00,5
"""


def read(text: bytes, cut: int | None = None) -> tuple[Batch, Tally]:
    """All of `text`, in two chunks if `cut` is a line number."""
    lines = text.splitlines(keepends=True)
    chunks = [Lines(text, 1)]
    if cut is not None:
        chunks = [Lines(b"".join(lines[:cut]), 1), Lines(b"".join(lines[cut:]), cut + 1)]
    tally = Tally()
    parts = list(lackey.batches([chunk for chunk in chunks if chunk.data], tally))
    columns = zip(*parts, strict=True)
    return Batch(*(np.concatenate(column) for column in columns)), tally


def test_a_real_recording() -> None:
    batch, tally = read(REAL)
    assert [hex(address) for address in batch.address] == ["0x1fff000728", "0x4033e06", "0x1ffeffcff8"]
    assert batch.kind.tolist() == [0, 2, 1]
    assert batch.size.tolist() == [8, 1, 16]
    assert batch.compute.tolist() == [1, 2, 0]
    assert (tally.lines, tally.instructions, tally.trailing_compute, tally.garbage) == (10, 4, 1, 0)
    assert tally.compute_unit == "instruction"
    assert tally.skipped == {"Valgrind's own lines": 3}


def test_without_instructions_the_unit_is_the_reference() -> None:
    assert read(b" L 10,8\n S 20,4\n")[1].compute_unit == "reference"


def test_garbage_is_reported_by_line() -> None:
    bad = [b" L 10", b" L ,8", b" L 10,", b" X 10,8", b" L 1g,8", b" L 10,0", b" L 10,65536", b" L 10,8,9", b"I  zz,1",
           b" L 123456789abcdef01,8", b"L 10,8", b"", b"SB 04001090", b" L 10,0x8", b"\xff\xfe\x00"]  # fmt: skip
    batch, tally = read(b" L 10,8\n" + b"\n".join(bad) + b"\n S 20,4\r\n")
    assert batch.address.tolist() == [0x10, 0x20]
    assert tally.garbage == len(bad) - 2
    assert [example.line for example in tally.examples] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert tally.examples[0].text == " L 10"
    assert tally.skipped == {"blank lines": 1, "Valgrind's own lines": 1}
    assert tally.lines == len(bad) + 2


def test_last_line_without_newline_is_read_and_noted() -> None:
    batch, tally = read(b" L 10,8\n S 20,4")
    assert batch.address.tolist() == [0x10, 0x20]
    assert sum(tally.notes.values()) == 1
    assert read(b" L 10,8\n S 2")[1].garbage == 1


line = st.one_of(
    st.builds(
        lambda start, address, size: f"{start}{address:08x},{size}".encode(),
        st.sampled_from([" L ", " S ", " M ", "I  ", " Q "]),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, 70000),
    ),
    st.binary(max_size=20).map(lambda text: text.replace(b"\n", b"").replace(b"\r", b"")),
    st.text(" LSMI=0af,1", max_size=12).map(str.encode),
)


@settings(deadline=None)
@given(st.lists(line, min_size=1), st.integers(0, 20))
def test_like_a_line_by_line_reader(lines: list[bytes], cut: int) -> None:
    text = b"".join(line + b"\n" for line in lines)
    expected, compute = [], 0
    for row in lines:
        match = re.fullmatch(rb"( [LSM] |I  )([0-9a-fA-F]{1,16}),([0-9]{1,5})", row)
        if match and 0 < int(match[3]) < 1 << 16:
            if match[1] == b"I  ":
                compute += 1
            else:
                expected.append((int(match[2], 16), b"LSM".index(match[1][1:2]), int(match[3]), compute))
                compute = 0
    tally = Tally()
    first, second = lines[:cut], lines[cut:]
    chunks = [Lines(b"".join(row + b"\n" for row in part), 1) for part in (first, second) if part]
    parts = list(lackey.batches(chunks, tally))
    found = [row for part in parts for row in zip(*(column.tolist() for column in part), strict=True)]
    assert found == [(address, (0, 1, 2)[kind], size, before) for address, kind, size, before in expected]
    assert tally.trailing_compute == compute
    assert len(found) + tally.instructions + tally.garbage + sum(tally.skipped.values()) == tally.lines
    assert tally.lines == text.count(b"\n")


def test_every_line_of_the_recording_is_recognised() -> None:
    lines = REAL.splitlines()
    assert all(lackey.matches(row) for row in lines)
    assert not any(lackey.matches(row) for row in (b"", b"time,address,rw", b" L 10", b"1.5: cpu: 10"))
