"""The name of a kernel's cache: it changes with every source that the kernel's module can reach, and with no other."""

from pathlib import Path

import pytest

from fleet import kernel_locator
from guestd.meter import metered
from guestd.mm import nodes


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three modules: engine imports tlb, tlb imports units (in brackets); policy imports nobody."""
    monkeypatch.setattr(kernel_locator, "ROOT", tmp_path)
    for cached in (kernel_locator.stamp, kernel_locator._imported, kernel_locator._read):
        cached.cache_clear()
    package = tmp_path / "guestd"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "engine.py").write_text("import numpy as np\nfrom guestd.tlb import probe\n")
    (package / "tlb.py").write_text("from guestd import (\n    units,\n)\n\n\ndef probe(): ...\n")
    (package / "units.py").write_text("PAGE = 4096\n")
    (package / "policy.py").write_text("import guestd.engine.nothing as nothing\n")
    return package


def stamps(tree: Path) -> dict[str, str]:
    for cached in (kernel_locator.stamp, kernel_locator._imported, kernel_locator._read):
        cached.cache_clear()
    return {name: kernel_locator.stamp(tree / f"{name}.py") for name in ("engine", "tlb", "units", "policy")}


@pytest.mark.parametrize(
    ("edited", "changed"),
    [("units", {"units", "tlb", "engine"}), ("tlb", {"tlb", "engine"}), ("engine", {"engine"}), ("policy", {"policy"})],
)
def test_an_edit_reaches_those_who_import_it(tree: Path, edited: str, changed: set[str]) -> None:
    before = stamps(tree)
    path = tree / f"{edited}.py"
    source = path.read_text()
    path.write_text(source + "# edited\n")
    after = stamps(tree)
    assert {name for name in before if before[name] != after[name]} == changed
    path.write_text(source)
    assert stamps(tree) == before


def test_a_metered_kernel_belongs_to_the_module_of_its_work() -> None:
    timed = metered(nodes.isolate_tail)
    assert timed.__module__ == "guestd.mm.nodes"
    assert Path(timed.stats.cache_path).name.startswith("nodes-")  # type: ignore[attr-defined]
