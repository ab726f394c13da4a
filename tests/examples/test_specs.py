"""Every spec in examples/ resolves: runs as they are, sweeps at each point of their axes."""

import re
import tomllib
from pathlib import Path

import pytest

from fleet.errors import SpecError
from fleet.spec import load
from fleet.sweep.spec import load_sweep

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SPECS = sorted(EXAMPLES.glob("*.toml"))
SWEEPS = [path for path in SPECS if "axes" in tomllib.loads(path.read_text())]


@pytest.mark.parametrize("path", [path for path in SPECS if path not in SWEEPS], ids=lambda path: path.stem)
def test_a_run_resolves(path: Path) -> None:
    assert load(path).name


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_a_sweep_resolves(path: Path) -> None:
    points = load_sweep(path).points
    assert len({point.hash for point in points}) == len(points) > 1


def test_the_readme_tells_of_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for path in SPECS:
        assert f"`{path.name}`" in readme


ROOT = EXAMPLES.parent
COMMAND = re.compile(r"fleet (run|sweep|sensitivity) (examples/\S+\.toml)")
NAMED = {match.groups() for folder in ("fleet", "docs", "examples") for path in (ROOT / folder).rglob("*")
         if path.suffix in (".py", ".md", ".toml") for match in COMMAND.finditer(path.read_text())}  # fmt: skip


@pytest.mark.parametrize(("command", "path"), sorted(NAMED))
def test_what_help_and_pages_name_is_of_the_kind_that_the_command_takes(command: str, path: str) -> None:
    assert (ROOT / path).is_file()
    assert (ROOT / path in SWEEPS) == (command == "sweep")


def test_a_sweep_that_is_run_as_a_run_is_told_how() -> None:
    with pytest.raises(SpecError, match="so it is a sweep: fleet sweep"):
        load(SWEEPS[0])
