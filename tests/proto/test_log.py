"""Log lines: whole JSON objects of one process, numbered, from the first line on."""

import json
import os
from pathlib import Path

from proto.log import LineLog


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_line_is_a_whole_object_in_order(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path / "log.jsonl"), 3, "vm3")
    log.info("one\ntwo")
    log.warning("drei ü")
    log.error("four")
    log.close()
    log.info("five")
    log.close()
    lines = _lines(tmp_path / "log.jsonl")
    assert [line["message"] for line in lines] == ["one\ntwo", "drei ü", "four", "five"]
    assert [line["level"] for line in lines] == ["info", "warning", "error", "info"]
    assert [line["seq"] for line in lines] == [0, 1, 2, 3]
    assert {(line["vm"], line["process"]) for line in lines} == {(3, "vm3")}
    assert all(isinstance(line["time_ns"], int) for line in lines)


def test_two_processes_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    pid = os.fork()
    if pid == 0:
        log = LineLog(str(path), 1, "vm1")
        for _ in range(200):
            log.info("x" * 500)
        os._exit(0)
    log = LineLog(str(path), None, "host")
    for _ in range(200):
        log.info("y" * 500)
    log.close()
    assert os.waitpid(pid, 0)[1] == 0
    lines = _lines(path)
    assert [line["seq"] for line in lines if line["vm"] == 1] == list(range(200))
    assert [line["seq"] for line in lines if line["vm"] is None] == list(range(200))


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    LineLog("", 1, "vm1").error("nobody hears")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_opened_ends_the_log_and_not_the_process(tmp_path: Path) -> None:
    log = LineLog(str(tmp_path / "missing" / "log.jsonl"), 1, "vm1")
    log.error("one")
    (tmp_path / "missing").mkdir()
    log.error("two")
    assert not list((tmp_path / "missing").iterdir())
