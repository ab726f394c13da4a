"""Valgrind Lackey text, as `valgrind --tool=lackey --trace-mem=yes` writes it (Valgrind manual 15, lackey/lk_main.c).

A line is ``I  address,size`` (instruction) or a space, ``L``, ``S`` or ``M`` (load, store, modify), a space,
``address,size``; address in hexadecimal, size in decimal bytes. Lackey prints an instruction before what it accesses.
Valgrind's own lines (``==pid==``, ``--pid--``, ``**pid**``), superblock lines (``SB address``) and blank lines are
skipped. Instruction addresses are not kept: they become compute, one unit a line.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from fleet.trace.batch import Batch, Garbage, Mask, Tally
from fleet.trace.source import Lines
from proto.trace import LOAD, MODIFY, STORE

_PREFIX = 3
_ADDRESS_DIGITS = 16
_SIZE_DIGITS = 5
_BAD = 0xFF
_SKIPPED = (b"==", b"--", b"**", b"SB ")

_INSTRUCTION = 3
_KINDS = {b" L ": LOAD, b" S ": STORE, b" M ": MODIFY, b"I  ": _INSTRUCTION}
_LINE = re.compile(rb"(?: [LSM] |I  )[0-9a-fA-F]{1,16},\d{1,5}\r?|==\d+==.*")

_DIGIT = np.full(256, _BAD, np.uint8)
for _value, _character in enumerate(b"0123456789abcdef"):
    _DIGIT[_character] = _value
for _value, _character in enumerate(b"ABCDEF", start=10):
    _DIGIT[_character] = _value

Positions = npt.NDArray[np.int64]


def matches(line: bytes) -> bool:
    """Whether `line` (without newline) is one that Lackey writes: what format detection asks."""
    return _LINE.fullmatch(line) is not None


def batches(chunks: Iterable[Lines], tally: Tally) -> Iterator[Batch]:
    """References of the recording; every line is booked in `tally`."""
    carry = 0
    for chunk in chunks:
        text = np.frombuffer(chunk.data, np.uint8)
        ends = np.flatnonzero(text == ord("\n"))
        if not chunk.data.endswith(b"\n"):
            ends = np.append(ends, len(text))
            tally.notes["no newline at the end: perhaps cut off"] += 1
        starts = np.concatenate(([0], ends[:-1] + 1))
        tally.lines += len(starts)
        ends = ends - (text[np.maximum(ends - 1, 0)] == ord("\r"))

        kind, address, size, good = _parse(text, starts, np.maximum(ends, starts))
        if not good.all():
            _book_rest(chunk, starts, ends, ~good, tally)
        data = good & (kind != _INSTRUCTION)
        instructions = np.cumsum(good & (kind == _INSTRUCTION))
        if instructions[-1]:
            tally.compute_unit = "instruction"
            tally.instructions += int(instructions[-1])
        compute = np.diff(instructions[data], prepend=0)
        left = int(instructions[-1])
        if len(compute):
            left -= int(instructions[data][-1])
            compute[0] += carry
            carry = 0
        carry += left
        yield Batch(address[data], kind[data], size[data].astype(np.uint16), compute)
    tally.trailing_compute = carry


def _parse(
    text: npt.NDArray[np.uint8], starts: Positions, ends: Positions
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64], npt.NDArray[np.uint64], Mask]:
    """Kind, address and size of each line, and whether it is one."""
    text = np.concatenate((text, np.zeros(_PREFIX, np.uint8)))  # so that reading on behind the last line is legal
    prefix = text[starts].astype(np.uint32) << 16 | text[starts + 1].astype(np.uint32) << 8 | text[starts + 2]
    kind = np.full(len(starts), _BAD, np.uint8)
    for start, value in _KINDS.items():
        kind[prefix == int.from_bytes(start)] = value
    commas = np.append(np.flatnonzero(text == ord(",")), len(text))
    comma = commas[np.searchsorted(commas, starts)]
    address, good_address = _number(text, starts + _PREFIX, comma, 16, _ADDRESS_DIGITS)
    size, good_size = _number(text, comma + 1, ends, 10, _SIZE_DIGITS)
    good = (kind != _BAD) & (comma < ends) & good_address & good_size & (size > 0) & (size < 1 << 16)
    return kind, address, size, good


def _number(
    text: npt.NDArray[np.uint8], starts: Positions, ends: Positions, base: int, most: int
) -> tuple[npt.NDArray[np.uint64], Mask]:
    """The number in text[start:end] of each line, and whether it is one of 1 to `most` digits."""
    length = ends - starts
    good = (length > 0) & (length <= most)
    value = np.zeros(len(starts), np.uint64)
    width = int(length[good].max(initial=0))
    for place in range(width):
        inside = good & (place < length)
        digit = _DIGIT[text[np.where(inside, starts + place, 0)]]
        good &= ~inside | (digit < base)
        value = np.where(inside, value * np.uint64(base) + digit, value)
    return value, good


def _book_rest(chunk: Lines, starts: Positions, ends: Positions, rest: Mask, tally: Tally) -> None:
    """Tell what is no access and should not be from what is garbage."""
    garbage: list[Garbage] = []
    for index in np.flatnonzero(rest).tolist():
        line = chunk.data[starts[index] : ends[index]]
        if not line.strip():
            tally.skipped["blank lines"] += 1
        elif line.startswith(_SKIPPED):
            tally.skipped["Valgrind's own lines"] += 1
        else:
            garbage.append(Garbage(chunk.first + index, line[:80].decode(errors="replace")))
    tally.add_garbage(len(garbage), garbage)
