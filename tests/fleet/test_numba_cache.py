"""The directory of compiled kernels: one per CPU and versions, ours alone, old ones forgotten."""

import os
import platform
import stat
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

from fleet import numba_cache


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tierfleet"


def test_the_same_machine_has_the_same_directory(base: Path) -> None:
    directory = numba_cache.cache_directory()
    assert directory.parent == base
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (directory / "kernel").touch()
    assert numba_cache.cache_directory() == directory
    assert (directory / "kernel").exists()


def test_another_cpu_or_version_has_another(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = numba_cache.cache_directory()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    second = numba_cache.cache_directory()
    monkeypatch.setattr(metadata, "version", lambda name: "0.0")
    assert len({first, second, numba_cache.cache_directory()}) == 3


def test_what_no_run_used_for_long_goes(base: Path) -> None:
    directory = numba_cache.cache_directory()
    old = base / "0123"
    (old / "deep").mkdir(parents=True)
    os.utime(old, (1, 1))
    older = directory / "tlb-0123"
    older.mkdir()
    os.utime(older, (1, 1))
    assert numba_cache.cache_directory() == directory
    assert not old.exists()
    assert not older.exists()


def test_without_a_writable_home_it_is_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    directory = numba_cache.cache_directory()
    assert directory.parent.parent == tmp_path
    assert os.access(directory, os.W_OK)
