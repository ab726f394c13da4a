"""A guest as a process: what the zygote's child does from the fork to its last word.

Memory comes over the guest's own socketpair, then hello, then one `Tick` for each `Advance` until the guest is
finished or told to stop; `Bye` carries its part of the summary. A guest that cannot go on says `Failed`. The process
ends with os._exit: it was forked, and finalising what it shares with the zygote would only cost private memory.
"""

import gc
import os
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import zmq

from guestd import ledger
from guestd.errors import GuestError, UnexpectedMessage
from guestd.hypercall import Hypercalls
from guestd.operations import EptFaultCall
from guestd.threads import OsThreads, Threads
from proto import clocks, transport
from proto.config import GuestConfig
from proto.handover import accept
from proto.layout import VmMemory
from proto.log import LineLog
from proto.messages import Advance, Bye, Failed, Stop, Tick
from proto.process import close_inherited, die_with_parent, hide_memory, ignore_group, set_title


class Guest(Protocol):
    """The guest as its process sees it: `guestd.guest.Guest`."""

    @property
    def finished(self) -> bool:
        """The last tick said ``done``."""
        ...

    def start(self) -> None:
        """Before the first quantum."""
        ...

    def advance(self, advance: Advance) -> Tick:
        """Run one quantum."""
        ...

    def report(self) -> dict[str, Any]:
        """The VM's part of summary.json, without what only the process knows."""
        ...

    def close(self) -> None:
        """Free the big arrays."""
        ...


MakeGuest = Callable[[GuestConfig, VmMemory, EptFaultCall, Threads], Guest]


def run_guest(sock: socket.socket, log: LineLog, make_guest: MakeGuest) -> None:
    """The life of a guest. ``sock``: its end of the socketpair to the host. Raises what went wrong, having said it."""
    handover, memory = accept(sock)
    context = zmq.Context(1)
    dealer = transport.connect_guest(context, handover.endpoint, handover.server_key)
    hypercalls = Hypercalls(dealer.send, dealer.recv)
    try:
        config = hypercalls.hello(handover.vm, handover.secret, os.getpid()).config
        log.info(f"{config.name}: {config.policy} {config.workload}")
        threads = OsThreads()
        guest = make_guest(config, memory, hypercalls.ept_fault, threads)
        guest.start()
        _quanta(guest, hypercalls)
        report = guest.report()
        report["memory"] = report.get("memory", {}) | ledger.process_memory()
        # Free what is big while there is still a clock that sees it: what comes after the ledger is in no account.
        guest.close()
        del guest, memory
        gc.collect()
        report["hypercalls"] = hypercalls.report()
        report["process_cpu"] = report.get("process_cpu", {}) | ledger.process_cpu(*threads.native_ids)
        log.info("done")
        hypercalls.say(Bye(report=msgspec.json.encode(report)))
        threads.close()
    except Exception as error:
        log.error(traceback.format_exc())
        kind = error.kind if isinstance(error, GuestError) else type(error).__name__
        hypercalls.say(Failed(kind=kind[:64], message=str(error)[:4096]))
        raise
    finally:
        dealer.close()
        context.term()  # waits until the last word is out (LINGER)


def _quanta(guest: Guest, hypercalls: Hypercalls) -> None:
    while not guest.finished and hypercalls.stop is None:
        message = hypercalls.hear()
        match message:
            case Advance():
                hypercalls.say(guest.advance(message))
            case Stop():
                return
            case _:
                raise UnexpectedMessage(f"the host sent {type(message).__name__} where a quantum was due")


def guest_process(parent: int, config: GuestConfig, sock: socket.socket, make_guest: MakeGuest) -> int:
    """What the zygote's child that is a guest does; its exit status. ``parent``: the zygote's pid."""
    ignore_group()
    die_with_parent(parent, signal.SIGKILL)
    set_title(f"vm{config.vm} {config.policy} {config.workload}")
    hide_memory()
    close_inherited({sock.fileno()})
    log = LineLog(config.log_path, config.vm, f"vm{config.vm}")
    try:
        run_guest(sock, log, make_guest)
    except EOFError:
        return 1  # the host is gone; there is no one to tell
    except Exception as error:
        log.error(f"{type(error).__name__}: {error}")
        return 1
    # So that the main thread's clock, which the zygote reads, has the teardown of the process.
    clocks.outlive_other_threads()
    return 0
