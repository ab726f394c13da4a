"""Whether a recorded trace fits the VM that is to replay it, found out before anything starts."""

from functools import cache
from pathlib import Path

import numpy as np

from fleet.errors import SpecError
from fleet.spec_values import exact_size
from proto.trace import read_trace, touched_pages
from proto.units import PAGE_SIZE, TABLE_SHIFT, format_bytes

USABLE = 0.97
"""Share of a VM's memory that a program can have; the rest is the kernel's watermarks and PEBS buffers."""
_UPPER_TABLES = 16
"""Page-table pages above the leaves: the few that a program's areas need."""


def check_trace(path: str, total_pages: int, step: int) -> None:
    """Refuse a trace whose pages and page tables exceed a VM of ``total_pages``.

    ``step``: memory sizes are a multiple of so many bytes. Raises SpecError; TraceError for a file that is no trace.
    """
    needed = pages_needed(path)
    if needed > total_pages * USABLE:
        least = -(-round(needed / USABLE) * PAGE_SIZE // step) * step
        raise SpecError(
            f"memory: {format_bytes(total_pages * PAGE_SIZE)} per VM cannot hold the trace {Path(path).name}, which "
            f"touches {format_bytes(needed * PAGE_SIZE)} with its page tables; give at least {exact_size(least)}"
        )


@cache
def pages_needed(path: str) -> int:
    """Pages that the trace touches, and those of the page tables that map them."""
    pages = touched_pages(read_trace(Path(path)))
    leaves = np.unique(pages >> np.uint64(TABLE_SHIFT)).size
    return int(pages.size + leaves + _UPPER_TABLES)
