"""Every spec in examples/ resolves: runs as they are, sweeps at each point of their axes."""

import itertools
import tomllib
from pathlib import Path

import pytest

from fleet.spec import load

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SPECS = sorted(EXAMPLES.glob("*.toml"))
SWEEPS = [path for path in SPECS if "axes" in tomllib.loads(path.read_text())]


def points(path: Path) -> list[dict[str, object]]:
    """Values of the axes by key, settings as ``space.key``, of every point that ``where`` leaves."""
    data = tomllib.loads(path.read_text())
    axes = data["axes"]
    for space, table in axes.pop("set", {}).items():
        axes |= {f"{space}.{key}": values for key, values in table.items()}
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [point for point in found if eval(data.get("where", "True"), {}, dict(point))]


@pytest.mark.parametrize("path", [path for path in SPECS if path not in SWEEPS], ids=lambda path: path.stem)
def test_a_run_resolves(path: Path) -> None:
    assert load(path).name


@pytest.mark.parametrize("path", [path for path in SWEEPS if path.stem != "scalability"], ids=lambda path: path.stem)
def test_every_point_of_a_sweep_resolves(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    base = text[text.index("[base]") + len("[base]") : text.index("[axes]")]
    found = set()
    for number, point in enumerate(points(path)):
        spec = tmp_path / f"{number}.toml"
        keys = "".join(f'{key} = "{value}"\n' for key, value in point.items() if "." not in key)
        kept = "".join(line for line in base.splitlines(True) if line.partition(" =")[0] not in point)
        spec.write_text(keys + kept)
        found.add(load(spec, {}, [f"{key}={value}" for key, value in point.items() if "." in key]).digest)
    assert len(found) == number + 1 > 1


def test_the_readme_tells_of_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for path in SPECS:
        assert f"`{path.name}`" in readme
