"""The generated pages say what the code says."""

import subprocess
import sys
from pathlib import Path

import pytest

from fleet import docs
from fleet.docs import FOLDER, pages, parameters_page, policies_page
from fleet.spec_params import ENGINE_PARAMS, GUEST_PARAMS, HOST_PARAMS
from guestd.params import Param
from guestd.tiering.policy import Policy
from guestd.tiering.registry import BUILT_IN


@pytest.mark.parametrize("name", pages())
def test_every_page_is_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == pages()[name], "run: python -m fleet.docs"


@pytest.mark.parametrize(
    ("space", "params"), [("engine", ENGINE_PARAMS), ("guest", GUEST_PARAMS), ("host", HOST_PARAMS)]
)
def test_every_space_has_a_section_with_all_its_parameters(space: str, params: tuple[Param, ...]) -> None:
    section = parameters_page().split(f"\n## {space}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [param.name for param in params]


@pytest.mark.parametrize("policy", BUILT_IN, ids=lambda policy: policy.name)
def test_every_policy_has_a_section_with_all_its_parameters(policy: Policy) -> None:
    section = policies_page().split(f"\n## {policy.name}\n")[1].split("\n## ")[0]
    assert policy.summary in section
    assert policy.source in section
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [param.name for param in policy.params]


def test_a_cell_never_breaks_its_table() -> None:
    param = Param("x", True, "", "either | or", "here")
    policy = Policy("p", "s", "guest", "src", {"tracker": "t"}, params=(param,))
    row = policies_page([policy]).splitlines()[-1]
    assert row == "| `x` | `true` |  | `true`, `false` | either \\| or | here |"


def test_the_script_writes_the_pages(tmp_path: Path) -> None:
    """In a copy of the module's surroundings, so that a test never writes into the tree."""
    (tmp_path / "docs").mkdir()
    source = Path(docs.__file__)
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "docs.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    root = source.parent.parent
    subprocess.run(
        [sys.executable, tmp_path / "fleet" / "docs.py"], check=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "docs").iterdir()} == pages()
