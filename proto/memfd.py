"""A VM's shared segment: anonymous memory that host and one guest map, sealed so that its size can never change.

The host creates and maps the memfd, seals the size, and passes the descriptor over the guest's own socketpair; the
guest maps it and acknowledges; then the host seals future writes and the seals themselves. That one can't come first:
F_SEAL_FUTURE_WRITE would refuse the guest its writable mapping (memfd_create(2), fcntl(2)). Both close the descriptor,
and the mapping alone keeps the memory: nothing is in /dev/shm, nothing survives a crash.

mmap from the standard library would keep a duplicate of the descriptor as long as the mapping lives (Python 3.11), so
the mapping is made through libc.
"""

import ctypes
import fcntl
import mmap
import os
import weakref

from proto.errors import SegmentError

_F_SEAL_FUTURE_WRITE = 0x0010
"""Linux 5.1; the fcntl module of Python 3.11 does not name it."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


def create(name: str, size: int) -> int:
    """Descriptor of a new zeroed memfd of ``size`` bytes whose size is sealed. Raises SegmentError."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise SegmentError(f"cannot create the memory of {name}: {error.strerror}; see `fleet doctor`") from error
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    except OSError as error:
        os.close(fd)
        raise SegmentError(f"cannot size and seal the memory of {name}: {error.strerror}") from error
    return fd


def seal(fd: int) -> None:
    """No new writable mapping, no write, no further seal: what is mapped now is all that ever will be."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)


def map_shared(fd: int, size: int) -> memoryview:
    """Map ``size`` bytes, shared and writable; unmapped when the last view of them is gone. Raises SegmentError.

    The size must be sealed: a segment that its creator could shrink would be a SIGBUS for the other side.
    """
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != size:
        raise SegmentError(f"the descriptor is no sealed segment of {size} bytes")
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise SegmentError(f"cannot map {size} bytes: {os.strerror(ctypes.get_errno())}; see `fleet doctor`")
    block = (ctypes.c_char * size).from_address(address)
    weakref.finalize(block, _libc.munmap, address, size).atexit = False
    return memoryview(block).cast("B")
