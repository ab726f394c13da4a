"""fleet report, from real runs to the page, the files, the terminal and the JSON."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped]
import pyarrow.csv as pa_csv
import pytest
from PIL import Image

from fleet import run

ROOT = Path(run.__file__).parent.parent
SMALL = (
    "--memory", "256MiB", "--scale", "1/16", "--seconds", "0.5", "--sample", "20ms", "--json",
    "--set", "policy.scan_period_max_ms=1000", "--set", "policy.scan_delay_ms=100",
)  # fmt: skip
pytestmark = pytest.mark.timeout(400)  # the first run of a machine compiles


def fleet(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleet", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


class Page(HTMLParser):
    """What a browser would fetch, and the text of the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.data: dict[str, Any] = {}
        self.policy = ""
        self.headings: list[str] = []
        self._script: str | None = None
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value for key in ("src", "href", "srcset", "action", "data") if (value := given.get(key))]
        if tag == "script" and given.get("type") == "application/json":
            self._script = given["id"]
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])
        self._heading = tag == "h2"

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.data[self._script] = json.loads(data)
            self._script = None
        if self._heading:
            self.headings.append(data)
            self._heading = False


def check_page(directory: Path) -> Page:
    """The page's figures are plotly's, all files are there, and nothing is fetched."""
    page = Page((directory / "report.html").read_text("utf-8"))
    assert page.policy.startswith("default-src 'none'")
    local = [link for link in page.links if not link.startswith(("#", "data:"))]
    assert local
    assert not [link for link in local if not re.fullmatch(r"report/[a-z0-9-]+\.(svg|png|csv)", link)]
    for link in local:
        assert (directory / link).stat().st_size > 0
    assert page.data.pop("config")["plotlyServerURL"] == ""
    for name, figure in page.data.items():
        checked = go.Figure(figure)  # raises for what plotly does not know
        assert checked.layout.yaxis.title.text, name
        assert checked.data, name
    for image in (directory / "report").glob("*.png"):
        with Image.open(image) as opened:
            grey = np.asarray(opened.convert("L"))
        assert (grey.min() < 64, grey.max() > 250) == (True, True)
    return page


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two VMs of g-tpp."""
    directory = tmp_path_factory.mktemp("single") / "run"
    done = fleet("run", "--vms", "2", "--policy", "g-tpp", *SMALL, "--out", directory)
    assert done.returncode == 0, done.stderr
    return directory


def test_report_of_a_run(single: Path) -> None:
    done = fleet("report", single)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(single / "report.html") in done.stdout
    assert "vm1" in done.stdout
    assert "Sensitivity" in done.stdout  # left out, and said so
    page = check_page(single)
    assert "Fast-tier share over time" in page.headings
    assert "Parameters and where they come from" in page.headings
    summary = json.loads((single / "summary.json").read_text())
    printed = json.loads(fleet("report", single, "--json").stdout)
    table = printed["tables"]["results"]
    assert [row[0] for row in table["rows"]] == ["vm0 g-tpp gups", "vm1 g-tpp gups"]
    column = [c["name"] for c in table["columns"]].index("throughput")
    assert [row[column] for row in table["rows"]] == [vm["throughput_mops"] for vm in summary["vms"]]
    parameters = {row[0]: row for row in printed["tables"]["parameters"]["rows"]}
    assert parameters["policy.scan_period_max_ms"][4] is True  # it was set
    assert parameters["host.invept"][7] == "estimated"
    assert parameters["host.invept"][4] is False
    drawn = pa_csv.read_csv(single / "report" / "throughput.csv")
    assert drawn.column_names == ["series", "virtual time of the fleet (s)", "throughput (M accesses/s)"]
    mean = np.mean(drawn["throughput (M accesses/s)"].to_numpy())
    assert mean == pytest.approx(np.mean([vm["throughput_mops"] for vm in summary["vms"]]), rel=0.05)


@pytest.fixture(scope="module")
def sweep(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of 1 and 2 VMs, the larger one twice; one that failed and one that was never run."""
    directory = tmp_path_factory.mktemp("sweep") / "sweep"
    (directory / "cells").mkdir(parents=True)
    done = fleet("run", "--vms", "1", "--policy", "g-tpp", *SMALL, "--out", directory / "cells" / "a")
    assert done.returncode == 0, done.stderr
    for name in ("b", "c"):
        shutil.copytree(single, directory / "cells" / name, ignore=shutil.ignore_patterns("report*"))
    (directory / "cells" / "d").mkdir()
    (directory / "cells" / "d" / "FAILED").write_text("the host died\n")
    (directory / "cells" / "e").mkdir()
    plan = []
    for name, vms, repetition in (("a", 1, 0), ("b", 2, 0), ("c", 2, 1), ("d", 3, 0), ("e", 4, 0)):
        entry = {"cell": name, "axes": {"vms": vms}, "repetition": repetition, "seed": 1}
        (directory / "cells" / name / "cell.json").write_text(json.dumps(entry))
        plan.append(entry)
        if name < "d":
            (directory / "cells" / name / "DONE").touch()
    (directory / "plan.json").write_text(json.dumps({"name": "two", "cells": plan}))
    return directory


def test_report_of_a_sweep(sweep: Path) -> None:
    done = fleet("report", sweep, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    page = check_page(sweep)
    printed = json.loads(done.stdout)
    assert printed["title"] == "Sweep two: 3 of 5 cells"
    assert [row[4] for row in printed["tables"]["cells"]["rows"]] == ["done"] * 3 + ["failed", "missing"]
    assert printed["tables"]["errors"]["rows"] == [["d", None, "cell", "the host died"]]
    points = printed["tables"]["results"]
    assert [row[:2] for row in points["rows"]] == [[1, 1], [2, 2]]
    summaries = [json.loads((sweep / "cells" / name / "summary.json").read_text()) for name in ("a", "b")]
    for kind, series in zip(("measured", "modelled"), page.data["data-agent-cores"]["data"], strict=True):
        cores = [sum(vm["agent_cpu"][f"{kind}_cores"] for vm in summary["vms"]) for summary in summaries]
        assert series["x"] == [1.0, 2.0]
        assert series["y"] == pytest.approx(cores)


def test_a_damaged_file_is_named_in_one_line(single: Path, tmp_path: Path) -> None:
    shutil.copytree(single, tmp_path / "run")
    (tmp_path / "run" / "timeseries.parquet").write_bytes(b"PAR1 and nothing else")
    done = fleet("report", tmp_path / "run")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "damaged" in done.stderr


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        done = fleet("report", directory)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert "neither a sweep nor a run" in done.stderr
