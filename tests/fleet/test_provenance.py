"""Where a run came from."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fleet import __version__
from fleet.provenance import LIBRARIES, collect, git_state, library_versions, machine

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git makes the checkouts")


def test_of_this_process() -> None:
    provenance = collect(["fleet", "run"])
    assert provenance.argv == ["fleet", "run"]
    assert provenance.version == __version__
    assert provenance.started.endswith("+00:00")
    assert provenance.machine["cores_usable"] == len(os.sched_getaffinity(0))


def test_versions_are_all_there() -> None:
    assert library_versions().keys() == {"python", *LIBRARIES}
    assert machine()["memory_bytes"] > 0


def test_a_directory_of_no_checkout_has_no_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (None, None)


@needs_git
def test_a_checkout_of_another_project_is_not_ours(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert git_state(tmp_path) == (None, None)


@needs_git
def test_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "provenance.py").write_text("")
    git("add", ".")
    git("commit", "-q", "-m", "m")
    commit, dirty = git_state(tmp_path)
    assert commit is not None
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "provenance.py").write_text("changed")
    assert git_state(tmp_path) == (commit, True)
