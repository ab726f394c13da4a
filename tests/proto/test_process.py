"""What a process of the fleet does to itself; tried on forked children."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from proto import process


def _in_child(act: Callable[[int], object]) -> str:
    """The result of ``act`` in a forked child, as text; ``act`` gets the descriptor over which it comes."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(act(writer)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


def test_the_title_is_what_ps_shows() -> None:
    def act(writer: int) -> str:
        process.set_title("vm3 g-tpp gups")
        return Path("/proc/self/cmdline").read_text().rstrip("\0")

    assert _in_child(act) == "fleet: vm3 g-tpp gups"


def test_only_what_is_kept_stays_open() -> None:
    def act(writer: int) -> bool:
        process.close_inherited({one.fileno(), writer})
        kept = {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
        return kept - {"0", "1", "2"} == {str(one.fileno()), str(writer)}

    one, other = socket.socketpair()
    with one, other:
        assert _in_child(act) == "True"


def test_a_child_dies_with_its_parent() -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        grandparent = os.getpid()
        if os.fork() == 0:
            process.die_with_parent(grandparent, signal.SIGKILL)
            os.write(writer, b"ready")
            signal.pause()
        signal.pause()
    os.close(writer)
    assert os.read(reader, 5) == b"ready"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    # The end of the pipe: the grandchild, its last writer, is gone too.
    assert os.read(reader, 5) == b""
    os.close(reader)


def test_a_child_whose_parent_is_gone_ends_at_once() -> None:
    pid = os.fork()
    if pid == 0:
        process.die_with_parent(1 << 22, signal.SIGTERM)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_the_terminals_signals_are_ignored() -> None:
    def act(writer: int) -> str:
        process.ignore_group()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)
        return "still here"

    assert _in_child(act) == "still here"


def test_a_hidden_process_is_not_dumpable() -> None:
    def act(writer: int) -> str:
        import ctypes

        process.hide_memory()
        return str(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE

    assert _in_child(act) == "0"
