"""Lines of all processes in one order, none lost; the launcher's own through multiprocessing-logging."""

import json
import logging
import multiprocessing
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fleet.logs import LOGGER, launcher_log, merge, read_lines, tail
from proto.log import LineLog

LINE = st.tuples(st.integers(0, 5), st.sampled_from([None, 0, 1, 2]))


@given(st.lists(LINE, max_size=30))
def test_merge_orders_by_time_vm_and_sequence(tmp_path_factory: object, lines: list[tuple[int, int | None]]) -> None:
    directory = tmp_path_factory.mktemp("logs")  # type: ignore[attr-defined]
    parts: dict[int | None, Path] = {}
    for seq, (time_ns, vm) in enumerate(lines):
        path = parts.setdefault(vm, directory / f"log.{vm}.jsonl")
        with path.open("a") as file:
            file.write(json.dumps({"time_ns": time_ns, "vm": vm, "seq": seq, "level": "info", "message": "m"}) + "\n")
    count = merge(parts.values(), directory / "log.jsonl")
    merged = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    keys = [(line["time_ns"], -1 if line["vm"] is None else line["vm"], line["seq"]) for line in merged]
    assert keys == sorted(keys)
    assert count == len(lines) == len({line["seq"] for line in merged})
    assert [path.name for path in directory.iterdir()] == ["log.jsonl"]


def test_lines_of_guests_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.vm3.jsonl"
    log = LineLog(str(path), 3, "vm3")
    log.info("first\nwith a second line")
    log.error("Ärger")
    log.close()
    lines = read_lines(path)
    assert [(line["vm"], line["seq"], line["level"]) for line in lines] == [(3, 0, "info"), (3, 1, "error")]
    assert tail(path, 1) == ["error: Ärger"]
    assert tail(tmp_path / "absent") == []


def test_what_is_no_json_is_kept_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "log.vm0.jsonl"
    path.write_bytes(b'{"time_ns": 5, "vm": 0, "seq": 0, "level": "info", "message": "well"}\nSegf\xff\n[1]\n')
    merge([path, tmp_path / "absent"], tmp_path / "log.jsonl")
    lines = read_lines(tmp_path / "log.jsonl")
    assert [line["message"] for line in lines] == ["well", "Segf\ufffd", "[1]"]
    assert {line["time_ns"] for line in lines} == {5}
    assert {line["vm"] for line in lines} == {0}


def _work(number: int) -> None:
    logging.getLogger(f"{LOGGER}.worker").info("worker %d", number, extra={"vm": number})


def test_the_launchers_children_log_to_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "log.launcher.jsonl"
    with launcher_log(path) as log:
        log.info("starts with %d", 2)
        workers = [multiprocessing.Process(target=_work, args=(number,)) for number in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        try:
            raise ValueError("odd")
        except ValueError:
            log.exception("ends")
    lines = read_lines(path)
    assert {line["message"] for line in lines} >= {"starts with 2", "worker 0", "worker 1"}
    assert {line["vm"] for line in lines} == {None, 0, 1}
    assert len(lines) == 4
    assert [line["seq"] for line in lines] == sorted({line["seq"] for line in lines})
    assert any("ValueError: odd" in line["message"] and line["level"] == "error" for line in lines)


def test_the_logger_is_put_back(tmp_path: Path) -> None:
    logger = logging.getLogger(LOGGER)
    before = (list(logger.handlers), logger.level, logger.propagate)
    with launcher_log(tmp_path / "log.jsonl"):
        assert logger.handlers != before[0]
    assert (list(logger.handlers), logger.level, logger.propagate) == before
