"""A spec file as plain tables: TOML into dictionaries, nested ones into full keys. What they mean: `fleet.spec`."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fleet.errors import SpecError
from fleet.names import unknown


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a spec file. Raises SpecError."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        near = [entry.name for entry in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise SpecError(f"{path}: " + unknown("spec file", path.name, near)) from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not a text file in UTF-8") from None
    except RecursionError:
        raise SpecError(f"{path}: nested too deeply for a spec") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not valid TOML: {error}") from None


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """``{"policy": {"a": 1}}`` and ``{"policy.a": 1}`` alike."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
