"""Where numba keeps a kernel's machine code: one directory per state of the sources that it can come from.

numba's own locators look at the file of a function only, and would go on with machine code of a callee that was edited
in another file (architecture 5). This one names the directory by a hash of the function's module and of all that it
imports, directly or not, of this project; so an edit compiles anew what it can reach, and nothing else. numba finds
the class by NUMBA_CACHE_LOCATOR_CLASSES (`fleet.numba_cache.environment`).
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

from numba.core import caching

ROOT = Path(__file__).resolve().parent.parent
_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)|import[ \t]+([^\n]*))", re.M)
_NAME = re.compile(r"[A-Za-z_][\w.]*")


class ModuleLocator(caching._CacheLocator):
    """See the module."""

    def __init__(self, function: Callable[..., Any], file: Path) -> None:
        self._line = function.__code__.co_firstlineno
        self._stamp = stamp(file)
        self._path = Path(os.environ["NUMBA_CACHE_DIR"]) / f"{file.stem}-{self._stamp}"

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> Self | None:
        """numba's hook. A function whose code is another module's (`guestd.meter.metered`) belongs to its own."""
        module = sys.modules.get(py_func.__module__)
        file = Path(getattr(module, "__file__", None) or py_file)
        if not file.exists():
            return None
        locator = cls(py_func, file)
        locator._path.mkdir(exist_ok=True)
        os.utime(locator._path)
        return locator

    def get_cache_path(self) -> str:
        """The directory."""
        return str(self._path)

    def get_source_stamp(self) -> str:
        """Part of the directory's name already; so what is in it is never stale."""
        return self._stamp

    def get_disambiguator(self) -> str:
        """Line of the function."""
        return str(self._line)


@cache
def stamp(file: Path) -> str:
    """Hash of a module's source and of all project sources that it imports, directly or not."""
    seen: set[Path] = set()
    left = [file]
    while left:
        source = left.pop()
        if source not in seen:
            seen.add(source)
            left += _imported(source)
    digest = hashlib.sha256()
    for source in sorted(seen):
        name = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source
        digest.update(str(name).encode() + b"\0" + _read(source) + b"\0")
    return digest.hexdigest()[:20]


@cache
def _imported(file: Path) -> list[Path]:
    return [path for name in _imported_names(_read(file).decode()) for path in _files(name, file)]


def _imported_names(source: str) -> Iterator[str]:
    """Every dotted name that may be a module."""
    for module, members, plain in _IMPORT.findall(source):
        if module:
            yield module
            yield from (f"{module}.{member}" for member in _NAME.findall(members))
        else:
            yield from _NAME.findall(plain)


def _files(name: str, importer: Path) -> list[Path]:
    """Sources of a module of this project, or of one beside the file that imports it."""
    below = Path(*name.lstrip(".").split("."))
    return [path for root in (ROOT, importer.parent)
            for path in (root / below.with_suffix(".py"), root / below / "__init__.py") if path.is_file()]  # fmt: skip


@cache
def _read(file: Path) -> bytes:
    return file.read_bytes()
