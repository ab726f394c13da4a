"""`fleet trace`, as a person meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fleet.trace.cli import FormatName, TimeUnit, app
from fleet.trace.importer import Format
from fleet.trace.table import NS
from proto.trace import read_trace

ROOT = str(Path(__file__).parents[3])
LACKEY = b"".join(b"I  1000,4\n L %x,8\n" % (0x10000 + 4096 * index) for index in range(200))


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.lackey").write_bytes(LACKEY)
    assert CliRunner().invoke(app, ["import", "x.lackey"]).exit_code == 0
    return Path("x.trace")


def test_import_then_info(trace: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(trace), "--png", "x.png"])
    assert result.exit_code == 0
    assert "200 pages" in result.stdout
    assert "100 % loads" in result.stdout
    assert "1 instructions per reference" in result.stdout
    assert result.stdout.isascii()
    assert Path("x.png").stat().st_size > 0


def test_json_is_one_object_and_nothing_else(trace: Path) -> None:
    info = CliRunner().invoke(app, ["info", str(trace), "--json"])
    assert json.loads(info.stdout)["footprint"]["pages"] == 200
    Path("y.lackey").write_bytes(LACKEY + b"oops\n")
    imported = CliRunner().invoke(app, ["import", "y.lackey", "--json", "--out", "y.trace"])
    assert json.loads(imported.stdout)["garbage_lines"] == [401]
    assert "line 401" in imported.stderr


def test_standard_input(tmp_path: Path) -> None:
    def pipe(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", "from fleet.trace.cli import app; app()", "import", "-", *arguments]
        return subprocess.run(
            command, input=LACKEY, capture_output=True, check=False, env={"PYTHONPATH": ROOT}, cwd=tmp_path
        )

    assert pipe("--out", "x.trace").returncode == 0
    assert len(read_trace(tmp_path / "x.trace").address) == 200
    unnamed = pipe()
    assert unnamed.returncode == 2
    assert b"--out" in unnamed.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "nothing.trace"],
        ["info", "x.lackey"],
        ["import", "nothing"],
        ["import", "x.lackey", "--out", "no/x.trace"],
        ["import", "x.lackey", "--cache", "1 lightyear"],
        ["import", "x.lackey", "--cache", "100"],
        ["import", "x.lackey", "--format", "csv"],
        ["import", "x.lackey", "--format", "lacky"],
    ],
)
def test_bad_input_is_two_and_no_traceback(trace: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if "lacky" not in arguments:  # the option parser's own message is a box
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_names_agree_with_what_they_stand_for() -> None:
    assert [name.value for name in FormatName] == [name.value for name in Format]
    assert {unit.value for unit in TimeUnit} == NS.keys()
