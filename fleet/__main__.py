"""``python -m fleet`` is ``fleet``: the entry point of both, where Ctrl-C is never lost."""

import os
import signal
import sys
import threading

_AGAIN_S = 0.01


def main() -> None:
    """Import the commands, which takes a moment in which Ctrl-C just ends the process, and run the one asked for."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fleet.cli import main as run

    sys.unraisablehook = _interrupt_again
    signal.signal(signal.SIGINT, handler)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is signal.SIG_DFL:
            # A command that is asked to end cleans up as at Ctrl-C.
            signal.signal(signum, signal.default_int_handler)
    run()


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C that came in a callback, as imports have, is nobody's exception: it comes again a moment later."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    main()
