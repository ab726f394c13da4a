"""fleet.sweep.spec: a file into cells, or one line that says what is wrong with it."""

from pathlib import Path

import pytest

from fleet.errors import SpecError
from fleet.spec import load
from fleet.sweep.spec import load_sweep

FULL = """
name = "tiny"
zip = [["vms", "memory"]]
where = "vms == 1 or policy != 'h-tpp'"
repetitions = 2

[base]
seconds = 0.02
seed = 40
set.policy.scan_delay_ms = 5
set.guest.hz = 200

[axes]
vms = "1..2"
memory = ["32MiB", "16MiB"]
policy = "h-tpp,g-tpp"
set.host.invept = ["200ns", "400ns"]
"""


def sweep_file(folder: Path, text: str) -> Path:
    path = folder / "s.toml"
    path.write_text(text)
    return path


def test_cells_are_crossed_zipped_filtered_and_repeated(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, FULL))
    assert (sweep.name, list(sweep.axes)) == ("tiny", ["vms", "memory", "policy", "host.invept"])
    shown = [(*point.axes.values(), point.repetition) for point in sweep.points]
    expected = [
        (vms, memory, policy, invept, repetition)
        for vms, memory in ((1, "32MiB"), (2, "16MiB"))
        for policy in ("h-tpp", "g-tpp")
        for invept in ("200ns", "400ns")
        for repetition in (0, 1)
        if vms == 1 or policy != "h-tpp"
    ]
    assert shown == expected
    assert len({point.hash for point in sweep.points}) == len(expected)
    for point in sweep.points:
        assert point.experiment.seed == 40 + point.repetition
        assert point.experiment.tenants[0].kernel.hz == 200
        assert point.experiment.tenants[0].vms == point.axes["vms"]
        assert point.experiment.costs.invept_ps == int(str(point.axes["host.invept"])[:3]) * 1000


def test_a_cell_is_the_run_that_the_same_flags_give(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        'vms = 2\npolicy = "g-tpp"\nset.policy.active_filter = false\n[[group]]\nvcpus = 2\n'
    )
    text = 'base = "base.toml"\n[axes]\nmemory = ["16MiB", "32MiB"]\nset.workload.layout = ["scattered"]\n'
    for point in load_sweep(sweep_file(tmp_path, text)).points:
        flags = {"memory": point.axes["memory"]}
        run = load(tmp_path / "base.toml", flags, ["workload.layout=scattered"])
        assert point.experiment.digest == run.digest
        assert point.hash == run.digest.removeprefix("sha256:")[:16]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[base]\nvms = 1\n", "has no [axes]; to run one experiment: fleet run"),
        ("vms = 1\n[axes]\nvms = [1]\n", "no key of a sweep 'vms'"),
        ("[axes]\nvmz = [1]\n", "s.toml: axes: no key 'vmz'; did you mean 'vms'"),
        ("[axes]\nname = ['a', 'b']\n", "says nothing about a run"),
        ("[axes]\nvms = [0, 1]\n", "s.toml: axes: vms: must be between 1 and"),
        ("[axes]\npolicy = ['g-tpp', 'gtpp']\n", "s.toml: axes: policy: no policy 'gtpp'; did you mean 'g-tpp'?"),
        ("[axes]\nset.policy.reclame = [1]\n[base]\npolicy = 'g-tpp'\n", "no policy parameter 'reclame'"),
        ("[axes]\nset.pol.x = [1]\n", "no set of parameters 'pol'"),
        ("where = 'vms > 9'\n[axes]\nvms = '1..3'\n", "where: no point is left"),
        ("repetitions = 0\n[axes]\nvms = [1]\n", "repetitions: must be between 1 and"),
        ("repetitions = 2\n[axes]\nseed = [1, 2]\n", "vary the seed"),
        ("repetitions = 2\n[base]\nseed = 9223372036854775807\n[axes]\nvms = [1]\n", "start lower"),
        ("zip = ['vms']\n[axes]\nvms = [1]\n", "zip: must be a list of lists"),
        ("where = 3\n[axes]\nvms = [1]\n", "where: must be an expression"),
        ("base = 'no.toml'\n[axes]\nvms = [1]\n", "no spec file 'no.toml'"),
        ("base = 3\n[axes]\nvms = [1]\n", "base: must be a table"),
        ("[base]\nvmz = 3\n[axes]\nvms = [1]\n", "s.toml: base: no key 'vmz'"),
        ("[axes]\nseconds = [1]\ntransactions = [5]\n", "after seconds or after transactions"),
        ("name = 'a/b'\n[axes]\nvms = [1]\n", "usable as the name of a directory"),
        ("[axes]\nvms = [1, 1]\n", "names 1 twice"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_sweep(sweep_file(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_error_of_a_cell_names_the_cell(tmp_path: Path) -> None:
    text = "[axes]\npolicy = ['none', 'g-tpp']\nset.policy.active_filter = [true]\n"
    with pytest.raises(SpecError, match=r"the cell policy=none policy\.active_filter=True; `where` can leave it out"):
        load_sweep(sweep_file(tmp_path, text))
