"""The nearest valid name for a mistyped one: what every refusal of a name says."""

from collections.abc import Iterable
from difflib import get_close_matches

_LISTED = 12
_PREFIX = 3


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to ``name`` in spelling, ignoring case, ``-`` and ``_``; None if none is close.

    A name cut short stands for the shortest that it begins.
    """
    folded = {_fold(candidate): candidate for candidate in sorted(valid)}
    begun = [candidate for candidate in folded if len(name) >= _PREFIX and candidate.startswith(_fold(name))]
    close = sorted(begun, key=len) or get_close_matches(_fold(name), folded, n=1, cutoff=0.5)
    return folded[close[0]] if close else None


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """``no policy 'gtpp'; did you mean 'g-tpp'?``, or the list of valid names where none is near."""
    names = sorted(valid)
    close = nearest(name, names)
    if close is not None:
        return f"no {what} {name!r}; did you mean {close!r}?"
    if not names:
        return f"no {what} {name!r}; there is none to choose from"
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    return f"no {what} {name!r}; choose from {listed}"


def _fold(name: str) -> str:
    return name.lower().replace("_", "-")
