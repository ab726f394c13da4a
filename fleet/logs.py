"""The log of a run: how the launcher writes its part, and how the parts of all processes become one ``log.jsonl``.

Guests, host and zygote append whole JSON lines to a file each (one `write` a line, so that a kill tears none). The
launcher's own records pass through multiprocessing-logging, so that worker processes of the launcher log through the
same handler; a raw-forked guest does not, as a queue that a killed sibling may jam must not stop it. Merging orders
the lines by time, then VM, then the writer's own sequence number.
"""

import json
import logging
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from fleet.atomic import write_atomic

LOGGER = "tierfleet"
"""The launcher's logger; modules of fleet log to it or to its children."""


class JsonLines(logging.Formatter):
    """A record as a JSON line with the keys of every log of the run: time_ns, vm, seq, level, message.

    The launcher is no VM, so ``vm`` is null unless the record names one (``extra={"vm": 3}``).
    """

    def __init__(self) -> None:
        super().__init__()
        self._seq = count()

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its newline."""
        message = record.getMessage()
        if record.exc_info and not record.exc_text:
            # Kept on the record, as the handler between processes formats once to drop what can't be pickled.
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            message += "\n" + record.exc_text
        line = {
            "time_ns": round(record.created * 1e9),
            "vm": getattr(record, "vm", None),
            "seq": next(self._seq),
            "process": "launcher" if record.processName == "MainProcess" else record.processName,
            "level": record.levelname.lower(),
            "message": message,
        }
        return json.dumps(line, ensure_ascii=False)


@contextmanager
def launcher_log(path: Path) -> Iterator[logging.Logger]:
    """Send the launcher's records, and those of its multiprocessing children, to ``path`` until the end of the block.

    Start it where threads may exist: the handler of multiprocessing-logging owns one, so never in the zygote.
    """
    from multiprocessing_logging import install_mp_handler

    if multiprocessing.get_start_method() != "fork":  # the only one that multiprocessing-logging supports
        multiprocessing.set_start_method("fork", force=True)

    logger = logging.getLogger(LOGGER)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(JsonLines())
    before, level, propagate = list(logger.handlers), logger.level, logger.propagate
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # It starts a thread, which is not to be interrupted half-way, nor to be the one that a signal goes to.
    unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    install_mp_handler(logger)
    signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
    try:
        yield logger
    finally:
        for wrapped in logger.handlers:
            wrapped.close()  # waits for what children still have in the queue
        logger.handlers[:] = before
        logger.setLevel(level)
        logger.propagate = propagate


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of one process; one that is no JSON object is kept as the message of an ``error`` line."""
    lines: list[dict[str, Any]] = []
    previous_ns, previous_vm = 0, None
    for seq, raw in enumerate(path.read_bytes().splitlines()):
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            text = raw.decode(errors="replace")
            line = {"time_ns": previous_ns, "vm": previous_vm, "seq": seq, "level": "error", "message": text}
        previous_ns, previous_vm = line.get("time_ns", previous_ns), line.get("vm", previous_vm)
        lines.append(line)
    return lines


def merge(parts: Iterable[Path], target: Path) -> int:
    """Write the lines of every file of ``parts`` that exists to ``target``, in order, then remove the files.

    Order: time, VM (processes that are no VM first), sequence number. Returns the number of lines. The target appears
    whole or not at all, and the parts go only after it is there.
    """
    present = [path for path in parts if path.exists()]
    lines = sorted((line for path in present for line in read_lines(path)), key=_order)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(target, text)
    for path in present:
        path.unlink()
    return len(lines)


def _order(line: dict[str, Any]) -> tuple[int, int, int]:
    vm = line.get("vm")
    return line.get("time_ns", 0), -1 if vm is None else vm, line.get("seq", 0)


def tail(path: Path, lines: int = 5) -> list[str]:
    """The last log lines of one process as ``level: message``, for the report of its failure; [] without a file."""
    if not path.exists():
        return []
    return [f"{line.get('level', '')}: {line.get('message', '')}" for line in read_lines(path)[-lines:]]
