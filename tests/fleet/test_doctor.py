"""fleet.doctor: every limit that a run would break is named with its fix, and nothing else is."""

import os
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest

from fleet import doctor
from fleet.spec import Registries, load
from guestd.params import Param
from proto.config import GuestConfig


class Kind:
    """A policy or workload without parameters."""

    params: tuple[Param, ...] = ()
    min_memory_bytes = 0
    view = "-"
    fast_share = None
    min_fast_ratio = Fraction(0)
    shares_fast = False

    @staticmethod
    def min_run_ps(params: object) -> int:
        return 0


def guest() -> GuestConfig:
    registries = Registries({"none": Kind()}, {"gups": Kind()})
    return load(None, {"memory": "16MiB"}, (), registries).guests()[0]


def names(checks: list[doctor.Check]) -> set[str]:
    return {check.name for check in checks if not check.ok}


def test_this_machine_can_run_one_small_guest() -> None:
    assert doctor.check_run([guest()]) == []
    assert names(doctor.examine(doctor.Demand(1, 4096))) == set()


def test_more_memory_than_there_is_is_refused_with_the_fix() -> None:
    large = msgspec.structs.replace(guest(), total_pages=1 << 27)
    (problem,) = doctor.check_run([large] * 300)
    assert problem.name == "memory"
    assert "--scale" in problem.fix
    assert "needed" in problem.line()
    assert "\n" not in problem.line()


def test_more_guests_than_processes_are_refused() -> None:
    assert "processes and threads" in names(doctor.limits(doctor.Demand(10**7, 0)))


def test_the_demand_grows_with_guests_and_pages() -> None:
    one, more_vms, more_pages = doctor.Demand(1, 10), doctor.Demand(2, 10), doctor.Demand(1, 20)
    assert one.memory_bytes < more_vms.memory_bytes
    assert more_pages.memory_bytes - one.memory_bytes == 10 * doctor.BYTES_PER_PAGE


def test_a_hard_limit_of_open_files_is_named() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        assert doctor.open_files(10**6).found == "unlimited"
    else:
        assert doctor.open_files(1).ok
        refused = doctor.open_files(hard)
        assert not refused.ok
        assert "nofile" in refused.fix
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


def test_the_soft_limit_of_open_files_is_raised_as_far_as_needed() -> None:
    # In a process of its own: limits belong to the process.
    script = (
        "import resource; from fleet import doctor\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))\n"
        "doctor.raise_file_limit(1); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "doctor.raise_file_limit(50); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    root = Path(doctor.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    first, second = (int(line) for line in done.stdout.split())
    assert first == 80
    assert second == doctor.FILES_FOR_ALL + 50 * doctor.FILES_PER_GUEST


def test_the_socket_directory_is_where_a_run_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/of-somebody-else")
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    there = doctor.socket_directory()
    assert (there.ok, there.found) == (True, "/tmp")
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    refused = doctor.socket_directory()
    assert not refused.ok
    assert "XDG_RUNTIME_DIR" in refused.fix


def test_a_kernel_without_sealed_memfds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    assert doctor.sealed_memfd().ok
    monkeypatch.setattr(os, "memfd_create", refuse)
    refused = doctor.sealed_memfd()
    assert not refused.ok
    assert refused.found == "Operation not permitted"


def test_limits_of_the_cgroup_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"pids.max": "40", "pids.current": "30", "memory.max": "1000000", "memory.current": "600000"}
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    monkeypatch.setattr(doctor, "_cgroups", lambda controller: iter([tmp_path]))
    refused = doctor.processes(1)
    assert (refused.ok, refused.found) == (False, "10 available")
    assert str(tmp_path / "pids.max") in refused.fix
    refused = doctor.memory(doctor.Demand(1, 1))
    assert not refused.ok
    assert str(tmp_path) in refused.fix
    (tmp_path / "pids.max").write_text("max\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.processes(1).ok
    assert doctor.memory(doctor.Demand(1, 1)).ok


def test_the_kernel_cache_lies_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check = doctor.kernel_cache()
    assert check.ok
    assert check.found.startswith(str(tmp_path))
    assert "empty" in check.found
