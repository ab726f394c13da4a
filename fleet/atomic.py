"""Files that appear whole or not at all: written beside their place under a hidden name, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to; it becomes ``target`` at the end of the block, and is removed if the block raises."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_atomic(target: Path, data: bytes | str) -> None:
    """``data`` as the whole content of ``target``; text as UTF-8."""
    with replacing(target) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
