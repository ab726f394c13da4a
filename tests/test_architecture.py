"""The arrows between the packages, read from the source of every module; and that the tests mirror the tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("proto", "guestd", "hostd", "fleet")

PURE_GUEST = ("guestd.mm", "guestd.tiering", "guestd.meter", "guestd.params", "guestd.jit", "guestd.events")
"""Libraries over a page view, which a host that runs Linux runs too, and what these stand on."""


MAY_IMPORT = {
    "proto": ("proto",),
    "guestd.mm": ("proto", *PURE_GUEST),
    "guestd.tiering": ("proto", *PURE_GUEST),
    "guestd.meter": ("proto", *PURE_GUEST),
    "guestd.params": ("proto", *PURE_GUEST),
    "guestd.jit": (),
    "guestd.events": ("proto",),
    "guestd": ("proto", "guestd"),
    "hostd": ("proto", "hostd", *PURE_GUEST),
    "fleet": PACKAGES,
}
"""For a module, the longest name here that it is or lies below says what it may import of ours."""

NO_IMPORT_AT_ALL = {
    "proto.trace": ("pyarrow",),
    "fleet.zygote": ("rich", "pyarrow", "matplotlib", "typer", "multiprocessing_logging"),
}
"""Libraries that must not come along with a module, also not through others (of ours): forked guests inherit it all."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def is_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def imports(module: str, at_import: bool = False) -> Iterator[str]:
    """Everything that a module imports, anywhere in it, or (``at_import``) only what importing it imports."""
    path = MODULES[module]
    yield from _imports(ast.parse(path.read_text(), str(path)), at_import)


def _imports(node: ast.AST, at_import: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if at_import and (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types(child)):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import; write the whole name"
            assert child.module is not None
            yield from (_target(child.module, alias.name) for alias in child.names)
        else:
            yield from _imports(child, at_import)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _target(module: str, name: str) -> str:
    """``from a import b``: the module a.b if there is one, else a."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def reached(module: str) -> set[str]:
    """All that importing a module imports, through our own modules and their packages."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            pending += imports(name, at_import=True)
        if "." in name:
            pending.append(name.rpartition(".")[0])
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module: str) -> None:
    rule = max((name for name in MAY_IMPORT if is_below(module, name)), key=len)
    ours = {name for name in imports(module) if name.split(".")[0] in PACKAGES}
    wrong = sorted(name for name in ours if not any(is_below(name, allowed) for allowed in MAY_IMPORT[rule]))
    assert not wrong, f"{module} may import {', '.join(MAY_IMPORT[rule])}"


@pytest.mark.parametrize("module", NO_IMPORT_AT_ALL)
def test_what_must_not_come_along(module: str) -> None:
    roots = {name.split(".")[0] for name in reached(module)}
    assert "proto" in roots
    assert not roots & set(NO_IMPORT_AT_ALL[module])


def test_the_rules_see_an_arrow_the_wrong_way() -> None:
    tree = ast.parse("def f():\n    from hostd import core\n    import fleet.cli as c\n")
    assert list(_imports(tree, at_import=False)) == [_target("hostd", "core"), "fleet.cli"]
    assert list(_imports(tree, at_import=True)) == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_begin_with_what_they_are(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text())), f"{module} has no docstring"


@pytest.mark.parametrize("test", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.stem)
def test_every_test_file_mirrors_a_module_or_package(test: Path) -> None:
    folder = test.relative_to(ROOT / "tests").parent
    if folder == Path():
        return  # about the project as a whole
    if folder.parts[0] not in PACKAGES:
        assert (ROOT / folder).is_dir()
        return
    mirrored = ROOT / folder / test.stem.removeprefix("test_")
    assert mirrored.with_suffix(".py").is_file() or mirrored.is_dir()


def test_files_stay_small() -> None:
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 450}
    assert not long
