"""perf's text, as perf 6.1 prints it."""

import numpy as np
import pytest

from fleet.trace import perf
from fleet.trace.batch import Batch, Tally
from fleet.trace.source import Lines

TIME_EVENT_ADDR = b"""\
 1169.536465: page-faults:     55a8b6fe7548
 1169.536744: page-faults:     7f9136e53110
 1169.536776: page-faults:                0
 1169.536780: page-faults:     7f9136e52e06
"""
ALL_FIELDS = b"""\
            perf  6124/6124  [001]  1693.780686001:          1 cpu/mem-loads,ldlat=30/P:     7f9d6b7c6408 [unknown] \
(anon_inode:[perf_event])      68100142 |OP LOAD|LVL L1 or L1 hit|SNP N/A|TLB N/A|LCK N/A|BLK  N/A     12     \
55aba0dc443d [unknown] (/usr/bin/perf)
       perf exec  6125/6125  [000]  1693.780710002:          1 cpu/mem-stores/P:     7f9d6c644270 @plt \
(/usr/lib/libc.so.6)      5080144 |OP STORE|LVL N/A or N/A|SNP N/A|TLB N/A|LCK N/A|BLK  N/A     0     7f9d6c644270 \
@plt (/usr/lib/libc.so.6)
"""
NO_DATA_ADDRESS = b"""\
            sort  4931  1169.536465:          1 page-faults:  ffffffff817554ea elf_load+0x28a ([kernel.kallsyms])
            sort  4931  1169.536776:          1 page-faults:      7f9136e39b70 _start+0x0 (/usr/lib/ld-linux.so.2)
"""
DUMP = b"""\
# PID, TID, IP, ADDR, LOCAL WEIGHT, DSRC, SYMBOL
 4931  4931 0xffffffff817554ea 0x01655a8b6fe7548     0 0x1e05080022 [kernel.kallsyms]:elf_load
4931 4931 0x7f9136e39b70 0x7f9136e53110 0 0x1e05080024 /usr/lib/ld-linux-x86-64.so.2:_start
4931 4931 0x7f9136e39b70 0x16000 0 0x1e05080021 /usr/lib/ld-linux-x86-64.so.2:_start
"""
DUMP_MORE = b"""\
# PID, TID, IP, ADDR, PHYS ADDR, DATA PAGE SIZE, LOCAL WEIGHT, DSRC, SYMBOL
 6124  6124 0x000055aba0dc443d 0x0167f9d6b7c6408 0x0000000000000000 4K     0 0x1e05080022 /usr/bin/perf:???
6125 6125 0x7f9d6c644270 0x7f9d6c644270 0x0000000000000000 N/A 0 0x1e05080024 /usr/lib/libc.so.6:@plt
"""


def read(text: bytes) -> tuple[Batch, Tally]:
    tally = Tally()
    parts = list(perf.batches([Lines(text, 1)], tally))
    return Batch(*(np.concatenate(column) for column in zip(*parts, strict=True))), tally


def test_time_event_address() -> None:
    batch, tally = read(TIME_EVENT_ADDR)
    assert batch.address.tolist() == [0x55A8B6FE7548, 0x7F9136E53110, 0x7F9136E52E06]
    assert batch.compute.tolist() == [0, 279_000, 36_000]
    assert tally.compute_unit == "ns"
    assert tally.skipped == {"samples without data address": 1}
    assert sum(tally.notes.values()) == 3  # neither load nor store


def test_all_fields_with_nanoseconds() -> None:
    batch, tally = read(ALL_FIELDS)
    assert batch.address.tolist() == [0x7F9D6B7C6408, 0x7F9D6C644270]
    assert batch.kind.tolist() == [0, 1]
    assert batch.compute.tolist() == [0, 24_001]
    assert not tally.garbage and not tally.notes


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"    55a8b6fe7548\n", 0),
        (b" cpu/mem-stores/P:     55a8b6fe7548\n", 1),
        (b" sort  4931 mem-loads:     55a8b6fe7548 [unknown] (/usr/bin/sort) ffffffff817554ea elf_load ([k])\n", 0),
        (b" 12.000001:     55a8b6fe7548\n", 0),
        (b" ibs_op//:     55a8b6fe7548  5 |OP LOAD or STORE|LVL|\n", 2),
    ],
)
def test_other_sets_of_fields(text: bytes, kind: int) -> None:
    batch, tally = read(text)
    assert batch.address.tolist() == [0x55A8B6FE7548]
    assert batch.kind.tolist() == [kind]
    assert perf.matches(text.rstrip(b"\n"))
    assert not tally.garbage


def test_instruction_addresses_are_not_taken_for_data() -> None:
    batch, tally = read(NO_DATA_ADDRESS)
    assert not len(batch.address)
    assert tally.garbage == 2
    assert not any(map(perf.matches, NO_DATA_ADDRESS.splitlines()))


def test_dump_with_spaces() -> None:
    batch, tally = read(DUMP)
    assert batch.address.tolist() == [0x55A8B6FE7548, 0x7F9136E53110, 0x16000]
    assert batch.kind.tolist() == [0, 1, 0]
    assert sum(tally.notes.values()) == 1
    assert (tally.garbage, tally.skipped, tally.compute_unit) == (0, {"comments": 1}, "reference")


@pytest.mark.parametrize("separator", [b",", b";", b"|", b"\t"])
def test_dump_with_separators(separator: bytes) -> None:
    body = DUMP.splitlines()[2].replace(b" ", separator)
    batch, _ = read(DUMP.splitlines()[0] + b"\n" + body + b"\n")
    assert batch.address.tolist() == [0x7F9136E53110]


def test_dump_with_more_columns() -> None:
    batch, tally = read(DUMP_MORE)
    assert batch.address.tolist() == [0x7F9D6B7C6408, 0x7F9D6C644270]
    assert batch.kind.tolist() == [0, 1]
    assert not tally.garbage


def test_garbage_is_reported_by_line() -> None:
    batch, tally = read(TIME_EVENT_ADDR + b"\n# comment\n[ perf record: Woken up 1 times ]\n\xff\xfe\n")
    assert len(batch.address) == 3
    assert [example.line for example in tally.examples] == [7, 8]
    assert tally.garbage == 2


def test_time_goes_on_over_chunks_and_never_back() -> None:
    tally = Tally()
    lines = TIME_EVENT_ADDR.splitlines(keepends=True)
    chunks = [Lines(lines[0], 1), Lines(lines[3], 2), Lines(lines[1], 3)]
    parts = list(perf.batches(chunks, tally))
    assert [part.compute.tolist() for part in parts] == [[0], [315_000], [0]]
    assert tally.notes["time steps back; taken as no time"] == 1
