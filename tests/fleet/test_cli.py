"""fleet.cli: what is printed where, and the exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fleet import hosts
from fleet.cli import main

ROOT = Path(hosts.__file__).parent.parent


class Outcome:
    """What one command did."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        self.code = caught.value.code
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.mark.parametrize(
    "command", ["run", "sweep", "compare", "policies", "workloads", "hosts", "doctor", "version", "trace"]
)
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = Outcome(capsys, command, "--help")
    assert done.code == 0
    assert f"fleet {command}" in done.out
    if command != "trace":
        assert "Example" in done.out


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    done = Outcome(capsys)
    assert (done.code, done.err) == (0, "")
    for command in ("run", "sweep", "results", "compare", "policies", "workloads", "hosts", "trace", "doctor"):
        assert f"\n  {command} " in done.out


def test_the_help_imports_no_heavy_library() -> None:
    script = "import sys; from fleet.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "print(sorted({'numba', 'numpy', 'pyarrow', 'matplotlib', 'rich', 'zmq'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


LOST = """
import fleet.__main__, fleet.cli, signal, weakref
def run():
    class Module: pass
    def callback(_):
        print("lost at first", flush=True)
        signal.raise_signal(signal.SIGINT)
    watched = weakref.ref(gone := Module(), callback)
    try:
        del gone
        signal.pause()
    except KeyboardInterrupt:
        print("and heard")
fleet.cli.main = run
signal.signal(signal.SIGINT, signal.default_int_handler)
fleet.__main__.main()
"""


def test_ctrl_c_in_a_callback_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("lost at first\nand heard\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("hots",), "Did you mean 'hosts'"),
        (("run", "--vmz", "3"), "--vms"),
        (("run", "--clock", "realtime"), "not yet"),
        (("run", "--policy", "gtpp"), "did you mean 'g-tpp'"),
        (("run", "--workload", "gupss"), "did you mean 'gups'"),
        (("run", "--host", "xeon"), "did you mean 'xeon-8360y-optane'"),
        (("run", "--memory", "512 Mebi"), "is not a size"),
        (("run", "nowhere.toml"), "no spec file 'nowhere.toml'"),
        (("run", "--set", "workload.layout=scatterd"), "did you mean 'scattered'"),
        (("run", "--vms", "60000", "--memory", "500GiB"), "this machine cannot hold the run"),
        (("policies", "gtpp"), "did you mean 'g-tpp'"),
        (("workloads", "gupps"), "did you mean 'gups'"),
        (("hosts", "show", "xeon-8360y-optan"), "did you mean 'xeon-8360y-optane'"),
        (("doctor", "--memory", "lots"), "is not a size"),
        (("doctor", "--vms", "0"), "--vms"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = Outcome(capsys, *arguments)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert len(done.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_hosts_are_listed_and_shown_with_their_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    listed = Outcome(capsys, "hosts")
    assert listed.code == 0
    for name in hosts.profile_names():
        assert name in listed.out
    assert set(Outcome(capsys, "hosts", "--json").json) == set(hosts.profile_names())
    shown = Outcome(capsys, "hosts", "show", "xeon-8360y-optane")
    assert shown.code == 0
    lines = {line.split()[0]: line for line in shown.out.splitlines() if line}
    for key, figure in hosts.load_profile("xeon-8360y-optane").figures.items():
        assert figure.unit in lines[key] or figure.unit == "factor"
        assert figure.grade in lines[key]
        assert figure.source in lines[key]
    figures = Outcome(capsys, "hosts", "show", "xeon-8360y-optane", "--json").json["figures"]
    assert figures["slow.latency_local"]["value"] == 176.6


def test_policies_are_listed_with_view_stages_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    known = Outcome(capsys, "policies", "--json").json
    assert {"none", "all-fast", "all-slow", "oracle", "g-tpp", "h-tpp", "hyperplace"} <= set(known)
    assert (known["g-tpp"]["view"], known["h-tpp"]["view"]) == ("guest", "host")
    table = Outcome(capsys, "policies").out
    for name, policy in known.items():
        assert name in table
        assert policy["source"] in table
    one = Outcome(capsys, "policies", "g-tpp")
    assert one.code == 0
    for param in known["g-tpp"]["params"]:
        assert f"policy.{param['name']}" in one.out
    assert "policy." not in table


def test_workloads_are_listed_with_their_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    known = Outcome(capsys, "workloads", "--json").json
    assert {"gups", "scan", "trace", "btree", "silo", "pagerank", "bfs"} <= set(known)
    assert "workload.layout" in Outcome(capsys, "workloads", "--params").out


def test_the_doctor_says_the_same_in_json_and_in_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    well = Outcome(capsys, "doctor", "--vms", "1", "--memory", "16MiB", "--json")
    assert (well.code, well.json["ok"]) == (0, True)
    ill = Outcome(capsys, "doctor", "--vms", "100000", "--memory", "500GiB", "--json")
    assert (ill.code, ill.json["ok"]) == (1, False)
    assert any(not check["ok"] and check["fix"] for check in ill.json["checks"])
    assert "fix memory: " in Outcome(capsys, "doctor", "--vms", "100000", "--memory", "500GiB").out


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m fleet hosts show xeon-8360y-optane | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("xeon-8360y-optane")


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">/dev/full", 1, "fleet: standard output: No space left on device\n"),
    ],
)
def test_a_stream_that_takes_nothing_is_no_traceback(redirect: str, code: int, said: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m fleet version {redirect}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.timeout(400)
def test_a_run_does_not_end_with_who_watches_it(tmp_path: Path) -> None:
    out = tmp_path / "\u00fc"
    command = f"{sys.executable} -m fleet run --memory 16MiB --seconds 0.2 --json --out {out} 2>/dev/full"
    plain = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=plain, check=False)
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["run"]["name"] == "\u00fc"
    assert (out / "summary.json").is_file()


def test_an_internal_error_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[str]:
        raise ValueError("two\nlines")

    monkeypatch.setattr(hosts, "profile_names", fail)
    done = Outcome(capsys, "hosts")
    assert (done.code, done.out) == (1, "")
    assert done.err == "fleet: internal error: ValueError: two lines (FLEET_DEBUG=1 shows where)\n"
