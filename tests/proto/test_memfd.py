"""A shared segment: sized and sealed for good, gone with its last view, never a file that outlives anyone."""

import ctypes
import fcntl
import gc
import mmap
import os

import numpy as np
import pytest

from proto import memfd
from proto.errors import SegmentError

SIZE = 1 << 16


@pytest.fixture
def fd() -> "object":
    descriptor = memfd.create("segment", SIZE)
    yield descriptor
    os.close(descriptor)


def _mapped() -> int:
    with open("/proc/self/maps", encoding="ascii") as file:
        return sum("memfd:segment" in line for line in file)


def test_both_mappings_see_the_same_memory(fd: int) -> None:
    one, other = (np.frombuffer(memfd.map_shared(fd, SIZE), np.int64) for _ in range(2))
    one[7] = 42
    assert other[7] == 42
    assert (np.delete(other, 7) == 0).all()


def test_the_size_is_sealed(fd: int) -> None:
    for size in (0, SIZE // 2, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)


def test_a_sealed_segment_takes_no_new_writer_but_keeps_the_old(fd: int) -> None:
    view = np.frombuffer(memfd.map_shared(fd, SIZE), np.int64)
    memfd.seal(fd)
    with pytest.raises(SegmentError, match="cannot map"):
        memfd.map_shared(fd, SIZE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    view[3] = 5
    with mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as reader:
        assert np.frombuffer(reader[:], np.int64)[3] == 5


def test_the_mapping_lives_as_long_as_its_last_view() -> None:
    fd = memfd.create("segment", SIZE)
    buffer = memfd.map_shared(fd, SIZE)
    os.close(fd)
    words = np.frombuffer(buffer, np.int64)
    part = words[10:20]
    del buffer, words
    gc.collect()
    part[:] = 1
    assert _mapped() == 1
    del part
    gc.collect()
    assert _mapped() == 0


def test_only_a_sealed_segment_of_the_right_size_is_mapped(fd: int) -> None:
    with pytest.raises(SegmentError, match="no sealed segment"):
        memfd.map_shared(fd, 2 * SIZE)
    unsealed = os.memfd_create("segment", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SIZE)
    with pytest.raises(SegmentError, match="no sealed segment"):
        memfd.map_shared(unsealed, SIZE)
    os.close(unsealed)


def test_an_impossible_size_is_an_error_that_names_the_segment() -> None:
    with pytest.raises(SegmentError, match="vm7"):
        memfd.create("vm7", ctypes.c_ssize_t(-1).value)


def test_untouched_pages_cost_nothing() -> None:
    fd = memfd.create("segment", 1 << 30)
    view = np.frombuffer(memfd.map_shared(fd, 1 << 30), np.int64)
    view[0] = 1
    assert os.fstat(fd).st_blocks * 512 <= 1 << 21
    os.close(fd)
