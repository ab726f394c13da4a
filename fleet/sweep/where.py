"""Filters over the points of a sweep: expressions such as ``vms <= 4 or policy != 'h-tpp'``.

Python's syntax for comparisons, ``and``, ``or``, ``not``, ``in`` and the four operations on numbers, read with `ast`
and evaluated here, so that nothing else of the language is there. Names are axes by their full key. Text that is a
number, a size (bytes) or a time (seconds) counts as that: ``memory <= '4GiB'``.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from fleet.errors import SpecError
from fleet.names import unknown
from proto.errors import UnitError
from proto.units import PS_PER_S, parse_bytes, parse_time_ps

_MOST_DIGITS = 60
_EXPONENT = re.compile(r"e[+-]?\d{4,}$", re.IGNORECASE)
"""One that no number of a sweep has."""
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda item, items: item in items, ast.NotIn: lambda item, items: item not in items,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}  # fmt: skip


def holds(expression: str, point: Mapping[str, object], where: str) -> bool:
    """Whether the point passes. Raises SpecError, which ``where`` begins."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SpecError(f"{where}: {expression!r} is no expression such as \"vms <= 4 or policy != 'none'\"") from None
    try:
        return bool(_value(tree, point))
    except SpecError as error:
        raise SpecError(f"{where}: {expression!r}: {error}") from None
    except (TypeError, ValueError, ArithmeticError, RecursionError):
        shown = ", ".join(f"{key}={value}" for key, value in point.items())
        raise SpecError(f"{where}: {expression!r} makes no sense at {shown}") from None


def comparable(value: object) -> object:
    """An axis value as filters compare it: numbers, sizes (bytes) and times (s) as numbers, all else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    text = str(value).strip()
    try:
        # Fraction("1e99999999") would write all its digits.
        return Fraction(text) if len(text) <= _MOST_DIGITS and _EXPONENT.search(text) is None else value
    except (ValueError, ZeroDivisionError):
        pass
    for parse, unit in ((parse_bytes, 1), (parse_time_ps, PS_PER_S)):
        try:
            return Fraction(parse(text), unit)
        except UnitError:
            continue
    return value


def _value(node: ast.expr, point: Mapping[str, object]) -> Any:
    match node:
        case ast.Constant(value=value) if isinstance(value, bool | int | float | str):
            return comparable(value)
        case ast.Name() | ast.Attribute():
            key = _key(node)
            if key not in point:
                raise SpecError(unknown("axis", key, point))
            return comparable(point[key])
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, point) for item in items]
        case ast.BoolOp(op=kind, values=parts):
            judge = all if isinstance(kind, ast.And) else any
            return judge(_value(part, point) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not _value(part, point)
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return -_value(part, point)
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _ARITHMETIC:
            return _ARITHMETIC[type(kind)](_value(left, point), _value(right, point))
        case ast.Compare(left=left, ops=kinds, comparators=others) if all(type(kind) in _COMPARE for kind in kinds):
            values = [_value(part, point) for part in (left, *others)]
            return all(
                _COMPARE[type(kind)](a, b) for kind, a, b in zip(kinds, values, values[1:], strict=False)
            )  # fmt: skip
    raise SpecError("only axes, constants, comparisons, and/or/not, in, + - * / % can be used")


def _key(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{_key(value)}.{name}"
    raise SpecError("only axes can have a dot")
