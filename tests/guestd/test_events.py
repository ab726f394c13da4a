"""The event log: whole records, in order, of one VM; nothing without a path."""

from pathlib import Path

import numpy as np

from guestd.events import EventLog
from proto.layout import EVENT, EVENT_KINDS


def test_records_are_appended_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_bytes(b"")
    log = EventLog(str(path), 7)
    log.add(100, "promote", np.array([4096, 8192]), 1, 0)
    assert path.stat().st_size == 0, "buffered"
    log.add(200, "demote", 12288, 0, 1)
    log.flush()
    log.add(300, "phase", 0, 0, 1)
    log.close()
    log.close()
    records = np.frombuffer(path.read_bytes(), EVENT)
    assert records["time_ps"].tolist() == [100, 100, 200, 300]
    assert [EVENT_KINDS[kind] for kind in records["kind"]] == ["promote", "promote", "demote", "phase"]
    assert records["gva"].tolist() == [4096, 8192, 12288, 0]
    assert records["source"].tolist() == [1, 1, 0, 0] and records["target"].tolist() == [0, 0, 1, 1]
    assert (records["vm"] == 7).all()


def test_many_records_are_written_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events"
    log = EventLog(str(path), 0)
    log.add(1, "promote", np.arange(10_000), 1, 0)
    assert path.stat().st_size == 10_000 * EVENT.itemsize
    other = EventLog(str(path), 1)
    other.add(2, "demote", 5, 0, 1)
    other.close()
    log.close()
    assert np.frombuffer(path.read_bytes(), EVENT)["vm"].tolist() == [0] * 10_000 + [1], "files are shared by appending"


def test_without_a_path_nothing_is_kept(tmp_path: Path) -> None:
    log = EventLog("", 0)
    log.add(1, "promote", np.arange(10_000), 1, 0)
    log.close()
    assert list(tmp_path.iterdir()) == []
