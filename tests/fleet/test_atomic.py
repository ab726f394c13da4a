"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from fleet.atomic import replacing, write_atomic


def test_replaces_the_whole_content(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomic(target, "a long first content")
    write_atomic(target, b"short")
    assert target.read_bytes() == b"short"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_keeps_the_old_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomic(target, "old")
    with pytest.raises(RuntimeError, match="half"), replacing(target) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
