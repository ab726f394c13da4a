"""What a run leaves behind: complete, never over another run, and with the last words of a guest that died."""

import json
import tomllib
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fleet.errors import OutputError
from fleet.experiment import Experiment
from fleet.outcome import FleetResult, Outcome
from fleet.provenance import collect
from fleet.results import RunDirectory, default_name, finish, to_json
from fleet.schema import check
from proto.control import Failure
from proto.layout import EVENT
from proto.log import LineLog


def test_default_name() -> None:
    started = datetime(2026, 1, 31, 14, 25, 1)
    assert default_name(started, ["g-tpp"] * 2, ["gups", "scan"]) == "20260131-142501-g-tpp-mixed"


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    names = [RunDirectory.create(None, "night", tmp_path).path.name for _ in range(3)]
    assert names == ["night", "night-2", "night-3"]


def test_out_may_be_new_or_empty(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path / "a" / "b", "ignored").path == tmp_path / "a" / "b"
    assert RunDirectory.create(tmp_path / "a" / "b", "ignored").path.is_dir()


@pytest.mark.parametrize("below", ["", "x"])
def test_out_that_is_no_directory_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match=r"no directory; choose another") as refused:
        RunDirectory.create(tmp_path / "file" / below, "n")
    assert refused.value.exit_code == 2
    assert (tmp_path / "file").read_text() == "precious"


def test_out_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(OutputError, match=r"is not empty; choose another --out"):
        RunDirectory.create(tmp_path, "n")


def test_a_place_that_takes_nothing_is_refused(tmp_path: Path, experiment: Experiment) -> None:
    directory = RunDirectory.create(tmp_path / "out", "n")
    directory.path.rmdir()
    with pytest.raises(OutputError, match="cannot write to"):
        directory.begin(experiment, collect())


def test_a_run_leaves_everything(tmp_path: Path, experiment: Experiment, result: FleetResult) -> None:
    directory = RunDirectory.create(tmp_path / "run", "n")
    provenance = collect(["fleet", "run", "two.toml"])
    directory.begin(experiment, provenance)
    guests = experiment.guests(directory.log_path, directory.events_path)
    for guest in guests:
        log = LineLog(guest.log_path, guest.vm, guest.name)
        log.info("hello")
        log.close()
        Path(guest.events_path).write_bytes(bytes(EVENT.itemsize * 2))
    summary = finish(directory, experiment, guests, result, provenance)

    assert sorted(path.name for path in directory.path.iterdir()) == [
        "events.parquet",
        "log.jsonl",
        "provenance.json",
        "spec.toml",
        "summary.json",
        "timeseries.parquet",
    ]
    written = json.loads(directory.summary_path.read_text())
    assert written == summary == json.loads(to_json(summary))
    checked = check(written)
    assert (checked.outcome, checked.run.name, checked.run.spec_digest) == ("ok", "run", experiment.digest)
    assert checked.run.argv == ["fleet", "run", "two.toml"]
    assert tomllib.loads((directory.path / "spec.toml").read_text())["seed"] == experiment.seed
    origin = json.loads((directory.path / "provenance.json").read_text())
    assert origin["spec_digest"] == experiment.digest
    assert origin["host_costs_digest"].startswith("sha256:")
    assert {"python", "numpy"} <= origin["versions"].keys()
    assert pq.read_table(directory.path / "events.parquet").num_rows == 4
    assert pq.read_table(directory.path / "timeseries.parquet").num_rows == len(result.samples)
    assert len((directory.path / "log.jsonl").read_text().splitlines()) == 2


def test_a_guest_that_died_is_reported_with_its_last_words(
    tmp_path: Path, experiment: Experiment, result: FleetResult
) -> None:
    directory = RunDirectory.create(tmp_path / "run", "n")
    guests = experiment.guests(directory.log_path, directory.events_path)
    log = LineLog(guests[1].log_path, 1, guests[1].name)
    for number in range(9):
        log.info(f"line {number}")
    log.close()
    result.outcome = Outcome.FAILED
    result.failures = [Failure(vm=1, kind="killed", message="was killed by signal 9 (SIGKILL)")]
    del result.reports[1]
    summary = check(finish(directory, experiment, guests, result, collect([])))
    assert summary.outcome == "failed"
    assert [vm.outcome for vm in summary.vms] == ["ok", "failed"]
    written = json.loads(directory.summary_path.read_text())["errors"][0]
    assert (written["vm"], written["kind"]) == (1, "killed")
    assert written["log"] == [f"info: line {number}" for number in range(4, 9)]


def test_a_run_that_failed_as_a_whole_names_no_vm(tmp_path: Path, experiment: Experiment, result: FleetResult) -> None:
    result.outcome, result.reports, result.host, result.samples = Outcome.FAILED, {}, {}, []
    result.failures = [Failure(vm=None, kind="host", message="the host was killed by signal 9 (SIGKILL)")]
    directory = RunDirectory.create(tmp_path / "run", "n")
    summary = finish(directory, experiment, experiment.guests(), result, collect([]))
    assert summary["errors"] == [{"kind": "host", "message": "the host was killed by signal 9 (SIGKILL)"}]
    assert [vm["outcome"] for vm in summary["vms"]] == ["interrupted", "interrupted"]
    check(summary)


def test_digest_does_not_depend_on_what_was_measured(
    tmp_path: Path, experiment: Experiment, result: FleetResult
) -> None:
    digests = []
    for number in range(2):
        directory = RunDirectory.create(tmp_path / str(number), "n")
        digests.append(finish(directory, experiment, experiment.guests(), result, collect([str(number)]))["digest"])
        result.wall_s += 1.0
        result.host["refused"]["malformed"] += 1
        for report in result.reports.values():
            report["agent_cpu"]["measured_s"]["track"] *= 1.5
            report["process_cpu"]["vcpu_s"] *= 1.5
    assert digests[0] == digests[1]
